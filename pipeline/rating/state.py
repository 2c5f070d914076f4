"""What a partition remembers on local disk: identities it rated, running quantities, and how far its changelogs are in.

A cache of the changelogs, no more: it may be deleted at any time and is restored from them; so is one found damaged. A
directory per partition holds

    manifest              what counts of the rest (``pipeline.rating.manifest``)
    00000017.log          the batches since the manifest's positions
    00000016-<checksum>   segments (``pipeline.rating.segments``): sorted rows, never changed

A batch is one record of the log, and in memory until ``_FLUSH_ROWS`` rows are; then they become segments, a new log and
a new manifest at once. A kill at any point leaves what some batch left. Identities stand apart by ``SPAN_DAYS`` expiry
days, so that forgetting deletes files and never scans; counters, by their 128-bit hash, in a span of their own. Of the
segments of a span the last ones are merged when ``_FANOUT`` of like size have come together, in steps of about 30,000
rows between batches, as many as these have earned, so that none waits for a large merge. Memory holds rows not yet
flushed and ``_CACHED`` running quantities, however many there are.
"""

import contextlib
import fcntl
import itertools
import shutil
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np
from xxhash import xxh3_128_digest

from pipeline.infra.logs import get_logger
from pipeline.infra.wire import IDENTITY_BYTES, PAYLOAD_BYTES
from pipeline.rating.batch import StateFailed
from pipeline.rating.manifest import SEEN_ROW_BYTES, Change, Listed, Log, Manifest, Positions, log_name, replay
from pipeline.rating.recent import Recent, new_recent
from pipeline.rating.segments import KEY_BYTES, Damaged, Described, Probe, Segment, build, merge, verify
from pipeline.rating.snapshot import Snapshots

__all__ = ["SPAN_DAYS", "PartitionState", "Positions"]

log = get_logger(__name__)

#: Expiry days that are forgotten together: an identity lives up to six days longer than it has to. With fewer, more
#: segments would have to be searched.
SPAN_DAYS = 7
#: The span of the counters, which do not expire.
_COUNTERS = -1
#: Signed, little-endian, in units of 1e-9: the rater refuses what has more than 38 digits.
_QUANTITY_BYTES = 16

#: Rows kept in memory, about 200 bytes each, before they become a segment.
_FLUSH_ROWS = 32_768
#: A log may grow faster than the rows in memory, where the same counters move again and again.
_LOG_BYTES = 16 * 1024 * 1024
#: Segments of like size that are merged; the next size is as many times larger.
_FANOUT = 4
#: Rows merged for each row applied: more than the number of sizes that 10^9 rows have, so merges keep up.
_MERGED_PER_ROW = 8
#: Running quantities kept in each half of the cache.
_CACHED = 65_536

#: A worker that just lost a partition is given two seconds to let go of its directory.
_CLAIM_TRIES, _CLAIM_PAUSE_S = 20, 0.1


@dataclass(slots=True)
class _Merge:
    """The last segments of a span, becoming one."""

    span: int
    segments: list[Segment]
    steps: Generator[int, None, Described]


