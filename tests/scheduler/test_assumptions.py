"""What a plan assumes is said."""

from hexgen2 import llm
from hexgen2.cluster import Cluster
from hexgen2.cluster_file import catalog_gpu, make_cluster
from hexgen2.scheduler.assumptions import assumptions
from hexgen2.scheduler.efficiency import engine
from hexgen2.workload import LengthClass, Workload

SHORT = Workload(lengths=(LengthClass(prompt_tokens=100, output_tokens=10, weight=1.0),))
LONG = Workload(name="long", lengths=(*SHORT.lengths, LengthClass(prompt_tokens=4090, output_tokens=10, weight=1.0)))


def cluster(*names: str) -> Cluster:
    return Cluster(gpu_types=tuple(catalog_gpu(name) for name in names), machines=())


def test_measured_gpus_and_short_requests_need_no_more_than_the_engine() -> None:
    said = assumptions(llm.find("llama-2-70b"), SHORT, cluster("H100-SXM", "A100-SXM"), engine())
    assert said == ("engine profile measured-2023: fitted to measured steps of Llama-2-70B",)


def test_borrowed_figures_and_too_long_requests_are_said() -> None:
    mine = catalog_gpu("L4").model_copy(update={"name": "mine", "efficiency": ""})
    given = Cluster(gpu_types=(mine, catalog_gpu("L40")), machines=())
    said = assumptions(llm.find("llama-2-70b"), LONG, given, engine("assumed-cuda-graphs"))
    assert said == (
        "engine profile assumed-cuda-graphs: an estimate, fitted to nothing",
        "L40: kernel efficiencies of the L40S; its own are not known",
        "mine: kernel efficiencies of the default GPU, an L40S; its own are not known",
        "50.0% of long's requests are longer than the 4096 tokens of llama-2-70b",
    )


def test_sites_that_nothing_links_are_said_to_have_their_cards_alone() -> None:
    fields = {
        "machines": [
            {"name": name, "site": site, "gpus": {"H100-SXM": 1}}
            for name, site in (("a", "east"), ("b", "west"), ("c", "north"))
        ],
        "site_links": [{"between": ["east", "west"], "link": "wan-1g"}],
        "machine_links": [{"between": ["a", "c"], "link": "wan-10g"}],
    }
    said = assumptions(llm.find("llama-2-70b"), SHORT, make_cluster(fields), engine())
    assert said[1:] == ("sites north and west: no link is given, so network cards alone limit what they exchange",)
