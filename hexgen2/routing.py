"""Which route the next request takes: by the plan's flow, corrected by what is in flight and by KV memory. Pure.

Each pick gives every usable route its share of one request (its flow's fraction) and takes the route that is owed
most, so that any run of picks is within a few requests of the plan's proportions (no randomness). What a
route has in flight beyond its share counts against it: a slow replica gets less until it has caught up. So does KV
memory that is nearly full at either end. A route from a replica to itself is a request served there as a whole.
"""

from collections.abc import Mapping
from typing import TypeAlias

from hexgen2.plan import Load, Plan, ReplicaState, ReplicaStatus, Role, Route

#: (prefill replica id, decode replica id).
RouteKey: TypeAlias = tuple[str, str]

#: Requests that a route may be owed at most. Unhurried picks stay within it; it bounds what a replica that was
#: passed over for being slow can claim once it is fast again.
MAX_OWED = 2.0

#: KV memory in use counts from this share on, and when all of it is, as much as so many requests in flight.
CROWDED = 0.75
FULL_COUNTS = 8.0

_NOTHING: Mapping[RouteKey, float] = {}


def route_key(route: Route) -> RouteKey:
    """The key of a route, stable over epochs."""
    return route.prefill_replica_id, route.decode_replica_id


def ready(statuses: Mapping[str, ReplicaStatus], replica_id: str) -> bool:
    """Whether the replica takes requests now."""
    status = statuses.get(replica_id)
    return status is not None and status.state is ReplicaState.READY


def usable_routes(
    plan: Plan, statuses: Mapping[str, ReplicaStatus], exclude: frozenset[str] = frozenset()
) -> tuple[Route, ...]:
    """Routes with flow whose both ends are READY and not in ``exclude`` (replica ids), in the plan's order."""
    return tuple(
        route
        for route in plan.routes
        if route.flow > 0 and all(ready(statuses, end) and end not in exclude for end in route_key(route))
    )


def pick(
    plan: Plan,
    statuses: Mapping[str, ReplicaStatus],
    in_flight: Mapping[RouteKey, int],
    exclude: frozenset[str] = frozenset(),
    owed: Mapping[RouteKey, float] = _NOTHING,
) -> Route | None:
    """The route of the next request; None when none is usable. The same arguments give the same route.

    ``in_flight`` is what runs on each route, as far as the caller knows; ``owed`` what earlier picks left (``Router``
    keeps it).
    """
    routes = usable_routes(plan, statuses, exclude)
    if not routes:
        return None
    shares = _shares(routes)
    total = sum(in_flight.get(key, 0) for key in shares)

    def claim(route: Route) -> float:
        key = route_key(route)
        excess = in_flight.get(key, 0) - shares[key] * total
        crowding = sum(crowded(statuses[end].load) for end in dict.fromkeys(key))
        return shares[key] + owed.get(key, 0.0) - excess - FULL_COUNTS * crowding

    # max() keeps the first of equals: the plan's order decides.
    return max(routes, key=claim)


def crowded(load: Load) -> float:
    """How full the KV memory of a replica is: 0 up to ``CROWDED`` of it, 1 when there is no room."""
    if not load.kv_pool_bytes_total:
        return 0.0
    used = load.kv_pool_bytes_used / load.kv_pool_bytes_total
    return min(1.0, max(0.0, used - CROWDED) / (1.0 - CROWDED))


class Router:
    """``pick`` with a memory of what each route is owed. One per gateway; no clock, no I/O."""

    def __init__(self) -> None:
        self._owed: dict[RouteKey, float] = {}

    def pick(
        self,
        plan: Plan,
        statuses: Mapping[str, ReplicaStatus],
        in_flight: Mapping[RouteKey, int],
        exclude: frozenset[str] = frozenset(),
    ) -> Route | None:
        """As the function, and remember the pick."""
        picked = pick(plan, statuses, in_flight, exclude, self._owed)
        if picked is None:
            return None
        planned = {route_key(route) for route in plan.routes}
        self._owed = {key: owed for key, owed in self._owed.items() if key in planned}
        for key, share in _shares(usable_routes(plan, statuses, exclude)).items():
            owed = self._owed.get(key, 0.0) + share - (key == route_key(picked))
            self._owed[key] = min(max(owed, -MAX_OWED), MAX_OWED)
        return picked


def pick_colocated(
    plan: Plan,
    statuses: Mapping[str, ReplicaStatus],
    in_flight: Mapping[str, int],
    exclude: frozenset[str] = frozenset(),
) -> str | None:
    """The READY replica that decodes, with the least in flight (by replica id), then by reported load; None if none.

    Where nobody who decodes is left, a flexible prefill replica does: it serves whole requests as well.
    """
    able = [r for r in plan.replicas if ready(statuses, r.replica_id) and r.replica_id not in exclude]
    able = [r for r in able if r.role is not Role.PREFILL] or [r for r in able if r.flexible]

    def busy(replica_id: str) -> tuple[int, int]:
        load: Load = statuses[replica_id].load
        return in_flight.get(replica_id, 0), load.num_requests_running + load.num_requests_waiting

    return min((each.replica_id for each in able), key=busy, default=None)


def short_enough(plan: Plan, prompt_tokens: int) -> bool:
    """Whether the plan has such a prompt answered by a decode replica alone, as long as one is calm (``calm``)."""
    return 0 < prompt_tokens <= plan.colocate_max_prompt_tokens


def calm(load: Load) -> bool:
    """Whether nobody waits there and KV memory has room: a prompt more delays those in flight by its own time only."""
    return not load.num_requests_waiting and not crowded(load)


def _shares(routes: tuple[Route, ...]) -> dict[RouteKey, float]:
    total = sum(route.flow for route in routes)
    return {route_key(route): route.flow / total for route in routes}
