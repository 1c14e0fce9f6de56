"""Small simulated fleets."""

from hexgen2.simulator.blueprint import Given, ReplicaSpec
from hexgen2.simulator.engine import Limits
from hexgen2.simulator.links import Path
from hexgen2.simulator.step_times import Figures

FIGURES = Figures(prompt_token_s=1e-4, step_s=2e-3, request_s=1e-4, context_token_s=1e-7)


def fleet(
    roles: dict[str, str],
    *,
    kv_tokens: float = 4000,
    max_num_seqs: int = 8,
    num_lanes: int = 1,
    pages: int = 12,
    bandwidth: float = 1e8,
    shared_tokens: int | None = None,
    times: Figures = FIGURES,
) -> Given:
    """Replicas alike in every role they may take, all behind one wire."""
    limits = Limits(kv_tokens, max_num_seqs, 256, shared_tokens, num_lanes)
    spec = ReplicaSpec(times, limits, pages, pages)
    given = Given(
        roles=roles,
        specs={(name, role): spec for name in roles for role in ("prefill", "decode", "colocated")},
        routes=(),
        bandwidths={"wire": bandwidth},
        paths={(a, b): Path((("wire", 1.0),), latency_s=1e-3) for a in roles for b in roles},
        kv_bytes_per_token=1e4,
    )
    return Given(given.roles, given.specs, given.reroute(roles), given.bandwidths, given.paths, 1e4)
