"""Large clusters made by rule: several sites of unlike machines, to see how planning grows with size."""

from typing import Any

from hexgen2.errors import ConfigError

#: What a site is made of, over and over: eight GPUs in each row, older ones on slower networks.
MACHINES: tuple[tuple[str, dict[str, int], str, int], ...] = (
    ("h100", {"H100-SXM": 8}, "400gbe", 1),
    ("a100", {"A100-SXM": 8}, "200gbe", 1),
    ("l40", {"L40": 4}, "100gbe", 2),
    ("a6000", {"A6000": 4}, "25gbe", 2),
    ("a100x4", {"A100-SXM": 4}, "100gbe", 2),
    ("l40s", {"L40S": 8}, "100gbe", 1),
    ("a40", {"A40": 4}, "25gbe", 2),
    ("a6000x8", {"A6000": 8}, "40gbe", 1),
)

#: GPUs to a site, but never fewer sites than two.
SITE_GPUS = 128

#: ``find_cluster`` makes one of this name and any number of GPUs.
PREFIX = "multi-site-"


def multi_site(num_gpus: int) -> dict[str, Any]:
    """The fields of a cluster.yaml with ``num_gpus``, a multiple of 16 from 16 to 4,096, in sites joined at 10 Gb/s.

    The same number gives the same cluster, and its GPUs are spread over the sites as evenly as eights allow.

    Raises:
        ConfigError: another number of GPUs.
    """
    if num_gpus % 16 or not 16 <= num_gpus <= 4096:
        raise ConfigError(f"cluster: {PREFIX}{num_gpus}: GPUs must be a multiple of 16 from 16 to 4096")
    num_sites = max(2, -(-num_gpus // SITE_GPUS))
    eights = [num_gpus // 8 // num_sites + (site < num_gpus // 8 % num_sites) for site in range(num_sites)]
    machines = []
    for site, count in enumerate(eights):
        for number in range(count):
            # Each site begins elsewhere in the list, so that sites are unlike, too.
            kind, gpus, nic, copies = MACHINES[(number + 3 * site) % len(MACHINES)]
            name = f"s{site}-{kind}-{number}"
            machines.append({"name": name, "count": copies, "site": f"site-{site}", "gpus": dict(gpus), "nic": nic})
    links = [
        {"between": [f"site-{one}", f"site-{other}"], "link": "wan-10g"}
        for one in range(num_sites)
        for other in range(one + 1, num_sites)
    ]
    return {
        "name": f"{PREFIX}{num_gpus}",
        "about": f"{num_gpus} GPUs in {num_sites} sites of unlike machines, made by rule.",
        "machines": machines,
        "site_links": links,
    }
