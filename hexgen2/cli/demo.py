"""``hexgen2 demo``: a fleet, one question over gRPC and one over HTTP, what they took, one trace, a clean stop."""

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from hexgen2.cli.fleet import Fleet
from hexgen2.cli.fleet_config import FleetConfig
from hexgen2.cli.generate import answer
from hexgen2.cli.up import make_console, running
from hexgen2.errors import EngineFailed, HexgenError, TraceNotFound, Unavailable
from hexgen2.security.tls_context import peer_context
from hexgen2.trace_tree import draw
from hexgen2.traces import Trace, find
from hexgen2.v1 import gateway_pb2

QUESTION = "What is the capital of France?"
EXPECTED = "Paris"
MAX_TOKENS = 32
TIMEOUT_S = 60.0

#: Processes write their spans twice a second.
TRACE_TIMEOUT_S = 5.0
TRACE_LOOK_S = 0.25


class DemoFailed(HexgenError):
    """The demo was stopped, or its answer is not the expected one."""


@dataclass(frozen=True, slots=True)
class Figures:
    """What one answer took. ``kv`` holds the attributes of its hand-off; empty when nothing was handed over."""

    text: str
    prompt_tokens: int
    output_tokens: int
    ttft_s: float
    tpot_s: float
    kv_bytes: int
    transport: str
    codec: str
    trace_id: str


def demo(config: FleetConfig) -> None:
    """The command. Raises HexgenError when anything in it does not work, also when the answer is wrong."""
    asyncio.run(_demo(config, make_console()))


async def _demo(config: FleetConfig, console: Console) -> None:
    async with running(config, console) as fleet:
        if fleet is not None:
            await fleet.unless_stopped(_show(fleet, console))
        if fleet is None or fleet.stopping.is_set():
            raise DemoFailed("stopped before its end")


async def _show(fleet: Fleet, console: Console) -> None:
    console.print(f"\n[bold]{QUESTION}[/]\n")
    async with asyncio.timeout(2 * TIMEOUT_S):
        console.print("[cyan]gRPC[/]  ", end="")
        by_grpc = await _ask_grpc(fleet)
        console.print("[cyan]HTTP[/]  ", end="")
        by_http = await _ask_http(fleet)
    console.print()
    console.print(_table(by_grpc, by_http))
    if by_grpc.trace_id and (trace := await _trace(by_grpc.trace_id)):
        console.print("\nThe request over gRPC, as [bold]hexgen2 trace[/] shows it:\n")
        console.print(draw(trace))
    console.print()
    if fleet.config.engine.kind == "vllm":
        for figures in (by_grpc, by_http):
            if EXPECTED not in figures.text:
                raise DemoFailed(f"the answer {figures.text!r} lacks {EXPECTED!r}")


async def _ask_grpc(fleet: Fleet) -> Figures:
    request = gateway_pb2.GenerateRequest()
    request.chat.messages.add(role="user", content=QUESTION)
    request.sampling.temperature = 0.0
    request.sampling.max_tokens = MAX_TOKENS
    made = await answer(fleet.grpc_address, request, TIMEOUT_S, sys.stdout, fleet.access)
    print(flush=True)
    usage, timing = made.last.usage, made.last.timing
    return Figures(
        text=made.text,
        prompt_tokens=usage.prompt_tokens,
        output_tokens=usage.completion_tokens,
        ttft_s=timing.ttft_s,
        tpot_s=timing.tpot_s,
        kv_bytes=timing.kv.bytes,
        transport=timing.kv.transport,
        codec=timing.kv.codec,
        trace_id=timing.trace_id,
    )


async def _ask_http(fleet: Fleet) -> Figures:
    """The same by OpenAI's chat completions, timed here; what was handed over is in its trace alone."""
    body = {
        "model": "",
        "messages": [{"role": "user", "content": QUESTION}],
        "temperature": 0,
        "max_tokens": MAX_TOKENS,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    parts: list[str] = []
    usage: dict[str, int] = {}
    first = last = None
    tls = fleet.access.tls
    async with httpx.AsyncClient(
        base_url=f"{fleet.http_url}/v1",
        timeout=TIMEOUT_S,
        trust_env=False,
        verify=peer_context(tls, server=False) if tls else True,
    ) as http:
        body["model"] = (await http.get("models")).raise_for_status().json()["data"][0]["id"]
        start = time.monotonic()
        async with http.stream("POST", "chat/completions", json=body) as response:
            if response.is_error:
                raise Unavailable(f"HTTP {response.status_code}: {(await response.aread()).decode(errors='replace')}")
            trace_id = response.headers.get("x-trace-id", "")
            async for event in _events(response):
                usage = event.get("usage") or usage
                for choice in event.get("choices", ()):
                    if text := choice["delta"].get("content"):
                        last = time.monotonic()
                        first = first or last
                        parts.append(text)
                        print(text, end="", flush=True)
    print(flush=True)
    if first is None or last is None or not usage:
        raise EngineFailed("the answer over HTTP came without text or usage")
    trace = await _trace(trace_id) if trace_id else None
    kv = next((span.attributes for span in trace.spans if "hexgen2.kv.bytes" in span.attributes), {}) if trace else {}
    return Figures(
        text="".join(parts),
        prompt_tokens=usage["prompt_tokens"],
        output_tokens=usage["completion_tokens"],
        ttft_s=first - start,
        tpot_s=(last - first) / max(1, usage["completion_tokens"] - 1),
        kv_bytes=int(kv.get("hexgen2.kv.bytes", 0)),
        transport=str(kv.get("hexgen2.kv.transport", "")),
        codec=str(kv.get("hexgen2.kv.codec", "")),
        trace_id=trace_id,
    )


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """Server-sent events until ``[DONE]``."""
    async for line in response.aiter_lines():
        if not line.startswith("data: "):
            continue
        if line == "data: [DONE]":
            return
        event = json.loads(line.removeprefix("data: "))
        if "error" in event:
            raise EngineFailed(str(event["error"].get("message", event["error"])))
        yield event
    raise EngineFailed("the answer over HTTP ended without [DONE]")


def _table(by_grpc: Figures, by_http: Figures) -> Table:
    table = Table("", "gRPC", "HTTP", box=None, padding=(0, 3, 0, 0))
    both = (by_grpc, by_http)

    def row(name: str, cells: list[str]) -> None:
        table.add_row(f"[bold]{name}", *(cell or "—" for cell in cells))

    row("tokens", [f"{each.prompt_tokens} in, {each.output_tokens} out" for each in both])
    row("TTFT", [f"{each.ttft_s * 1e3:.0f} ms" for each in both])
    row("TPOT", [f"{each.tpot_s * 1e3:.1f} ms" for each in both])
    row("KV moved", [f"{decimal(each.kv_bytes)} ({each.kv_bytes:,} bytes)" if each.kv_bytes else "" for each in both])
    row("transport", [each.transport for each in both])
    row("codec", [each.codec for each in both])
    return table


async def _trace(trace_id: str) -> Trace | None:
    """The whole trace, once every process has written its part; what there is of it after a while; None if nothing."""
    deadline = time.monotonic() + TRACE_TIMEOUT_S
    found = None
    while time.monotonic() < deadline:
        try:
            found = find(trace_id)
        except TraceNotFound:
            found = None
        if found and len(found.roots()) == 1 and found.roots()[0].span.service == "hexgen2-gateway":
            return found
        await asyncio.sleep(TRACE_LOOK_S)
    return found
