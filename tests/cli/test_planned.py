"""``hexgen2 up plan.yaml``: the plan's replicas, as processes."""

import asyncio
import io
import json
import os
import signal
from collections import Counter
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from hexgen2.calibration import ENOUGH
from hexgen2.cli.client import Access, apply_plan, generate, get_plan
from hexgen2.cli.cpu_quota import V1, quota
from hexgen2.cli.fleet import Fleet
from hexgen2.cli.fleet_config import FleetConfig
from hexgen2.cli.main import make_request
from hexgen2.cli.members import Addresses, members
from hexgen2.cli.status import show_status
from hexgen2.config import CoordinatorConfig, WorkerConfig
from hexgen2.errors import ConfigError, HexgenError, Unavailable
from hexgen2.placement import EnginePlan, TimesPlan, to_json
from hexgen2.plan import Role, Route
from hexgen2.rpc.calibration_convert import calibration_from_proto
from hexgen2.rpc.plan_convert import gateway_from_proto, plan_from_proto
from tests.eventually import eventually_async
from tests.models import make_tiny_llama
from tests.placements import mixed, placement, planned_replica, stage, write
from tests.test_examples import run as run_example

DEADLINE_S = 60.0
ADDRESSES = Addresses("127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


def config(tokenizer: Path, plan: Path, **fields: object) -> FleetConfig:
    free = dict.fromkeys(("listen", "http_listen", "coordinator"), "127.0.0.1:0")
    engine = {"kind": "emulated"}
    given = {"engine": engine, "tokenizer": tokenizer, "kv": {"transport": "tcp"}, "drain_s": 5, "plan": plan}
    return FleetConfig.model_validate(free | given | fields)


def test_a_plan_makes_flexible_workers_with_its_costs(tokenizer: Path, tmp_path: Path) -> None:
    found = members(config(tokenizer, write(tmp_path, mixed())), ADDRESSES, tmp_path)
    assert [(each.name, each.service) for each in found] == [
        ("coordinator", "coordinator"),
        *((name, "flexible") for name in ("p", "d", "c")),
        ("gateway", "gateway"),
    ]
    coordinator, worker = found[0].settings, found[1].settings
    assert isinstance(coordinator, CoordinatorConfig)
    assert coordinator.plan == tmp_path / "plan.yaml"
    assert isinstance(worker, WorkerConfig)
    assert worker.engine.kind == "emulated"
    assert worker.engine.cost_file == tmp_path / "p-cost.yaml"
    assert worker.engine.max_model_len == 4096, "of Llama-2"
    cost = yaml.safe_load((tmp_path / "p-cost.yaml").read_text())
    assert [(each["gpu"], each["num_layers"]) for each in cost["stages"]] == [("A100-SXM", 40)]


def test_vllm_gets_the_plans_stages_and_refuses_what_it_cannot_do(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(4)))
    engine = {"kind": "vllm", "model": str(tokenizer)}

    def given(*stages: object) -> FleetConfig:
        plan = placement(planned_replica("c", "colocated", *stages, batch=7))  # type: ignore[arg-type]
        return config(tokenizer, write(tmp_path, plan), engine=engine)

    halves = stage("cpu-0.5", 1, 0, 3), stage("cpu-0.5", 1, 3, 1)
    worker = members(given(*halves), ADDRESSES, tmp_path)[1]
    assert isinstance(worker.settings, WorkerConfig)
    made = worker.settings.engine
    assert made.kind == "vllm"
    assert (made.tensor_parallel_size, made.pipeline_parallel_size, made.max_num_seqs) == (1, 2, 7)
    assert worker.environment == {"VLLM_PP_LAYER_PARTITION": "3,1"}
    assert worker.share is not None
    assert worker.share.cores == 1.0
    with pytest.raises(ConfigError, match=r"stages of 2, 1 GPUs: vLLM takes one tensor_parallel_size"):
        members(given(stage("cpu", 2, 0, 1), stage("cpu", 1, 1, 1)), ADDRESSES, tmp_path)
    with pytest.raises(ConfigError, match=r"replica c has 40 layers, and .* has 4: give the model"):
        members(given(stage("cpu")), ADDRESSES, tmp_path)
    with pytest.raises(ConfigError, match="it takes 1 H100-SXM, and no GPU is here"):
        members(given(stage("H100-SXM")), ADDRESSES, tmp_path)


