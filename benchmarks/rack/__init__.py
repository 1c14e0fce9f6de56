"""A rack on one machine: three hosts made of containers, installed, upgraded under load and removed by the playbooks.

``python -m benchmarks.rack --help``; docs/operations.md has what came of it.
"""
