"""What a fleet on this machine consists of."""

from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from hexgen2.config import SLO_TPOT, SLO_TTFT, Config, EngineConfig, KvConfig, ReplanConfig, home
from hexgen2.kv.codecs import Codec

#: Of the model that is used when none is named; ``cli.prepare`` makes its folder.
DEFAULT_MODEL_NAME = "SmolLM2-135M-Instruct"


def default_model() -> Path:
    """The default model's folder, whether it is there or not."""
    return home() / "models" / DEFAULT_MODEL_NAME


class FleetConfig(Config):
    """A fleet on this machine. Port 0 takes any free one."""

    plan: Path | None = Field(None, description="a plan.yaml: exactly its replicas, instead of `prefill` and `decode`")
    cluster: str = Field("", description="with a plan: its cluster.yaml; default: the catalog's of the name it gives")
    workload: str = Field("", description="with a plan: its workload.yaml; default: the built-in one of that name")
    cpu_quotas: bool = Field(True, description="with a plan on CPU cores: hold each replica to its share of them")
    replan: bool = Field(False, description="with a plan: give replicas other roles as requests change or replicas go")
    replanning: ReplanConfig = Field(ReplanConfig(), description="when and how; cluster and workload are as above")
    gateways: int = Field(1, ge=1, le=16, description="number of gateways; further ones take any free ports")
    prefill: int = Field(1, ge=0, le=64, description="number of prefill workers; with none, decode workers do both")
    decode: int = Field(1, ge=1, le=64, description="number of decode workers")
    listen: str = Field("127.0.0.1:50051", description="host:port of the gateway's gRPC service")
    http_listen: str = Field("127.0.0.1:8000", description="host:port of the OpenAI-compatible HTTP API")
    coordinator: str = Field("127.0.0.1:50052", description="host:port of the coordinator")
    page_listen: str = Field(
        "", description="host:port of the page that shows the fleet; default: port 8001, any other where that is taken"
    )
    tokenizer: Path | None = Field(None, description="folder with tokenizer.json; default: the model's")
    served_model_name: str = Field("", description="what clients call the model; default: its folder's name")
    engine: EngineConfig
    kv: KvConfig = KvConfig()
    slo_ttft_s: float | None = SLO_TTFT
    slo_tpot_s: float | None = SLO_TPOT
    codec: Codec = Field("none", description="what KV travels in between workers; others than none lose a little")
    tls: Path | None = Field(
        None, description="folder made by `hexgen2 certs fleet`: everything speaks TLS, both sides show certificates"
    )
    api_keys: Path | None = Field(None, description="file of API keys (`hexgen2 keys`): requests must show one")
    start_timeout_s: float = Field(300.0, gt=0, description="how long all processes may take to be ready")
    drain_s: float = Field(30.0, ge=0, description="how long running requests may take to end when stopping")

    @model_validator(mode="before")
    @classmethod
    def _fill_engine(cls, data: Any) -> Any:
        """vLLM and the default model unless told otherwise."""
        if not isinstance(data, dict):
            return data
        engine = data.get("engine", {})
        if not isinstance(engine, dict):
            return data
        engine = {"kind": "vllm"} | engine
        if engine["kind"] == "vllm":
            engine = {"model": default_model()} | engine
        return data | {"engine": engine}
