"""Clusters: what a file may say, what becomes of it, and how its mistakes are told."""

from pathlib import Path

import pytest

from hexgen2 import catalog
from hexgen2.cluster_file import catalog_gpu, find_cluster, load_cluster, make_cluster
from hexgen2.errors import ConfigError

HOUSE = """\
name: house
gpu_types:
  mine: {flops: 1e14, memory_mib: 1000, memory_bandwidth_bytes_per_s: 1e12, price_per_hour: 0.5, link: pcie-5}
nic: 10gbe
machines:
  - {name: a, gpus: {H100-SXM: 2}}
  - {name: b, count: 2, site: north, gpus: {mine: 1, L40: 1}, nic: {bandwidth_bytes_per_s: 3e9, latency_s: 1e-5}}
site_links:
  - {between: [default, north], link: {bandwidth_bytes_per_s: 1e8, latency_s: 0.01}}
machine_links:
  - {between: [a, b-1], link: 1gbe}
"""


@pytest.fixture
def house(tmp_path: Path) -> Path:
    path = tmp_path / "cluster.yaml"
    path.write_text(HOUSE)
    return path


def problem(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_cluster(path)
    return str(caught.value)


def test_names_become_numbers(house: Path) -> None:
    cluster = load_cluster(house)
    a, b0, b1 = cluster.machines
    assert (a.name, b0.name, b1.name) == ("a", "b-0", "b-1")
    assert cluster.num_gpus == 6
    assert a.intra_bandwidth_bytes_per_s == 450e9
    assert a.nic_bandwidth_bytes_per_s == 1.25e9
    assert b0.gpus == (("L40", 1), ("mine", 1))
    assert b0.intra_bandwidth_bytes_per_s == 32e9, "the slower of its two GPUs' links"
    assert cluster.price_per_hour == pytest.approx(2 * 3.69 + 2 * (0.5 + 0.99))


def test_links_between_machines_are_the_narrowest_thing_on_the_way(house: Path) -> None:
    cluster = load_cluster(house)
    a, b0, b1 = cluster.machines
    assert cluster.bandwidth(a, a) == 450e9
    assert cluster.bandwidth(a, b0) == cluster.bandwidth(b0, a) == 1e8, "the sites' link"
    assert cluster.bandwidth(a, b1) == 0.125e9, "the machines' own link wins over the sites'"
    assert cluster.bandwidth(b0, b1) == 3e9, "one site: network cards alone"
    assert cluster.latency(a, b0) == 0.01


def test_a_cluster_with_one_gpu_of_unknown_price_has_no_price(house: Path) -> None:
    house.write_text(HOUSE.replace("price_per_hour: 0.5, ", ""))
    assert load_cluster(house).price_per_hour is None


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("H100-SXM: 2", "H100-SXN: 2", ":6: machines.0.gpus.H100-SXN: no GPU `H100-SXN`"),
        ("H100-SXM: 2", "H100-SXM: 0", ":6: machines.0.gpus.H100-SXM: 0 should be greater"),
        ("H100-SXM: 2", "", ":6: machines.0.gpus: {} Dictionary should have at least 1 item"),
        ("nic: 10gbe", "nic: 10gb", ":4: nic: no link class `10gb`; did you mean `10gbe`?"),
        ("memory_mib: 1000", "memory_mib: -1", ":3: gpu_types.mine.memory_mib: -1 should be greater than 0"),
        ("flops: 1e14", "flops: .nan", ":3: gpu_types.mine.flops: nan should be a finite number"),
        (
            "bandwidth_bytes_per_s: 3e9",
            "bandwidth_bytes_per_s: 0",
            ":7: machines.1.nic.bandwidth_bytes_per_s: 0 should",
        ),
        (
            "bandwidth_bytes_per_s: 1e8",
            "bandwidth_bytes_per_s: 0",
            ":9: site_links.0.link.bandwidth_bytes_per_s: 0 should be greater than or equal to 1000",
        ),
        ("latency_s: 0.01", "latency_s: 1e300", ":9: site_links.0.link.latency_s: '1e300' should be less than or"),
        ("[default, north]", "[north, north]", ":9: site_links.0.between: `north` is linked to itself"),
        ("link: 1gbe}", "link: 1gbe}\n  - {between: [b-1, a], link: 10gbe}", ":12: machine_links.1.between: machine_"),
        ("[default, north]", "[default, south]", ":9: site_links.0.between.1: no `south`; there are: default, north"),
        ("[a, b-1]", "[a, b]", ":11: machine_links.0.between.1: no `b`"),
        ("name: a,", "name: b-0,", "machines.1.name: `b-0` is the name of another machine"),
        ("count: 2", "counts: 2", ":7: machines.1.counts: no such field; did you mean `count`?"),
        ("link: pcie-5", "efficiency: X", ":3: gpu_types.mine.efficiency: no GPU `X` in the catalog; there are"),
    ],
)
def test_mistakes_are_told_by_file_line_and_field(house: Path, old: str, new: str, message: str) -> None:
    house.write_text(HOUSE.replace(old, new))
    told = problem(house)
    assert message in told
    assert told.startswith(f"{house}:")
    assert "\n" not in told, "one problem, one line"


def test_a_cluster_without_machines_is_refused(house: Path) -> None:
    house.write_text("machines: []\n")
    assert problem(house) == f"{house}:1: machines: no machines"


def test_the_papers_clusters_cost_what_the_paper_says() -> None:
    prices = {name: find_cluster(name).price_per_hour for name in catalog.cluster_files() if "paper" in name}
    assert prices.pop("paper-baseline") == pytest.approx(29.52)
    assert prices.pop("paper-setting-5") == pytest.approx(20.5)
    assert len(prices) == 4
    assert all(price is not None and 26.2 < price < 28.9 for price in prices.values())


@pytest.mark.parametrize("num_gpus", [64, 128, 320, 1024])
def test_generated_clusters_have_as_many_gpus_as_asked_for_in_unlike_sites(num_gpus: int) -> None:
    cluster = find_cluster(f"multi-site-{num_gpus}")
    assert cluster.num_gpus == num_gpus
    assert len({machine.site for machine in cluster.machines}) == max(2, num_gpus // 128 + (num_gpus % 128 > 0))
    assert cluster == find_cluster(f"multi-site-{num_gpus}")


def test_unknown_clusters_are_told_with_the_likely_one() -> None:
    with pytest.raises(ConfigError, match="did you mean `paper-setting-1`"):
        find_cluster("paper-setting1")
    with pytest.raises(ConfigError, match="multiple of 16"):
        find_cluster("multi-site-100")


def test_every_catalog_gpu_and_link_can_be_used() -> None:
    for name in catalog.names("gpus"):
        assert catalog_gpu(name).name == name
    for link in catalog.names("links"):
        machine = {"name": "m", "gpus": {"L4": 1}, "nic": link, "link": link}
        assert make_cluster({"machines": [machine]}).machines[0].nic_bandwidth_bytes_per_s > 0
