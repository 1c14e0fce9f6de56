"""``inventory.yaml``: the machines that a plan is deployed to. A machine's ``name`` is the plan's name of it."""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from hexgen2.config import Config, EngineConfig, KvConfig, VllmEngineConfig
from hexgen2.config_file import load
from hexgen2.kv.codecs import Codec

Port = Annotated[int, Field(ge=1, le=65535)]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
_ADDRESS = re.compile(r"[A-Za-z0-9:][A-Za-z0-9:.-]*")


class Host(Config):
    """One machine."""

    name: str = Field(description="as in the plan; letters, digits and - _ .")
    address: str = Field(description="by which the other hosts reach it: services listen there")
    kv_host: str = Field(
        "", description="address, or several with commas between, that KV travels by; default: `address`"
    )
    gpus: tuple[str, ...] = Field((), description="as nvidia-smi lists them, in its order")
    cores: int = Field(1, ge=1, description="of the CPU, for plans that name `cpu` devices")
    infiniband: bool = Field(
        False, description="it has RDMA (InfiniBand or RoCE): KV goes by UCX, which may pin memory"
    )
    ucx_net_devices: str = Field("", description="what UCX may use (mlx5_0:1,mlx5_1:1); default: whatever it finds")
    ucx_tls: str = Field("", description="UCX's transports; default: by `infiniband` and `gpus`")
    environment: dict[str, str] = Field({}, description="of all its processes")
    ssh_host: str = Field("", description="how Ansible reaches it; default: `address`")
    ssh_user: str = Field("root", description="who may become root there")
    ssh_port: Port = 22

    @field_validator("name")
    @classmethod
    def _check_name(cls, value: str) -> str:
        if not _NAME.fullmatch(value):
            raise ValueError(f"{value!r} is not 1 to 63 letters, digits and any of - _ .")
        return value

    @field_validator("address", "ssh_host")
    @classmethod
    def _check_address(cls, value: str, info: ValidationInfo) -> str:
        if not (_ADDRESS.fullmatch(value) or (not value and info.field_name == "ssh_host")):
            raise ValueError(f"{value!r} is no host name nor address")
        return value

    @field_validator("environment")
    @classmethod
    def _check_environment(cls, value: dict[str, str]) -> dict[str, str]:
        for name, text in value.items():
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) or "\n" in text:
                raise ValueError(f"{name!r} cannot be set: names are of letters, digits and _, values of one line")
        return value


class Ports(Config):
    """Where services listen. Workers of one host take ``worker`` and the following ones, and so for ``metrics``."""

    grpc: Port = 50051
    http: Port = 8000
    coordinator: Port = 50052
    worker: Port = 50061
    metrics: Port = 9400
    engine: Port = Field(29500, description="between the machines of one replica; each such replica takes two")


class Inventory(Config):
    """An inventory.yaml."""

    version: Literal[1] = 1
    hosts: tuple[Host, ...] = Field(min_length=1)
    coordinator: str = Field(description="the host that the coordinator runs on")
    gateways: tuple[str, ...] = Field(min_length=1, description="hosts that a gateway runs on each")
    model: Path = Field(description="the model's folder: the same path on every host, put there by you")
    served_model_name: str = Field("", description="what clients call the model; default: its folder's name")
    engine: EngineConfig | None = Field(None, description="default: vLLM with `model`; what the plan decides wins")
    kv: KvConfig = Field(KvConfig(), description="of all workers")
    codec: Codec = "none"
    packages: tuple[str, ...] = Field(
        min_length=1,
        description="what pip installs (hexgen2[vllm]==0.1.0); a path to a wheel: it is copied to the hosts",
    )
    constraints: Path | None = Field(None, description="a constraints file for pip")
    python: str = Field("python3", description="on the hosts, 3.11 or newer, with venv")
    user: str = Field("hexgen2", pattern=r"^[a-z_][a-z0-9_-]{0,31}$", description="whom everything runs as")
    tls: bool = Field(True, description="certificates for every process, made here; both sides show theirs")
    serve_tls: bool = Field(True, description="clients speak TLS to the gateways; false: behind a proxy")
    api_keys: Path | None = Field(None, description="file of API keys (`hexgen2 keys`) for the gateways")
    ports: Ports = Ports()
    drain_s: float = Field(
        30.0, ge=0, description="how long running requests may take to end when a process is stopped"
    )

    @field_validator("hosts")
    @classmethod
    def _check_hosts(cls, hosts: tuple[Host, ...]) -> tuple[Host, ...]:
        for field in ("name", "address"):
            seen: dict[str, int] = {}
            for number, host in enumerate(hosts):
                value = getattr(host, field)
                if value in seen:
                    raise ValueError(f"hosts.{number}.{field}: `{value}` is hosts.{seen[value]}'s, too")
                seen[value] = number
        return hosts

    @field_validator("coordinator", "gateways")
    @classmethod
    def _check_place(cls, value: str | tuple[str, ...], info: ValidationInfo) -> str | tuple[str, ...]:
        names = [host.name for host in info.data.get("hosts", ())]
        places = (value,) if isinstance(value, str) else value
        for place in places if names else ():
            if place not in names:
                raise ValueError(f"no host `{place}`; there are: {', '.join(names)}")
        if len(set(places)) < len(places):
            raise ValueError("a host is named twice; one gateway serves a host")
        return value

    def host(self, name: str) -> Host:
        """By its name; KeyError when there is none."""
        return {host.name: host for host in self.hosts}[name]

    @property
    def the_engine(self) -> EngineConfig:
        """What every worker runs, before the plan says how."""
        return self.engine if self.engine is not None else VllmEngineConfig(model=self.model)


def load_inventory(path: Path) -> Inventory:
    """Read an inventory.yaml. Raises ConfigError with file, line and field of every problem."""
    return load(path, Inventory)
