"""Who is in the fleet and the plan that follows: every prefill with every decode replica of the same model. Pure.

The plan changes (a new epoch) only with membership: who is there, where, in which role and incarnation. States and
load change without a new plan; routing looks at both. Times are seconds of the caller's monotonic clock.
"""

import re
from dataclasses import dataclass, replace
from enum import IntEnum

from hexgen2.address import parse_address
from hexgen2.errors import ConfigError, InvalidRequest, ReplicaConflict
from hexgen2.kv.codecs import NONE
from hexgen2.plan import Load, Plan, Replica, ReplicaState, ReplicaStatus, Role, Route

#: A lost replica stays listed for so long, so that people see it.
FORGET_AFTER_S = 60.0
MAX_ID_CHARS = 64

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]*")


class Change(IntEnum):
    """How much a report or the passing of time changed; larger includes smaller."""

    NOTHING = 0
    LOAD = 1
    STATE = 2
    MEMBERS = 3


@dataclass(frozen=True, slots=True)
class Member:
    """A replica, its last report and when that came."""

    replica: Replica
    status: ReplicaStatus
    seen_s: float

    @property
    def lost(self) -> bool:
        """Whether it has been silent for too long."""
        return self.status.state is ReplicaState.LOST


class FleetState:
    """See the module. After a change of MEMBERS the caller calls ``replan``.

    ``epoch`` is where epochs start: above every epoch of an earlier coordinator, such as wall-clock milliseconds.
    ``codec`` is that of every route.
    """

    def __init__(
        self, epoch: int, lost_after_s: float, forget_after_s: float = FORGET_AFTER_S, codec: str = NONE
    ) -> None:
        self.plan = Plan(epoch)
        self._lost_after_s = lost_after_s
        self._codec = codec
        self._forget_after_s = max(forget_after_s, lost_after_s)
        self._members: dict[str, Member] = {}

    @property
    def statuses(self) -> tuple[ReplicaStatus, ...]:
        """State and load of every replica, in the plan's order."""
        return tuple(self._members[key].status for key in sorted(self._members))

    def report(self, replica: Replica, state: ReplicaState, load: Load, now_s: float) -> Change:
        """Take a worker's report.

        Raises:
            InvalidRequest: a value that no worker should send.
            ReplicaConflict: the id or the address belongs to another replica that is alive.
        """
        check_replica(replica, state)
        if state is ReplicaState.LOST:
            raise InvalidRequest("state", "a replica that reports is not lost")
        self._check_conflict(replica)
        before = self._members.get(replica.replica_id)
        status = ReplicaStatus(replica.replica_id, state, load)
        self._members[replica.replica_id] = Member(replica, status, now_s)
        if before is None or before.lost or before.replica != replica:
            return Change.MEMBERS
        if before.status.state is ReplicaState.DRAINING and state is not ReplicaState.DRAINING:
            # It joins again: routes that it was denied meanwhile are due.
            return Change.MEMBERS
        if before.status.state is not state:
            return Change.STATE
        return Change.LOAD if before.status.load != load else Change.NOTHING

    def expire(self, now_s: float) -> Change:
        """Mark who has been silent for too long as lost, and forget who has been lost for long."""
        change = Change.NOTHING
        for key, member in list(self._members.items()):
            silent_s = now_s - member.seen_s
            if member.lost and silent_s >= self._forget_after_s:
                del self._members[key]
                change = Change.MEMBERS
            elif not member.lost and silent_s >= self._lost_after_s:
                status = replace(member.status, state=ReplicaState.LOST, load=Load())
                self._members[key] = replace(member, status=status)
                change = Change.MEMBERS
        return change

    def next_deadline(self) -> float | None:
        """When ``expire`` has something to do next, if nobody reports; None with nobody there."""
        return min(
            (m.seen_s + (self._forget_after_s if m.lost else self._lost_after_s) for m in self._members.values()),
            default=None,
        )

    def forgive(self, now_s: float) -> None:
        """Count nobody's silence before now: it was this process that did not listen."""
        self._members = {
            key: member if member.lost else replace(member, seen_s=now_s) for key, member in self._members.items()
        }

    def replan(self, traceparent: str = "") -> Plan:
        """Make the plan of the members as they are now, one epoch later.

        Lost replicas stay listed, so that people see them, but have no routes; draining ones get no new routes.
        """
        members = [self._members[key] for key in sorted(self._members)]
        before = {(route.prefill_replica_id, route.decode_replica_id) for route in self.plan.routes}

        def joins(p: Member, d: Member) -> bool:
            if p.lost or d.lost or not _matches(p.replica, d.replica):
                return False
            draining = ReplicaState.DRAINING in (p.status.state, d.status.state)
            return not draining or (p.replica.replica_id, d.replica.replica_id) in before

        prefills = [m for m in members if m.replica.role is Role.PREFILL]
        decodes = [m for m in members if m.replica.role is Role.DECODE]
        routes = tuple(
            Route(p.replica.replica_id, d.replica.replica_id, 1.0, self._codec)
            for p in prefills
            for d in decodes
            if joins(p, d)
        )
        self.plan = Plan(self.plan.epoch + 1, tuple(m.replica for m in members), routes, traceparent)
        return self.plan

    def _check_conflict(self, replica: Replica) -> None:
        for member in self._members.values():
            other = member.replica
            same_id, same_address = other.replica_id == replica.replica_id, other.address == replica.address
            if member.lost or same_id == same_address:
                continue
            if same_id:
                raise ReplicaConflict(
                    f"replica {replica.replica_id!r} is alive at {other.address}, and now also reports from "
                    f"{replica.address}: give each worker its own replica_id"
                )
            raise ReplicaConflict(
                f"{replica.address} is the address of replica {other.replica_id!r}, which is alive, and now also of "
                f"{replica.replica_id!r}: give each worker its own address"
            )


def check_replica(replica: Replica, state: ReplicaState) -> None:
    """Raise InvalidRequest for a replica that nobody could dial or name, or that is READY without a model."""
    if not _ID.fullmatch(replica.replica_id) or len(replica.replica_id) > MAX_ID_CHARS:
        raise InvalidRequest(
            "replica.replica_id",
            f"{replica.replica_id[:80]!r} is not 1 to {MAX_ID_CHARS} letters, digits or any of . _ : -",
        )
    try:
        host, port = parse_address(replica.address, what="replica.address")
    except ConfigError as error:
        field, _, message = str(error).partition(": ")
        raise InvalidRequest(field, message) from None
    if not port:
        raise InvalidRequest("replica.address", f"{replica.address!r} has no port")
    if host in ("0.0.0.0", "::"):
        raise InvalidRequest(
            "replica.address", f"{replica.address!r} is where it listens, not where others dial: set advertise"
        )
    if not replica.incarnation:
        raise InvalidRequest("replica.incarnation", "is empty")
    # A worker that starts does not know its model yet.
    if state is ReplicaState.READY and not replica.model_sha256:
        raise InvalidRequest("replica.model_sha256", "is empty")
    if state is ReplicaState.READY and replica.max_model_len < 1:
        raise InvalidRequest("replica.max_model_len", "0 is less than 1")


def _matches(prefill: Replica, decode: Replica) -> bool:
    """Whether KV of the one is KV of the other and both have the same transport ("ucx (tcp)" and "ucx (shm)" have)."""
    same_model = prefill.model_sha256 == decode.model_sha256 != b""
    return same_model and _kind(prefill.transport) == _kind(decode.transport)


def _kind(transport: str) -> str:
    return transport.partition(" ")[0]
