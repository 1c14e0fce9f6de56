"""Channels to workers: one per address, kept while the plan names it or a call uses it; and the calls on them.

A worker that was stopped, or whose link fell silent, says nothing: gRPC needs half a minute to find out. The
coordinator needs seconds, so calls to a worker that it has lost, and that are silent too, are ended here. Until then
they would hold memory at workers that are well.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Protocol

import grpc

from hexgen2.rpc.client import channel
from hexgen2.security.tls import TlsFiles

#: A call to a lost worker goes on while something came so recently: it may be the coordinator that cannot reach it.
SILENT_S = 3.0


class Endable(Protocol):
    """What is used of a gRPC call."""

    def cancel(self) -> bool:
        """End it."""


class OpenCall:
    """One call to a worker. ``lost``: it was ended because the worker is."""

    def __init__(self, call: Endable) -> None:
        self.lost = False
        self._call = call
        self._heard_s = monotonic()

    def heard(self) -> None:
        """A message has come."""
        self._heard_s = monotonic()

    def end_if_silent(self) -> None:
        """End it unless something came within ``SILENT_S``."""
        if monotonic() - self._heard_s >= SILENT_S:
            self.lost = True
            self._call.cancel()


class Peers:
    """Owns the channels. ``wanted`` gives the addresses worth keeping a channel for when no call uses it."""

    def __init__(self, wanted: Callable[[], frozenset[str]], tls: TlsFiles | None = None) -> None:
        self._wanted = wanted
        self._tls = tls
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._uses: Counter[str] = Counter()
        self._calls: dict[str, set[OpenCall]] = {}

    @contextmanager
    def follow(self, address: str, call: Endable) -> Iterator[OpenCall]:
        """For as long as the messages of a call to that address are read."""
        made = OpenCall(call)
        self._calls.setdefault(address, set()).add(made)
        try:
            yield made
        finally:
            self._calls[address].discard(made)
            if not self._calls[address]:
                del self._calls[address]

    def end_silent(self, addresses: Iterable[str]) -> bool:
        """End the silent calls to lost workers; whether others to them go on, so that this must be done again."""
        calls = [call for address in addresses for call in self._calls.get(address, ())]
        for call in calls:
            call.end_if_silent()
        return any(not call.lost for call in calls)

    @contextmanager
    def use(self, address: str) -> Iterator[grpc.aio.Channel]:
        """The channel to ``host:port`` for the length of a call."""
        if address not in self._channels:
            self._channels[address] = channel(address, self._tls)
        self._uses[address] += 1
        try:
            yield self._channels[address]
        finally:
            self._uses[address] -= 1

    async def prune(self) -> None:
        """Close channels that are neither used nor wanted: replicas come and go, each on a port of its own."""
        wanted = self._wanted()
        idle = [each for each in self._channels if each not in wanted and not self._uses[each]]
        channels = [self._channels.pop(each) for each in idle]
        for address in idle:
            del self._uses[address]
        for each in channels:
            await each.close()

    async def close(self) -> None:
        """Close all, ending the calls that use them. Idempotent."""
        channels = list(self._channels.values())
        self._channels.clear()
        for each in channels:
            await each.close()
