"""The spool on disk: every event is written here before it goes to Kafka, and marked when Kafka has it.

An append-only log in segments of fixed size, mapped into memory. One writer thread at a time (``append`` locks), one
sender thread (everything else). What a crash leaves:

- *process killed* (SIGKILL, out of memory): every append that returned is in the page cache, so nothing is lost. A
  record cut short fails its checksum and was never sent; its number is used again. Marks survive as well, so what Kafka
  confirmed is not sent again.
- *machine lost power*: what the kernel had not yet written is gone; ``sync`` bounds that. Numbers may then be
  missing at the end, so the caller starts a new epoch (``pipeline.producer.spool``) and never reuses one.

Segment: magic, epoch, first sequence number, count once sealed; then records, then zeros. Record: state, length of
key, length of value, CRC-32 of key and value, key, value. A record's number is its place in the segment.
"""

import contextlib
import errno
import logging
import mmap
import os
import struct
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from pipeline.producer.errors import BufferFull, ProducerClosed, SpoolError
from pipeline.producer.usage import varint

log = logging.getLogger("tally.producer")

PENDING, DELIVERED, REJECTED = 0, 1, 2

_MAGIC = b"TALLYJ1\n"
_SEGMENT = struct.Struct("<8s16sQQ")
_SEALED_COUNT = struct.Struct("<Q")
_SEALED_COUNT_AT = _SEGMENT.size - _SEALED_COUNT.size
_RECORD = struct.Struct("<BBxxII")

#: A segment holds ~70,000 events; a smaller spool has smaller ones, so that room comes back in steps.
SEGMENT_BYTES_MAX = 16 * 1024 * 1024
#: Room for the largest event with its headers.
SEGMENT_BYTES_MIN = 512 * 1024
#: One segment being written, one being delivered.
SPOOL_BYTES_MIN = 2 * SEGMENT_BYTES_MIN


class Segment:
    """One mapped file. ``tail`` is written by appenders, ``done`` by the sender."""

    __slots__ = ("base", "done", "epoch", "file", "map", "path", "size", "synced", "tail")

    def __init__(self, path: Path, file: int, size: int, epoch: str, base: int) -> None:
        self.path = path
        self.file = file
        self.size = size
        self.epoch = epoch
        #: Sequence number of the first record.
        self.base = base
        self.map = mmap.mmap(file, size)
        #: End of the last record and number of records; one tuple, so that readers see both or neither.
        self.tail = (_SEGMENT.size, 0)
        #: Records delivered or rejected.
        self.done = 0
        #: Complete and on disk.
        self.synced = False

    @property
    def pending(self) -> int:
        return self.tail[1] - self.done

    def drop(self) -> None:
        """Unmap and delete."""
        self.unmap()
        self.path.unlink()

    def unmap(self) -> None:
        self.map.close()
        os.close(self.file)


class Entry(NamedTuple):
    """One journaled event. ``at`` is its place in the segment."""

    segment: Segment
    at: int
    sequence: int
    key: bytes
    value: bytes


class Left(NamedTuple):
    """What an earlier run left in a segment: numbers from ``first`` to, not including, ``following``."""

    epoch: str
    first: int
    #: Where they end that can be read; below ``following`` only where the segment is damaged.
    readable: int
    following: int
    #: Runs of those not yet delivered or rejected, both ends inclusive.
    waiting: list[tuple[int, int]]


