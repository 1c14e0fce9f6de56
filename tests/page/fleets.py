"""A fleet to look at, made up: what of it comes from outside is as bad as it can be."""

from dataclasses import replace
from typing import Any

from hexgen2.coordinator.assignment import assignment_of
from hexgen2.coordinator.page.view import Fleet
from hexgen2.plan import (
    GatewayLoad,
    KvReceived,
    Load,
    Measured,
    Plan,
    PlanChange,
    Replica,
    ReplicaState,
    ReplicaStatus,
    Role,
    RouteLoad,
)
from tests.placements import mixed

#: Nobody may register so, but a page should not depend on it.
EVIL = "<img src=x onerror=alert(1)>\"'&"


def replica(replica_id: str, role: Role, **changes: Any) -> Replica:
    made = Replica(replica_id, role, "10.0.0.7:5000", "m", b"m", "first", 1024, "tcp")
    return replace(made, **changes)


def fleet(**changes: Any) -> Fleet:
    """p hands over to d, c serves whole requests: half of what is planned of each, over a minute."""
    placement = mixed()
    assignment = assignment_of(placement)
    members = tuple(replica(key, role) for key, role in sorted(assignment.roles.items()))
    load = Load(2, 1, 25, 100, KvReceived(6_000_000, 3.0, 60))
    made = Fleet(
        unix_s=1_000_000.0,
        plan=Plan(7, members, assignment.routes, prediction=assignment.prediction),
        statuses={each.replica_id: ReplicaStatus(each.replica_id, ReplicaState.READY, Load()) for each in members}
        | {"d": ReplicaStatus("d", ReplicaState.READY, load)},
        gateways=(
            GatewayLoad(
                "g",
                (RouteLoad("p", "d", 3, 60), RouteLoad("c", "c", 1, 30)),
                Measured(60.0, 95, 90, 0, 100.0, 10.0, 0.55, 0.08),
            ),
        ),
        placement=placement,
        changes=(PlanChange(999_000.0, 6, "applied", "by a person"), PlanChange(999_990.0, 7, "members", "d is back")),
    )
    return replace(made, **changes)


def evil() -> Fleet:
    """The same, and every text of it is EVIL."""
    members = (replica(EVIL, Role.DECODE, model=EVIL, transport=EVIL, address=EVIL),)
    made = fleet(placement=None)
    return replace(
        made,
        plan=Plan(7, members),
        statuses={EVIL: ReplicaStatus(EVIL, ReplicaState.READY, Load())},
        gateways=(GatewayLoad(EVIL, (RouteLoad(EVIL, EVIL, 1, 1),), Measured(60.0, 1, 1)),),
        changes=(PlanChange(1.0, 7, EVIL, EVIL),),
    )