def test_an_engine_gets_the_plans_memory_and_limits_unless_told_otherwise(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(4)))
    settings = EnginePlan(
        kv_cache_bytes=123 << 20,
        max_num_seqs=9,
        max_num_batched_tokens=99,
        send_tokens=300,
        staging_tokens=1000,
        slo_tpot_s=0.5,
    )
    replica = planned_replica("d", "decode", stage("cpu", 1, 0, 4)).model_copy(update={"engine": settings})
    plan = write(tmp_path, placement(replica))

    def made(kv: dict[str, object], **engine: object) -> WorkerConfig:
        given = {"kind": "vllm", "model": str(tokenizer), **engine}
        worker = members(config(tokenizer, plan, engine=given, kv=kv), ADDRESSES, tmp_path)[1].settings
        assert isinstance(worker, WorkerConfig)
        return worker

    worker = made({})
    assert worker.engine.kind == "vllm"
    assert (worker.engine.kv_cache_bytes, worker.engine.max_num_seqs) == (123 << 20, 9)
    assert worker.engine.max_num_batched_tokens == 99
    # Pages of 128 tokens, 4 layers of 2 heads of 32 in float32, keys and values.
    page = 128 * 4 * 2 * 32 * 4 * 2
    assert (worker.kv.send_bytes, worker.kv.staging_bytes) == (3 * page, 8 * page)
    assert (worker.slo_ttft_s, worker.slo_tpot_s) == (None, 0.5)
    own = made({"staging_bytes": 1 << 20}, max_num_seqs=5)
    assert own.engine.max_num_seqs == 5
    assert own.kv.staging_bytes == 1 << 20


