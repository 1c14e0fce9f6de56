"""A profile as a cluster.yaml: what was measured, merged with the catalog and with other machines' files. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from hexgen2 import catalog
from hexgen2.cluster import HostTimes, Reached
from hexgen2.cluster_file import make_cluster
from hexgen2.devices import is_gpu
from hexgen2.errors import ConfigError

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class MeasuredDevice:
    """``count`` alike devices of this machine."""

    driver_name: str
    count: int
    memory_bytes: int
    flops: float
    memory_bandwidth_bytes_per_s: float
    reached: Reached
    host: HostTimes


@dataclass(frozen=True, slots=True)
class MeasuredLink:
    """To another machine, over ``transport``."""

    peer: str
    bandwidth_bytes_per_s: float
    latency_s: float
    transport: str


def catalog_name(driver_name: str) -> str | None:
    """What the catalog calls a device, if it has it."""
    return next((name for name in catalog.table("gpus")["gpus"] if is_gpu(name, driver_name)), None)


def document(
    machine: str,
    found: Sequence[MeasuredDevice],
    links: Sequence[MeasuredLink],
    *,
    about: str,
    before: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A cluster.yaml's content. ``before``: another one, whose machines stay and whose entry of this one is replaced.

    Raises:
        ConfigError: it would be none that the planner takes; says what.
    """
    kept = dict(before or {})
    types = dict(kept.get("gpu_types", {}))
    counts: dict[str, int] = {}
    for each in found:
        name, entry = _entry(each, machine, types)
        types[name] = entry
        counts[name] = counts.get(name, 0) + each.count
    others = [spec for spec in kept.get("machines", ()) if spec["name"] != machine]
    spec: dict[str, Any] = {"name": machine, "gpus": counts}
    known = {other["name"] for other in others}
    between = [each for each in kept.get("machine_links", ()) if machine not in each["between"]]
    unplaced = []
    for link in links:
        numbers = _link(link)
        if link.peer in known:
            between.append({"between": [machine, link.peer], "link": numbers})
        else:
            unplaced.append(numbers)
    if unplaced:
        # Nobody has profiled these peers yet: the quickest of them shows what this machine's card can do at least.
        spec["nic"] = max(unplaced, key=lambda numbers: float(numbers["bandwidth_bytes_per_s"]))
    result = {
        **kept,
        "name": kept.get("name", machine),
        "about": about,
        "gpu_types": types,
        "machines": [*others, spec],
        "machine_links": between,
    }
    if not between:
        del result["machine_links"]
    make_cluster(result, "profile")
    return result


def to_yaml(content: Mapping[str, Any]) -> str:
    """Its text."""
    return yaml.safe_dump(dict(content), sort_keys=False, width=120, allow_unicode=True)


def _entry(each: MeasuredDevice, machine: str, taken: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name and numbers. The catalog gives what cannot be measured here: price and the link inside a machine."""
    known = catalog_name(each.driver_name)
    fields = catalog.table("gpus")["gpus"][known] if known else {}
    name = each.driver_name.lower().replace(" ", "-") if known is None else known
    entry: dict[str, Any] = {
        "flops": float(f"{each.flops:.4g}"),
        "memory_mib": each.memory_bytes // MIB,
        "memory_bandwidth_bytes_per_s": float(f"{each.memory_bandwidth_bytes_per_s:.4g}"),
        "link": fields.get("link", "pcie-4"),
        "reached": _rounded(each.reached.model_dump()),
        "host": _rounded(each.host.model_dump()),
        "measured": ["flops", "memory_mib", "memory_bandwidth_bytes_per_s", "reached", "host"],
    }
    if "price_per_hour" in fields:
        entry["price_per_hour"] = fields["price_per_hour"]
    if known is None and name in taken and taken[name] != entry and name != "cpu":
        # The same name with other figures, in another machine: both stay.
        name = f"{name}-{machine}"
    return name, entry


def _link(link: MeasuredLink) -> dict[str, Any]:
    return {
        "bandwidth_bytes_per_s": float(f"{link.bandwidth_bytes_per_s:.4g}"),
        "latency_s": float(f"{link.latency_s:.4g}"),
        "measured": f"to {link.peer} by {link.transport}",
    }


def _rounded(numbers: Mapping[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.4g}") for name, value in numbers.items()}


def read_before(text: str, path: str) -> dict[str, Any]:
    """An earlier cluster.yaml to merge with. Raises ConfigError."""
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: not a cluster.yaml")
    make_cluster(data, path)
    return data
