"""Fixtures of every test, and how tests share the machine."""

import pytest
from hypothesis import settings
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from tests.certificates import authority, stranger

__all__ = ["authority", "stranger"]

# How long an example takes is the machine's business.
settings.register_profile("untimed", deadline=None)
settings.register_profile("same", deadline=None, derandomize=True)
settings.load_profile("untimed")

#: Fleets that share the machine with faults or with vLLM: one after the other, beside everything else, so that none of
#: them starves another.
_PROCESSES = (
    *("tests/chaos/", "tests/fleet/"),
    *("tests/cli/test_fleet", "tests/cli/test_planned", "tests/bench/test_netns", "/test_vllm"),
)


class _Scheduling(LoadScopeScheduling):
    """A file is run by one of ``pytest -n``'s workers, and all that start processes by the same one."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::", 1)[0]
        return "processes" if any(part in file for part in _PROCESSES) else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    """What ``pytest -n`` distributes tests by."""
    return _Scheduling(config, log)
