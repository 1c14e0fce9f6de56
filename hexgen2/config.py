"""Configuration of every process: the only definition of each field, its default, its limits and its help text.

Read from YAML (``load``) or from command-line flags made from the same fields (``cli.options``).
"""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from hexgen2.config_file import load as load
from hexgen2.kv.codecs import Codec

GIB = 1 << 30
MIB = 1 << 20
#: Of the coordinator's page.
PAGE_PORT = 8001


def home() -> Path:
    """Where models, traces, logs and run files are kept: ``$HEXGEN2_HOME`` or ``~/.cache/hexgen2``."""
    return Path(os.environ.get("HEXGEN2_HOME", "~/.cache/hexgen2")).expanduser()


class Config(BaseModel):
    """Base: unknown fields are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TlsConfig(Config):
    """Certificates of one process, PEM; ``tls: FOLDER`` means ca.pem, cert.pem and key.pem in it."""

    ca: Path = Field(description="certificates of the authorities that peers' certificates must come from")
    cert: Path = Field(description="this process's certificate")
    key: Path = Field(description="its private key")

    @model_validator(mode="before")
    @classmethod
    def _from_folder(cls, data: Any) -> Any:
        if isinstance(data, str | Path):
            return {name: Path(data) / f"{name}.pem" for name in ("ca", "cert", "key")}
        return data


SLO_TTFT = Field(None, gt=0, description="time to first token that batches adapt to, in seconds; default: the plan's")
SLO_TPOT = Field(None, gt=0, description="time per output token that batches adapt to, in seconds; default: the plan's")
_TLS = Field(
    None, description="folder with ca.pem, cert.pem and key.pem (`hexgen2 certs`): TLS, both sides show certificates"
)


class VllmEngineConfig(Config):
    """A vLLM engine. Names are vLLM's own."""

    kind: Literal["vllm"] = "vllm"
    model: Path = Field(description="Hugging Face model folder")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="weights and KV; auto is float32 on CPU and the model's own on GPU"
    )
    max_model_len: int | None = Field(
        None,
        ge=8,
        description="prompt and answer together, in tokens; default: the model's own, or what KV memory holds",
    )
    max_num_seqs: int = Field(32, ge=1)
    max_num_batched_tokens: int | None = Field(
        None, ge=16, description="tokens per step; 256 on CPU, vLLM's own on GPU"
    )
    tensor_parallel_size: int = Field(1, ge=1)
    pipeline_parallel_size: int = Field(1, ge=1)
    block_size: int | None = Field(None, ge=1)
    kv_cache_bytes: int | None = Field(None, ge=MIB, description="engine KV cache; 1 GiB on CPU, vLLM's own on GPU")
    omp_num_threads: int = Field(1, ge=1, description="OpenMP threads per rank on CPU")
    nnodes: int = Field(1, ge=1, description="machines that the ranks are on, as many on each")
    node_rank: int = Field(0, ge=0, description="which of them this is; those after the first run `hexgen2 node`")
    master_addr: str = Field("127.0.0.1", description="with nnodes: address of the first")
    master_port: int = Field(29501, ge=1, le=65535)


class EmulatedEngineConfig(Config):
    """An engine whose times come from figures, or a plan's, and whose tokens come from its KV bytes."""

    kind: Literal["emulated"] = "emulated"
    name: str = "emulated"
    prefill_tokens_per_s: float = Field(20_000.0, gt=0)
    decode_step_base_s: float = Field(0.002, ge=0, description="a decode step's time with an empty batch")
    decode_step_per_request_s: float = Field(0.0001, ge=0, description="and what each request in the batch adds")
    cost_file: Path | None = Field(
        None, description="take as long as a planned replica would (written by `hexgen2 up PLAN`) instead of by figures"
    )
    num_layers: int = Field(4, ge=1)
    num_kv_heads: int = Field(2, ge=1)
    head_dim: int = Field(8, ge=2)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    vocab_size: int = Field(512, ge=8)
    max_model_len: int = Field(8192, ge=8)
    max_num_seqs: int = Field(64, ge=1)
    max_num_batched_tokens: int = Field(512, ge=16)
    tensor_parallel_size: int = Field(1, ge=1)


EngineConfig = Annotated[VllmEngineConfig | EmulatedEngineConfig, Field(discriminator="kind")]


