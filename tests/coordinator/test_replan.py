"""When a plan is looked for, when it is taken, and when it is taken back."""

from dataclasses import replace

from hexgen2.coordinator.replan import InForce, Policy, Situation, Watch, judge, why_back, why_search, workload_now
from hexgen2.observed import ClassTally, Tally, Window
from hexgen2.workload import LengthClass, Workload

POLICY = Policy(drift=0.3, busy=0.8, min_gain=0.1, min_requests=10, interval_s=60.0, max_drop=0.15)
WORK = Workload(lengths=(LengthClass(prompt_tokens=1000, output_tokens=100, weight=1),), ttft_s=1.0)
PLAN = InForce(WORK, capacity_rps=10.0, since_s=0.0, replicas=frozenset("abcd"), settled_s=50.0)


def window(num: int, prompt: int = 1000, output: int = 100, good: int | None = None, failed: int = 0) -> Window:
    classes = (ClassTally(5, num, num * prompt, num * output),) if num else ()
    return Window(10.0, Tally(num, num, num if good is None else good, failed, classes))


def seen(num: int = 50, prompt: int = 1000, output: int = 100, **changes: object) -> Situation:
    made = Situation(100.0, window(num, prompt, output), 0.0, frozenset("abcd"))
    return replace(made, **changes)  # type: ignore[arg-type]


def test_a_plan_that_fits_is_left_alone() -> None:
    assert why_search(POLICY, PLAN, seen()) == ""
    assert why_search(POLICY, PLAN, seen(prompt=1250, output=80)) == ""


def test_lengths_that_drift_are_a_reason_once_enough_was_seen_and_time_has_passed() -> None:
    drifted = seen(prompt=200, output=500)
    assert why_search(POLICY, PLAN, drifted) == (
        "prompts have 200 tokens, planned were 1000; answers have 500 tokens, planned were 100"
    )
    assert why_search(POLICY, PLAN, seen(num=9, prompt=200)) == ""
    assert why_search(POLICY, PLAN, replace(drifted, now_s=49.0)) == ""


def test_a_lost_replica_waits_for_nothing_and_one_that_is_back_waits_its_time() -> None:
    lost = seen(num=0, there=frozenset("abc"), now_s=1.0)
    assert why_search(POLICY, PLAN, lost) == "d is gone"
    back = seen(num=0, there=frozenset("abcde"))
    assert why_search(POLICY, PLAN, back) == "e is there again"
    assert why_search(POLICY, PLAN, replace(back, now_s=1.0)) == ""


def test_more_requests_than_the_plan_carries_are_a_reason_once() -> None:
    assert "8.5 requests/s come" in why_search(POLICY, PLAN, seen(num=85))
    assert "9 requests/s are forecast" in why_search(POLICY, PLAN, seen(forecast_rps=9.0))
    # Planned for, and no better plan was found: the same rate is no news.
    planned = replace(PLAN, workload=WORK.model_copy(update={"rate": 8.5}))
    assert why_search(POLICY, planned, seen(num=85)) == ""
    assert why_search(POLICY, planned, seen(num=120))


def test_what_is_planned_for_is_what_was_seen_within_the_limits_of_before() -> None:
    found = workload_now(PLAN, seen(num=40, prompt=200, output=500))
    assert (found.mean_prompt_tokens, found.mean_output_tokens, found.rate) == (200, 500, 4.0)
    assert found.ttft_s == WORK.ttft_s
    assert workload_now(PLAN, seen(num=0)).lengths == WORK.lengths
    # Means say nothing of the longest.
    assert (found.longest_prompt_tokens, found.longest_tokens) == (1000, 1100)


def test_a_change_must_gain_and_pay_for_its_moves() -> None:
    assert judge(POLICY, "drift", 9.0, 5.0, 8.0, flips=1, num_replicas=4).change
    assert not judge(POLICY, "drift", 9.0, 5.0, 5.4, flips=1, num_replicas=4).change
    assert not judge(POLICY, "drift", 9.0, 5.0, 8.0, flips=0, num_replicas=4).change
    # Roles that carry nothing cost nothing.
    assert judge(POLICY, "gone", 9.0, 0.0, 0.1, flips=3, num_replicas=4).change
    costly = replace(POLICY, flip_s=1e6)
    verdict = judge(costly, "drift", 9.0, 5.0, 8.0, flips=1, num_replicas=4)
    assert not verdict.change
    assert "cost more" in verdict.why


def test_plans_do_not_swing_back_and_forth_on_the_edge() -> None:
    """The reverse of a change that was worth it never is, whatever the margin."""
    for better in (1.11, 1.5, 3.0):
        assert judge(POLICY, "drift", 9.0, 5.0, 5.0 * better, 1, 4).change
        assert not judge(POLICY, "drift", 9.0, 5.0 * better, 5.0, 1, 4).change


def test_a_change_after_which_fewer_answers_are_good_is_taken_back() -> None:
    watch = Watch(window(100, good=90), since_s=0.0, until_s=60.0)
    assert why_back(POLICY, watch, window(100, good=80)) == ""
    assert "60% of answers were good after it, 90% before" in why_back(POLICY, watch, window(100, good=60))
    assert why_back(POLICY, watch, window(90, good=90, failed=40))
    # Half as many requests, all good: no fault.
    assert why_back(POLICY, watch, window(50, good=50)) == ""
    assert why_back(POLICY, watch, window(5, good=0)) == ""
