"""``hexgen2 status --watch``: redrawn in place on a terminal, printed again and again elsewhere, until Ctrl-C.

A coordinator that is away is waited for: what it said last stays, under a line that says since when.
"""

import asyncio
import json
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from hexgen2.cli.status import as_dict, overview
from hexgen2.errors import DeadlineExceeded, Unavailable
from hexgen2.v1.coordinator_pb2 import GetPlanResponse

#: Asks the coordinator once.
Look = Callable[[], Awaitable[GetPlanResponse]]


@dataclass(frozen=True, slots=True)
class Seen:
    """What was heard last; and since when (seconds since 1970) and why nothing is heard any more."""

    answer: GetPlanResponse | None = None
    away_since_s: float | None = None
    why: str = ""

    def missed(self, now_s: float, why: str) -> "Seen":
        """The coordinator did not answer."""
        return Seen(self.answer, now_s if self.away_since_s is None else self.away_since_s, why)


def drawn(seen: Seen, now_s: float) -> Group:
    """What is on the screen."""
    if seen.away_since_s is None:
        line = Text(f"{_clock(now_s)}  Ctrl-C ends it", style="dim")
    else:
        line = Text(
            f"{_clock(now_s)}  coordinator away since {_clock(seen.away_since_s)}: {seen.why}", style="bold red"
        )
    return Group(line, "", *([overview(seen.answer)] if seen.answer is not None else []))


def told(seen: Seen, now_s: float) -> str:
    """The same for programs: one line."""
    if seen.answer is None or seen.away_since_s is not None:
        return json.dumps({"unix_time_s": now_s, "away_since_s": seen.away_since_s, "why": seen.why})
    return json.dumps({"unix_time_s": now_s} | as_dict(seen.answer))


async def watch_status(look: Look, console: Console, interval_s: float, *, as_json: bool) -> None:
    """The command. Raises HexgenError for what waiting does not mend."""
    with _interrupted() as stop, _screen(console, as_json) as show:
        seen = Seen()
        while not stop.is_set():
            try:
                seen = Seen(await look())
            except (Unavailable, DeadlineExceeded) as error:
                seen = seen.missed(time.time(), str(error))
            show(seen)
            with suppress(TimeoutError):
                async with asyncio.timeout(interval_s):
                    await stop.wait()


@contextmanager
def _interrupted() -> Iterator[asyncio.Event]:
    """Set by SIGINT and SIGTERM, for the length of a block."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    try:
        yield stop
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


@contextmanager
def _screen(console: Console, as_json: bool) -> Iterator[Callable[[Seen], None]]:
    """What shows a state: JSON lines, a screen of its own that is gone afterwards, or else plain text."""
    if as_json:
        yield lambda seen: print(told(seen, time.time()), flush=True)
    elif not console.is_terminal:
        yield lambda seen: console.print(drawn(seen, time.time()), highlight=False)
    else:
        with Live(
            console=console, screen=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
        ) as live:
            yield lambda seen: live.update(drawn(seen, time.time()), refresh=True)


def _clock(unix_s: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(unix_s))
