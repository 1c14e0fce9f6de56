"""What a plan takes for granted, in sentences for its reader: nothing is assumed in silence."""

from hexgen2 import catalog
from hexgen2.cluster import Cluster
from hexgen2.llm import Llm
from hexgen2.scheduler.efficiency import DEFAULT, Engine
from hexgen2.workload import Workload

#: Pairs of sites that are named before the rest is only counted.
NAMED = 3


def assumptions(llm: Llm, workload: Workload, cluster: Cluster, profile: Engine) -> tuple[str, ...]:
    """One sentence for each thing that nobody measured or that does not quite fit together."""
    said = []
    measured_engine = profile.name in catalog.table("engines")["engines"]
    said.append(
        f"engine profile {profile.name}: "
        + ("fitted to measured steps of Llama-2-70B" if measured_engine else "an estimate, fitted to nothing")
    )
    kernels = catalog.table("efficiencies")["gpus"]
    for gpu in sorted(cluster.gpu_types, key=lambda each: each.name):
        source = gpu.efficiency or gpu.name
        if gpu.reached is not None:
            said.append(f"{gpu.name}: efficiencies as measured on it")
        elif source not in kernels:
            said.append(f"{gpu.name}: kernel efficiencies of the {DEFAULT} GPU, an L40S; its own are not known")
        elif source != gpu.name:
            said.append(f"{gpu.name}: kernel efficiencies of the {source}; its own are not known")
        if (
            measured_engine
            and gpu.host is None
            and gpu.name not in profile.hosts
            and gpu.efficiency not in profile.hosts
        ):
            said.append(f"{gpu.name}: a host as slow as the slowest of those measured")
    if apart := cluster.sites_by_cards_alone():
        pairs = ", ".join(f"{a} and {b}" for a, b in apart[:NAMED])
        more = f" and {len(apart) - NAMED} more pairs" if len(apart) > NAMED else ""
        said.append(f"sites {pairs}{more}: no link is given, so network cards alone limit what they exchange")
    limit = llm.max_position_embeddings
    beyond = sum(p.weight for p in workload.lengths if p.prompt_tokens + p.output_tokens > limit)
    if beyond > 0:
        said.append(f"{beyond:.1%} of {workload.name}'s requests are longer than the {limit} tokens of {llm.name}")
    return tuple(said)
