import gc
from collections.abc import Iterator

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # vLLM, torch and transformers warn about their own innards, wherever they are first used.
    for item in items:
        if item.get_closest_marker("vllm"):
            item.add_marker(pytest.mark.filterwarnings("ignore"))


@pytest.fixture(scope="module", autouse=True)
def _collected() -> Iterator[None]:
    """What vLLM leaves unclosed is found here, where that is no error, and not at the end of the session."""
    yield
    gc.collect()
