"""``cluster.yaml``: its schema, and how its names (GPUs, link classes, sites) become a ``Cluster``."""

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator

from hexgen2 import catalog
from hexgen2.cluster import Cluster, GpuType, HostTimes, Link, Machine, Reached
from hexgen2.cluster_generated import PREFIX, multi_site
from hexgen2.config_file import Place, build, did_you_mean, dotted, line_of, read
from hexgen2.errors import ConfigError

MIB = 1 << 20

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Part(BaseModel):
    """Base: unknown fields are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


#: Slower links carry no KV in any useful time, and their tiny numbers would drown in those of the others.
LEAST_BANDWIDTH, MOST_LATENCY_S = 1000.0, 60.0


class LinkNumbers(Part):
    """A link as measured."""

    bandwidth_bytes_per_s: Annotated[float, Field(ge=LEAST_BANDWIDTH, allow_inf_nan=False)] = Field(
        description="one way"
    )
    latency_s: Annotated[float, Field(ge=0, le=MOST_LATENCY_S, allow_inf_nan=False)] = Field(description="of one hop")
    measured: str = Field("", description="when and how, where `hexgen2 profile` measured it; a note for readers")
    rdma: bool = Field(False, description="of a network card: remote memory access, InfiniBand or RoCE")


#: What pydantic puts into the place of a problem within a link; nothing that a reader wrote.
CLASS, NUMBERS = "<class>", "<numbers>"

LinkSpec = Annotated[
    Annotated[str, Tag(CLASS)] | Annotated[LinkNumbers, Tag(NUMBERS)],
    Discriminator(lambda value: NUMBERS if isinstance(value, dict | LinkNumbers) else CLASS),
    Field(description="a link class of the catalog, or its numbers"),
]


class GpuNumbers(Part):
    """A GPU that the catalog does not have, or has otherwise."""

    flops: Positive = Field(description="dense bf16 FLOP/s")
    memory_mib: Annotated[int, Field(gt=0)] = Field(description="as the driver reports it")
    memory_bandwidth_bytes_per_s: Positive
    link: LinkSpec = "pcie-4"
    price_per_hour: NotNegative | None = Field(None, description="$/h")
    efficiency: str = Field("", description="a GPU of the catalog whose measured efficiencies it shares")
    reached: Reached | None = Field(None, description="its own efficiencies, as `hexgen2 profile` measures them")
    host: HostTimes | None = Field(None, description="its own host times, as `hexgen2 profile` measures them")
    measured: tuple[str, ...] = Field((), description="fields of this entry that were measured; others: the catalog")


class MachineSpec(Part):
    """One machine, or ``count`` alike ones that are called NAME-0, NAME-1 ..."""

    name: Annotated[str, Field(min_length=1)]
    count: Annotated[int, Field(ge=1)] = Field(1, description="how many there are, or may be rented")
    site: str = "default"
    gpus: Annotated[dict[str, Annotated[int, Field(ge=1)]], Field(min_length=1)] = Field(
        description="how many of which; names of the catalog or of this file"
    )
    link: LinkSpec | None = Field(None, description="between its GPUs; default: the slowest GPU type's own")
    nic: LinkSpec | None = Field(None, description="to other machines; default: the cluster's `nic`")
    price_per_hour: NotNegative | None = Field(None, description="$/h of one such machine; default: its GPUs'")


class BetweenSpec(Part):
    """A link between two sites or two machines."""

    between: tuple[str, str]
    link: LinkSpec


class ClusterSpec(Part):
    """A cluster.yaml."""

    name: str = "cluster"
    about: str = Field("", description="a note for readers")
    gpu_types: dict[str, GpuNumbers] = Field({}, description="GPUs by numbers, by name")
    nic: LinkSpec = Field("100gbe", description="network card of machines that say nothing else")
    machines: tuple[MachineSpec, ...]
    site_links: tuple[BetweenSpec, ...] = Field((), description="between sites; default: network cards alone")
    machine_links: tuple[BetweenSpec, ...] = Field((), description="between machines, as measured")

    @field_validator("machines")
    @classmethod
    def _some(cls, machines: tuple[MachineSpec, ...]) -> tuple[MachineSpec, ...]:
        if not machines:
            raise ValueError("no machines")
        return machines


def load_cluster(path: Path) -> Cluster:
    """Read a cluster.yaml. Raises ConfigError with file, line and field of every problem."""
    data, lines = read(path)

    def where(place: Place) -> str:
        place = _without_tags(place)
        return f"{path}:{line_of(lines, place)}: {dotted(place)}: "

    return resolve(build(ClusterSpec, data, where), where)


def find_cluster(name_or_path: str | Path) -> Cluster:
    """A cluster from its file, by the name of one of the catalog's, or ``multi-site-N`` with N GPUs, made by rule.

    Raises:
        ConfigError: there is none, or it cannot be used.
    """
    size = str(name_or_path).removeprefix(PREFIX)
    if size != str(name_or_path) and size.isdecimal():
        return make_cluster(multi_site(int(size)), str(name_or_path))
    known = catalog.cluster_files()
    path = known.get(str(name_or_path), Path(name_or_path))
    if not path.exists() and path.suffix not in {".yaml", ".yml"}:
        hint = did_you_mean(str(name_or_path), [*known, f"{PREFIX}256"])
        raise ConfigError(f"cluster: no file nor example `{name_or_path}`; {hint}")
    return load_cluster(path)


def make_cluster(data: Mapping[str, Any], name: str = "cluster") -> Cluster:
    """A cluster from the fields of a cluster.yaml. Raises ConfigError with field; ``name`` begins its lines."""

    def where(place: Place) -> str:
        return f"{name}: {dotted(_without_tags(place))}: "

    return resolve(build(ClusterSpec, data, where), where)


@cache
def catalog_gpu(name: str) -> GpuType:
    """A GPU type of the catalog. Raises ConfigError."""
    return _gpu(name, None, ("gpu",), lambda place: f"{dotted(place)}: ")


def resolve(spec: ClusterSpec, where: Callable[[Place], str]) -> Cluster:
    """Names to numbers. ``where`` begins the line about a place. Raises ConfigError."""
    types: dict[str, GpuType] = {}
    machines: list[Machine] = []
    seen: dict[str, Place] = {}
    for number, machine in enumerate(spec.machines):
        place: Place = ("machines", number)
        counts: dict[str, int] = {}
        for name, count in machine.gpus.items():
            gpu = _gpu(name, spec, (*place, "gpus", name), where)
            types[gpu.name] = gpu
            counts[gpu.name] = counts.get(gpu.name, 0) + count
        if machine.link is None:
            slowest = min((types[name] for name in counts), key=lambda gpu: gpu.link_bandwidth_bytes_per_s)
            intra = LinkNumbers(
                bandwidth_bytes_per_s=slowest.link_bandwidth_bytes_per_s, latency_s=slowest.link_latency_s
            )
        else:
            intra = link_numbers(machine.link, (*place, "link"), where)
        nic = link_numbers(*((spec.nic, ("nic",)) if machine.nic is None else (machine.nic, (*place, "nic"))), where)
        for copy in range(machine.count):
            name = machine.name if machine.count == 1 else f"{machine.name}-{copy}"
            if name in seen:
                raise ConfigError(f"{where((*place, 'name'))}`{name}` is the name of another machine, too")
            seen[name] = place
            machines.append(
                Machine(
                    name=name,
                    site=machine.site,
                    gpus=tuple(sorted(counts.items())),
                    intra_bandwidth_bytes_per_s=intra.bandwidth_bytes_per_s,
                    intra_latency_s=intra.latency_s,
                    nic_bandwidth_bytes_per_s=nic.bandwidth_bytes_per_s,
                    nic_latency_s=nic.latency_s,
                    nic_rdma=nic.rdma,
                    price_per_hour=machine.price_per_hour,
                )
            )
    sites = {machine.site for machine in machines}
    return Cluster(
        name=spec.name,
        gpu_types=tuple(types[name] for name in sorted(types)),
        machines=tuple(machines),
        site_links=_between(spec.site_links, sites, "site_links", where),
        machine_links=_between(spec.machine_links, set(seen), "machine_links", where),
    )


def link_numbers(spec: str | LinkNumbers, place: Place, where: Callable[[Place], str]) -> LinkNumbers:
    """A link's numbers from its class. Raises ConfigError."""
    if isinstance(spec, LinkNumbers):
        return spec
    links = catalog.table("links")["links"]
    known = {name.casefold(): name for name in links}
    key = known.get(spec.casefold())
    if key is None:
        raise ConfigError(f"{where(place)}no link class `{spec}`; {did_you_mean(spec, list(links))}")
    return LinkNumbers(**links[key])


