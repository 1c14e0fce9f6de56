"""One engine: batching, chunks, memory and runs of decode."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hexgen2.simulator.blueprint import Arrival
from hexgen2.simulator.clock import Clock
from hexgen2.simulator.engine import Engine, Job, Limits
from hexgen2.simulator.fleet import Settings, Simulation
from hexgen2.simulator.step_times import Figures
from tests.simulator.fleets import FIGURES, fleet


class Book:
    """Writes down what an engine says."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.first_s: dict[str, float] = {}
        self.done_s: dict[str, float] = {}

    def computing(self, job: Job, num_tokens: int, done_s: float) -> None:
        """Not needed here."""

    def first(self, job: Job) -> None:
        self.first_s[job.owner] = self.clock.now

    def done(self, job: Job) -> None:
        assert job.owner not in self.done_s
        self.done_s[job.owner] = self.clock.now


def run(jobs: list[tuple[float, int, int]], limits: Limits, times: Figures = FIGURES) -> tuple[Book, Engine]:
    clock = Clock()
    book = Book(clock)
    engine = Engine(clock, times, limits, book)
    for number, (at_s, prompt, outputs) in enumerate(jobs):
        clock.at(at_s, engine.submit, Job(str(number), number, prompt, outputs))
    while clock.step():
        pass
    return book, engine


def test_a_lone_request_takes_its_prompt_then_a_step_for_each_token() -> None:
    book, _ = run([(1.0, 100, 11)], Limits())
    assert book.first_s["0"] == pytest.approx(1.0 + 0.002 + 100e-4)
    context = sum(100 + i for i in range(10))
    assert book.done_s["0"] - book.first_s["0"] == pytest.approx(10 * 0.0021 + context * 1e-7)


def test_a_long_prompt_is_cut_and_decode_goes_on_beside_it() -> None:
    limits = Limits(max_num_batched_tokens=64)
    book, engine = run([(0.0, 10, 40), (0.01, 640, 2)], limits)
    # Ten tokens or more of the first while the second is computed in eleven steps.
    assert book.first_s["1"] < book.done_s["0"]
    assert engine.num_steps > 11


def test_whole_prompts_share_a_step_as_far_as_allowed() -> None:
    times = Figures(0.0, 1.0, 0.0)
    together, _ = run([(0.0, 5, 1), (0.0, 50, 1), (0.0, 50, 1)], Limits(shared_tokens=100), times)
    assert [together.first_s[name] for name in "012"] == [1.0, 2.0, 2.0]
    apart, _ = run([(0.0, 5, 1), (0.0, 50, 1), (0.0, 50, 1)], Limits(shared_tokens=0), times)
    assert [apart.first_s[name] for name in "012"] == [1.0, 2.0, 3.0]


def test_full_memory_pre_empts_the_latest_and_all_end() -> None:
    book, engine = run([(0.0, 100, 100), (0.0, 100, 100), (0.0, 100, 100)], Limits(kv_tokens=320))
    assert engine.num_preemptions > 0
    assert len(book.done_s) == 3
    assert book.done_s["0"] < book.done_s["2"]
    assert engine.kv_used == 0


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 0.5), st.integers(1, 300), st.integers(1, 60)), min_size=1, max_size=12),
    st.integers(1, 3),
)
def test_runs_of_steps_change_nothing(jobs: list[tuple[float, int, int]], num_lanes: int) -> None:
    """The same engine that may not take several steps at once gives the same times."""
    limits = Limits(kv_tokens=1500, max_num_seqs=4, max_num_batched_tokens=128, num_lanes=num_lanes)
    quick, _ = run(jobs, limits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "_start_run", lambda *_: False)
        slow, _ = run(jobs, limits)
    for name, seconds in slow.done_s.items():
        # A run is never cut before the step that is under way ends; rounding may move a request by one step.
        assert quick.done_s[name] == pytest.approx(seconds, abs=0.01)


def test_kv_travels_while_it_is_made() -> None:
    """At 1e8 bytes/s a prompt of 1,000 tokens takes 0.1 s on the wire, as long as it takes to be made."""
    outcome = Simulation(fleet({"p": "prefill", "d": "decode"}), [Arrival(0.0, 1000, 2)], Settings()).run()
    assert outcome.ttft.mean == pytest.approx(0.1 + 4 * 0.002)
    # The last of it lands with the first token; then the way's latency and a step of decode.
    assert outcome.e2e.mean == pytest.approx(0.108 + 0.001 + 0.0021 + 1000e-7, rel=0.02)
