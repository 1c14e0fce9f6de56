"""Properties that every plan has, on small random clusters."""

import dataclasses
import pickle
import re
from collections import Counter
from itertools import islice
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hexgen2 import llm as llms
from hexgen2.cluster_file import make_cluster
from hexgen2.errors import ConfigError
from hexgen2.placement import Placement, to_yaml
from hexgen2.scheduler.exhaustive import states
from hexgen2.scheduler.fabric import Fabric, Parts
from hexgen2.scheduler.groups import Choice, Groups
from hexgen2.scheduler.lp_start import lp_start
from hexgen2.scheduler.moves import Mover
from hexgen2.scheduler.multi_start import Effort, hexgen2
from hexgen2.scheduler.parallelism import Strategies
from hexgen2.scheduler.problem import SPLIT, Problem
from hexgen2.scheduler.refine import refine
from hexgen2.scheduler.schedule import solve
from hexgen2.scheduler.state import Group, Judge, State, parts_of
from hexgen2.workload_file import find_workload
from tests.scheduler.problems import machines, problem

Machines = list[tuple[str, int, float]]
FEW = settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.too_slow])
TINY: Machines = [("A100-SXM", 2, 1.25), ("L40", 3, 1.25)]


def plan(case: Problem, kind: str = "auto", seed: int = 0, jobs: int = 1, evaluations: int = 300) -> Placement:
    return solve(case, kind=kind, seed=seed, jobs=jobs, evaluations=evaluations)


@given(machines, st.sampled_from(["auto", "disaggregated"]), st.sampled_from(["hpld", "lphd"]))
@FEW
def test_a_plan_keeps_gpus_memory_layers_capacity_and_conservation(given: Machines, kind: str, workload: str) -> None:
    case = problem(given, workload=workload)
    found = plan(case, kind)
    there = Counter({(m.name, gpu): count for m in case.cluster.machines for gpu, count in m.gpus})
    used: Counter[tuple[str, str]] = Counter()
    for replica in found.replicas:
        used.update(replica.gpus)
        assert [stage.first_layer for stage in replica.stages] == [
            sum(before.num_layers for before in replica.stages[:i]) for i in range(len(replica.stages))
        ]
        assert sum(stage.num_layers for stage in replica.stages) == case.llm.num_layers
        assert replica.flow_rps <= replica.capacity_rps * (1 + 1e-6)
        ends = len(replica.stages) - 1
        for number, stage in enumerate(replica.stages):
            weights = (
                stage.num_layers * case.llm.layer_bytes + ((number == 0) + (number == ends)) * case.llm.embedding_bytes
            )
            assert weights <= stage.tensor_parallel_size * case.cost.usable_bytes(stage.gpu)
    used.update({(idle.machine, idle.gpu): idle.count for idle in found.idle})
    assert used == there
    for replica in found.replicas:
        if replica.role != "colocated":
            through = sum(route.flow_rps for route in found.routes if replica.id in (route.prefill, route.decode))
            assert through == pytest.approx(replica.flow_rps, rel=1e-6, abs=1e-9)
    alone = sum(replica.flow_rps for replica in found.replicas if replica.role == "colocated")
    assert sum(route.flow_rps for route in found.routes) + alone == pytest.approx(found.throughput_rps, rel=1e-6)
    for link in found.links:
        assert link.utilisation <= 1 + 1e-6
    assert found.bound_rps is not None
    assert found.throughput_rps <= found.bound_rps


@given(machines, st.integers(0, 3))
@FEW
def test_the_search_judges_by_what_the_network_and_the_linear_program_say(given: Machines, seed: int) -> None:
    case = problem(given)
    judge = case.judge
    start = lp_start(judge, case.limits, case.columns(SPLIT), case.lp(SPLIT))
    state = refine(judge, Mover(case.fabric, case.limits, SPLIT), start, 60, seed, SPLIT).state
    replicas = judge.replicas(state)
    assert judge.verified(state) <= judge.ceiling(state) * (1 + 1e-6)
    if all(replica.machine is not None for replica in replicas) and judge.network.may_bind(replicas):
        # Each replica on one machine: the integer network is exact.
        assert judge.network.flow(replicas) == pytest.approx(judge.verified(state), rel=1e-5)


