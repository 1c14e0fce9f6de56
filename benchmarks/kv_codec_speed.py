"""How fast KV is written and read in each codec on one thread, digest and all, against a plain copy of the same values.

``PieceFormat`` writes pieces of a whole model's KV (more than any cache holds) to a send buffer and reads them from a
landing buffer, as one rank's agent does. Run from the root of the tree: ``python -m benchmarks.kv_codec_speed``.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from time import thread_time

import click
import torch

from hexgen2.kv.codecs import CODECS
from hexgen2.kv.pieces import TORCH_DTYPE, PieceFormat
from hexgen2.kv.wire import CHUNK_TOKENS, KvShape

#: SmolLM2-135M and Llama-3.1-8B.
SHAPES = (KvShape(30, 3, 64, "float32"), KvShape(30, 3, 64, "bfloat16"), KvShape(32, 8, 128, "bfloat16"))
REPEATS = 7


@dataclass(frozen=True, slots=True)
class Row:
    """Values (not wire bytes) per second; ratios are to the copy of the same run, each repeat to its own."""

    shape: str
    dtype: str
    codec: str
    copy_gb_per_s: float
    write_gb_per_s: float
    read_gb_per_s: float
    write_ratio: float
    read_ratio: float


def seconds(work: Callable[[int], object], num_pieces: int) -> float:
    """This thread's own, on the core, for all pieces once: others' load counts little."""
    began = thread_time()
    for piece in range(num_pieces):
        work(piece)
    return thread_time() - began


def measure(shape: KvShape, codec: str) -> Row:
    """One chunk of all layers, copied, written and read in turn."""
    device = torch.device("cpu")
    piece_format = PieceFormat(bytes(32), codec, shape, device)
    size = (shape.num_layers, shape.num_kv_heads, 2, CHUNK_TOKENS, shape.head_dim)
    kv = torch.randn(size).to(TORCH_DTYPE[shape.dtype])
    got = torch.zeros_like(kv)
    per_head = piece_format.head_bytes(CHUNK_TOKENS)
    sent = torch.zeros(shape.num_layers, shape.num_kv_heads, per_head, dtype=torch.uint8)
    works: tuple[Callable[[int], object], ...] = (
        lambda layer: got[layer].copy_(kv[layer]),
        lambda layer: piece_format.write(sent[layer], kv[layer], layer=layer, chunk=0, first_head=0),
        lambda layer: piece_format.read(got[layer], sent[layer], layer=layer, chunk=0, first_head=0),
    )
    took = [[seconds(work, shape.num_layers) for work in works] for _ in range(REPEATS + 1)][1:]
    num_bytes = kv.numel() * kv.element_size()
    copy, write, read = (num_bytes / median(each[i] for each in took) / 1e9 for i in range(3))
    return Row(
        shape=f"{shape.num_layers} layers, {shape.num_kv_heads} x {shape.head_dim}",
        dtype=shape.dtype,
        codec=codec,
        copy_gb_per_s=copy,
        write_gb_per_s=write,
        read_gb_per_s=read,
        write_ratio=median(each[0] / each[1] for each in took),
        read_ratio=median(each[0] / each[2] for each in took),
    )


@click.command()
@click.option("--json", "as_json", is_flag=True, help="print the rows as JSON")
def main(as_json: bool) -> None:
    """Measure each codec on each shape."""
    torch.set_num_threads(1)
    rows = [measure(shape, codec) for shape in SHAPES for codec in CODECS]
    if as_json:
        click.echo(json.dumps([asdict(row) for row in rows], indent=1))
        return
    click.echo(f"{'KV':24}{'dtype':10}{'codec':7}{'copy':>8}{'write':>8}{'read':>8}  GB/s of values{'ratios':>10}")
    for row in rows:
        click.echo(
            f"{row.shape:24}{row.dtype:10}{row.codec:7}{row.copy_gb_per_s:8.1f}{row.write_gb_per_s:8.2f}"
            f"{row.read_gb_per_s:8.2f}{row.write_ratio:18.2f}{row.read_ratio:8.2f}"
        )


if __name__ == "__main__":
    main()
