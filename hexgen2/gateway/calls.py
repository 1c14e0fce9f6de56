"""The two calls of an attempt: each read by an owned task that turns messages into ``life`` events."""

import asyncio
from collections.abc import AsyncIterable, Callable
from types import TracebackType
from typing import Any, Protocol

import grpc

from hexgen2.errors import HexgenError, InvalidRequest, Unavailable
from hexgen2.gateway.job import KvMoved
from hexgen2.gateway.life import Ended, Event, FirstToken, KvVerified, Side, Tokens
from hexgen2.gateway.peers import OpenCall, Peers
from hexgen2.rpc.client import to_error
from hexgen2.rpc.convert import finish_from_proto, token_from_proto
from hexgen2.v1 import decode_pb2, prefill_pb2

#: Messages read ahead of a slow client; then flow control holds the worker back.
_QUEUE_MESSAGES = 16


class Call(AsyncIterable[Any], Protocol):
    """What is used of a gRPC call."""

    def cancel(self) -> bool:
        """End it."""


class Calls:
    """``events`` of both calls, in order per call. Leaving the block ends every call."""

    def __init__(self, peers: Peers) -> None:
        self._peers = peers
        self._group = asyncio.TaskGroup()
        self._tasks: dict[Side, asyncio.Task[None]] = {}
        self.events: asyncio.Queue[Event] = asyncio.Queue(_QUEUE_MESSAGES)

    def open(self, side: Side, address: str, start: Callable[[grpc.aio.Channel], Call]) -> None:
        """Start a call; the one of that side before it must be closed."""
        self._tasks[side] = self._group.create_task(self._read(side, address, start))

    async def close(self, side: Side) -> None:
        """Cancel the call of that side, if it still runs."""
        task = self._tasks.pop(side, None)
        if task is not None:
            task.cancel()
            await asyncio.wait((task,))

    async def __aenter__(self) -> "Calls":
        await self._group.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks.values():
            task.cancel()
        # Each cancels its call before it ends; nothing here waits for a peer.
        await self._group.__aexit__(kind, error, trace)

    async def _read(self, side: Side, address: str, start: Callable[[grpc.aio.Channel], Call]) -> None:
        with self._peers.use(address) as channel:
            call = start(channel)
            with self._peers.follow(address, call) as followed:
                failure = await self._queue_events(side, call, followed)
        await self.events.put(Ended(side, failure))

    async def _queue_events(self, side: Side, call: Call, followed: OpenCall) -> HexgenError | None:
        """Until the call ends; why it failed, if it did."""
        try:
            async for message in call:
                followed.heard()
                event = _event(message)
                if event is not None:
                    await self.events.put(event)
        except grpc.aio.AioRpcError as error:
            return to_error(error)
        except InvalidRequest as error:
            return Unavailable(f"{side} sent what cannot be understood: {error}")
        except asyncio.CancelledError:
            # Of the call, not of this task, when it was we who gave a lost worker up.
            task = asyncio.current_task()
            if not followed.lost or (task is not None and task.cancelling()):
                raise
            return Unavailable(f"the {side} replica was lost")
        finally:
            call.cancel()
        return None


def _event(message: prefill_pb2.PrefillResponse | decode_pb2.DecodeResponse) -> Event | None:
    """None for messages that decide nothing."""
    if isinstance(message, prefill_pb2.PrefillResponse):
        if not message.HasField("first_token"):
            return None
        first = message.first_token
        return FirstToken(token_from_proto(first.token), finish_from_proto(first.finish_reason), first.cached_tokens)
    if message.HasField("kv_verified"):
        kv = message.kv_verified.summary
        return KvVerified(KvMoved(kv.bytes, kv.pieces, kv.transport, kv.codec, kv.seconds))
    if not message.HasField("tokens"):
        return None
    tokens = message.tokens
    return Tokens(
        tuple(token_from_proto(token) for token in tokens.tokens),
        finish_from_proto(tokens.finish_reason),
        tokens.cached_tokens,
    )
