"""Transfers that are not what they should be: each refused with a status and words that say why, logged once, nothing
served; and the next request works."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from structlog.testing import capture_logs

from hexgen2.engine.base import Sampling
from hexgen2.kv.wire import CHUNK_TOKENS, prompt_sha256
from hexgen2.rpc.server import GrpcServer
from hexgen2.v1 import decode_pb2, decode_pb2_grpc, prefill_pb2, prefill_pb2_grpc, types_pb2
from tests.eventually import eventually
from tests.worker.pair import CONFIG, DEADLINE_S, WorkerPair, expected_tokens, pair
from tests.worker.test_hand_over import first_token, prompt_of, small, status_of

PROMPT = prompt_of(200)
SAMPLING = Sampling(max_tokens=4)
REFUSED, INVALID, NOT_FOUND = (
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
)


class Liar(prefill_pb2_grpc.PrefillServicer):
    """Offers what a test makes of a right header, and then the pieces it is told."""

    def __init__(self, header: prefill_pb2.KvHeader, pieces: tuple[prefill_pb2.KvPiece, ...]) -> None:
        self.messages = [prefill_pb2.FetchKvResponse(header=header)]
        if pieces:
            self.messages.append(prefill_pb2.FetchKvResponse(pieces=prefill_pb2.KvPieces(pieces=pieces)))

    def Prefill(self, request: prefill_pb2.PrefillRequest, context: Any) -> Any:
        raise NotImplementedError

    async def FetchKv(self, request: prefill_pb2.FetchKvRequest, context: Any) -> AsyncIterator[Any]:
        for message in self.messages:
            yield message
        await eventually(lambda: False)


def right_header(fleet: WorkerPair) -> prefill_pb2.KvHeader:
    shape = fleet.decode.engine.model.kv_shape
    ends = [h.endpoints[0] for h in fleet.prefill.ranks.hellos]
    return prefill_pb2.KvHeader(
        model_sha256=fleet.decode.engine.model.sha256,
        prompt_sha256=prompt_sha256(tuple(PROMPT)),
        prompt_tokens=len(PROMPT),
        shape=prefill_pb2.KvShape(
            num_layers=shape.num_layers,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            dtype=shape.dtype,
        ),
        codec="none",
        chunk_tokens=CHUNK_TOKENS,
        transport=fleet.decode.ranks.hellos[0].transport,
        ranks=[
            prefill_pb2.KvRank(
                rank=0,
                num_layers=shape.num_layers,
                num_kv_heads=shape.num_kv_heads,
                page_offsets=[0, 65536],
                endpoints=ends,
            )
        ],
    )


@asynccontextmanager
async def lying(
    fleet: WorkerPair, change: Callable[[prefill_pb2.KvHeader], object], pieces: tuple[prefill_pb2.KvPiece, ...] = ()
) -> AsyncIterator[str]:
    header = right_header(fleet)
    change(header)
    server = GrpcServer("127.0.0.1:0")
    server.add(prefill_pb2_grpc.add_PrefillServicer_to_server, Liar(header, pieces), "hexgen2.v1.Prefill")
    address = await server.start()
    try:
        yield address
    finally:
        await server.stop(0)


def decode_from(fleet: WorkerPair, address: str, transfer: types_pb2.Transfer) -> Any:
    request = decode_pb2.DecodeRequest(
        request_id="r",
        prompt_token_ids=PROMPT,
        sampling=types_pb2.SamplingParams(max_tokens=4),
        remote_kv=decode_pb2.RemoteKv(transfer=transfer, prefill_address=address),
    )
    return decode_pb2_grpc.DecodeStub(fleet.decode.channel).Decode(request, timeout=DEADLINE_S)


def changed(**fields: object) -> Callable[[prefill_pb2.KvHeader], object]:
    return lambda header: header.MergeFrom(prefill_pb2.KvHeader(**fields))  # type: ignore[arg-type]


def shape(**fields: object) -> Callable[[prefill_pb2.KvHeader], object]:
    return lambda header: header.shape.MergeFrom(prefill_pb2.KvShape(**fields))  # type: ignore[arg-type]


OFFERS: list[tuple[Callable[[prefill_pb2.KvHeader], object], str]] = [
    (changed(model_sha256=b"x" * 32), "model differs"),
    (changed(prompt_sha256=b"x" * 32), "prompt differs"),
    (changed(prompt_tokens=199), "prompt_tokens differs"),
    (shape(num_layers=5), "num_layers differs"),
    (shape(num_kv_heads=4), "num_kv_heads differs"),
    (shape(head_dim=16), "head_dim differs"),
    (shape(dtype="float8"), "dtype differs"),
    (changed(codec="zstd"), "codec differs: offered zstd, expected none"),
    (changed(codec="int8"), "codec differs: offered int8, expected none"),
    (changed(chunk_tokens=64), "chunk_tokens differs"),
    (changed(transport="pigeon"), "transport differs: offered pigeon"),
    (changed(transport="p" * 100_000), "transport differs: offered ppp"),
    (lambda header: header.ranks.append(header.ranks[0]), "ranks: "),
    (lambda header: header.ranks[0].page_offsets.append(7), "page_offsets: 3 given, 2 chunks expected"),
    (lambda header: setattr(header.ranks[0], "num_layers", 9), "ranks: rank 0 lies outside"),
    (lambda header: setattr(header.ranks[0], "num_layers", 1), "layer 1"),
    (lambda header: header.ClearField("ranks"), "ranks: "),
]
PIECES = [
    (prefill_pb2.KvPiece(rank=1, digests=[1, 2]), "pieces: there is no rank 1"),
    (prefill_pb2.KvPiece(layer=4, digests=[1, 2]), "pieces: there is no rank 0, layer 4"),
    (prefill_pb2.KvPiece(chunk=2, digests=[1, 2]), "pieces: there is no rank 0, layer 0, chunk 2"),
    (prefill_pb2.KvPiece(digests=[1]), "pieces: 1 digests for 2 KV heads"),
]


def refusals(logs: Any) -> list[str]:
    return [entry["reason"] for entry in logs if entry["event"] == "refused"]


async def served_nothing(fleet: WorkerPair) -> None:
    """And the next request works."""
    await fleet.settled()
    handed = await fleet.generate([5, 6], Sampling(max_tokens=3))
    assert handed.tokens == expected_tokens(CONFIG, [5, 6], 3)


async def test_what_is_offered_and_was_not_asked_for() -> None:
    wrong = []
    async with pair() as fleet:
        for number, (change, words) in enumerate(OFFERS):
            async with lying(fleet, change) as address:
                with capture_logs() as logs:
                    code, details = await status_of(decode_from(fleet, address, fleet.transfer()))
            told = refusals(logs)
            if code is not REFUSED or words not in details or len(details) > 300 or told != [details]:
                wrong.append((number, code, details[:200], told))
        for piece, words in PIECES:
            async with lying(fleet, lambda _: None, (piece,)) as address:
                code, details = await status_of(decode_from(fleet, address, fleet.transfer()))
            if code is not REFUSED or words not in details:
                wrong.append((len(OFFERS), code, details[:200], []))
        assert wrong == []
        await served_nothing(fleet)


async def test_wrong_and_used_up_tokens_and_ids() -> None:
    async with pair() as fleet:
        stub = prefill_pb2_grpc.PrefillStub(fleet.prefill.channel)
        transfer = fleet.transfer()
        holding = fleet.start_prefill(transfer, PROMPT, SAMPLING)
        await first_token(holding)
        right = prefill_pb2.FetchKvRequest(transfer_id=transfer.transfer_id, token=transfer.token)
        stolen = prefill_pb2.FetchKvRequest(transfer_id=transfer.transfer_id, token=bytes(32))
        short = prefill_pb2.FetchKvRequest(transfer_id=transfer.transfer_id, token=b"x")

        async def fetched(request: prefill_pb2.FetchKvRequest) -> tuple[grpc.StatusCode, str]:
            with capture_logs() as logs:
                code, details = await status_of(stub.FetchKv(request, timeout=DEADLINE_S))
            assert refusals(logs) == [details]
            return code, details

        assert (await fetched(stolen))[0] is NOT_FOUND
        assert (await fetched(short))[0] is INVALID
        code, details = await status_of(fleet.start_prefill(transfer, PROMPT, SAMPLING))
        assert (code, "under way" in details) == (INVALID, True)
        holding.cancel()
        await fleet.settled()
        # At once, long before the time that a transfer has to arrive is over.
        code, details = await fetched(right)
        assert (code, "used up" in details) == (REFUSED, True)
        assert (await fetched(stolen))[0] is NOT_FOUND
        for call in (fleet.start_prefill(transfer, PROMPT, SAMPLING), fleet.start_decode(transfer, PROMPT, SAMPLING)):
            code, details = await status_of(call)
            assert (code, "used up" in details) == (REFUSED, True)
        await served_nothing(fleet)


async def test_an_unknown_codec_is_refused_by_both_sides() -> None:
    async with pair() as fleet:
        transfer = fleet.transfer()
        transfer.codec = "zstd"
        for start in (fleet.start_prefill, fleet.start_decode):
            with capture_logs() as logs:
                code, details = await status_of(start(transfer, PROMPT, SAMPLING))
            assert code is INVALID
            assert "transfer.codec" in details
            assert "'zstd' is not one of none" in details
            assert refusals(logs) == [details]
        await served_nothing(fleet)


@pytest.mark.parametrize("side", ["prefill", "decode"])
async def test_kv_larger_than_the_pool_is_told_before_anything_is_made(side: str) -> None:
    pools = small(send_bytes=70_000, staging_bytes=70_000)
    sending = side == "prefill"
    async with pair(prefill_kv=pools if sending else None, decode_kv=None if sending else pools) as fleet:
        transfer = fleet.transfer()
        prefill = fleet.start_prefill(transfer, PROMPT, SAMPLING)
        call = prefill if sending else fleet.start_decode(transfer, PROMPT, SAMPLING)
        with capture_logs() as logs:
            code, details = await status_of(call)
        assert code is REFUSED
        assert "KV needs 2 pages" in details
        assert refusals(logs) == [details]
        prefill.cancel()
        await served_nothing(fleet)
