"""A plan: which replicas there are, and which prefill hands over to which decode. Frozen data and its invariants."""

from dataclasses import dataclass
from enum import StrEnum

from hexgen2.kv.codecs import NONE
from hexgen2.observed import NOTHING, Tally


class Role(StrEnum):
    """The phase that a replica serves."""

    PREFILL = "prefill"
    DECODE = "decode"
    #: Both phases of a request, without a hand-over.
    COLOCATED = "colocated"


class ReplicaState(StrEnum):
    """As its worker reports it; lost when it reports no more, stopped when it said that it would not."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    LOST = "lost"
    STOPPED = "stopped"


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
    #: Can serve both phases, so that its role is the plan's to choose.
    flexible: bool = False
    #: Of the software.
    version: str = ""
    #: Of its engine: GPUs of a stage, layers of each stage, what its device is called. Empty: not told (emulated).
    tensor_parallel_size: int = 0
    stage_layers: tuple[int, ...] = ()
    device: str = ""
    #: Of one prompt whose KV its send buffer and its staging hold; 0: it has none.
    send_tokens: int = 0
    staging_tokens: int = 0


@dataclass(frozen=True, slots=True)
class KvReceived:
    """KV hand-offs to a replica: sums over the last minute; corrupt ones since its process began."""

    num_bytes: int = 0
    #: Of all hand-offs together, each from FetchKv's first message to its last verified byte.
    seconds: float = 0.0
    num_transfers: int = 0
    #: Whose bytes did not match their digest.
    num_corrupt: int = 0
    #: Landing memory that is kept apart now, because its read has not ended.
    quarantine_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Load:
    """What a replica is busy with."""

    num_requests_running: int = 0
    num_requests_waiting: int = 0
    kv_pool_bytes_used: int = 0
    kv_pool_bytes_total: int = 0
    kv_received: KvReceived = KvReceived()


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    """A replica's state and load, apart from the plan: they change without a new epoch."""

    replica_id: str
    state: ReplicaState
    load: Load


@dataclass(frozen=True, slots=True)
class Route:
    """``flow`` requests per second from a prefill to a decode replica; only the proportions count for routing.

    ``codec`` is what their KV travels in, one of ``kv.codecs.CODECS``. A route from a replica to itself: these requests
    are served there as a whole.
    """

    prefill_replica_id: str
    decode_replica_id: str
    flow: float
    codec: str = NONE


@dataclass(frozen=True, slots=True)
class ReplicaPrediction:
    """Requests per second that a replica could serve and that the plan gives it."""

    replica_id: str
    capacity_rps: float
    flow_rps: float


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a plan promises: its largest flow, and mean times at ``load_rps``."""

    throughput_rps: float
    output_tokens_per_s: float
    load_rps: float
    #: None: more than the replicas carry.
    ttft_s: float | None
    tpot_s: float
    replicas: tuple[ReplicaPrediction, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """Replicas and routes of one epoch. ``traceparent`` is the W3C context of the span that made it."""

    epoch: int
    replicas: tuple[Replica, ...] = ()
    routes: tuple[Route, ...] = ()
    traceparent: str = ""
    #: Prompts of up to so many tokens are answered sooner by a decode replica alone; 0: none are.
    colocate_max_prompt_tokens: int = 0
    #: None when nobody planned: every prefill hands over to every decode replica.
    prediction: Prediction | None = None

    def replica(self, replica_id: str) -> Replica:
        """The replica of that id; KeyError when the plan has none."""
        for replica in self.replicas:
            if replica.replica_id == replica_id:
                return replica
        raise KeyError(replica_id)


@dataclass(frozen=True, slots=True)
class RouteLoad:
    """Requests over one route: in flight now, and that ended well in the last window."""

    prefill_replica_id: str
    decode_replica_id: str
    num_requests: int
    num_finished: int = 0


@dataclass(frozen=True, slots=True)
class Measured:
    """Requests of the last ``window_s`` seconds; means are over those that ended well, 0 where there were none."""

    window_s: float = 0.0
    num_arrived: int = 0
    num_finished: int = 0
    num_failed: int = 0
    mean_prompt_tokens: float = 0.0
    mean_output_tokens: float = 0.0
    mean_ttft_s: float = 0.0
    #: Over answers of more than one token.
    mean_tpot_s: float = 0.0


@dataclass(frozen=True, slots=True)
class GatewayLoad:
    """What one gateway sees."""

    gateway_id: str
    routes: tuple[RouteLoad, ...] = ()
    measured: Measured = Measured()
    tally: Tally = NOTHING


@dataclass(frozen=True, slots=True)
class PlanChange:
    """What happened to the plan, and why."""

    unix_s: float
    epoch: int
    what: str
    why: str
