from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexgen2.errors import TransferRefused
from hexgen2.kv.layout import plan_picks, rank_slices
from hexgen2.kv.wire import RankSlice


@st.composite
def replica(draw: st.DrawFn, num_layers: int, num_kv_heads: int) -> tuple[RankSlice, ...]:
    cuts = draw(st.lists(st.integers(1, num_layers - 1), max_size=3, unique=True)) if num_layers > 1 else []
    edges = [0, *sorted(cuts), num_layers]
    tp = draw(st.sampled_from([t for t in (1, 2, 3, 4, 6, 8) if not num_kv_heads % t or not t % num_kv_heads]))
    return rank_slices([b - a for a, b in pairwise(edges)], num_kv_heads, tp)


@st.composite
def pair(draw: st.DrawFn) -> tuple[tuple[RankSlice, ...], tuple[RankSlice, ...], int, int]:
    num_layers, num_kv_heads = draw(st.integers(1, 9)), draw(st.integers(1, 8))
    return draw(replica(num_layers, num_kv_heads)), draw(replica(num_layers, num_kv_heads)), num_layers, num_kv_heads


@given(pair())
def test_every_rank_gets_each_of_its_layers_and_heads_once_from_a_rank_that_has_it(
    case: tuple[tuple[RankSlice, ...], tuple[RankSlice, ...], int, int],
) -> None:
    sources, targets, _, _ = case
    by_rank = {s.rank: s for s in sources}
    for target in targets:
        got = []
        for pick in plan_picks(sources, target):
            heads = range(pick.first_kv_head, pick.first_kv_head + pick.num_kv_heads)
            assert pick.layer in by_rank[pick.rank].layers
            assert all(head in by_rank[pick.rank].kv_heads for head in heads)
            got += [(pick.layer, head) for head in heads]
        assert sorted(got) == [(layer, head) for layer in target.layers for head in target.kv_heads]
        assert len(set(got)) == len(got)


@given(pair())
def test_the_ranks_of_a_replica_hold_all_of_the_model(
    case: tuple[tuple[RankSlice, ...], tuple[RankSlice, ...], int, int],
) -> None:
    sources, _, num_layers, num_kv_heads = case
    held = {(layer, head) for s in sources for layer in s.layers for head in s.kv_heads}
    assert held == {(layer, head) for layer in range(num_layers) for head in range(num_kv_heads)}


@given(case=pair(), most_heads=st.none() | st.integers(1, 3))
def test_what_ranks_gather_through_their_picks_is_the_dense_kv(
    case: tuple[tuple[RankSlice, ...], tuple[RankSlice, ...], int, int], most_heads: int | None
) -> None:
    """A number for each (layer, head), held by the sources as their slices say and read as the picks say."""
    sources, targets, num_layers, num_kv_heads = case
    dense = np.arange(num_layers * num_kv_heads).reshape(num_layers, num_kv_heads)
    held = {s.rank: dense[s.layers.start : s.layers.stop, s.kv_heads.start : s.kv_heads.stop] for s in sources}
    by_rank = {s.rank: s for s in sources}
    for target in targets:
        mine = np.full((target.num_layers, target.num_kv_heads), -1)
        for pick in plan_picks(sources, target, most_heads):
            assert pick.num_kv_heads <= (most_heads or num_kv_heads)
            theirs = by_rank[pick.rank]
            there, here = (pick.first_kv_head - each.first_kv_head for each in (theirs, target))
            run = held[pick.rank][pick.layer - theirs.first_layer, there : there + pick.num_kv_heads]
            mine[pick.layer - target.first_layer, here : here + pick.num_kv_heads] = run
        expected = dense[target.layers.start : target.layers.stop, target.kv_heads.start : target.kv_heads.stop]
        assert (mine == expected).all()


def test_equal_ranks_read_one_contiguous_run_per_layer() -> None:
    slices = rank_slices([2], 4, 2)
    assert [(p.rank, p.first_kv_head, p.num_kv_heads) for p in plan_picks(slices, slices[1])] == [(1, 2, 2), (1, 2, 2)]


def test_replicated_heads_share_the_work() -> None:
    sources = rank_slices([1], 2, 4)
    assert [s.first_kv_head for s in sources] == [0, 0, 1, 1]
    assert [plan_picks(sources, target)[0].rank for target in sources] == [0, 1, 2, 3]


def test_a_head_that_nobody_holds_is_refused() -> None:
    with pytest.raises(TransferRefused, match="layer 1, KV head 0"):
        plan_picks([RankSlice(0, 0, 1, 0, 2)], RankSlice(0, 0, 2, 0, 2))


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="3 KV heads cannot be shared by tensor_parallel_size 2"):
        rank_slices([4], 3, 2)
