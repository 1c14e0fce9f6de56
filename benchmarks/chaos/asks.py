"""What clients ask: a stream of requests of many kinds, the same for the same seed."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from random import Random

from benchmarks.chaos.oracle import MAX_TOKENS, Known


class Kind(StrEnum):
    """Why a request is as it is."""

    PLAIN = "plain"
    DEADLINE = "deadline"  #: the client's own, of some seconds
    HASTY = "hasty deadline"  #: mostly too short to be met
    CANCEL_EARLY = "cancel early"  #: at any time from the first millisecond on
    CANCEL_FIRST = "cancel at token 1"
    CANCEL_LATER = "cancel at token n"
    ONE_TOKEN = "one token"
    STOP_TOKEN = "stop token"
    HISTORY = "colocated"  #: sampling that depends on the output so far
    OVERSIZE = "larger than a pool"
    CHECK = "check"  #: asked of a fleet that has been left alone


class Api(StrEnum):
    """By what."""

    GRPC = "grpc"
    HTTP = "http"
    SSE = "sse"


_WEIGHTS = {
    Kind.PLAIN: 50,
    Kind.DEADLINE: 10,
    Kind.HASTY: 6,
    Kind.CANCEL_EARLY: 9,
    Kind.CANCEL_FIRST: 5,
    Kind.CANCEL_LATER: 5,
    Kind.ONE_TOKEN: 4,
    Kind.STOP_TOKEN: 6,
    Kind.HISTORY: 4,
    Kind.OVERSIZE: 1,
}
CANCELLED = (Kind.CANCEL_EARLY, Kind.CANCEL_FIRST, Kind.CANCEL_LATER)


@dataclass(frozen=True, slots=True)
class Ask:
    """One request. ``cancel_after_s`` and ``cancel_after_tokens``: when the client leaves."""

    number: int
    kind: Kind
    api: Api
    known: Known
    max_tokens: int
    stop_token: int | None = None
    seed: int | None = None
    logprobs: int | None = None
    timeout_s: float | None = None
    cancel_after_s: float | None = None
    cancel_after_tokens: int | None = None


def asks(known: Sequence[Known], oversize: Sequence[Known], seed: int, without: Collection[Kind] = ()) -> Iterator[Ask]:
    """Requests without end, of all kinds but those ``without``."""
    number = 0
    kinds = [kind for kind in _WEIGHTS if kind not in without]
    weights = [_WEIGHTS[kind] for kind in kinds]
    while True:
        number += 1
        random = Random(f"{seed}/{number}")
        kind = random.choices(kinds, weights)[0]
        if kind is Kind.OVERSIZE and not oversize:
            kind = Kind.PLAIN
        yield _ask(number, kind, random.choice(oversize if kind is Kind.OVERSIZE else known), random)


def check(number: int, known: Known) -> Ask:
    """A plain request."""
    return Ask(number, Kind.CHECK, Api.GRPC, known, 8)


def _ask(number: int, kind: Kind, known: Known, random: Random) -> Ask:
    api = random.choices([Api.GRPC, Api.SSE, Api.HTTP], [85, 10, 5])[0]
    max_tokens = random.randint(2, 16)
    cancel_after_s = timeout_s = None
    cancel_after_tokens = stop_token = None
    match kind:
        case Kind.ONE_TOKEN:
            max_tokens = 1
        case Kind.STOP_TOKEN:
            max_tokens = MAX_TOKENS
            # The very first token too: then decode is not needed.
            stop_token = known.answer[random.choice((0, 1, 2, 5, 11))]
        case Kind.DEADLINE:
            api, timeout_s = Api.GRPC, random.uniform(4.0, 15.0)
        case Kind.HASTY:
            api, timeout_s = Api.GRPC, random.uniform(0.005, 0.3)
        case Kind.CANCEL_EARLY:
            max_tokens, cancel_after_s = MAX_TOKENS, random.uniform(0.001, 0.25)
        case Kind.CANCEL_FIRST:
            max_tokens, cancel_after_tokens = MAX_TOKENS, 1
        case Kind.CANCEL_LATER:
            max_tokens, cancel_after_tokens = MAX_TOKENS, random.randint(2, 12)
        case _:
            pass
    if cancel_after_tokens is not None and api is Api.HTTP:
        api = Api.SSE
    return Ask(
        number,
        kind,
        api,
        known,
        max_tokens,
        stop_token=stop_token,
        seed=random.randrange(1 << 32) if random.random() < 0.2 else None,
        logprobs=random.choice((0, 1)) if random.random() < 0.15 else None,
        timeout_s=timeout_s,
        cancel_after_s=cancel_after_s,
        cancel_after_tokens=cancel_after_tokens,
    )
