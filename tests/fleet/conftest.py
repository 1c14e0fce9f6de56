import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The processes that a fixture starts serve all tests of a module, in the module's own event loop.
    for item in items:
        if "tests/fleet/" in str(item.path):
            item.add_marker(pytest.mark.asyncio(loop_scope="module"), append=False)