@given(machines, st.randoms(use_true_random=False), st.sampled_from(["auto", "disaggregated"]))
@settings(FEW, max_examples=10)
def test_names_and_order_of_machines_change_nothing_but_names(given: Machines, chance: Random, kind: str) -> None:
    order = list(range(len(given)))
    chance.shuffle(order)
    one = to_yaml(plan(problem(given), kind))
    other = to_yaml(plan(problem([given[i] for i in order], names=[f"other-{i}" for i in order]), kind))
    # Machines that are alike are numbered in the file's order, so names of those may be exchanged.
    alike = {i: min(j for j in order if given[j] == given[i]) for i in order}

    def told(text: str, prefix: str) -> str:
        return re.sub(rf"\b{prefix}(\d)\b", lambda found: f"machine-{alike[int(found[1])]}", text)

    assert told(other, "other-") == told(one, "m")


def test_the_same_seed_gives_the_same_bytes_whatever_the_number_of_jobs() -> None:
    case = [("A100-SXM", 2, 0.25), ("L40", 3, 0.25), ("A6000", 2, 1.25)]
    first = to_yaml(plan(problem(case, "opt-30b"), "disaggregated", seed=3))
    assert to_yaml(plan(problem(case, "opt-30b"), "disaggregated", seed=3)) == first
    assert to_yaml(plan(problem(case, "opt-30b"), "disaggregated", seed=3, jobs=2)) == first


@pytest.mark.parametrize("codecs", [("none",), ("none", "int8")])
def test_a_problem_that_went_to_another_process_is_judged_alike(codecs: tuple[str, ...]) -> None:
    case = dataclasses.replace(problem([("A100-SXM", 3, 0.25), ("L40", 2, 0.25)], "opt-30b"), codecs=codecs)
    assert case.judge, "made before it goes, as a search's is"
    far = pickle.loads(pickle.dumps(case))
    for state in islice(states(case.judge, case.limits, SPLIT, 10_000), 150):
        assert far.judge.flow(state) == case.judge.flow(state)
        assert far.judge.verified(state) == case.judge.verified(state)


@given(machines, st.sampled_from(["opt-30b", "llama-3.1-8b"]))
@settings(FEW, max_examples=10)
def test_smaller_kv_carries_no_less_and_is_used_only_where_it_carries_more(given: Machines, model: str) -> None:
    plain = problem(given, model, "hpld")
    smaller = dataclasses.replace(plain, codecs=("none", "int8", "int4"))
    state = lp_start(plain.judge, plain.limits, plain.columns(SPLIT), plain.lp(SPLIT))
    before, after = plain.judge.verified(state), smaller.judge.verified(state)
    # What the codecs' own work takes is little.
    assert after >= before * (1 - 1e-6)
    routed = smaller.judge.network.route(smaller.judge.replicas(state))
    assert routed.rps == pytest.approx(after, rel=1e-5)
    if any(codec != "none" for codec in routed.codecs):
        assert after > before
    for _, used, limit in routed.wires:
        assert used <= limit * (1 + 1e-6)


def test_routes_over_slow_cards_travel_in_the_codec_that_is_allowed() -> None:
    # One H100 prefills for the other across 0.25 GB/s: KV is 0.8 MB a token.
    case = problem([("H100-SXM", 1, 0.25), ("H100-SXM", 1, 0.25)], "llama-2-13b", "hpld")
    plain = plan(case, "disaggregated")
    smaller = plan(dataclasses.replace(case, codecs=("none", "int8")), "disaggregated")
    assert {route.codec for route in plain.routes} == {"none"}
    assert {route.codec for route in smaller.routes} == {"int8"}
    assert smaller.throughput_rps == pytest.approx(plain.throughput_rps * 2, rel=0.02)
    assert smaller.routes[0].transfer_s == pytest.approx(plain.routes[0].transfer_s / 2, rel=0.02)


def test_a_codec_that_does_not_exist_is_named() -> None:
    with pytest.raises(ConfigError, match="no `int9`; there are: none, int8, fp8, int4"):
        plan(dataclasses.replace(problem(TINY), codecs=("int9",)))


class Doubled(Groups):
    """Rates per two seconds."""

    def choice(self, role: str, parts: Parts) -> Choice | None:
        found = super().choice(role, parts)
        return found and dataclasses.replace(found, rps=2 * found.rps)