class KvConfig(Config):
    """The KV hand-off of one worker. Sizes are per rank."""

    transport: Literal["auto", "ucx", "tcp"] = Field(
        "auto", description="auto is ucx within a machine or over RDMA where NIXL is installed, else tcp; it is logged"
    )
    tls: Literal["auto", "require", "off"] = Field(
        "auto",
        description="auto: tcp speaks TLS where the worker has certificates; require: nothing else may do",
    )
    require: Literal["any", "rdma"] = Field(
        "any", description="rdma: a worker that could not read its peers' KV by RDMA does not start"
    )
    host: str = Field(
        "127.0.0.1",
        description="address that the KV plane binds and tells its peers (TCP transport); "
        "several, separated by commas, share each transfer",
    )
    devices: str = Field(
        "", description="UCX network devices (mlx5_0:1); several, separated by commas, share each transfer"
    )
    stall_s: float = Field(
        10.0, gt=0, description="a route that carried no byte for so long, though asked, is given up"
    )
    send_bytes: int = Field(256 * MIB, ge=1, description="send buffer of a prefill worker; bounds the longest prompt")
    staging_bytes: int = Field(256 * MIB, ge=1, description="staging of a decode worker; bounds the longest prompt")
    landing_bytes: int = Field(64 * MIB, ge=1, description="registered memory that reads land in")
    max_queued: int = Field(256, ge=0, description="requests that may wait for memory; one more is refused with 503")


class WorkerConfig(Config):
    """A prefill or a decode worker."""

    role: Literal["prefill", "decode", "flexible"] = Field(
        description="flexible does either, or whole requests, as the plan has it"
    )
    replica_id: str = Field("", max_length=64, description="default: the role and the port")
    listen: str = Field("127.0.0.1:0", description="host:port of the gRPC service")
    advertise: str = Field("", description="host:port that others dial; default: where it listens")
    coordinator: str = "127.0.0.1:50052"
    metrics_listen: str = Field("", description="host:port of Prometheus metrics; empty: none")
    engine: EngineConfig
    kv: KvConfig = KvConfig()
    nodes_listen: str = Field(
        "",
        validate_default=True,
        description="with nnodes: host:port where the other machines' `hexgen2 node` find this worker",
    )
    slo_ttft_s: float | None = SLO_TTFT
    slo_tpot_s: float | None = SLO_TPOT
    tls: TlsConfig | None = _TLS
    drain_s: float = Field(30.0, ge=0, description="how long running requests may take to end after SIGTERM")

    @field_validator("nodes_listen")
    @classmethod
    def _check_nodes_listen(cls, value: str, info: ValidationInfo) -> str:
        nnodes = getattr(info.data.get("engine"), "nnodes", 1)
        if bool(value) != (nnodes > 1):
            raise ValueError(f"{'not ' if value else ''}needed with engine.nnodes: {nnodes}")
        return value


class NodeConfig(Config):
    """Further ranks of a replica, on a machine that is not its first."""

    replica_id: str = Field("", max_length=64)
    leader: str = Field(description="host:port, the `nodes_listen` of the worker on the first machine")
    engine: VllmEngineConfig = Field(description="as the worker's, but for node_rank")
    kv: KvConfig = Field(KvConfig(), description="as the worker's, but for the addresses")
    tls: TlsConfig | None = _TLS


class ReplanConfig(Config):
    """When and how a coordinator plans anew by itself."""

    cluster: str = Field(
        "", description="cluster.yaml of the plan, or a name of the catalog; default: as the plan says"
    )
    workload: str = Field("", description="workload.yaml of the plan (its limits count as good), or a built-in one")
    bucket_s: float = Field(10.0, gt=0, description="what clients ask is kept in buckets of so many seconds, for a day")
    window_s: float = Field(60.0, gt=0, description="what is seen in so many seconds is compared with the plan")
    drift: float = Field(0.3, gt=0, description="lengths that differ by this share from the planned ones are looked at")
    busy: float = Field(0.85, gt=0, le=1, description="and more requests than this share of what the plan carries")
    min_gain: float = Field(0.1, ge=0, description="another plan must carry this share more")
    min_requests: int = Field(20, ge=1, description="fewer answers than these say nothing")
    interval_s: float = Field(60.0, ge=0, description="a plan stays so long, but for replicas that go")
    flip_s: float = Field(5.0, ge=0, description="for so long a replica that changes its role counts as serving nobody")
    horizon_s: float = Field(300.0, gt=0, description="within so long a change must pay; also how far forecasts look")
    watch_s: float = Field(
        60.0, gt=0, description="so long after a change it is taken back when fewer answers are good"
    )
    max_drop: float = Field(0.15, gt=0, description="by so much: of the share of good answers")
    evaluations: int = Field(500, ge=1, description="choices of roles that a search looks at")
    forecast_s: float = Field(60.0, gt=0, description="how often arrivals are forecast")
    season_s: float = Field(86400.0, gt=0, description="what the baseline takes arrivals to repeat after")
    lstm: bool = Field(True, description="also forecast by a small LSTM, in a process of its own")
    lstm_train_s: float = Field(5.0, gt=0, description="how long it may learn each time")


