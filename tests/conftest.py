"""Fixtures of every test."""

from hypothesis import settings

from tests.certificates import authority, stranger

__all__ = ["authority", "stranger"]

# How long an example takes is the machine's business.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
