"""What a check has found. Pure."""

from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    """``WARNING``: it will run, worse than it could."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. ``remedy`` says what to do, unless all is well."""

    check: str
    state: State
    found: str
    remedy: str = ""


def ok(check: str, found: str) -> Finding:
    """All is well."""
    return Finding(check, State.OK, found)


def warning(check: str, found: str, remedy: str) -> Finding:
    """It will run."""
    return Finding(check, State.WARNING, found, remedy)


def failed(check: str, found: str, remedy: str) -> Finding:
    """It will not."""
    return Finding(check, State.FAILED, found, remedy)
