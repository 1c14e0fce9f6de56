"""Fixtures of the coordinator's tests; see ``harness`` for what runs."""

from tests.spans import spans

__all__ = ["spans"]
