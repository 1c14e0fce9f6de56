"""What became of one request, as its client saw it. Frozen data."""

from dataclasses import dataclass
from enum import StrEnum

from benchmarks.chaos.asks import Api, Kind


class End(StrEnum):
    """How it ended."""

    ANSWERED = "answered"
    REFUSED = "refused"  #: an error before any token
    BROKEN_OFF = "broken off"  #: an error after tokens
    DEADLINE = "deadline"  #: DEADLINE_EXCEEDED
    CANCELLED = "cancelled"  #: by its client
    SILENT = "no answer"  #: none by its deadline


@dataclass(frozen=True, slots=True)
class Outcome:
    """Times are nanoseconds since the epoch, as in traces. ``wrong`` says what no right fleet would have answered."""

    number: int
    kind: Kind
    api: Api
    trace_id: str
    began_ns: int
    ended_ns: int
    end: End
    status: str
    num_tokens: int
    wrong: str = ""
    detail: str = ""
    #: When the client left, or its deadline passed: from then on nobody wants the answer.
    given_up_ns: int | None = None