def _without_tags(place: Place) -> Place:
    return tuple(part for part in place if part not in (CLASS, NUMBERS))


def _gpu(name: str, spec: ClusterSpec | None, place: Place, where: Callable[[Place], str]) -> GpuType:
    given: dict[str, GpuNumbers] = spec.gpu_types if spec else {}
    gpus: dict[str, dict[str, Any]] = catalog.table("gpus")["gpus"]
    at: Place
    if name in given:
        numbers, key, at = given[name], name, ("gpu_types", name)
    else:
        found = {key.casefold(): key for key in gpus}.get(name.casefold())
        if found is None:
            hint = did_you_mean(name, [*given, *gpus])
            raise ConfigError(f"{where(place)}no GPU `{name}` in the catalog nor in this file's gpu_types; {hint}")
        key, at = found, place
        fields = {field: value for field, value in gpus[key].items() if field != "price_source"}
        numbers = GpuNumbers(**fields)
    if numbers.efficiency and numbers.efficiency not in gpus:
        hint = did_you_mean(numbers.efficiency, list(gpus))
        raise ConfigError(f"{where((*at, 'efficiency'))}no GPU `{numbers.efficiency}` in the catalog; {hint}")
    link = link_numbers(numbers.link, (*at, "link"), where)
    return GpuType(
        name=key,
        flops=numbers.flops,
        memory_bytes=numbers.memory_mib * MIB,
        memory_bandwidth_bytes_per_s=numbers.memory_bandwidth_bytes_per_s,
        link=numbers.link if isinstance(numbers.link, str) else "measured",
        link_bandwidth_bytes_per_s=link.bandwidth_bytes_per_s,
        link_latency_s=link.latency_s,
        price_per_hour=numbers.price_per_hour,
        efficiency=numbers.efficiency,
        reached=numbers.reached,
        host=numbers.host,
    )


def _between(
    specs: tuple[BetweenSpec, ...], known: set[str], field: str, where: Callable[[Place], str]
) -> tuple[Link, ...]:
    links = []
    seen: dict[frozenset[str], int] = {}
    for number, spec in enumerate(specs):
        place: Place = (field, number)
        for end, name in enumerate(spec.between):
            if name not in known:
                raise ConfigError(f"{where((*place, 'between', end))}no `{name}`; {did_you_mean(name, sorted(known))}")
        ends = frozenset(spec.between)
        if len(ends) == 1:
            raise ConfigError(f"{where((*place, 'between'))}`{spec.between[0]}` is linked to itself")
        if ends in seen:
            raise ConfigError(f"{where((*place, 'between'))}{field}.{seen[ends]} links these two already")
        seen[ends] = number
        numbers = link_numbers(spec.link, (*place, "link"), where)
        links.append(
            Link(
                between=spec.between,
                bandwidth_bytes_per_s=numbers.bandwidth_bytes_per_s,
                latency_s=numbers.latency_s,
            )
        )
    return tuple(links)
