"""Workers that are told to leave, and that are killed, under load: every answer is whole and right."""

import asyncio
import signal
from pathlib import Path

import pytest

from benchmarks.replan import setting
from benchmarks.replan.load import Phase, drive
from hexgen2.cli.client import get_plan, preempt
from hexgen2.cli.fleet import Fleet
from hexgen2.config import EmulatedEngineConfig
from hexgen2.model import load_model
from hexgen2.plan import ReplicaState, Role
from hexgen2.rpc.plan_convert import gateway_from_proto, plan_from_proto, status_from_proto
from tests.eventually import eventually_async
from tests.models import make_tiny_llama

DEADLINE_S = 60.0
#: Answers take four seconds and more: a step of these engines takes a third of one.
LOAD = Phase(seconds=4.0, rate=3.0, prompt_tokens=40, output_tokens=12)


@pytest.mark.slow
async def test_no_answer_is_lost_with_a_worker(tmp_path: Path) -> None:
    tokenizer = make_tiny_llama(tmp_path / "tiny")
    setting.plan(tmp_path)
    engine = EmulatedEngineConfig.model_validate(setting.ENGINE | {"vocab_size": load_model(tokenizer).vocab_size})
    async with Fleet(setting.config(tmp_path, tokenizer, replan=True), tmp_path / "run") as fleet:

        async def decoding() -> str:
            """A replica that has answers under way and that decodes."""
            answer = await get_plan(fleet.coordinator_address, DEADLINE_S)
            ready = {s.replica_id for s in map(status_from_proto, answer.statuses) if s.state is ReplicaState.READY}
            roles = {each.replica_id: each.role for each in plan_from_proto(answer.plan).replicas}
            for gateway in map(gateway_from_proto, answer.gateways):
                for route in gateway.routes:
                    end = route.decode_replica_id
                    if route.num_requests and end in ready and roles.get(end) is not Role.PREFILL:
                        return end
            return ""

        async def busy() -> bool:
            return bool(await decoding())

        for how in ("preempted", "killed"):
            asking = asyncio.create_task(drive(fleet.grpc_address, [LOAD], 1, wait_s=DEADLINE_S, engine=engine))
            await eventually_async(busy)
            victim = await decoding()
            if how == "preempted":
                # Too short for what runs: its last answers are continued elsewhere.
                await preempt(fleet.coordinator_address, victim, 3.5, DEADLINE_S)
            else:
                fleet[victim].send(signal.SIGKILL)
            answers = await asking
            assert [each.error for each in answers if not each.ended] == []
            assert not any(each.wrong for each in answers)
            await fleet[victim].wait()
        log = fleet["gateway"].log_file.read_text(encoding="utf-8")
        assert '"continued"' in log
        changes = [each.what for each in (await get_plan(fleet.coordinator_address, DEADLINE_S)).changes]
        # Nobody else decodes until there is another plan.
        assert "re-planned" in changes
