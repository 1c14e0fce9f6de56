"""What a simulation is made of: replicas, routes between them, and the links that KV passes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from hexgen2.kv.codecs import NONE
from hexgen2.plan import Route
from hexgen2.simulator.engine import Limits
from hexgen2.simulator.links import Path
from hexgen2.simulator.step_times import StepTimes

#: Pages when nothing limits them.
PLENTY = 1_000_000


class Arrival(NamedTuple):
    """A request: when it comes, and its lengths."""

    time_s: float
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class ReplicaSpec:
    """A replica in one role: what its steps take, what it may do at once, the pages of its send and staging pools."""

    times: StepTimes
    limits: Limits
    send_pages: int = PLENTY
    staging_pages: int = PLENTY
    #: GPUs, for the report.
    num_gpus: int = 1


class Blueprint(Protocol):
    """See the module. A role is "prefill", "decode" or "colocated"."""

    @property
    def roles(self) -> Mapping[str, str]:
        """By replica, at the start."""

    @property
    def routes(self) -> tuple[Route, ...]:
        """At the start. One from a replica to itself: requests are served there as a whole."""

    @property
    def bandwidths(self) -> Mapping[Any, float]:
        """Bytes per second of each wire, whatever wires are called."""

    def replica(self, replica_id: str, role: str) -> ReplicaSpec:
        """A replica in a role, which need not be its first. Raises ConfigError when it cannot have it."""

    def reroute(self, roles: Mapping[str, str]) -> tuple[Route, ...]:
        """Routes when the roles are these."""

    def path(self, prefill_id: str, decode_id: str) -> Path:
        """What KV passes between two replicas."""

    def wire_bytes(self, codec: str, num_tokens: int) -> float:
        """KV of a prompt as it travels."""


@dataclass(frozen=True)
class Given:
    """A blueprint all of whose parts are given: for closed forms, for engines that were measured, for tests.

    Every replica is the same in every role that ``specs`` has for it.
    """

    roles: Mapping[str, str]
    specs: Mapping[tuple[str, str], ReplicaSpec]
    routes: tuple[Route, ...]
    bandwidths: Mapping[Any, float] = field(default_factory=dict)
    paths: Mapping[tuple[str, str], Path] = field(default_factory=dict)
    kv_bytes_per_token: float = 0.0

    def replica(self, replica_id: str, role: str) -> ReplicaSpec:
        """See ``Blueprint``."""
        return self.specs[replica_id, role]

    def reroute(self, roles: Mapping[str, str]) -> tuple[Route, ...]:
        """Every prefill replica to every decode replica, each colocated one to itself, alike."""
        senders = [name for name, role in roles.items() if role == "prefill"]
        receivers = [name for name, role in roles.items() if role == "decode"]
        alone = [name for name, role in roles.items() if role == "colocated"]
        pairs = [(a, b) for a in senders for b in receivers] + [(name, name) for name in alone]
        return tuple(Route(a, b, 1.0, NONE) for a, b in pairs)

    def path(self, prefill_id: str, decode_id: str) -> Path:
        """See ``Blueprint``."""
        return self.paths.get((prefill_id, decode_id), Path())

    def wire_bytes(self, codec: str, num_tokens: int) -> float:
        """See ``Blueprint``; the codec is not looked at."""
        return self.kv_bytes_per_token * num_tokens
