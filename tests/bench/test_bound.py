"""What copies allow."""

import os

import pytest

from hexgen2.bench import bound


def test_the_bound_is_the_bare_transport_until_the_processors_are_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert bound.least_s("protocol", 1.0, 1.5, 0.5) == 1.0
    assert bound.least_s("digest", 1.0, 0.8, 0.5) == 1.0
    assert bound.least_s("digest", 1.0, 1.8, 0.5) == pytest.approx(1.15)


def test_processor_time_is_of_all_threads() -> None:
    before = bound.used_s(os.getpid())
    total = sum(i * i for i in range(200_000))
    assert total > 0
    assert bound.used_s(os.getpid()) > before
    assert bound.copy_s(1 << 20, 1) > 0
