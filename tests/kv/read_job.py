"""The smallest thing that ``kv.reads`` reads."""

from dataclasses import dataclass

from hexgen2.kv.reads import Claim


@dataclass(frozen=True, slots=True)
class Job:
    """The ``number``-th slot's worth of a peer's send buffer."""

    number: int
    claim: Claim
    peer: tuple[bytes, ...]
    num_bytes: int

    @property
    def remote_offset(self) -> int:
        return self.number * self.num_bytes
