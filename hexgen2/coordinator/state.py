"""Who is in the fleet and the plan that follows. Pure.

The plan changes (a new epoch) only with membership and roles: who is there, where, as what and in which incarnation.
States and load change without a new plan; routing looks at both. With an ``Assignment`` roles and routes are its own;
without one every prefill hands over to every decode replica. Times are seconds of the caller's monotonic clock.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from math import inf

from hexgen2.coordinator.assignment import Assignment, all_routes, routes_among
from hexgen2.coordinator.replica_check import check_replica, compatible
from hexgen2.errors import InvalidRequest, ReplicaConflict, ReplicaMismatch
from hexgen2.kv.codecs import NONE
from hexgen2.plan import Load, Plan, PlanChange, Replica, ReplicaState, ReplicaStatus, Role, Route

#: A lost replica stays listed for so long, so that people see it.
FORGET_AFTER_S = 60.0
#: Changes of the plan that are remembered.
MAX_CHANGES = 20
#: Incarnations of one replica that are remembered as replaced.
MAX_REPLACED = 8


class Change(IntEnum):
    """How much a report or the passing of time changed; larger includes smaller."""

    NOTHING = 0
    LOAD = 1
    STATE = 2
    MEMBERS = 3


@dataclass(frozen=True, slots=True)
class Member:
    """A replica in its assigned role since ``role_epoch``, its last report and when that came."""

    replica: Replica
    status: ReplicaStatus
    seen_s: float
    role_epoch: int = 0

    @property
    def lost(self) -> bool:
        """Whether it has been silent for too long."""
        return self.status.state is ReplicaState.LOST


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that a coordinator must know to go on where another ended: the plan, and each replica's state by id."""

    plan: Plan
    states: Mapping[str, ReplicaState]
    role_epochs: Mapping[str, int]
    #: The placement (``placement.to_json``) that was applied last, and the one that was configured then; "": none.
    applied: str = ""
    configured: str = ""


