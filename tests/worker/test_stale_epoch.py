"""A worker whose role has changed refuses what was routed before, and nothing else."""

import grpc
import pytest

from hexgen2.errors import StaleEpoch
from hexgen2.rpc.client import to_error
from hexgen2.v1 import decode_pb2, decode_pb2_grpc, prefill_pb2, prefill_pb2_grpc, types_pb2
from tests.worker.pair import DEADLINE_S, pair

SAMPLING = types_pb2.SamplingParams(max_tokens=1)


async def test_calls_of_an_epoch_before_the_change_of_role_are_refused_and_no_others() -> None:
    async with pair() as fleet:
        prefill = prefill_pb2_grpc.PrefillStub(fleet.prefill.channel)
        decode = decode_pb2_grpc.DecodeStub(fleet.decode.channel)

        async def ask(epoch: int) -> None:
            first = prefill_pb2.PrefillRequest(
                request_id="p", prompt_token_ids=[5, 6], sampling=SAMPLING, plan_epoch=epoch
            )
            async for _ in prefill.Prefill(first, timeout=DEADLINE_S):
                pass
            whole = decode_pb2.DecodeRequest(
                request_id="d", prompt_token_ids=[5, 6], sampling=SAMPLING, plan_epoch=epoch
            )
            async for _ in decode.Decode(whole, timeout=DEADLINE_S):
                pass

        await ask(4)
        for worker in (fleet.prefill, fleet.decode):
            worker.gate.role_epoch = 5
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await ask(4)
            assert caught.value.code() is grpc.StatusCode.ABORTED
            error = to_error(caught.value)
            assert isinstance(error, StaleEpoch)
            assert "routed by plan 4, but this replica has had another role since plan 5" in str(error)
            worker.gate.role_epoch = 0
        fleet.prefill.gate.role_epoch = fleet.decode.gate.role_epoch = 5
        # The epoch of the change, one that this worker has not heard of, and none.
        for epoch in (5, 9, 0):
            await ask(epoch)
        await fleet.settled()
