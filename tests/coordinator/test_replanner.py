"""The coordinator plans anew: what gateways report leads to other roles, is written down, is taken back if worse."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from hexgen2.calibration import WINDOW, Sample, Term
from hexgen2.config import ReplanConfig
from hexgen2.coordinator.assignment import assignment_of
from hexgen2.coordinator.outlook import Outlook
from hexgen2.coordinator.state import FleetState
from hexgen2.coordinator.store import FleetStore
from hexgen2.observed import Counter
from hexgen2.placement import Placement, to_json
from hexgen2.plan import GatewayLoad, ReplicaState, Role
from hexgen2.rpc import plan_convert as convert
from hexgen2.rpc.calibration_convert import samples_to_proto
from hexgen2.v1 import coordinator_pb2 as pb
from services.coordinator.background import Background, search
from services.coordinator.replanner import Replanner
from services.coordinator.service import CoordinatorService
from tests.coordinator.harness import replica
from tests.coordinator.slow_four import planned, problem, workload
from tests.coordinator.test_service import report

READY = ReplicaState.READY

P = ParamSpec("P")
T = TypeVar("T")


class Here(Background):
    """Computes in a thread of the test: a process takes seconds to start."""

    async def run(self, task: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.to_thread(task, *args, **kwargs)


class Caller:
    """Whoever calls."""

    def peer(self) -> str:
        return "test"


class Coordinator:
    """A service and its re-planner on a clock that the test turns, with four flexible workers."""

    def __init__(self, service: CoordinatorService, replanner: Replanner, placement: Placement, clock: list[float]):
        self.service, self.replanner, self.placement, self.clock = service, replanner, placement, clock
        self.asked = Counter()

    async def workers(self, *states: ReplicaState) -> dict[str, Role]:
        """All report, the first ones with these states; the roles that they are given."""
        roles = {}
        names = [each.id for each in self.placement.replicas]
        for name, state in zip(names, [*states, *[READY] * (len(names) - len(states))], strict=True):
            made = replica(name, flexible=True, role=Role.COLOCATED)
            answer = await self.service.Report(report(made, state), Caller())
            if answer.role:
                roles[name] = convert.role_from_proto(answer.role)
        return roles

    async def requests(self, num: int, prompt: int, output: int, *, seconds: float = 10.0, tpot_s: float = 0.1) -> None:
        """So many come and are answered within so many seconds."""
        for _ in range(num):
            self.asked.arrived()
            self.asked.ended(prompt, output, 0.5, tpot_s)
        self.clock[0] += seconds
        load = GatewayLoad("g", tally=self.asked.tally)
        answer = await self.service.ReportGateway(
            pb.ReportGatewayRequest(gateway=convert.gateway_to_proto(load)), Caller()
        )
        assert (answer.slo_ttft_s, answer.slo_tpot_s) == (6.0, 0.3)
        self.asked.slo = self.replanner._outlook.slo

    async def history(self) -> list[str]:
        return [each.what for each in (await self.service.GetPlan(pb.GetPlanRequest(), Caller())).changes]


@asynccontextmanager
async def coordinating(folder: Path, **config: Any) -> AsyncIterator[Coordinator]:
    placement = planned(folder)
    problem(folder, workload(1000, 8))
    clock = [1000.0]
    async with FleetStore(folder / "state.db") as store:
        state = FleetState(100, 5.0, assignment=assignment_of(placement), version="")
        state.configured = to_json(placement)
        outlook = Outlook(10.0)
        service = CoordinatorService(
            state, lambda: clock[0], save=store.save, record=store.record, outlook=outlook, wall_clock=time.time
        )
        settings = ReplanConfig(cluster=str(folder / "cluster.yaml"), window_s=20.0, watch_s=30.0, **config)
        with Replanner(
            settings, service, outlook, placement, workload(1000, 8), lambda: clock[0], background=Here
        ) as replanner:
            made = Coordinator(service, replanner, placement, clock)
            await made.workers()
            await made.requests(0, 1, 1, seconds=0.0)
            yield made
        assert [each.what for each in await store.changes(100)] == [*reversed(await made.history())]


async def test_roles_follow_what_is_asked_without_a_worker_being_restarted(tmp_path: Path) -> None:
    async with coordinating(tmp_path) as made:
        assert sorted((await made.workers()).values()) == ["decode", "prefill", "prefill", "prefill"]
        await made.requests(15, 1000, 8)
        await made.replanner.look()
        assert await made.history() == []
        for _ in range(3):
            await made.requests(15, 64, 96)
        await made.replanner.look()
        assert await made.history() == ["re-planned"]
        assert sorted((await made.workers()).values()) == ["decode", "decode", "decode", "prefill"]
        plan = await made.service.GetPlan(pb.GetPlanRequest(), Caller())
        assert "prompts have 64 tokens, planned were 1000" in plan.changes[0].why
        assert plan.plan.prediction.throughput_rps > 2.5
        # And it stays: neither a look nor the watch at its end finds anything.
        for _ in range(10):
            await made.requests(15, 64, 96)
            await made.replanner.look()
        assert await made.history() == ["re-planned"]


async def test_a_change_after_which_answers_are_late_is_taken_back_for_long(tmp_path: Path) -> None:
    async with coordinating(tmp_path, interval_s=10.0) as made:
        before = await made.workers()
        for _ in range(3):
            await made.requests(15, 64, 96)
        await made.replanner.look()
        assert await made.workers() != before
        for _ in range(3):
            await made.requests(15, 64, 96, tpot_s=0.4)
        await made.replanner.look()
        assert await made.history() == ["rolled back", "re-planned"]
        assert await made.workers() == before
        for _ in range(3):
            await made.requests(15, 64, 96, tpot_s=0.4)
            await made.replanner.look()
        assert await made.history() == ["rolled back", "re-planned"]


async def test_a_replica_that_goes_is_planned_around_at_once_and_taken_in_again_later(tmp_path: Path) -> None:
    async with coordinating(tmp_path) as made:
        names = [each.id for each in made.placement.replicas]
        await made.requests(15, 1000, 8)
        await made.replanner.look()
        decode = names[-1]
        assert (await made.workers())[decode] is Role.DECODE
        # It says that it will go: nobody else decodes.
        await made.workers(READY, READY, READY, ReplicaState.DRAINING)
        await made.replanner.look()
        assert await made.history() == ["re-planned"]
        plan = convert.plan_from_proto((await made.service.GetPlan(pb.GetPlanRequest(), Caller())).plan)
        assert plan.routes
        assert decode not in {
            end for route in plan.routes for end in (route.prefill_replica_id, route.decode_replica_id)
        }
        await made.workers()
        await made.replanner.look()
        assert await made.history() == ["re-planned"]
        made.clock[0] += 100.0
        await made.workers()
        await made.requests(30, 1000, 8)
        await made.replanner.look()
        assert len(await made.history()) == 2


async def test_times_that_are_off_are_planned_with_and_looked_at_once(tmp_path: Path) -> None:
    async with coordinating(tmp_path) as made:
        roles = await made.workers()
        prefill = next(name for name, role in roles.items() if role is Role.PREFILL)

        async def measured(factor: float) -> None:
            original = next(each.times for each in made.placement.replicas if each.id == prefill)
            assert original is not None
            samples = [Sample(Term.PREFILL, factor * original.prefill[1000], (1000,))] * WINDOW
            request = report(replica(prefill, flexible=True, role=Role.COLOCATED), READY)
            request.samples.extend(samples_to_proto(samples))
            await made.service.Report(request, Caller())

        await made.requests(15, 1000, 8)
        await measured(1.0)
        await made.replanner.look()
        assert await made.history() == []
        # Prompts are computed so quickly that three of the four replicas are too many for them.
        await measured(0.25)
        await made.replanner.look()
        assert await made.history() == ["re-planned"]
        assert list((await made.workers()).values()).count(Role.PREFILL) < 3
        plan = await made.service.GetPlan(pb.GetPlanRequest(), Caller())
        assert plan.changes[0].why.startswith(f"the plan's times are off: prefill of {prefill} takes 0.25 times")
        # The new plan foretells what was measured, as nearly as scaled devices can: it is off no more.
        await made.requests(15, 1000, 8, seconds=100.0)
        await made.workers()
        await measured(0.25)
        (found,) = made.service.promises.calibration.ratios
        assert 0.7 < found.ratio < 1.1
        await made.replanner.look()
        assert await made.history() == ["re-planned"]


async def test_a_search_in_a_process_of_its_own(tmp_path: Path) -> None:
    placement = planned(tmp_path)
    problem(tmp_path, workload(1, 1))
    roles = {each.id: each.role for each in placement.replicas}
    with Background() as background:
        found = await background.run(
            search, str(tmp_path / "cluster.yaml"), placement, workload(64, 96), roles, 100, {}
        )
    assert found.rps > 2 * found.current_rps