async def test_a_planned_fleet_routes_by_its_flow_over_two_gateways_and_says_how_it_does(
    tokenizer: Path, tmp_path: Path
) -> None:
    async with Fleet(config(tokenizer, write(tmp_path, mixed()), gateways=2), tmp_path) as fleet:
        plan = await fleet.plan()
        assert {each.replica_id: each.role for each in plan.replicas} == {
            "p": Role.PREFILL,
            "d": Role.DECODE,
            "c": Role.COLOCATED,
        }
        assert set(plan.routes) == {Route("p", "d", 2.0), Route("c", "c", 1.0)}
        for replica in plan.replicas:
            assert replica.max_model_len == 4096
            assert min(replica.send_tokens, replica.staging_tokens) > 0
        went: Counter[tuple[str, str]] = Counter()
        addresses = (fleet.grpc_address, fleet.addresses.more[0][0])
        for number in range(6):
            async for response in generate(
                addresses[number % 2], make_request("hello", max_tokens=3, ignore_eos=True), DEADLINE_S
            ):
                last = response
            went[last.timing.prefill_replica_id, last.timing.decode_replica_id] += 1
        # Each gateway spreads by itself: two over the route and one alone, of every three.
        assert went == {("p", "d"): 4, ("", "c"): 2}

        async def both_reported() -> bool:
            answer = await get_plan(fleet.coordinator_address, DEADLINE_S)
            seen = [gateway_from_proto(each) for each in answer.gateways]
            return sum(each.measured.num_finished for each in seen) == 6 and len(seen) == 2

        await eventually_async(both_reported)
        text = io.StringIO()
        await show_status(fleet.coordinator_address, DEADLINE_S, Access(), Console(file=text, width=160), as_json=False)
        told = text.getvalue()
        assert "1 of 2/s" in told
        assert "0.5 s" in told
        assert "c alone" in told

        # The examples ask it.
        told = await run_example("grpc_client", fleet.grpc_address)
        assert "tokens by " in told
        assert "32 tokens" in await run_example("http_stream", fleet.http_url)

        # Another plan: p and d change over, nothing is started anew, and what is asked meanwhile is answered.
        pids = {process.name: process.pid for process in fleet.processes}
        swapped = placement(
            planned_replica("d", "prefill"),
            # Steps are foretold to take no time at all, which p will be seen not to hold.
            planned_replica("p", "decode").model_copy(update={"times": TimesPlan(prefill={1: 1.0}, decode={1: 1e-6})}),
            planned_replica("c", "colocated", flow=0.0),
            routes=(("d", "p", 1.0),),
        )

        async def ask() -> tuple[str, str]:
            request = make_request("hello " * 40, max_tokens=40, ignore_eos=True)
            async for response in generate(fleet.grpc_address, request, DEADLINE_S):
                last = response
            assert last.usage.completion_tokens == 40
            return last.timing.prefill_replica_id, last.timing.decode_replica_id

        async with asyncio.TaskGroup() as tasks:
            asked = [tasks.create_task(ask()) for _ in range(6)]
            epoch = await apply_plan(fleet.coordinator_address, to_json(swapped), DEADLINE_S)
            asked += [tasks.create_task(ask()) for _ in range(6)]
        assert {task.result() for task in asked} <= {("p", "d"), ("", "c"), ("d", "p")}
        assert {await task for task in [asyncio.create_task(ask()) for _ in range(ENOUGH)]} == {("d", "p")}

        async def off() -> bool:
            answer = await get_plan(fleet.coordinator_address, DEADLINE_S)
            return calibration_from_proto(answer.calibration).off

        await eventually_async(off)
        text = io.StringIO()
        await show_status(fleet.coordinator_address, DEADLINE_S, Access(), Console(file=text, width=160), as_json=False)
        assert "the plan is off: decode of p takes" in text.getvalue()
        plan = await fleet.plan()
        assert (plan.epoch, plan.replica("p").role, plan.replica("d").role) == (epoch, Role.DECODE, Role.PREFILL)
        assert {process.name: process.pid for process in fleet.processes} == pids
        with pytest.raises(HexgenError, match="the plan has x, and this fleet c, d, p: start"):
            await apply_plan(fleet.coordinator_address, to_json(placement(planned_replica("x", "decode"))), DEADLINE_S)

        # The plan, its epoch and its routes outlive the coordinator.
        fleet["coordinator"].send(signal.SIGKILL)
        await fleet["coordinator"].wait()
        await fleet["coordinator"].start()

        async def back() -> bool:
            try:
                answer = await get_plan(fleet.coordinator_address, DEADLINE_S)
            except Unavailable:
                return False
            return plan_from_proto(answer.plan) == plan

        await eventually_async(back)
    log = (tmp_path / "coordinator.log").read_text().splitlines()
    events = [json.loads(line) for line in log if line.startswith("{")]
    left = {each["replica"] for each in events if each.get("state") == "stopped"}
    assert left == {"p", "d", "c"}
    assert not [each for each in events if each.get("state") == "lost"]


@pytest.mark.skipif(os.geteuid() != 0 or not (V1 / "cpu.cfs_quota_us").exists(), reason="needs root and cgroup v1")
async def test_a_quota_holds_a_process_and_leaves_nothing_behind() -> None:
    with quota("test", 0.25) as group:
        folder = next(V1.glob(f"hexgen2-{os.getpid()}-test"))
        assert (folder / "cpu.cfs_quota_us").read_text().strip() == "25000"
        process = await asyncio.create_subprocess_exec("sleep", "60")
        group.add(process.pid)
        assert str(process.pid) in (folder / "cgroup.procs").read_text().split()
        process.kill()
        await process.wait()
    assert not folder.exists()