class PartitionState:
    """State of one source partition. Not thread safe: only the partition's own thread touches it."""

    def __init__(
        self, path: Path, stamp: Mapping[str, str], *, snapshots: Path | None = None, snapshot_interval_s: float = 600
    ) -> None:
        """Open or create. ``stamp`` names the cluster and topics it belongs to: with another stamp it is wiped.

        A directory that another process (or a worker not quite gone) still holds is left alone: the state then lives
        in ``path-1``, ``path-2``, … and is restored there. ``snapshots`` is where copies of it are kept; one is used
        when there is nothing here. Raises StateFailed when the disk cannot be used.
        """
        self._path, self._lock = _claim(path)
        self._stamp = dict(stamp)
        self._snapshots = None if snapshots is None else Snapshots(snapshots, snapshot_interval_s)
        self._usable = True
        try:
            with self._disk():
                self._open()
        except StateFailed:
            self._lock.close()
            raise

    def _open(self) -> None:
        try:
            manifest = Manifest.read(self._path)
            if manifest is not None and manifest.stamp == self._stamp:
                self._load(manifest)
                return
        except (OSError, Damaged) as error:
            # The directory is ours alone, so what is in it is damaged. It is only a cache.
            log.warning("state_unreadable", path=str(self._path), error=str(error), then="restored anew")
        if not self._load_snapshot():
            self._create()

    def _load_snapshot(self) -> bool:
        """Begin with the copy, if there is one of use."""
        if self._snapshots is None:
            return False
        self._wipe()
        try:
            manifest = self._snapshots.fetch(self._stamp, self._path)
            if manifest is None:
                return False
            manifest.write(self._path)
            self._load(manifest)
        except (OSError, Damaged) as error:
            log.warning("snapshot_unreadable", error=str(error), then="restored from the changelogs")
            return False
        log.info("snapshot_used", path=str(self._path), positions=self._positions, identities=self.seen_keys)
        return True

    def _create(self) -> None:
        self._wipe()
        manifest = Manifest(self._stamp, None, 0, ())
        manifest.write(self._path)
        self._load(manifest)

    def _wipe(self) -> None:
        if self._path.exists():
            shutil.rmtree(self._path)
        self._path.mkdir(parents=True)

    def _load(self, manifest: Manifest) -> None:
        """Take up what is on disk, checked. Raises OSError, Damaged."""
        for listed in manifest.segments:
            verify(self._path, listed.segment)
        self._manifest = manifest
        self._segments: dict[int, list[Segment]] = {}
        for span, described in manifest.segments:
            self._segments.setdefault(span, []).append(Segment(self._path, described))
        self._merging: _Merge | None = None
        # Rows of merging that are due; below 0 after a step larger than that.
        self._to_merge = 0
        self._number = manifest.last_number
        self._positions = manifest.positions
        # Rows not in segments yet: identity → payload by span, counter hash → quantity.
        self._recent: dict[int, Recent] = {}
        self._moved: dict[bytes, bytes] = {}
        # Running quantities by counter: those used since the halves last changed places, and those before.
        self._young: dict[bytes, int] = {}
        self._old: dict[bytes, int] = {}
        for change in replay(self._path / manifest.log):
            self._remember(change)
        for path in self._path.iterdir():
            if path.name not in manifest.files:
                path.unlink()
        self._log = Log(self._path / manifest.log)

    def reset(self) -> None:
        """Forget everything, to be restored from the changelogs' beginning."""
        with self._disk():
            self._abandon_merge()
            self._log.close()
            self._create()

    def close(self) -> None:
        """Close, and let others have the directory."""
        self._usable = False
        if self._snapshots is not None:
            self._snapshots.stop()
        self._abandon_merge()
        self._log.close()
        self._segments.clear()
        self._lock.close()

    # -- reading

    @property
    def positions(self) -> Positions | None:
        """How far the changelogs are in this state; None in a new one."""
        return self._positions

    @property
    def seen_keys(self) -> int:
        """Number of identities held; one that was applied twice may count twice."""
        return sum(map(len, self._recent.values())) + sum(
            segment.rows for span, segments in self._segments.items() if span != _COUNTERS for segment in segments
        )

    def known(self, identities: bytes) -> Sequence[bytes | None]:
        """Payload each identity was rated with, None for those never rated. Raises StateFailed.

        The identities stand one behind the other.
        """
        found: list[bytes | None] = [None] * (len(identities) // IDENTITY_BYTES)
        if not identities:
            return found
        with self._disk():
            probe = Probe(identities)
            for span in sorted(self._segments):
                if span != _COUNTERS:
                    for segment in self._segments[span]:
                        numbers, payloads = segment.find(probe)
                        for number, payload in zip(numbers.tolist(), payloads, strict=True):
                            found[number] = payload
        for _, recent in sorted(self._recent.items()):
            newer = recent.find(identities)
            if newer is not None:
                found = [new or old for new, old in zip(newer, found, strict=True)]
        return found

    def quantity(self, counter: bytes) -> int | None:
        """Running quantity of a counter in units of 1e-9, None where no event counted yet. Raises StateFailed."""
        quantity = self._young.get(counter)
        if quantity is not None:
            return quantity
        quantity = self._old.get(counter)
        if quantity is None:
            with self._disk():
                stored = self._stored_quantity(xxh3_128_digest(counter))
            if stored is None:
                return None
            quantity = int.from_bytes(stored, "little", signed=True)
        self._cache({counter: quantity})
        return quantity

    def _stored_quantity(self, key: bytes) -> bytes | None:
        if (stored := self._moved.get(key)) is not None:
            return stored
        for segment in reversed(self._segments.get(_COUNTERS, ())):
            if (stored := segment.get(key)) is not None:
                return stored
        return None

    def _cache(self, quantities: Mapping[bytes, int]) -> None:
        self._young.update(quantities)
        if len(self._young) > _CACHED:
            self._young, self._old = {}, self._young

    # -- writing

    def apply(self, seen: Mapping[int, Iterable[bytes]], totals: Mapping[bytes, int], positions: Positions) -> None:
        """Write what a committed batch (or a run of restored records) changed, atomically. Raises StateFailed.

        ``seen``: by expiry day (days since 1970 UTC), entries of identity and payload, or blocks of several.
        """
        packed = {day: block for day, entries in seen.items() if (block := b"".join(entries))}
        moved = [
            xxh3_128_digest(counter) + quantity.to_bytes(_QUANTITY_BYTES, "little", signed=True)
            for counter, quantity in totals.items()
        ]
        change = Change(packed, b"".join(moved), positions)
        rows = sum(map(len, packed.values())) // SEEN_ROW_BYTES + len(moved)
        if not rows and positions == self._positions:
            return  # all were repeats
        with self._disk():
            if rows < _FLUSH_ROWS:
                self._log.append(change)
                self._remember(change)
                held = sum(map(len, self._recent.values())) + len(self._moved)
                if held >= _FLUSH_ROWS or self._log.size >= _LOG_BYTES:
                    self._flush()
            else:
                # A run of restored records: identities become a segment without passing through memory.
                self._remember(change._replace(seen={}))
                self._flush(packed)
            self._cache(totals)
            self._merge_some(rows)
            if self._snapshots is not None and self._snapshots.due:
                self._flush()
                self._snapshots.start(self._manifest, self._path)

    def forget_before(self, day: int) -> None:
        """Drop identities that all expire before ``day`` (days since 1970 UTC). Raises StateFailed."""
        gone = {span for span in self._recent.keys() | self._segments.keys() if _expired(span, day)}
        if not gone:
            return
        with self._disk():
            if self._merging is not None and self._merging.span in gone:
                self._abandon_merge()
            files = [segment.path for span in gone for segment in self._segments.pop(span, ())]
            for span in gone:
                self._recent.pop(span, None)
            self._flush()
            _delete(files)

    def _remember(self, change: Change) -> None:
        """Keep a change in memory."""
        for day, packed in change.seen.items():
            span = day // SPAN_DAYS
            recent = self._recent.get(span)
            if recent is None:
                recent = self._recent[span] = new_recent()
            recent.add(packed)
        self._moved.update(_rows(change.totals, KEY_BYTES + _QUANTITY_BYTES))
        self._positions = change.positions

    def _flush(self, more: Mapping[int, bytes] | None = None) -> None:
        """Make segments of what is in memory, and of ``more`` rows by expiry day; begin a new log."""
        packed: dict[int, list[bytes]] = {span: [recent.entries()] for span, recent in self._recent.items()}
        for day, block in (more or {}).items():
            packed.setdefault(day // SPAN_DAYS, []).append(block)
        if self._moved:
            packed[_COUNTERS] = list(itertools.chain.from_iterable(self._moved.items()))
        for span, parts in packed.items():
            value_bytes = _QUANTITY_BYTES if span == _COUNTERS else PAYLOAD_BYTES
            described = build(self._path / "building", b"".join(parts), value_bytes)
            self._segments.setdefault(span, []).append(self._named(described))
        full, self._log = self._log, Log(self._path / log_name(self._next_number()))
        self._write_manifest(self._positions, self._number)
        self._recent, self._moved = {}, {}
        full.close()
        _delete([full.path])

    def _named(self, written: Described) -> Segment:
        """A file just written, under its name: its number and checksum, so that no other content ever has it."""
        described = written._replace(name=f"{self._next_number():08d}-{written.checksum}")
        (self._path / written.name).rename(self._path / described.name)
        return Segment(self._path, described)

    def _next_number(self) -> int:
        self._number += 1
        return self._number

    def _write_manifest(self, positions: Positions | None, log_number: int) -> None:
        listed = (Listed(span, one.described) for span in sorted(self._segments) for one in self._segments[span])
        manifest = Manifest(self._stamp, positions, log_number, tuple(listed))
        manifest.write(self._path)
        self._manifest = manifest

    # -- merging

    def _merge_some(self, rows: int) -> None:
        """Merge on, in proportion to the rows just applied."""
        self._to_merge += _MERGED_PER_ROW * rows
        while self._to_merge > 0:
            if self._merging is None and not self._begin_merge():
                self._to_merge = 0
                return
            assert self._merging is not None
            try:
                self._to_merge -= next(self._merging.steps)
            except StopIteration as ended:
                self._end_merge(self._merging, ended.value)

    def _begin_merge(self) -> bool:
        newest = max(self._segments, default=_COUNTERS)
        for span in sorted(self._segments, reverse=True):
            segments = self._segments[span]
            first = merge_from([one.rows for one in segments], growing=span in (newest, _COUNTERS))
            if first is not None:
                inputs = segments[first:]
                self._merging = _Merge(span, inputs, merge(inputs, self._path / "merging"))
                return True
        return False

    def _end_merge(self, done: _Merge, described: Described) -> None:
        segments = self._segments[done.span]
        first = segments.index(done.segments[0])
        segments[first : first + len(done.segments)] = [self._named(described)]
        self._merging = None
        self._write_manifest(self._manifest.positions, self._manifest.log_number)
        _delete(one.path for one in done.segments)

    def _abandon_merge(self) -> None:
        if self._merging is not None:
            self._merging.steps.close()
            self._merging = None

    @contextlib.contextmanager
    def _disk(self) -> Iterator[None]:
        """Name an error of the disk for what it is, and no event's fault; after it nothing is written any more."""
        if not self._usable:
            raise StateFailed("the local state was closed, or failed before")
        try:
            yield
        except OSError as error:
            self._usable = False
            raise StateFailed(f"the local state cannot be read or written: {error}") from error


def merge_from(rows: Sequence[int], *, growing: bool) -> int | None:
    """The segment of a span from which on all are to be merged, given their rows, oldest first; None when none are.

    In a span that grows: those at the end that are of one size or smaller, once ``_FANOUT`` of that size are there.
    Sizes are powers of it, so a row is written again once a size. A span that grows no more becomes one segment.
    """
    if not growing:
        return 0 if len(rows) > 1 else None
    sizes = [_size(one) for one in rows]
    for size in sorted(set(sizes)):
        first = len(sizes)
        while first and sizes[first - 1] <= size:
            first -= 1
        if sizes[first:].count(size) >= _FANOUT:
            return first
    return None


def _size(rows: int) -> int:
    """0 for what a flush makes, one more for what ``_FANOUT`` of a size make, though some be smaller than others."""
    size = 0
    while rows >= _FLUSH_ROWS // 2 * _FANOUT ** (size + 1):
        size += 1
    return size


def _expired(span: int, day: int) -> bool:
    return span != _COUNTERS and (span + 1) * SPAN_DAYS <= day


def _rows(packed: bytes, row_bytes: int) -> Iterator[tuple[bytes, bytes]]:
    """Key and value of each row."""
    rows = np.frombuffer(packed, [("key", f"V{KEY_BYTES}"), ("value", f"V{row_bytes - KEY_BYTES}")])
    return zip(rows["key"].tolist(), rows["value"].tolist(), strict=True)


def _delete(files: Iterable[Path]) -> None:
    for path in files:
        path.unlink()


def _claim(path: Path) -> tuple[Path, TextIO]:
    """The first free directory of ``path``, ``path-1``, …, and the lock on it, which the process's end releases."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count():
        candidate = path if number == 0 else path.with_name(f"{path.name}-{number}")
        lock = candidate.with_suffix(".lock").open("w")
        for _ in range(_CLAIM_TRIES if number == 0 else 1):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return candidate, lock
            except BlockingIOError:
                time.sleep(_CLAIM_PAUSE_S)
        lock.close()
    raise AssertionError("unreachable")
