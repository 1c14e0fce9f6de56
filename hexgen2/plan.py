"""A plan: which replicas there are, and which prefill hands over to which decode. Frozen data and its invariants."""

from dataclasses import dataclass
from enum import StrEnum

from hexgen2.kv.codecs import NONE


class Role(StrEnum):
    """The phase that a replica serves."""

    PREFILL = "prefill"
    DECODE = "decode"


class ReplicaState(StrEnum):
    """As its worker reports it; lost when it reports no more."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class Replica:
    """One whole copy of the model in one role. ``address`` is host:port of its gRPC service."""

    replica_id: str
    role: Role
    address: str
    model: str
    model_sha256: bytes
    incarnation: str
    max_model_len: int
    transport: str
    #: host:port of its Prometheus metrics; empty when it serves none.
    metrics_address: str = ""


@dataclass(frozen=True, slots=True)
class Load:
    """What a replica is busy with."""

    num_requests_running: int = 0
    num_requests_waiting: int = 0
    kv_pool_bytes_used: int = 0
    kv_pool_bytes_total: int = 0


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    """A replica's state and load, apart from the plan: they change without a new epoch."""

    replica_id: str
    state: ReplicaState
    load: Load


@dataclass(frozen=True, slots=True)
class Route:
    """``flow`` requests per second from a prefill to a decode replica; only the proportions count for routing.

    ``codec`` is what their KV travels in, one of ``kv.codecs.CODECS``.
    """

    prefill_replica_id: str
    decode_replica_id: str
    flow: float
    codec: str = NONE


@dataclass(frozen=True, slots=True)
class Plan:
    """Replicas and routes of one epoch. ``traceparent`` is the W3C context of the span that made it."""

    epoch: int
    replicas: tuple[Replica, ...] = ()
    routes: tuple[Route, ...] = ()
    traceparent: str = ""

    def replica(self, replica_id: str) -> Replica:
        """The replica of that id; KeyError when the plan has none."""
        for replica in self.replicas:
            if replica.replica_id == replica_id:
                return replica
        raise KeyError(replica_id)