def test_doubling_the_unit_of_time_changes_nothing() -> None:
    case = problem([("A100-SXM", 2, 0.25), ("L40", 3, 0.25), ("H100-SXM", 1, 1.25)])
    fast = dataclasses.replace(
        case.fabric,
        cluster=case.fabric.cluster.model_copy(
            update={
                "machines": tuple(
                    machine.model_copy(update={"intra_bandwidth_bytes_per_s": 2 * machine.intra_bandwidth_bytes_per_s})
                    for machine in case.fabric.cluster.machines
                )
            }
        ),
        nic=tuple(2 * bandwidth for bandwidth in case.fabric.nic),
    )
    doubled = Judge(Doubled(fast, case.cost, Strategies(case.fabric, case.cost)))
    start = lp_start(case.judge, case.limits, case.columns(SPLIT), case.lp(SPLIT))
    mover = Mover(case.fabric, case.limits, SPLIT)
    one = refine(case.judge, mover, start, 400, 1, SPLIT)
    other = refine(doubled, mover, start, 400, 1, SPLIT)
    assert other.state == one.state
    assert other.flow == pytest.approx(2 * one.flow, rel=1e-9)


@given(machines, st.sampled_from(["H100-SXM", "A6000"]))
@settings(FEW, max_examples=8)
def test_one_more_machine_never_lowers_the_flow_when_the_smaller_plan_is_a_start(given: Machines, gpu: str) -> None:
    small, large = problem(given), problem([*given, (gpu, 1, 12.5)])
    before = hexgen2(small, Effort(200, roles=SPLIT))
    pools = {_place(large.fabric, pool): pool for pool in range(len(large.fabric.pools))}
    same = State.of(
        large.fabric,
        [
            Group(group.role, parts_of({pools[_place(small.fabric, pool)]: n for pool, n in group.parts}))
            for group in before.state.groups
        ],
    )
    after = hexgen2(large, Effort(200, roles=SPLIT, starts=(same,)))
    assert after.flow >= before.flow * 0.99


def _place(fabric: Fabric, pool: int) -> tuple[str, str]:
    found = fabric.pools[pool]
    return fabric.cluster.machines[found.machine].name, fabric.kinds[found.kind].gpu


def test_one_gpu_plans_a_colocated_replica_and_says_why() -> None:
    found = plan(problem([("H100-SXM", 1, 12.5)]))
    assert found.kind == "colocated"
    assert "twice" in found.why


def test_too_little_memory_is_told_with_numbers() -> None:
    with pytest.raises(ConfigError, match=r"need 1\d\d\.\d GB; all 2 GPUs of cluster test together have"):
        plan(problem([("L40", 2, 12.5)], model="llama-2-70b"))


def test_disaggregation_that_does_not_fit_is_refused_when_asked_for() -> None:
    with pytest.raises(ConfigError, match="prefill and decode apart need it twice"):
        plan(problem([("A100-SXM", 2, 12.5)], model="llama-2-70b"), "disaggregated")


def test_limits_that_nothing_meets_are_told() -> None:
    case = problem(TINY)
    hurried = dataclasses.replace(case, workload=case.workload.model_copy(update={"tpot_s": 1e-6, "ttft_s": 1e-6}))
    with pytest.raises(ConfigError, match="ttft_s 1e-06 s, tpot_s 1e-06 s"):
        plan(hurried)


def apart(gpus_of_a_site: int) -> Problem:
    """Two sites between which KV takes days."""
    fields = {
        "machines": [
            {"name": site, "site": site, "gpus": {"A100-SXM": gpus_of_a_site}, "nic": "100gbe"} for site in ("a", "b")
        ],
        "site_links": [{"between": ["a", "b"], "link": {"bandwidth_bytes_per_s": 1000, "latency_s": 0.01}}],
    }
    return Problem(make_cluster(fields), llms.find("llama-2-70b"), find_workload("hphd"))


def test_sites_that_hold_the_model_once_each_and_hardly_reach_each_other_are_colocated_and_told_why() -> None:
    found = plan(apart(2))
    assert found.kind == "colocated"
    assert found.why == "not disaggregated: links between prefill and decode apart would carry next to nothing"
    with pytest.raises(ConfigError, match="no site holds the model twice, and the links between sites carry next to"):
        plan(apart(2), "disaggregated")


def test_a_plan_says_which_of_its_machines_have_rdma() -> None:
    cards = {"a": "roce-100", "b": "100gbe"}
    machines = [{"name": name, "gpus": {"A100-SXM": 1}, "nic": card} for name, card in cards.items()]
    found = plan(Problem(make_cluster({"machines": machines}), llms.find("llama-3.1-8b"), find_workload("hphd")))
    assert found.machines == ("a", "b")
    assert found.rdma == ("a",)