class FleetState:
    """See the module. After a change of MEMBERS the caller calls ``replan``.

    ``epoch`` is where epochs start: above every epoch of an earlier coordinator, such as wall-clock milliseconds.
    ``version`` is the software's; every worker's must be of the same release line; empty: any. ``codec`` is that of
    every route that no assignment gives one.
    """

    def __init__(
        self,
        epoch: int,
        lost_after_s: float,
        forget_after_s: float = FORGET_AFTER_S,
        *,
        assignment: Assignment | None = None,
        version: str = "",
        codec: str = NONE,
    ) -> None:
        self.plan = Plan(epoch)
        #: As in a snapshot; the caller's to set, told back in snapshots.
        self.applied = self.configured = ""
        #: Its last changes by who came, went or changed roles, oldest first. Who applies a plan tells why elsewhere.
        self.changes: tuple[PlanChange, ...] = ()
        # What has happened since.
        self._happened: list[str] = []
        self._assignment = assignment
        self._version = version
        self._lost_after_s = lost_after_s
        self._codec = codec
        self._forget_after_s = max(forget_after_s, lost_after_s)
        self._members: dict[str, Member] = {}
        # Who was told to leave: its incarnation, and when its machine goes.
        self._leaving: dict[str, tuple[str, float]] = {}
        # Incarnations that another one of the same id has taken the place of, newest last.
        self._replaced: dict[str, tuple[str, ...]] = {}

    @property
    def statuses(self) -> tuple[ReplicaStatus, ...]:
        """State and load of every replica, in the plan's order."""
        return tuple(self._members[key].status for key in sorted(self._members))

    def member(self, replica_id: str) -> Member | None:
        """Who has that id, if anybody."""
        return self._members.get(replica_id)

    @property
    def snapshot(self) -> Snapshot:
        """What ``restore`` takes."""
        return Snapshot(
            self.plan,
            {key: member.status.state for key, member in self._members.items()},
            {key: member.role_epoch for key, member in self._members.items()},
            self.applied,
            self.configured,
        )

    def restore(self, snapshot: Snapshot, now_s: float) -> Change:
        """Go on from a snapshot: the same epoch, and every replica has until it counts as lost to report again.

        MEMBERS when the assignment is another than that of the snapshot's plan.
        """
        self.plan = snapshot.plan
        for replica in snapshot.plan.replicas:
            key = replica.replica_id
            status = ReplicaStatus(key, snapshot.states.get(key, ReplicaState.LOST), Load())
            self._members[key] = Member(replica, status, now_s, snapshot.role_epochs.get(key, 0))
        before = self._content(self.plan)
        if self._content(self._next_plan("")) == before:
            return Change.NOTHING
        self._happened.append("the coordinator was started with another plan")
        return Change.MEMBERS

    def report(self, replica: Replica, state: ReplicaState, load: Load, now_s: float) -> Change:
        """Take a worker's report.

        Raises:
            InvalidRequest: a value that no worker should send.
            ReplicaConflict: the id or the address belongs to another replica that is alive.
            ReplicaMismatch: another model, version or role than the fleet's.
        """
        check_replica(replica, state)
        if state is ReplicaState.LOST:
            raise InvalidRequest("state", "a replica that reports is not lost")
        before = self._members.get(replica.replica_id)
        if state is ReplicaState.STOPPED:
            return self._leave(replica, before)
        self._check_conflict(replica)
        self._check_match(replica)
        replica = replace(replica, role=self._role(replica, before))
        if before is not None and before.replica.incarnation != replica.incarnation:
            replaced = (*self._replaced.get(replica.replica_id, ()), before.replica.incarnation)
            # One that was replaced may be there again, once its successor is lost.
            others = [each for each in replaced if each != replica.incarnation]
            self._replaced[replica.replica_id] = tuple(others[-MAX_REPLACED:])
        if self.leave_within_s(replica.replica_id, now_s, replica.incarnation) is not None:
            # It may not have heard of it yet.
            state = ReplicaState.DRAINING
        status = ReplicaStatus(replica.replica_id, state, load)
        same_role = before is not None and before.replica.role is replica.role
        epoch = before.role_epoch if before is not None and same_role else self.plan.epoch + 1
        self._members[replica.replica_id] = Member(replica, status, now_s, epoch)
        if before is None:
            self._happened.append(f"{replica.replica_id} registered as {replica.role}")
            return Change.MEMBERS
        if joined := _joined(before, replica, state):
            self._happened.append(f"{replica.replica_id} {joined}")
            return Change.MEMBERS
        if before.status.state is not state:
            return Change.STATE
        return Change.LOAD if before.status.load != load else Change.NOTHING

    def preempt(self, replica_id: str, grace_s: float, now_s: float) -> Change:
        """The machine of a replica goes in ``grace_s``: it drains from now on.

        Raises:
            InvalidRequest: nobody of that id is here, or there is no time.
        """
        member = self._members.get(replica_id)
        if member is None or member.lost:
            here = ", ".join(key for key in sorted(self._members) if not self._members[key].lost)
            raise InvalidRequest("replica_id", f"{replica_id[:80]!r} is not here; there are: {here or 'none'}")
        if not 0 < grace_s < inf:
            raise InvalidRequest("grace_s", f"{grace_s:g} is not a time greater than 0")
        self._leaving[replica_id] = member.replica.incarnation, now_s + grace_s
        status = replace(member.status, state=ReplicaState.DRAINING)
        self._members[replica_id] = replace(member, status=status)
        return Change.STATE

    def leave_within_s(self, replica_id: str, now_s: float, incarnation: str = "") -> float | None:
        """How long a replica that was told to leave has; None for all others, also for one that was started anew."""
        member = self._members.get(replica_id)
        leaving, until_s = self._leaving.get(replica_id, ("", 0.0))
        now_there = incarnation or (member.replica.incarnation if member is not None else "")
        return max(0.0, until_s - now_s) if leaving and leaving == now_there else None

    def expire(self, now_s: float) -> Change:
        """Mark who has been silent for too long as lost, and forget who has been lost for long."""
        change = Change.NOTHING
        for key, member in list(self._members.items()):
            silent_s = now_s - member.seen_s
            if member.lost and silent_s >= self._forget_after_s:
                self._forget(key)
                self._happened.append(f"{key} has been lost for {silent_s:.0f} s and is forgotten")
                change = Change.MEMBERS
            elif not member.lost and silent_s >= self._lost_after_s:
                status = replace(member.status, state=ReplicaState.LOST, load=Load())
                self._members[key] = replace(member, status=status)
                self._happened.append(f"{key} is lost: nothing heard for {silent_s:.0f} s")
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

    def replan(self, traceparent: str = "", unix_s: float = 0.0) -> Plan:
        """Make the plan of the members as they are now, one epoch later, which is remembered with what happened.

        Lost replicas stay listed, so that people see them, but have no routes; draining ones get no new routes.
        """
        self.plan = self._next_plan(traceparent)
        if self._happened:
            change = PlanChange(unix_s, self.plan.epoch, "members", "; ".join(self._happened))
            self.changes = (*self.changes, change)[-MAX_CHANGES:]
            self._happened.clear()
        return self.plan

    def assign(self, assignment: Assignment | None) -> None:
        """Follow another assignment from the next ``replan`` on, which is due; flexible replicas change their roles.

        Raises:
            ReplicaMismatch: it names replicas that are not here, or has one do what it cannot; nothing has changed.
        """
        alive = {key for key, member in self._members.items() if not member.lost}
        missing = sorted(set(assignment.roles) - alive) if assignment else []
        if missing:
            raise ReplicaMismatch(
                f"the plan has {', '.join(missing)}, and this fleet {', '.join(sorted(alive)) or 'nobody'}: start what "
                f"is missing, or plan for the replicas that are here"
            )
        before, self._assignment = self._assignment, assignment
        try:
            roles = {key: self._role(member.replica, member) for key, member in self._members.items()}
        except ReplicaMismatch:
            self._assignment = before
            raise
        for key, member in self._members.items():
            if roles[key] is not member.replica.role:
                self._happened.append(f"{key} changes from {member.replica.role} to {roles[key]}")
                replica = replace(member.replica, role=roles[key])
                self._members[key] = replace(member, replica=replica, role_epoch=self.plan.epoch + 1)

    def _next_plan(self, traceparent: str) -> Plan:
        members = [self._members[key] for key in sorted(self._members)]
        alive = [member.replica for member in members if not member.lost]
        assignment = self._assignment
        found = (
            all_routes(alive, _matches, self._codec)
            if assignment is None
            else routes_among(assignment, alive, _matches, self._codec)
        )
        before = {(route.prefill_replica_id, route.decode_replica_id) for route in self.plan.routes}
        draining = {m.replica.replica_id for m in members if m.status.state is ReplicaState.DRAINING}

        def stays(route: Route) -> bool:
            ends = (route.prefill_replica_id, route.decode_replica_id)
            return ends in before or draining.isdisjoint(ends)

        return Plan(
            self.plan.epoch + 1,
            tuple(member.replica for member in members),
            tuple(filter(stays, found)),
            traceparent,
            assignment.colocate_max_prompt_tokens if assignment else 0,
            assignment.prediction if assignment else None,
        )

    @staticmethod
    def _content(plan: Plan) -> Plan:
        return replace(plan, epoch=0, traceparent="")

    def _role(self, replica: Replica, before: Member | None) -> Role:
        """The assignment's, where there is one; else a flexible replica keeps the role that it has."""
        role = self._assignment.roles.get(replica.replica_id) if self._assignment else None
        shape = self._assignment.shapes.get(replica.replica_id) if self._assignment else None
        if shape is not None and (differs := shape.difference(replica)):
            raise ReplicaMismatch(
                f"replica {replica.replica_id!r} is not as the plan has it: {differs}: start it as planned "
                f"(`hexgen2 up PLAN`), or plan for the hardware that is there"
            )
        if not replica.flexible:
            if role is not None and role is not replica.role and not _stands_in(replica.role, role):
                raise ReplicaMismatch(
                    f"replica {replica.replica_id!r} can only do {replica.role}, and the plan has it {role}: start it "
                    f"with role: {'flexible' if role is Role.COLOCATED else role}, or with another replica_id"
                )
            return role or replica.role
        if role is not None:
            return role
        return before.replica.role if before is not None and before.replica.flexible else replica.role

    def _leave(self, replica: Replica, before: Member | None) -> Change:
        # Whoever took its place stays.
        if before is None or before.replica.incarnation != replica.incarnation:
            return Change.NOTHING
        self._forget(replica.replica_id)
        self._happened.append(f"{replica.replica_id} has stopped")
        return Change.MEMBERS

    def _forget(self, replica_id: str) -> None:
        del self._members[replica_id]
        self._replaced.pop(replica_id, None)
        self._leaving.pop(replica_id, None)

    def _check_conflict(self, replica: Replica) -> None:
        for member in self._members.values():
            other = member.replica
            same_id, same_address = other.replica_id == replica.replica_id, other.address == replica.address
            if member.lost or not (same_id or same_address):
                continue
            if same_id and same_address:
                if replica.incarnation in self._replaced.get(replica.replica_id, ()):
                    raise ReplicaConflict(
                        f"replica {replica.replica_id!r} at {other.address} was started anew since this process began, "
                        f"and both report: stop one of them, or give each its own replica_id and address"
                    )
            elif same_id:
                raise ReplicaConflict(
                    f"replica {replica.replica_id!r} is alive at {other.address}, and now also reports from "
                    f"{replica.address}: give each worker its own replica_id"
                )
            else:
                raise ReplicaConflict(
                    f"{replica.address} is the address of replica {other.replica_id!r}, which is alive, and now also "
                    f"of {replica.replica_id!r}: give each worker its own address"
                )

    def _check_match(self, replica: Replica) -> None:
        name = replica.replica_id
        if self._version and not compatible(replica.version, self._version):
            raise ReplicaMismatch(
                f"replica {name!r} runs hexgen2 {replica.version or 'of an unknown version'}, this coordinator "
                f"{self._version}: they work together only where all but the last number is the same"
            )
        for member in self._members.values():
            other = member.replica
            if member.lost or other.replica_id == name or not (other.model_sha256 and replica.model_sha256):
                continue
            if other.model_sha256 != replica.model_sha256:
                raise ReplicaMismatch(
                    f"replica {name!r} serves {replica.model} ({replica.model_sha256.hex()[:12]}), this fleet serves "
                    f"{other.model} ({other.model_sha256.hex()[:12]}, {other.replica_id!r}): start it with the same "
                    f"model folder and dtype, or stop the others first"
                )


def _joined(before: Member, replica: Replica, state: ReplicaState) -> str:
    """What happened, when a report means that the plan is another; else empty."""
    if before.lost:
        return "is back"
    if before.replica.incarnation != replica.incarnation:
        return "was started anew"
    if before.replica.role is not replica.role:
        return f"changes from {before.replica.role} to {replica.role}"
    if before.replica != replica:
        return "has loaded its model" if not before.replica.model_sha256 else "says other things of itself"
    if before.status.state is ReplicaState.DRAINING and state is not ReplicaState.DRAINING:
        # Routes that it was denied meanwhile are due.
        return "joins again"
    return ""


def _stands_in(able: Role, planned: Role) -> bool:
    """A decode worker serves whole requests as well as one that is planned for them."""
    return able is Role.DECODE and planned is Role.COLOCATED


def _matches(prefill: Replica, decode: Replica) -> bool:
    """Whether KV of the one is KV of the other and both have the same transport ("ucx (tcp)" and "ucx (shm)" have)."""
    same_model = prefill.model_sha256 == decode.model_sha256 != b""
    return same_model and _kind(prefill.transport) == _kind(decode.transport)


def _kind(transport: str) -> str:
    return transport.partition(" ")[0]
