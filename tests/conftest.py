"""Fixtures of every test."""

from tests.certificates import authority, stranger

__all__ = ["authority", "stranger"]