class CoordinatorConfig(Config):
    """The coordinator."""

    listen: str = "127.0.0.1:50052"
    metrics_listen: str = Field("", description="host:port of Prometheus metrics; empty: none")
    page_listen: str = Field("", description="host:port of the page that shows the fleet, over HTTP; empty: none")
    page_names: str = Field(
        "",
        description="names that the page answers to beside addresses, with commas between; default: `localhost` where "
        "it listens on a loopback address, any elsewhere",
    )
    codec: Codec = Field("none", description="what KV travels in between workers; others than none lose a little")
    plan: Path | None = Field(None, description="a plan.yaml whose replicas and routes it is to have; none: all to all")
    replan: bool = Field(False, description="with a plan: give replicas other roles as requests change or replicas go")
    replanning: ReplanConfig = ReplanConfig()
    state_file: Path | None = Field(
        None,
        description="where it keeps the plan; default: by its address under $HEXGEN2_HOME, nowhere for port 0",
    )
    lost_after_s: float = Field(5.0, gt=0, description="a worker silent for so long is lost")
    max_clock_skew_s: float = Field(30.0, gt=0, description="a worker whose clock is further apart is refused")
    tls: TlsConfig | None = _TLS
    drain_s: float = Field(5.0, ge=0)


class GatewayConfig(Config):
    """The gateway: gRPC and OpenAI-compatible HTTP."""

    listen: str = "127.0.0.1:50051"
    http_listen: str = "127.0.0.1:8000"
    coordinator: str = "127.0.0.1:50052"
    model: Path = Field(description="folder with tokenizer.json and the chat template")
    served_model_name: str = Field("", description="default: the folder's name")
    max_model_len: int | None = Field(None, ge=8, description="default: the smallest of the plan's replicas")
    gateway_id: str = Field("", max_length=64, description="its name among the gateways; default: a random one")
    request_timeout_s: float = Field(300.0, gt=0, description="deadline of a request whose client set none")
    max_body_bytes: int = Field(8 * MIB, ge=1024)
    max_concurrent_requests: int = Field(512, ge=1)
    max_http_connections: int = Field(
        768, ge=1, description="for one more, the connection that has waited longest for a request is closed"
    )
    max_grpc_connections: int = Field(1024, ge=1, description="one more is closed at once")
    head_timeout_s: float = Field(
        10.0,
        gt=0,
        description="how long the head of an HTTP request may take to come, with the TLS handshake before it",
    )
    unread_timeout_s: float = Field(
        30.0, gt=0, description="a client that takes nothing of its HTTP answer for so long is hung up on"
    )
    tls: TlsConfig | None = _TLS
    api_keys: Path | None = Field(
        None, description="file of API keys (`hexgen2 keys`): requests over HTTP and gRPC must show one"
    )
    serve_tls: bool = Field(True, description="with tls: speak it to clients too; false on loopback or behind a proxy")
    client_certs: Literal["auto", "required", "none"] = Field(
        "auto", description="with tls: must clients show a certificate? auto: unless they must show an API key"
    )
    drain_s: float = Field(30.0, ge=0)

    @property
    def asks_certificates(self) -> bool:
        """Whether clients must show a certificate."""
        if self.client_certs == "auto":
            return self.tls is not None and self.serve_tls and self.api_keys is None
        return self.client_certs == "required"

    @field_validator("client_certs")
    @classmethod
    def _check_client_certs(cls, value: str, info: ValidationInfo) -> str:
        has_tls, has_keys = (info.data.get(each) is not None for each in ("tls", "api_keys"))
        has_tls = has_tls and info.data.get("serve_tls", True)
        if value == "required" and not has_tls:
            raise ValueError("required needs tls and serve_tls")
        if value == "none" and has_tls and not has_keys:
            raise ValueError("none needs api_keys: anybody could use the fleet")
        return value
