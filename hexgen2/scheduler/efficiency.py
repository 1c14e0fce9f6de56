"""What part of its nominal speed a GPU gives, and what an engine's host adds: fitted figures, read from the catalog."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

from hexgen2 import catalog
from hexgen2.cluster import GpuType
from hexgen2.config_file import did_you_mean
from hexgen2.errors import ConfigError

#: Entry of a table for what is not in it.
DEFAULT = "default"

#: The profile that is fitted to measured steps.
DEFAULT_ENGINE = "measured-2023"


@dataclass(frozen=True, slots=True)
class Efficiency:
    """Of one GPU. Parts of nominal speed are between 0 and 1; times are fixed costs of one kernel, in seconds."""

    #: Matrix products: of nominal FLOP/s with many tokens, of memory bandwidth with few, each one's fixed time, and
    #: how sharply one takes over from the other (``kernels.blended_max``).
    compute: float
    memory: float
    gemm_s: float
    blend: float
    #: Attention over a prompt (of FLOP/s), over cached keys and values (of memory bandwidth), and their fixed times.
    attention_compute: float
    attention_s: float
    attention_memory: float
    cached_attention_s: float
    #: All-reduce, of its link class: fixed time, time for each further GPU, and its part of the link's bandwidth.
    all_reduce_s: float
    all_reduce_hop_s: float
    all_reduce_bandwidth: float


@dataclass(frozen=True, slots=True)
class Host:
    """CPU time of one step: launching overlaps with kernels, so that a step takes the longer of both.

    ``token_s`` is apart from that: work per token, layer and element of the hidden state that tensor parallelism does
    not divide (norms, residuals, and what an engine does one token after another); ``shared_token_s`` comes on top for
    prompts after the first in a step.
    """

    step_s: float
    layer_s: float
    request_s: float
    token_s: float
    shared_token_s: float


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine profile: host times by GPU (its usual host), limits of a step, and its attention."""

    name: str
    hosts: Mapping[str, Host]
    max_num_seqs: int
    max_num_batched_tokens: int
    #: What every prefill step takes beside launching and kernels.
    prefill_s: float
    #: Time of attention over prompts, as a multiple of the kernels that were measured apart.
    prompt_attention_factor: float
    #: Whether a step may decode and take in a part of a prompt; else each step is of one phase, prefill first.
    chunked_prefill: bool
    #: Times that a KV codec goes over what it writes or reads. Nobody measured it on a GPU.
    codec_passes: float

    def host(self, gpu: GpuType) -> Host:
        """Its own as measured; else of machines with that GPU (or whose efficiencies it has), or what is usual."""
        if gpu.host is not None:
            return Host(**gpu.host.model_dump())
        return self.hosts.get(gpu.name) or self.hosts.get(gpu.efficiency) or self.hosts[DEFAULT]


@cache
def efficiency(gpu: GpuType) -> Efficiency:
    """Its own as measured, or the fitted ones of a GPU (or of the one that it names), and of its link class."""
    table = catalog.table("efficiencies")
    kernels = table["gpus"].get(gpu.efficiency or gpu.name, table["gpus"][DEFAULT])
    if gpu.reached is not None:
        kernels = gpu.reached.model_dump()
    link = table["links"].get(gpu.link, table["links"][DEFAULT])
    known = {**kernels, **link}
    return Efficiency(**{field.name: float(known[field.name]) for field in fields(Efficiency)})


@cache
def engine(name: str = DEFAULT_ENGINE) -> Engine:
    """An engine profile by name. Raises ConfigError."""
    known = _engines()
    if name not in known:
        raise ConfigError(f"engine: no profile `{name}`; {did_you_mean(name, list(known))}")
    return make_engine(name, known[name])


def engines() -> tuple[str, ...]:
    """Names of the catalog's profiles."""
    return tuple(_engines())


def _engines() -> dict[str, Any]:
    return {**catalog.table("engines")["engines"], **catalog.table("engines_assumed")["engines"]}


def make_engine(name: str, entry: Mapping[str, Any]) -> Engine:
    """A profile from its catalog entry."""
    known = {field.name: entry[field.name] for field in fields(Engine) if field.name not in {"name", "hosts"}}
    hosts = {gpu: Host(**host) for gpu, host in entry["hosts"].items()}
    return Engine(name=name, hosts=hosts, **known)
