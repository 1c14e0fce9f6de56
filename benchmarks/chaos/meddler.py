"""Messages that no gateway and no worker of ours would send: stale, repeated, forged, cut short, garbage.

Sent to the workers themselves while the fleet serves. What counts is what must never happen: an answer with a wrong
token, KV served without its token, or a worker that holds memory for it afterwards.
"""

import asyncio
import secrets
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from random import Random
from typing import Any

import grpc

from benchmarks.chaos.house import House, Member
from benchmarks.chaos.oracle import Known, wrong_tokens
from hexgen2.kv import tcp_wire
from hexgen2.kv.transport import Span, TransportError
from hexgen2.rpc.client import channel
from hexgen2.v1 import decode_pb2, decode_pb2_grpc, prefill_pb2, prefill_pb2_grpc, types_pb2

TIMEOUT_S = 8.0
_MAX_TOKENS = 6
#: Between two tricks.
PAUSE_S = 0.25

Trick = Callable[["Meddler", Member, Member, Known], Awaitable[None]]


class Meddler:
    """``counts`` by (trick, status); ``wrong`` what must not be."""

    def __init__(self, house: House, known: Sequence[Known], seed: int) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        self.wrong: list[str] = []
        self._house = house
        self._known = known
        self._random = Random(f"meddler/{seed}")
        self._channels: dict[str, grpc.aio.Channel] = {}

    async def run(self) -> None:
        """Until cancelled."""
        tricks = list(_TRICKS)
        try:
            while True:
                for trick in self._random.sample(tricks, len(tricks)):
                    prefill = self._random.choice(self._house.of("prefill"))
                    decode = self._random.choice(self._house.of("decode"))
                    await trick(self, prefill, decode, self._random.choice(self._known))
                    await asyncio.sleep(PAUSE_S)
        finally:
            for each in self._channels.values():
                await each.close()

    async def fetches_that_are_forged_or_stale(self, prefill: Member, decode: Member, known: Known) -> None:
        """FetchKv with another token while the transfer lives, and with its own once it is over."""
        transfer = _transfer()
        call = self._prefill(prefill, transfer, known)
        try:
            if not await self._first(call, "first_token"):
                self._note("prefill", await _end(call))
                return
            forged = types_pb2.Transfer(transfer_id=transfer.transfer_id, token=secrets.token_bytes(32))
            await self._refused("forged token", self._fetch(prefill, forged))
        finally:
            call.cancel()
        await self._refused("used-up token", self._fetch(prefill, transfer))

    async def fetches_that_are_repeated_and_dropped(self, prefill: Member, decode: Member, known: Known) -> None:
        """The holder of the token may fetch as often as it likes, and leave in the middle."""
        transfer = _transfer()
        call = self._prefill(prefill, transfer, known)
        try:
            fetches = [self._fetch(prefill, transfer) for _ in range(3)]
            for fetch in fetches:
                await self._first(fetch, "header")
                fetch.cancel()
            self._note("repeated and dropped", await _end(fetches[-1]))
        finally:
            call.cancel()

    async def a_prefill_that_is_repeated(self, prefill: Member, decode: Member, known: Known) -> None:
        """The same transfer a second time while the first is under way, by one who has another token."""
        transfer = _transfer()
        call = self._prefill(prefill, transfer, known)
        try:
            if await self._first(call, "admitted"):
                again = types_pb2.Transfer(transfer_id=transfer.transfer_id, token=secrets.token_bytes(32))
                await self._refused("repeated Prefill", self._prefill(prefill, again, known))
        finally:
            call.cancel()

    async def a_decode_that_is_repeated(self, prefill: Member, decode: Member, known: Known) -> None:
        """Two Decode calls for one transfer, at once, at the same or at two replicas: each right or refused."""
        transfer = _transfer()
        call = self._prefill(prefill, transfer, known)
        others = self._house.of("decode")
        try:
            calls = [self._decode(each, prefill, transfer, known) for each in (decode, self._random.choice(others))]
            for answer in await asyncio.gather(*(self._answer(each, known) for each in calls)):
                self._note("repeated Decode", answer)
        finally:
            call.cancel()

    async def a_decode_of_another_prompt(self, prefill: Member, decode: Member, known: Known) -> None:
        """The right token, but another prompt of the same length: what HTTP 200 with foreign tokens is made of."""
        if len(known.prompt) < 2:
            return
        transfer = _transfer()
        call = self._prefill(prefill, transfer, known)
        other = Known((*known.prompt[:-1], known.prompt[-1] ^ 1), known.answer)
        try:
            await self._refused("Decode of another prompt", self._decode(decode, prefill, transfer, other))
        finally:
            call.cancel()

    async def a_decode_after_the_end(self, prefill: Member, decode: Member, known: Known) -> None:
        """The Decode of a transfer whose Prefill is over, as when messages overtake each other."""
        transfer = _transfer()
        call = self._prefill(prefill, transfer, known)
        await self._first(call, "admitted")
        call.cancel()
        await self._refused("stale Decode", self._decode(decode, prefill, transfer, known))

    async def garbage_on_the_data_plane(self, prefill: Member, decode: Member, known: Known) -> None:
        """Strangers on the port that KV leaves from: noise, a wrong nonce, absurd and half requests, no reading."""
        transfer = _transfer()
        call = self._prefill(prefill, transfer, known)
        try:
            fetch = self._fetch(prefill, transfer)
            header = await self._first(fetch, "header")
            fetch.cancel()
            if header is None:
                return
            try:
                endpoint = tcp_wire.Endpoint.unpack(header.header.ranks[0].endpoints[0])
            except TransportError:
                return  # another transport
        finally:
            call.cancel()
        hello = tcp_wire.pack_hello(endpoint.nonce)
        beyond = tcp_wire.pack_request(1, [Span(endpoint.num_bytes - 1, 0, 4096)])
        all_of_it = tcp_wire.pack_request(2, [Span(0, 0, endpoint.num_bytes)])
        for what in (
            self._random.randbytes(self._random.choice((1, 40, 5000))),
            tcp_wire.pack_hello(secrets.token_bytes(tcp_wire.NONCE_BYTES)) + all_of_it,
            hello + tcp_wire.REQUEST.pack(1, 0xFFFFFFFF),
            hello + beyond,
            hello + beyond[:-3],
            hello + all_of_it * 50,
        ):
            served = await self._pour(endpoint, what)
            self._note("garbage on the data port", "answered" if served else "hung up on")
            if served > tcp_wire.ANSWER.size + tcp_wire.MAX_REFUSAL_BYTES and not what.startswith(hello):
                self.wrong.append(f"{prefill.name} served {served} bytes to a stranger on its data port")

    async def _pour(self, endpoint: tcp_wire.Endpoint, what: bytes) -> int:
        """Send and read a little; how many bytes came back."""
        served = 0
        with suppress(OSError, TimeoutError):
            async with asyncio.timeout(1.0):
                reader, writer = await asyncio.open_connection(endpoint.host, endpoint.port)
                try:
                    writer.write(what)
                    await writer.drain()
                    served = len(await reader.read(4096))
                finally:
                    writer.transport.abort()
        return served

    def _stub(self, member: Member) -> grpc.aio.Channel:
        if member.address not in self._channels:
            self._channels[member.address] = channel(member.address)
        return self._channels[member.address]

    def _prefill(self, member: Member, transfer: types_pb2.Transfer, known: Known) -> Any:
        request = prefill_pb2.PrefillRequest(
            request_id=f"meddler-{secrets.token_hex(4)}",
            transfer=transfer,
            prompt_token_ids=known.prompt,
            sampling=_sampling(),
            hand_over=True,
        )
        return prefill_pb2_grpc.PrefillStub(self._stub(member)).Prefill(request, timeout=TIMEOUT_S)

    def _fetch(self, member: Member, transfer: types_pb2.Transfer) -> Any:
        request = prefill_pb2.FetchKvRequest(transfer_id=transfer.transfer_id, token=transfer.token)
        return prefill_pb2_grpc.PrefillStub(self._stub(member)).FetchKv(request, timeout=TIMEOUT_S)

    def _decode(self, member: Member, prefill: Member, transfer: types_pb2.Transfer, known: Known) -> Any:
        request = decode_pb2.DecodeRequest(
            request_id=f"meddler-{secrets.token_hex(4)}",
            prompt_token_ids=known.prompt,
            sampling=_sampling(),
            remote_kv=decode_pb2.RemoteKv(transfer=transfer, prefill_address=prefill.address),
        )
        return decode_pb2_grpc.DecodeStub(self._stub(member)).Decode(request, timeout=TIMEOUT_S)

    async def _first(self, call: Any, event: str) -> Any:
        """The first message of that kind; None when the call ended before."""
        with suppress(grpc.aio.AioRpcError):
            async for response in call:
                if response.HasField(event):
                    return response
        return None

    async def _answer(self, call: Any, known: Known) -> str:
        """The status of a Decode call; its tokens are checked (the first is prefill's)."""
        tokens: list[int] = []
        with suppress(grpc.aio.AioRpcError):
            async for response in call:
                tokens += [token.token_id for token in response.tokens.tokens]
        if wrong := wrong_tokens(Known(known.prompt, known.answer[1:]), tokens):
            self.wrong.append(f"a repeated Decode: {wrong}")
        return await _end(call)

    async def _refused(self, trick: str, call: Any) -> None:
        """The call must end with an error and serve nothing."""
        num_messages = 0
        with suppress(grpc.aio.AioRpcError):
            async for _ in call:
                num_messages += 1
        status = await _end(call)
        self._note(trick, status)
        if num_messages or status == "OK":
            self.wrong.append(f"{trick}: {num_messages} messages were served, status {status}")

    def _note(self, trick: str, status: str) -> None:
        self.counts[trick, status] += 1


_TRICKS: tuple[Trick, ...] = (
    Meddler.fetches_that_are_forged_or_stale,
    Meddler.fetches_that_are_repeated_and_dropped,
    Meddler.a_prefill_that_is_repeated,
    Meddler.a_decode_that_is_repeated,
    Meddler.a_decode_of_another_prompt,
    Meddler.a_decode_after_the_end,
    Meddler.garbage_on_the_data_plane,
)


def _transfer() -> types_pb2.Transfer:
    return types_pb2.Transfer(transfer_id=secrets.token_hex(8), token=secrets.token_bytes(32))


def _sampling() -> types_pb2.SamplingParams:
    return types_pb2.SamplingParams(max_tokens=_MAX_TOKENS, temperature=0.0, ignore_eos=True)


async def _end(call: Any) -> str:
    status: str = (await call.code()).name
    return status
