"""Channels to workers: one per address, kept while the plan names it or a call uses it."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import grpc

from hexgen2.rpc.client import channel
from hexgen2.tls import TlsFiles


class Peers:
    """Owns the channels. ``wanted`` gives the addresses worth keeping a channel for when no call uses it."""

    def __init__(self, wanted: Callable[[], frozenset[str]], tls: TlsFiles | None = None) -> None:
        self._wanted = wanted
        self._tls = tls
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._uses: Counter[str] = Counter()

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
