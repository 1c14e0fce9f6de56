"""The packed layouts are this machine's: elsewhere the same tests run on another instruction set's."""

from collections.abc import Callable

import pytest

pytest.importorskip("vllm")

import torch

from hexgen2.engine.vllm_layout import (
    DenseLayout,
    Layout,
    PackedLayout,
    check_exact,
    cpu_cache_write,
    token_slots,
)
from hexgen2.errors import ConfigError

pytestmark = pytest.mark.vllm

CPU = torch.device("cpu")
BLOCKS = (6, 0, 3, 5)


def packed(block_size: int, head_dim: int, dtype: torch.dtype) -> tuple[Layout, torch.Tensor]:
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    current_platform.import_kernels()
    write = cpu_cache_write(_get_attn_isa(dtype, block_size, head_dim))
    return PackedLayout(write, block_size, head_dim, dtype), torch.zeros(8, 3, block_size, 2 * head_dim, dtype=dtype)


def dense(order: tuple[int, ...], kernel_block: int) -> tuple[Layout, torch.Tensor]:
    """Of ``[block, kv_head, token, 2 * head_dim]``, with memory in ``order``; the scheduler's blocks hold 128."""
    shape = (8 * 128 // kernel_block, 3, kernel_block, 128)
    memory = torch.zeros(*(shape[i] for i in order))
    return DenseLayout(128), memory.permute(*(order.index(i) for i in range(4)))


CASES: dict[str, Callable[[], tuple[Layout, torch.Tensor]]] = {
    "float32": lambda: packed(128, 64, torch.float32),
    "bfloat16": lambda: packed(128, 64, torch.bfloat16),
    "float16": lambda: packed(128, 128, torch.float16),
    "small blocks": lambda: packed(32, 32, torch.float32),
    "blocks across chunks": lambda: packed(96, 64, torch.bfloat16),
    "large blocks": lambda: packed(256, 80, torch.float32),
    "token-major": lambda: dense((0, 2, 1, 3), 128),
    "head-major": lambda: dense((0, 1, 2, 3), 128),
    "heads outermost": lambda: dense((1, 0, 2, 3), 128),
    "smaller kernel blocks": lambda: dense((0, 2, 1, 3), 16),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Layout, torch.Tensor, int]:
    layout, cache = CASES[request.param]()
    return layout, cache, 128 if isinstance(layout, DenseLayout) else cache.shape[2]


def random_piece(cache: torch.Tensor, num_tokens: int) -> torch.Tensor:
    torch.manual_seed(num_tokens)
    return torch.randn(cache.shape[1], 2, num_tokens, cache.shape[3] // 2).to(cache.dtype)


def test_what_is_written_is_read_back_bit_by_bit(case: tuple[Layout, torch.Tensor, int]) -> None:
    layout, cache, block_size = case
    num_tokens = 3 * block_size + 5
    piece = random_piece(cache, num_tokens)
    layout.scatter(cache, token_slots(BLOCKS, block_size, 0, num_tokens, CPU), piece)
    assert torch.equal(layout.gather(cache, BLOCKS, 0, num_tokens), piece)
    for start, stop in ((0, 1), (7, 9), (block_size - 1, block_size + 1), (0, block_size), (17, 17 + block_size)):
        first, last = start // block_size, -(-stop // block_size)
        got = layout.gather(cache, BLOCKS[first:last], start - first * block_size, stop - start)
        assert got.is_contiguous()
        assert torch.equal(got, piece[:, :, start:stop])


def test_a_write_touches_its_own_slots_only(case: tuple[Layout, torch.Tensor, int]) -> None:
    layout, cache, block_size = case
    before = random_piece(cache, 4 * block_size)
    layout.scatter(cache, token_slots(BLOCKS, block_size, 0, 4 * block_size, CPU), before)
    patch = random_piece(cache, 10)
    layout.scatter(cache, token_slots(BLOCKS, block_size, block_size - 3, block_size + 7, CPU), patch)
    expected = before.clone()
    expected[:, :, block_size - 3 : block_size + 7] = patch
    assert torch.equal(layout.gather(cache, BLOCKS, 0, 4 * block_size), expected)


def test_the_check_at_start_passes(case: tuple[Layout, torch.Tensor, int]) -> None:
    layout, cache, block_size = case
    check_exact(layout, cache, block_size)


def test_a_packed_gather_reads_what_vllm_itself_has_written() -> None:
    layout, cache = packed(128, 64, torch.float32)
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    key, value = torch.randn(128, 3, 64), torch.randn(128, 3, 64)
    key_cache, value_cache = cache.view(8, 3, 256, 64).chunk(2, dim=2)
    isa = _get_attn_isa(torch.float32, 128, 64)
    ops.cpu_attn_reshape_and_cache(key, value, key_cache, value_cache, torch.arange(256, 384), isa)
    piece = layout.gather(cache, (2,), 0, 128)
    assert torch.equal(piece, torch.stack((key, value)).permute(2, 0, 1, 3))


def test_a_write_that_is_no_permutation_is_refused() -> None:
    def lossy(key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
        cache[0, 0] = torch.cat((key, value), dim=2).squeeze(1) // 2

    with pytest.raises(ConfigError, match="not understood"):
        PackedLayout(lossy, 32, 32, torch.float32)


def test_a_layout_that_loses_values_is_refused_at_start() -> None:
    class Halved(DenseLayout):
        def scatter(self, cache: torch.Tensor, slots: torch.Tensor, piece: torch.Tensor) -> None:
            super().scatter(cache, slots, piece * 0.5)

    _, cache = dense((0, 1, 2, 3), 128)
    with pytest.raises(ConfigError, match="not laid out as expected"):
        check_exact(Halved(128), cache, 128)
