"""What gateways reported lately: each by its id, forgotten once it is silent. Pure; times are one clock's."""

from collections.abc import Iterable

from hexgen2.plan import GatewayLoad, Measured

#: A gateway reports once a second; one that has been silent for so long has nothing in flight any more.
SILENT_S = 5.0
#: More gateways than any fleet has: beyond them the one that was silent for longest makes room.
MAX_GATEWAYS = 256


class GatewayLoads:
    """See the module."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[GatewayLoad, float]] = {}

    def report(self, load: GatewayLoad, now_s: float) -> None:
        """Take a gateway's report in place of its last one."""
        self._seen.pop(load.gateway_id, None)
        self._seen[load.gateway_id] = load, now_s
        if len(self._seen) > MAX_GATEWAYS:
            self._seen.pop(next(iter(self._seen)))

    def current(self, now_s: float) -> tuple[GatewayLoad, ...]:
        """Of the gateways that are not silent, by id."""
        self._seen = {key: entry for key, entry in self._seen.items() if now_s - entry[1] < SILENT_S}
        return tuple(self._seen[key][0] for key in sorted(self._seen))


def together(loads: Iterable[GatewayLoad]) -> Measured:
    """What several gateways measure as one: counts added, means by what finished, the longest of their windows."""
    parts = [load.measured for load in loads]
    finished = sum(part.num_finished for part in parts)

    def mean(name: str) -> float:
        return sum(getattr(part, name) * part.num_finished for part in parts) / finished if finished else 0.0

    return Measured(
        window_s=max((part.window_s for part in parts), default=0.0),
        num_arrived=sum(part.num_arrived for part in parts),
        num_finished=finished,
        num_failed=sum(part.num_failed for part in parts),
        mean_prompt_tokens=mean("mean_prompt_tokens"),
        mean_output_tokens=mean("mean_output_tokens"),
        mean_ttft_s=mean("mean_ttft_s"),
        mean_tpot_s=mean("mean_tpot_s"),
    )
