"""What the two processes of ``hexgen2 bench kv`` say to each other, a line of JSON each; and the KV they hand over."""

from typing import Final

import msgspec

from hexgen2.kv.messages import Ready
from hexgen2.kv.wire import KvShape, RankSlice

#: Like an eighth of an 8B model: pieces of 512 KiB, 32 KiB a token.
SHAPE: Final = KvShape(num_layers=8, num_kv_heads=8, head_dim=128, dtype="bfloat16")
SLICE: Final = RankSlice(0, 0, SHAPE.num_layers, 0, SHAPE.num_kv_heads)
TOKEN: Final = bytes(range(32))


class Setup(msgspec.Struct, frozen=True):
    """How one process begins. ``hosts`` and ``devices`` are as in ``kv.host`` and ``kv.devices``."""

    transport: str
    hosts: str
    devices: str
    max_tokens: int


class Hold(msgspec.Struct, frozen=True, tag=True):
    """Take a send buffer. Without ``digest`` pieces are copied, or encoded, and no more. Answered by Held."""

    transfer_id: str
    num_tokens: int
    codec: str
    digest: bool


class Put(msgspec.Struct, frozen=True, tag=True):
    """Gather the KV, as prefill does that takes ``prefill_s``. Answered by Ready, more than once, and HasPut."""

    transfer_id: str
    prefill_s: float = 0.0


class Drop(msgspec.Struct, frozen=True, tag=True):
    """Give the send buffer back."""

    transfer_id: str


class Raw(msgspec.Struct, frozen=True, tag=True):
    """Serve the bare transport until told otherwise. Answered by Held."""

    active: bool


class Up(msgspec.Struct, frozen=True, tag=True):
    """First word of the sender: where its send buffer is, and where the bare transport reads from."""

    endpoints: tuple[bytes, ...]
    page_bytes: int
    raw_port: int
    raw_endpoint: bytes


class Held(msgspec.Struct, frozen=True, tag=True):
    """Done."""


class HasPut(msgspec.Struct, frozen=True, tag=True):
    """All is in the send buffer, since ``at_s`` (monotonic; all processes of a machine have the same)."""

    at_s: float


ToSender = Hold | Put | Drop | Raw
FromSender = Up | Held | Ready | HasPut


def line(message: ToSender | FromSender) -> bytes:
    """One line."""
    return msgspec.json.encode(message) + b"\n"
