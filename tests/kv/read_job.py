"""The smallest thing that ``kv.reads`` reads."""

from dataclasses import dataclass, replace

from hexgen2.kv.reads import Claim, Part


@dataclass(frozen=True, slots=True)
class Job:
    """Slots' worth of a peer's send buffer, from the ``number``-th on."""

    number: int
    claim: Claim
    peer: tuple[bytes, ...]
    part_bytes: int
    count: int = 1
    #: Where memory that it is to stay in begins, laid out as the peer's is.
    stays_from: int | None = None

    @property
    def num_bytes(self) -> int:
        return self.count * self.part_bytes

    @property
    def numbers(self) -> range:
        return range(self.number, self.number + self.count)

    @property
    def parts(self) -> list[Part]:
        begins = [number * self.part_bytes for number in self.numbers]
        stays = self.stays_from
        return [Part(at, self.part_bytes, None if stays is None else stays + at) for at in begins]

    def split(self, count: int) -> "tuple[Job, Job]":
        return replace(self, count=count), replace(self, number=self.number + count, count=self.count - count)
