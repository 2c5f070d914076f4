"""Hash segments: immutable, memory-mapped files of sorted rows, searched a whole batch of keys at a time.

A row is a key of 16 bytes, taken to be a hash, and a value of 8 or 16. A file has room for ``capacity`` rows, of which
the first ``rows`` are there (how many rows of a merge are equal is known only afterwards). It holds three columns,
one behind the other, little-endian, with no header:

    filter   8 bytes × words(capacity)    Bloom filter, in the keys' order
    heads    8 bytes × capacity           first half of each key as an unsigned integer, ascending
    tails    (8 + value) × capacity       second half of the key, and the value

What describes a file (``Described``) stands in the manifest of the state it belongs to. A key that is not there costs
one read of the filter, for all keys of a batch in a handful of numpy calls: 0.04 µs a key and segment, measured.
"""

import mmap
import os
from bisect import bisect_right
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64

KEY_BYTES = 16
_HALF = KEY_BYTES // 2
#: Rows a word of the filter serves: 16 bits each, of which a key sets 5, let 0.5 % of the keys pass that are not there.
_ROWS_A_WORD = 4
_BIT_SHIFTS = (6, 12, 18, 24)
#: Words of the filter, and about four times as many rows, that one step of a merge goes over: about 2 ms.
_STEP_WORDS = 8_192
_READ_BYTES = 1024 * 1024

_Words = NDArray[np.uint64]
_Tails = NDArray[np.void]


class Damaged(Exception):
    """A file of the local state is not what was written: to be treated like one that is missing."""


class Described(NamedTuple):
    """What is to be known of a segment's file to read it."""

    name: str
    rows: int
    capacity: int
    value_bytes: int
    checksum: str


class Probe:
    """Keys to look for, made ready once for all segments."""

    def __init__(self, keys: bytes) -> None:
        """``keys`` stand one behind the other."""
        halves = np.frombuffer(keys, "<u8")
        self.heads: _Words = np.ascontiguousarray(halves[0::2])
        self.lows: _Words = halves[1::2]
        self.bits = _bits(self.heads)
        self.tops: _Words = self.heads >> np.uint64(32)


class Segment:
    """One file, open for reading. An unreadable page of it ends the process (SIGBUS), as with any mapped file."""

    def __init__(self, directory: Path, described: Described) -> None:
        """Map the file. Raises OSError, Damaged when it is shorter than described."""
        self.path = directory / described.name
        self.described = described
        words, row_bytes = _words(described.capacity), _HALF + described.value_bytes
        _, (heads_at, _), (tails_at, tails_size) = _columns(described)
        self._tails_at, self._row_bytes = tails_at, row_bytes
        size = tails_at + tails_size
        with self.path.open("rb") as file:
            found = os.fstat(file.fileno()).st_size
            if found < size:
                raise Damaged(f"{described.name}: expected {size} bytes, got {found}")
            self._map = mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ)
        self.filter: _Words = np.frombuffer(self._map, "<u8", words)
        self.heads: _Words = np.frombuffer(self._map, "<u8", described.rows, heads_at)
        self.tails: _Tails = np.frombuffer(self._map, f"V{row_bytes}", described.rows, self._tails_at)
        self._words = np.uint64(words)
        # The same columns for single keys: indexing these is far faster than indexing arrays.
        self._filter_view, self._heads_view = self.filter.data, self.heads.data

    @property
    def rows(self) -> int:
        return self.described.rows

    def find(self, probe: Probe) -> tuple[NDArray[np.intp], list[bytes]]:
        """Numbers of the keys that are here, and their values."""
        words = self.filter.take((probe.tops * self._words) >> np.uint64(32))
        words &= probe.bits
        maybe = np.flatnonzero(words == probe.bits)
        if not maybe.size:
            return maybe, []
        heads = probe.heads[maybe]
        at = self.heads.searchsorted(heads, "right") - 1  # -1 reads the largest, which is no equal one then
        there = self.heads[at] == heads
        maybe, at = maybe[there], at[there]
        lows = probe.lows[maybe]
        equal = _lows(self.tails[at]) == lows
        for i in np.flatnonzero(~equal):  # 64 bits alike, 128 not: one pair in 100,000 states of 50M keys
            at[i] = self._row(int(probe.heads[maybe[i]]), int(lows[i]).to_bytes(_HALF, "little"), int(at[i]))
            equal[i] = at[i] >= 0
        values: list[bytes] = (
            self.tails[at[equal]].view([("low", "<u8"), ("value", f"V{self._row_bytes - _HALF}")])["value"].tolist()
        )
        return maybe[equal], values

    def get(self, key: bytes) -> bytes | None:
        """Value of a single key: a few µs, where ``find`` with one key takes ten times as long."""
        head = int.from_bytes(key[:_HALF], "little")
        bits = _bits_of(head)
        if self._filter_view[(head >> 32) * len(self._filter_view) >> 32] & bits != bits:
            return None
        row = self._row(head, key[_HALF:], bisect_right(self._heads_view, head) - 1)
        return None if row < 0 else self._tail(row)[_HALF:]

    def _row(self, head: int, low: bytes, at: int) -> int:
        """The last row of a key at or before ``at``, -1 when there is none. The last one is the newest."""
        while at >= 0 and self._heads_view[at] == head:
            if self._tail(at)[:_HALF] == low:
                return at
            at -= 1
        return -1

    def _tail(self, row: int) -> bytes:
        start = self._tails_at + row * self._row_bytes
        return self._map[start : start + self._row_bytes]


