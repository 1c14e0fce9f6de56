"""Who needs what from whom: matches the slices of sending ranks to what one receiving rank holds. Pure.

Prefill and decode may differ in tensor and pipeline parallelism; with more ranks than KV heads, heads repeat.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from hexgen2.errors import TransferRefused
from hexgen2.kv.wire import RankSlice


@dataclass(frozen=True, slots=True)
class Pick:
    """Of one layer: ``num_kv_heads`` heads from ``first_kv_head`` on (global numbers), read from rank ``rank``."""

    rank: int
    layer: int
    first_kv_head: int
    num_kv_heads: int


def rank_slices(stage_layers: Sequence[int], num_kv_heads: int, tensor_parallel_size: int) -> tuple[RankSlice, ...]:
    """Slices of a replica's ranks, stage by stage; ``stage_layers`` counts each pipeline stage's layers.

    Raises:
        ValueError: KV heads neither divide over the ranks of a stage nor repeat evenly.
    """
    if num_kv_heads % tensor_parallel_size and tensor_parallel_size % num_kv_heads:
        raise ValueError(f"{num_kv_heads} KV heads cannot be shared by tensor_parallel_size {tensor_parallel_size}")
    heads = max(1, num_kv_heads // tensor_parallel_size)
    repeat = max(1, tensor_parallel_size // num_kv_heads)
    slices: list[RankSlice] = []
    first_layer = 0
    for num_layers in stage_layers:
        for rank in range(tensor_parallel_size):
            slices.append(RankSlice(len(slices), first_layer, num_layers, rank // repeat * heads, heads))
        first_layer += num_layers
    return tuple(slices)


def plan_picks(sources: Sequence[RankSlice], target: RankSlice, most_heads: int | None = None) -> tuple[Pick, ...]:
    """Every (layer, head) of ``target`` exactly once, from ranks that hold it, as few and as even as they come.

    No pick has more than ``most_heads`` heads. Where several sources hold the same head, the target's own rank number
    chooses among them, so that replicated heads share the work.

    Raises:
        TransferRefused: a layer or head that no source holds.
    """
    picks: list[Pick] = []
    for layer in target.layers:
        for head in target.kv_heads:
            holders = [s.rank for s in sources if layer in s.layers and head in s.kv_heads]
            if not holders:
                raise TransferRefused(f"no sending rank holds layer {layer}, KV head {head}")
            rank = holders[target.rank % len(holders)]
            last = picks[-1] if picks else None
            if (
                last
                and (last.rank, last.layer, last.first_kv_head + last.num_kv_heads) == (rank, layer, head)
                and last.num_kv_heads != most_heads
            ):
                picks[-1] = Pick(rank, layer, last.first_kv_head, last.num_kv_heads + 1)
            else:
                picks.append(Pick(rank, layer, head, 1))
    return tuple(picks)


@lru_cache(maxsize=64)
def missing(sources: tuple[RankSlice, ...], num_layers: int, num_kv_heads: int) -> str:
    """Which layer and head of a model none of the sources holds; empty when they hold all of it."""
    held = {(layer, head) for each in sources for layer in each.layers for head in each.kv_heads}
    for layer in range(num_layers):
        for head in range(num_kv_heads):
            if (layer, head) not in held:
                return f"ranks: no sending rank holds layer {layer}, KV head {head}"
    return ""
