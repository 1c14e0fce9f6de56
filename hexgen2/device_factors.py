"""How much longer than planned prefill and decode take on each kind of device, from a plan's error so far. Pure."""

from collections.abc import Mapping
from statistics import median
from typing import TypeAlias

from hexgen2.calibration import Calibration, Term
from hexgen2.placement import Placement

#: By kind of device: measured over planned time of prefill, and of decode.
Factors: TypeAlias = Mapping[str, tuple[float, float]]


def device_factors(placement: Placement, calibration: Calibration) -> Factors:
    """By kind of device: measured over planned time of prefill and of decode, medians over its replicas; 1: unknown."""
    found: dict[tuple[str, Term], list[float]] = {}
    for ratio in calibration.ratios:
        replica = next((each for each in placement.replicas if each.id == ratio.replica_id), None)
        for device in {stage.gpu for stage in replica.stages} if replica else ():
            found.setdefault((device, ratio.term), []).append(ratio.ratio)
    devices = sorted({device for device, _ in found})
    return {
        device: (
            median(found.get((device, Term.PREFILL), [1.0])),
            median(found.get((device, Term.DECODE), [1.0])),
        )
        for device in devices
    }


def further(before: Factors, more: Factors) -> Factors:
    """Both one after the other: ``more`` was measured of a plan that ``before`` was in already."""
    both = {}
    for device in sorted({*before, *more}):
        (a, b), (c, d) = before.get(device, (1.0, 1.0)), more.get(device, (1.0, 1.0))
        both[device] = (a * c, b * d)
    return both