def build(path: Path, packed: bytes, value_bytes: int) -> Described:
    """Write rows (key and value, one behind the other, in any order) to a new file. Raises OSError."""
    row = np.dtype([("head", "<u8"), ("tail", f"V{_HALF + value_bytes}")])
    rows = np.frombuffer(packed, row)
    heads = np.ascontiguousarray(rows["head"])
    order = heads.argsort(kind="stable")
    heads = heads[order]
    with _Writer(path, len(rows), value_bytes) as writer:
        writer.add(_filter(heads, 0, writer.words, writer.words), heads, rows["tail"][order])
        return writer.finish()


def merge(segments: Sequence[Segment], path: Path) -> Generator[int, None, Described]:
    """Write the rows of all to a new file, step by step: yields how many rows a step went over.

    Of equal keys the one in the last segment stays. Raises OSError; leaves an unfinished file when it is closed early.
    """
    value_bytes = segments[0].described.value_bytes
    done = [0] * len(segments)
    with _Writer(path, sum(segment.rows for segment in segments), value_bytes) as writer:
        for first in range(0, writer.words, _STEP_WORDS):
            last = min(first + _STEP_WORDS, writer.words)
            ends = [_rows_below(segment, last, writer.words) for segment in segments]
            parts = list(zip(segments, done, ends, strict=True))
            heads = np.concatenate([segment.heads[start:end] for segment, start, end in parts])
            tails = np.concatenate([segment.tails[start:end] for segment, start, end in parts])
            # Stable: rows with equal heads keep the order of their segments.
            order = heads.argsort(kind="stable")
            heads, tails = heads[order], tails[order]
            newest = np.ones(len(heads), bool)
            lows = _lows(tails)
            newest[:-1] = (heads[1:] != heads[:-1]) | (lows[1:] != lows[:-1])
            heads, tails = heads[newest], tails[newest]
            writer.add(_filter(heads, first, last, writer.words), heads, tails)
            done = ends
            yield len(order)
        return writer.finish()


def verify(directory: Path, described: Described) -> None:
    """Read a whole file and compare its checksum. Raises OSError, Damaged.

    By reading, not by the mapping: a page that the disk cannot read is an error here, not the end of the process.
    """
    sums = []
    with (directory / described.name).open("rb", buffering=0) as file:
        for start, left in _columns(described):
            file.seek(start)
            column = xxh3_64()
            while left and (chunk := file.read(min(left, _READ_BYTES))):
                column.update(chunk)
                left -= len(chunk)
            sums.append(column.digest())
    if _checksum(sums) != described.checksum:
        raise Damaged(f"{described.name}: its checksum is not that of what was written")


class _Writer:
    """Appends to the three columns of a new file."""

    def __init__(self, path: Path, capacity: int, value_bytes: int) -> None:
        self.words = _words(capacity)
        self._described = Described(path.name, 0, capacity, value_bytes, "")
        self._rows = 0
        self._file = path.open("wb", buffering=0)
        self._at = [start for start, _ in _columns(self._described)]
        self._sums = [xxh3_64(), xxh3_64(), xxh3_64()]

    def add(self, words: _Words, heads: _Words, tails: _Tails) -> None:
        self._rows += len(heads)
        for column, data in enumerate((words, heads, tails)):
            left = memoryview(data.tobytes())
            self._sums[column].update(left)
            while left:
                written = os.pwrite(self._file.fileno(), left, self._at[column])
                self._at[column] += written
                left = left[written:]

    def finish(self) -> Described:
        checksum = _checksum([column.digest() for column in self._sums])
        return self._described._replace(rows=self._rows, checksum=checksum)

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()


def _checksum(columns: Sequence[bytes]) -> str:
    return xxh3_64(b"".join(columns)).hexdigest()


def _columns(described: Described) -> tuple[tuple[int, int], ...]:
    """Where each column starts, and how many bytes of it are used."""
    words, capacity, rows = _words(described.capacity), described.capacity, described.rows
    return (0, 8 * words), (8 * words, 8 * rows), (8 * (words + capacity), (_HALF + described.value_bytes) * rows)


def _words(capacity: int) -> int:
    return -(-capacity // _ROWS_A_WORD)


def _bits(heads: _Words) -> _Words:
    """The bits each key sets in its word of a filter: from the lower half of its head; the upper half says which."""
    bits: _Words = np.uint64(1) << (heads & np.uint64(63))
    for shift in _BIT_SHIFTS:
        bits |= np.uint64(1) << ((heads >> np.uint64(shift)) & np.uint64(63))
    return bits


def _bits_of(head: int) -> int:
    bits = 1 << (head & 63)
    for shift in _BIT_SHIFTS:
        bits |= 1 << (head >> shift & 63)
    return bits


def _filter(heads: _Words, first: int, last: int, words: int) -> _Words:
    """Words ``first`` to ``last`` of a filter of ``words``, of sorted heads that all belong there."""
    part = np.zeros(last - first, np.uint64)
    if len(heads):
        word = ((heads >> np.uint64(32)) * np.uint64(words)) >> np.uint64(32)
        starts = np.flatnonzero(np.concatenate(([True], word[1:] != word[:-1])))
        part[word[starts].astype(np.intp) - first] = np.bitwise_or.reduceat(_bits(heads), starts)
    return part


def _rows_below(segment: Segment, word: int, words: int) -> int:
    """Number of rows whose key belongs below a word of a filter of ``words``."""
    if word == words:
        return segment.rows
    return int(segment.heads.searchsorted(np.uint64(-(-(word << 32) // words) << 32)))


def _lows(tails: _Tails) -> _Words:
    """Second halves of the keys."""
    return tails.view([("low", "<u8"), ("value", f"V{tails.dtype.itemsize - _HALF}")])["low"]