class Journal:
    """All segments of one spool folder, oldest first; the last one is written to.

    Recovers what an earlier run left; raises SpoolError when the folder holds something else or cannot be written.
    """

    def __init__(self, folder: Path, epoch: str, bytes_max: int) -> None:
        if bytes_max < SPOOL_BYTES_MIN:
            raise ValueError(f"expected spool_bytes_max of at least {SPOOL_BYTES_MIN}, got {bytes_max}")
        self._folder = folder
        self._epoch = epoch
        self._bytes_max = bytes_max
        self._segment_bytes = max(SEGMENT_BYTES_MIN, min(SEGMENT_BYTES_MAX, bytes_max // 8))
        #: Held to append and to add or remove segments; notified when room comes back.
        self._room = threading.Condition(threading.Lock())
        self._segments: list[Segment] = []
        self._final_next = 1
        #: What earlier runs left, oldest first.
        self.left: list[Left] = []
        try:
            for path in sorted(folder.glob("*.journal")):
                if (recovered := _recover(path)) is not None:
                    segment, left = recovered
                    self._segments.append(segment)
                    self.left.append(left)
            # Never append after a recovered tail: a record cut short may follow it.
            first = 1
            if self._segments and self._segments[-1].epoch == epoch:
                first = self._segments[-1].base + self._segments[-1].tail[1]
            self._add(first, self._segment_bytes)
        except OSError as error:
            raise SpoolError(f"cannot use the spool {folder}: {error}") from error
        self.retire()
        self.recovered = sum(segment.pending for segment in self._segments)

    # -- appending: any thread

    @property
    def next_sequence(self) -> int:
        segments = self._segments
        return segments[-1].base + segments[-1].tail[1] if segments else self._final_next

    @property
    def size(self) -> int:
        """Disk space taken, in bytes."""
        return sum(segment.size for segment in tuple(self._segments))

    def append(self, key: bytes, head: bytes, block_seconds: float, before: Callable[[int], None] | None = None) -> int:
        """Write one event, ``head`` and then its sequence number, and return the number.

        ``before`` is called with the number before the sender can see the event. Raises BufferFull when there is no
        room within ``block_seconds``, ProducerClosed after ``close``; then nothing was written, no number used.
        """
        deadline = None
        with self._room:
            while True:
                if not self._segments:
                    raise ProducerClosed("the producer is closed")
                segment = self._segments[-1]
                end, count = segment.tail
                sequence = segment.base + count
                value = head + varint(sequence)
                record = _RECORD.pack(PENDING, len(key), len(value), zlib.crc32(value, zlib.crc32(key))) + key + value
                stop = end + len(record)
                if stop <= segment.size:
                    if before is not None:
                        before(sequence)
                    segment.map[end:stop] = record
                    segment.tail = (stop, count + 1)  # from here on the sender sees it
                    return sequence
                if deadline is None:
                    deadline = time.monotonic() + block_seconds
                self._roll(segment, sequence, deadline, block_seconds)

    def _roll(self, full: Segment, first: int, deadline: float, block_seconds: float) -> None:
        """Start the next segment, or wait for room and return to look again."""
        if self.size + self._segment_bytes <= self._bytes_max:
            try:
                self._add(first, self._segment_bytes)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise BufferFull(f"the spool {self._folder} cannot grow: {error}") from error
                reason = f"the disk of the spool {self._folder} is full"
            else:
                _SEALED_COUNT.pack_into(full.map, _SEALED_COUNT_AT, full.tail[1])
                return
        else:
            reason = f"the spool {self._folder} holds its {self._bytes_max} bytes of undelivered events"
        if not self._room.wait(max(0.0, deadline - time.monotonic())):
            raise BufferFull(f"{reason}, and no room came within {block_seconds} s: is Kafka reachable?")

    def _add(self, first: int, size: int) -> None:
        number = int(self._segments[-1].path.stem) + 1 if self._segments else 1
        path = self._folder / f"{number:08d}.journal"
        # Truncated, not refused, when it exists: then an interrupt came while it was made, and it was never used.
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            _allocate(file, size)
            segment = Segment(path, file, size, self._epoch, first)
        except BaseException:
            os.close(file)
            path.unlink()
            raise
        header = _SEGMENT.pack(_MAGIC, self._epoch.encode(), first, 0)
        segment.map[len(_MAGIC) : _SEGMENT.size] = header[len(_MAGIC) :]
        segment.map[: len(_MAGIC)] = _MAGIC  # last: a segment without it was never used
        self._segments.append(segment)

    # -- sending: one thread

    def start(self) -> "Cursor":
        """A cursor before the first event not yet delivered."""
        return Cursor(self._segments[0])

    def read(self, cursor: "Cursor", limit: int) -> list[Entry]:
        """Up to ``limit`` pending events from the cursor on, in the order they were appended; moves the cursor."""
        entries: list[Entry] = []
        while len(entries) < limit:
            segment = cursor.segment
            end, _ = segment.tail
            data = segment.map
            while cursor.at < end and len(entries) < limit:
                at = cursor.at
                state, key_bytes, value_bytes, _ = _RECORD.unpack_from(data, at)
                key_end = at + _RECORD.size + key_bytes
                cursor.at = key_end + value_bytes
                if state == PENDING:
                    entries.append(
                        Entry(
                            segment,
                            at,
                            segment.base + cursor.index,
                            data[at + _RECORD.size : key_end],
                            data[key_end : cursor.at],
                        )
                    )
                cursor.index += 1
            if cursor.at < end or not self._advance(cursor):
                break
        return entries

    def _advance(self, cursor: "Cursor") -> bool:
        """Move a cursor that has read its segment to the next one, once there is one."""
        with self._room:
            segment = cursor.segment
            place = self._segments.index(segment)
            if place + 1 == len(self._segments) or cursor.at < segment.tail[0]:
                return False
            cursor.segment, cursor.at, cursor.index = self._segments[place + 1], _SEGMENT.size, 0
            return True

    def first_waiting(self, epoch: str) -> int | None:
        """The lowest number of an epoch that is not marked; None when all are."""
        for segment in tuple(self._segments):
            if segment.epoch != epoch or not segment.pending:
                continue
            at, (end, _), sequence = _SEGMENT.size, segment.tail, segment.base
            while at < end:
                state, key_bytes, value_bytes, _ = _RECORD.unpack_from(segment.map, at)
                if state == PENDING:
                    return sequence
                at, sequence = at + _RECORD.size + key_bytes + value_bytes, sequence + 1
        return None

    def mark(self, segment: Segment, at: int, state: int) -> None:
        """Note that an event needs no more sending. Room comes back with ``retire``."""
        segment.map[at] = state
        segment.done += 1

    def retire(self, reading: Segment | None = None) -> None:
        """Delete sealed segments whose events are all delivered, except the one being read."""
        if len(self._segments) == 1:
            return
        with self._room:
            finished = [s for s in self._segments[:-1] if s.pending == 0 and s is not reading]
            for segment in finished:
                self._segments.remove(segment)
                segment.drop()
            if finished:
                self._room.notify_all()

    def sync(self) -> None:
        """Bring what was appended to the disk itself, for the sake of a machine that loses power."""
        with self._room:  # own descriptors: a segment may be dropped, and no appender waits for the disk
            last = self._segments[-1]
            files = [(segment, os.dup(segment.file)) for segment in self._segments if not segment.synced]
        for segment, file in files:
            try:
                os.fsync(file)
            finally:
                os.close(file)
            segment.synced = segment is not last

    def close(self) -> None:
        """Leave only what is not delivered, and the next number, on the disk; synced."""
        with self._room:
            last = self._segments[-1]
            with contextlib.suppress(OSError):  # on a full disk the last segment stays and tells the next number
                self._add(last.base + last.tail[1], _SEGMENT.size)
                _SEALED_COUNT.pack_into(last.map, _SEALED_COUNT_AT, last.tail[1])
            for segment in self._segments:
                if segment.pending == 0 and segment is not self._segments[-1]:
                    segment.drop()
                else:
                    os.fsync(segment.file)
                    segment.unmap()
            self._final_next = last.base + last.tail[1]
            self._segments = []
            self._room.notify_all()

    def abandon(self) -> None:
        """Let go of the files without touching what they hold: in a child of fork, or after a failed start."""
        for segment in self._segments:
            segment.unmap()


class Cursor:
    """Where the sender reads on."""

    __slots__ = ("at", "index", "segment")

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        self.at = _SEGMENT.size
        self.index = 0


def _allocate(file: int, size: int) -> None:
    """Reserve the disk space: a store into a mapped hole on a full disk would kill the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
    else:  # macOS
        os.pwrite(file, bytes(size), 0)


def _recover(path: Path) -> tuple[Segment, Left] | None:
    """A segment an earlier run left, cut to what it holds; None, and the file removed, when it was never used."""
    data = path.read_bytes()
    if not any(data[: len(_MAGIC)]):  # killed before its header was complete
        path.unlink()
        return None
    if len(data) < _SEGMENT.size or not data.startswith(_MAGIC):
        raise SpoolError(f"{path} is not a journal of this version: move it away")
    _, epoch, base, sealed = _SEGMENT.unpack_from(data)
    at, count, done = _SEGMENT.size, 0, 0
    waiting: list[tuple[int, int]] = []
    while at + _RECORD.size <= len(data):
        state, key_bytes, value_bytes, crc = _RECORD.unpack_from(data, at)
        start = at + _RECORD.size
        end = start + key_bytes + value_bytes
        if not value_bytes or end > len(data) or zlib.crc32(data[start:end]) != crc:
            break
        if state != PENDING:
            done += 1
        elif waiting and waiting[-1][1] == base + count - 1:
            waiting[-1] = (waiting[-1][0], base + count)
        else:
            waiting.append((base + count, base + count))
        count += 1
        at = end
    if count < sealed:
        keep = path.with_suffix(".damaged")
        keep.write_bytes(data)
        log.error(
            "spool segment %s is damaged: events %d to %d cannot be read; a copy is kept as %s",
            path,
            base + count,
            base + sealed - 1,
            keep,
        )
    file = os.open(path, os.O_RDWR)
    os.ftruncate(file, at)
    segment = Segment(path, file, at, epoch.rstrip(b"\0").decode(), base)
    segment.tail, segment.done = (at, count), done
    return segment, Left(segment.epoch, base, base + count, base + max(count, sealed), waiting)
