"""``hexgen2 generate``: one question to a gateway; the answer is printed as it is made, its figures after it."""

import json
import sys
from typing import Any, TextIO

from google.protobuf.json_format import MessageToDict
from rich.filesize import decimal

from hexgen2.cli.client import ANONYMOUS, Access, generate
from hexgen2.errors import EngineFailed
from hexgen2.v1 import gateway_pb2, types_pb2


async def answer(
    address: str, request: gateway_pb2.GenerateRequest, timeout_s: float, out: TextIO, access: Access = ANONYMOUS
) -> "Answer":
    """Ask, and write text to ``out`` as it comes. Raises HexgenError."""
    parts: list[str] = []
    last = gateway_pb2.GenerateResponse()
    async for message in generate(address, request, timeout_s, access):
        parts.append(message.text)
        out.write(message.text)
        out.flush()
        last = message
    if last.finish_reason == types_pb2.FINISH_REASON_UNSPECIFIED:
        raise EngineFailed("the answer ended without a reason")
    return Answer("".join(parts), last)


class Answer:
    """A whole answer and its last message, which has usage and timing."""

    def __init__(self, text: str, last: gateway_pb2.GenerateResponse) -> None:
        self.text = text
        self.last = last

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        usage, timing = (
            MessageToDict(part, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
            for part in (self.last.usage, self.last.timing)
        )
        reason = types_pb2.FinishReason.Name(self.last.finish_reason).removeprefix("FINISH_REASON_").lower()
        return {
            "request_id": self.last.request_id,
            "text": self.text,
            "finish_reason": reason,
            "usage": usage,
            "timing": timing,
        }

    def figures(self) -> str:
        """One line: how long it took, what was moved, where it went."""
        usage, timing = self.last.usage, self.last.timing
        parts = [
            f"{usage.prompt_tokens} + {usage.completion_tokens} tokens",
            f"TTFT {timing.ttft_s * 1e3:.0f} ms",
            f"TPOT {timing.tpot_s * 1e3:.1f} ms",
        ]
        if timing.HasField("kv"):
            parts.append(f"KV {decimal(timing.kv.bytes)} by {timing.kv.transport}, codec {timing.kv.codec}")
        route = " → ".join(filter(None, (timing.prefill_replica_id, timing.decode_replica_id)))
        return " · ".join(filter(None, (*parts, route, f"trace {timing.trace_id}" if timing.trace_id else "")))


async def ask(
    address: str, request: gateway_pb2.GenerateRequest, timeout_s: float, access: Access, *, as_json: bool
) -> None:
    """The command: text to stdout and figures to stderr, or one JSON object to stdout."""
    if as_json:
        with open("/dev/null", "w", encoding="utf-8") as nowhere:  # noqa: ASYNC230 - never blocks
            made = await answer(address, request, timeout_s, nowhere, access)
        print(json.dumps(made.as_dict(), indent=2, ensure_ascii=False))
        return
    made = await answer(address, request, timeout_s, sys.stdout, access)
    print(flush=True)
    print(f"[{made.figures()}]", file=sys.stderr)
