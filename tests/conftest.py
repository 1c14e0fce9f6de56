"""Fixtures of every test, and how tests share the machine."""

import pytest
from hypothesis import settings

from tests.certificates import authority, stranger

__all__ = ["authority", "stranger"]

# How long an example takes is the machine's business.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

#: Whole fleets and engines: one after the other, beside everything else, so that none of them starves another.
_PROCESSES = (
    "tests/chaos/",
    "tests/fleet/",
    "tests/cli/test_fleet",
    "tests/cli/test_planned",
    "tests/bench/test_netns",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give each file to one of ``pytest -n``'s workers, and what starts processes to the same one, first.

    Before pytest-xdist reads the groups.
    """
    groups = {item: _group(item) for item in items}
    items.sort(key=lambda item: groups[item] != "processes")
    for item, group in groups.items():
        item.add_marker(pytest.mark.xdist_group(group))


def _group(item: pytest.Item) -> str:
    path = item.path.as_posix()
    if item.get_closest_marker("vllm") or any(part in path for part in _PROCESSES):
        return "processes"
    return path
