"""Samples and the error of the plan, wire <-> domain. Bad values raise InvalidRequest naming the field."""

from collections.abc import Iterable, Mapping
from math import isfinite

from hexgen2.calibration import Calibration, Ratio, Sample, Term
from hexgen2.errors import InvalidRequest
from hexgen2.v1 import coordinator_pb2 as pb

#: Of one report, and tokens of one sample.
MAX_SAMPLES, MAX_TOKENS = 256, 1024

_TERMS: Mapping[Term, "pb.Term.ValueType"] = {
    Term.PREFILL: pb.TERM_PREFILL,
    Term.DECODE: pb.TERM_DECODE,
    Term.TRANSFER: pb.TERM_TRANSFER,
}
_TERMS_BACK = {value: key for key, value in _TERMS.items()}


def samples_to_proto(samples: Iterable[Sample]) -> list[pb.Sample]:
    """What a worker measured."""
    return [
        pb.Sample(
            term=_TERMS[each.term], seconds=each.seconds, tokens=each.tokens, batch=each.batch, peer_address=each.peer
        )
        for each in samples
    ]


def samples_from_proto(messages: Iterable[pb.Sample]) -> tuple[Sample, ...]:
    """What a worker measured; InvalidRequest for what cannot be."""
    found = []
    for number, each in enumerate(messages):
        field = f"samples.{number}"
        if number >= MAX_SAMPLES or len(each.tokens) > MAX_TOKENS:
            raise InvalidRequest(field, f"more than {MAX_SAMPLES} samples, or {MAX_TOKENS} tokens of one")
        if not all(isfinite(value) and value >= 0 for value in (each.seconds, each.batch)):
            raise InvalidRequest(field, "seconds and batch must be numbers of at least 0")
        found.append(
            Sample(_term(each.term, f"{field}.term"), each.seconds, tuple(each.tokens), each.batch, each.peer_address)
        )
    return tuple(found)


def calibration_to_proto(calibration: Calibration) -> pb.Calibration:
    """The error so far."""
    ratios = [
        pb.TermRatio(replica_id=r.replica_id, term=_TERMS[r.term], ratio=r.ratio, num_samples=r.num_samples)
        for r in calibration.ratios
    ]
    return pb.Calibration(ratios=ratios, off=calibration.off, why=calibration.why)


def calibration_from_proto(message: pb.Calibration) -> Calibration:
    """The error so far."""
    ratios = tuple(
        Ratio(each.replica_id, _term(each.term, f"ratios.{number}.term"), each.ratio, each.num_samples)
        for number, each in enumerate(message.ratios)
    )
    return Calibration(ratios, message.off, message.why)


def _term(value: "pb.Term.ValueType", field: str) -> Term:
    if value not in _TERMS_BACK:
        raise InvalidRequest(field, f"must be a known term, is {value}")
    return _TERMS_BACK[value]
