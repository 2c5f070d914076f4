"""Which of a source's sequence numbers arrived in a batch: bit maps for its receipt, by which gaps are found."""

from typing import Protocol

from pipeline.core.usage import SEQUENCE_BLOCK
from pipeline.rating import compiled


class Arrivals(Protocol):
    """Bit maps of the sequence numbers that arrived, per source and block of 1,000."""

    def add(self, source: bytes, sequence: int) -> None:
        """A number arrived; 0 and below, which mean unknown, are left out."""

    def blocks(self) -> dict[tuple[bytes, int], int]:
        """The bit map of each source and block of which a number arrived."""


def new_arrivals() -> Arrivals:
    """Empty bit maps."""
    if compiled.fastpath is not None:
        made: Arrivals = compiled.fastpath.Arrivals(SEQUENCE_BLOCK)
        return made
    return _Arrivals()


class _Arrivals:
    def __init__(self) -> None:
        self._blocks: dict[tuple[bytes, int], bytearray] = {}

    def add(self, source: bytes, sequence: int) -> None:
        if sequence <= 0:
            return
        block, bit = divmod(sequence, SEQUENCE_BLOCK)
        bits = self._blocks.get((source, block))
        if bits is None:
            bits = self._blocks[source, block] = bytearray(-(-SEQUENCE_BLOCK // 8))
        bits[bit >> 3] |= 1 << (bit & 7)

    def blocks(self) -> dict[tuple[bytes, int], int]:
        return {name: int.from_bytes(bits, "little") for name, bits in self._blocks.items()}
