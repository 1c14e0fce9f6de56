"""Chaos: a fleet of real processes under load and faults, every answer checked. ``python -m benchmarks.chaos``."""
