"""Requests without end to the gateways of a fleet, until SIGTERM: every answer checked, every failure told.

    python -m benchmarks.rack.load --model M --tls RACK/certs/a-admin --gateway https://10.0.0.1:8000 --gateway ...:8000

A client has a list of gateways, as behind a load balancer: one that does not answer, or says that it is draining
(503), is passed over for the next. A request fails when none answers it, when its answer ends early, or when it differs
from the first answer to the same prompt. Exit status 1 when one failed.
"""

import argparse
import asyncio
import json
import signal
import ssl
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

TOKENS = 48
#: For one request, over all gateways.
LIMIT_S = 60.0
PROMPTS = tuple(f"Tell me {number} things about the number {number}, and why. " * 8 for number in range(1, 9))


@dataclass(slots=True)
class Tally:
    """What came of the requests so far."""

    answered: Counter[str] = field(default_factory=Counter)
    passed_over: Counter[str] = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)
    slowest_s: float = 0.0
    first_answers: dict[str, str] = field(default_factory=dict)
    #: Set when each prompt has been answered once.
    known: asyncio.Event = field(default_factory=asyncio.Event)


async def ask(client: httpx.AsyncClient, gateway: str, model: str, prompt: str) -> str:
    """The whole answer. Raises httpx.HTTPError for one that broke off, ValueError for one that ended early."""
    body = {"model": model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "stream": True}
    # A draining gateway closes its connections; the next request must not go to one of those.
    async with client.stream("POST", f"{gateway}/v1/completions", json=body | {"ignore_eos": True}) as response:
        if response.status_code != 200:
            await response.aread()
            response.raise_for_status()
        text, finish, done = "", None, False
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                done = True
            elif line.startswith("data: "):
                event = json.loads(line[6:])
                if "error" in event:
                    raise ValueError(f"{gateway}: {event['error']}")
                for choice in event["choices"]:
                    text += choice["text"]
                    finish = choice["finish_reason"] or finish
    if not done or finish != "length":
        raise ValueError(f"{gateway}: the answer ended early ({finish}, {len(text)} characters)")
    return text


async def one(client: httpx.AsyncClient, gateways: Sequence[str], model: str, number: int, tally: Tally) -> None:
    """One request, at whichever gateway takes it."""
    prompt, began = PROMPTS[number % len(PROMPTS)], time.monotonic()
    for attempt in range(len(gateways) * 2):
        gateway = gateways[(number + attempt) % len(gateways)]
        try:
            text = await ask(client, gateway, model, prompt)
        except httpx.ConnectError:
            tally.passed_over[f"{gateway} not there"] += 1
            continue
        except httpx.HTTPStatusError as error:
            if error.response.status_code != 503:
                tally.failed.append(f"{gateway}: {error.response.status_code} {error.response.text[:200]}")
                return
            tally.passed_over[f"{gateway} 503"] += 1
            continue
        except (httpx.HTTPError, ValueError, json.JSONDecodeError) as error:
            tally.failed.append(f"{gateway}: {type(error).__name__}: {error}")
            return
        tally.answered[gateway] += 1
        tally.slowest_s = max(tally.slowest_s, time.monotonic() - began)
        if tally.first_answers.setdefault(prompt, text) != text:
            tally.failed.append(f"{gateway}: another answer than before to prompt {number % len(PROMPTS)}")
        if len(tally.first_answers) == len(PROMPTS):
            tally.known.set()
        return
    tally.failed.append(f"request {number}: no gateway took it")


async def run(
    gateways: Sequence[str], model: str, tls: Path | None, clients: int, tally: Tally, stop: asyncio.Event
) -> None:
    """``clients`` requests at a time until ``stop``; those under way then are waited for."""
    verify: ssl.SSLContext | bool = True
    if tls is not None:
        verify = ssl.create_default_context(cafile=str(tls / "ca.pem"))
        verify.load_cert_chain(tls / "cert.pem", tls / "key.pem")
    numbers = iter(range(1 << 62))
    limits = httpx.Limits(max_keepalive_connections=0)
    async with httpx.AsyncClient(verify=verify, timeout=LIMIT_S, limits=limits, trust_env=False) as client:

        async def repeat() -> None:
            while not stop.is_set():
                await one(client, gateways, model, next(numbers), tally)

        async with asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(repeat())


@asynccontextmanager
async def loading(gateways: Sequence[str], model: str, tls: Path | None, clients: int) -> AsyncIterator[Tally]:
    """``run`` while the context lasts."""
    tally, stop = Tally(), asyncio.Event()
    task = asyncio.create_task(run(gateways, model, tls, clients, tally, stop))
    try:
        yield tally
    finally:
        stop.set()
        await task


async def until_signal(gateways: Sequence[str], model: str, tls: Path | None, clients: int) -> Tally:
    """``run`` until SIGTERM or SIGINT."""
    tally, stop = Tally(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for each in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(each, stop.set)
    await run(gateways, model, tls, clients, tally, stop)
    return tally


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--gateway", action="append", required=True, help="URL; repeat it for each")
    parser.add_argument("--model", required=True, help="as it is served")
    parser.add_argument("--tls", type=Path, help="folder with ca.pem, cert.pem and key.pem of a client")
    parser.add_argument("--clients", type=int, default=4)
    given = parser.parse_args()
    tally = asyncio.run(until_signal(given.gateway, given.model, given.tls, given.clients))
    print(f"answered {sum(tally.answered.values())} ({dict(tally.answered)}), slowest {tally.slowest_s:.2f} s")
    print(f"passed over {dict(tally.passed_over)}")
    print(f"failed {len(tally.failed)}", *tally.failed[:20], sep="\n  ")
    raise SystemExit(1 if tally.failed or not tally.answered else 0)


if __name__ == "__main__":
    main()
