"""The error of the plan in force: what it foretells, what workers measure, and how far the two are apart. Pure."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from hexgen2.calibration import Calibration, Calibrator, Sample, Times
from hexgen2.placement import Placement, from_json


def times_of(placement: Placement) -> dict[str, Times]:
    """What a plan foretells, by replica id; nothing of replicas that it says nothing of."""
    mean = placement.mean_prompt_tokens
    found = {}
    for replica in placement.replicas:
        # The next prompt begins when the busiest part of a pipeline is free, not when this one is through.
        times = replica.times
        prefill = {size: seconds * times.busiest for size, seconds in times.prefill.items()} if times else {}
        routes = (route for route in placement.routes if route.decode == replica.id and mean)
        found[replica.id] = Times(
            prefill=prefill,
            decode=times.decode if times else {},
            transfer={route.prefill: route.transfer_s / mean for route in routes if mean},
        )
    return found


class Promises:
    """Of whichever plan is in force. A new plan begins without errors: its figures may be others."""

    def __init__(self) -> None:
        self._text = ""
        self._calibrator = Calibrator({})
        self.calibration = Calibration()

    def follow(self, plan_json: str) -> None:
        """That is the plan in force now; "": none."""
        if plan_json != self._text:
            self._text = plan_json
            self._calibrator = Calibrator(times_of(from_json(plan_json)) if plan_json else {})
            self.calibration = Calibration()

    def add(self, replica_id: str, samples: Iterable[Sample], ids: Mapping[str, str]) -> bool:
        """Take a report; ``ids`` are replicas' by their address. True when it has just become off, or is so no more."""
        named = (replace(each, peer=ids.get(each.peer, each.peer)) if each.peer else each for each in samples)
        if not self._calibrator.add(replica_id, named):
            return False
        before, self.calibration = self.calibration, self._calibrator.calibration()
        return before.off is not self.calibration.off
