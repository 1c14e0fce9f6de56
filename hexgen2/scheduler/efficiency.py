"""What part of its nominal speed a GPU gives, and what an engine's host adds: fitted figures, read from the catalog."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from hexgen2 import catalog
from hexgen2.cluster import GpuType
from hexgen2.config_file import did_you_mean
from hexgen2.errors import ConfigError

DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class Efficiency:
    """Of one GPU. Parts of nominal speed are between 0 and 1; times are fixed costs of one kernel, in seconds."""

    #: Matrix products: of nominal FLOP/s with many tokens, of memory bandwidth with few, and each one's fixed time.
    compute: float
    memory: float
    gemm_s: float
    #: Tokens at which products reach half of ``compute``.
    half_tokens: float
    #: Attention over a prompt (of FLOP/s), over cached keys and values (of memory bandwidth), and its fixed time.
    attention_compute: float
    attention_memory: float
    attention_s: float
    #: All-reduce: its fixed time beside the link's latency, and its part of the link's bandwidth.
    all_reduce_s: float
    all_reduce_bandwidth: float


@dataclass(frozen=True, slots=True)
class Host:
    """CPU time of one step: launching overlaps with kernels, so that a step takes the longer of both."""

    step_s: float
    layer_s: float
    request_s: float


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine profile: host times by GPU (its usual host) and limits of a step."""

    name: str
    hosts: Mapping[str, Host]
    max_num_seqs: int
    max_num_batched_tokens: int
    #: How often a layer's elementwise work passes over a token's hidden state; not divided by tensor parallelism.
    elementwise_passes: float

    def host(self, gpu: str) -> Host:
        """Of machines with that GPU, or what is usual."""
        return self.hosts.get(gpu, self.hosts[DEFAULT])


@cache
def efficiency(gpu: GpuType) -> Efficiency:
    """The fitted efficiencies of a GPU, of the one it names, or the default ones."""
    table = catalog.table("efficiencies")
    fields = table["efficiencies"].get(gpu.efficiency or gpu.name, table[DEFAULT])
    return Efficiency(**{name: float(fields[name]) for name in Efficiency.__slots__})


@cache
def engine(name: str = "nccl-2023") -> Engine:
    """An engine profile by name. Raises ConfigError."""
    engines = catalog.table("engines")["engines"]
    if name not in engines:
        raise ConfigError(f"engine: no profile `{name}`; {did_you_mean(name, list(engines))}")
    fields = engines[name]
    hosts = {gpu: Host(**host) for gpu, host in fields["hosts"].items()}
    return Engine(name, hosts, fields["max_num_seqs"], fields["max_num_batched_tokens"], fields["elementwise_passes"])
