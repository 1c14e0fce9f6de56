"""One model folder for all tests of the gateway."""

from pathlib import Path

import pytest

from tests.models import make_tiny_llama
from tests.spans import spans

__all__ = ["spans"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with one token per byte; its context is what the workers say."""
    return make_tiny_llama(tmp_path_factory.mktemp("gateway") / "tiny", num_layers=1)
