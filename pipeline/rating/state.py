"""What a partition remembers on local disk: identities it rated, running quantities, and how far its changelogs are in.

A cache of the changelogs, no more: it may be deleted at any time and is restored from them. RocksDB, one database per
partition; a batch is written atomically. Identities stand in one column family per 37 expiry days, so that forgetting
is dropping a whole family, never a scan; at most three hold live entries. Memory is bounded by RocksDB's caches and
``_TOTALS_CACHED``, however many keys there are.
"""

import contextlib
import fcntl
import itertools
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from rocksdict import BlockBasedOptions, Cache, DBCompressionType, Options, Rdict, WriteBatch

from pipeline.infra.logs import get_logger
from pipeline.infra.wire import IDENTITY_BYTES
from pipeline.rating.batch import StateFailed
from pipeline.rating.changelog import SEEN_DAYS, pack_quantity, unpack_quantity

log = get_logger(__name__)

_META, _TOTALS, _SEEN = "default", "totals", "seen-"
#: Running quantities kept in memory; the rest is read from disk when asked for.
_TOTALS_CACHED = 500_000
#: Block cache of all partitions of a process, bloom filters and indexes included.
_CACHE_BYTES = 128 * 1024 * 1024
_WRITE_BUFFER_BYTES = 16 * 1024 * 1024

#: A worker that just lost a partition is given two seconds to let go of its directory.
_CLAIM_TRIES, _CLAIM_PAUSE_S = 20, 0.1

_cache: Cache | None = None


class Positions(NamedTuple):
    """Next offset to read of each changelog."""

    seen: int
    totals: int


class PartitionState:
    """State of one source partition. Not thread safe: only the partition's own thread touches it."""

    def __init__(self, path: Path, stamp: Mapping[str, str]) -> None:
        """Open or create. ``stamp`` names the cluster and topics it belongs to: with another stamp it is wiped.

        A directory that another process (or a worker not quite gone) still holds is left alone: the state then lives
        in ``path-1``, ``path-2``, … and is restored there.
        """
        self._path, self._lock = _claim(path)
        self._stamp = json.dumps(dict(sorted(stamp.items()))).encode()
        self._totals_cached: dict[bytes, int] = {}
        try:
            self._open()
        except Exception as error:  # noqa: BLE001  the driver raises nothing more exact
            # The directory is ours alone, so what is in it is damaged. It is only a cache.
            log.warning("state_unreadable", path=str(self._path), error=str(error), then="restored from the changelogs")
            shutil.rmtree(self._path)
            self._open()
        stored = self._meta.get(b"stamp")
        if stored is None:
            self._meta[b"stamp"] = self._stamp
        elif stored != self._stamp:
            self.reset()

    def reset(self) -> None:
        """Forget everything, to be restored from the changelogs' beginning."""
        self._close()
        shutil.rmtree(self._path)
        self._open()
        self._meta[b"stamp"] = self._stamp
        self._totals_cached.clear()

    def _open(self) -> None:
        self._path.mkdir(parents=True, exist_ok=True)
        options = _options()
        existing = Rdict.list_cf(str(self._path), options) if (self._path / "CURRENT").exists() else []
        self._db = Rdict(str(self._path), options, column_families={name: _options() for name in existing} or None)
        self._meta = self._db
        self._totals = self._family(_TOTALS, existing)
        self._seen = {
            int(name.removeprefix(_SEEN)): self._family(name, existing) for name in existing if name.startswith(_SEEN)
        }

    def _family(self, name: str, existing: Sequence[str]) -> Rdict:
        if name in existing:
            return self._db.get_column_family(name)
        return self._db.create_column_family(name, _options())

    @property
    def positions(self) -> Positions | None:
        """How far the changelogs are in this state; None in a new one."""
        stored = self._meta.get(b"positions")
        return None if stored is None else Positions(*json.loads(stored))

    def known(self, identities: Sequence[bytes]) -> Sequence[bytes | None]:
        keys: list[Any] = list(identities)
        found: list[bytes | None] = [None] * len(keys)
        for family in self._seen.values():
            with _disk():
                below: list[bytes | None] = family.get(keys) or []
            if any(below):
                found = [old if old is not None else new for old, new in zip(found, below, strict=True)]
        return found

    def quantity(self, counter: bytes) -> int | None:
        cached = self._totals_cached.get(counter)
        if cached is not None:
            return cached
        with _disk():
            stored = self._totals.get(counter)
        if stored is None:
            return None
        quantity = unpack_quantity(stored)
        self._totals_cached[counter] = quantity
        return quantity

    def apply(self, seen: Mapping[int, Sequence[bytes]], totals: Mapping[bytes, int], positions: Positions) -> None:
        """Write what a committed batch (or a run of restored records) changed, atomically. Raises StateFailed."""
        with _disk():
            self._write(seen, totals, positions)
        if len(self._totals_cached) > _TOTALS_CACHED:
            self._totals_cached.clear()
        self._totals_cached.update(totals)

    def _write(self, seen: Mapping[int, Sequence[bytes]], totals: Mapping[bytes, int], positions: Positions) -> None:
        batch = WriteBatch(raw_mode=True)
        put = batch.put
        for day, entries in seen.items():
            bucket = day // SEEN_DAYS
            if bucket not in self._seen:
                self._seen[bucket] = self._db.create_column_family(f"{_SEEN}{bucket}", _options())
            handle = self._db.get_column_family_handle(f"{_SEEN}{bucket}")
            for entry in entries:
                put(entry[:IDENTITY_BYTES], entry[IDENTITY_BYTES:], handle)
        handle = self._db.get_column_family_handle(_TOTALS)
        for counter, quantity in totals.items():
            put(counter, pack_quantity(quantity), handle)
        put(b"positions", json.dumps(positions).encode())
        self._db.write(batch)

    def forget_before(self, day: int) -> None:
        """Drop identities that all expire before ``day`` (days since 1970 UTC)."""
        for bucket in [b for b in self._seen if (b + 1) * SEEN_DAYS <= day]:
            self._seen.pop(bucket).close()
            self._db.drop_column_family(f"{_SEEN}{bucket}")

    @property
    def seen_keys(self) -> int:
        """Estimated number of identities held."""
        return sum(family.property_int_value("rocksdb.estimate-num-keys") or 0 for family in self._seen.values())

    def close(self) -> None:
        """Close, and let others have the directory."""
        self._close()
        self._lock.close()

    def _close(self) -> None:
        for family in (*self._seen.values(), self._totals):
            family.close()
        self._db.close()


@contextlib.contextmanager
def _disk() -> Iterator[None]:
    """Name a driver's error for what it is: the disk's fault, or the store's, never an event's."""
    try:
        yield
    except Exception as error:
        raise StateFailed(f"the local state cannot be read or written: {error}") from error


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


def _options() -> Options:
    global _cache
    if _cache is None:
        _cache = Cache(_CACHE_BYTES)
    table = BlockBasedOptions()
    table.set_block_cache(_cache)
    table.set_bloom_filter(10, False)
    table.set_cache_index_and_filter_blocks(True)
    table.set_pin_l0_filter_and_index_blocks_in_cache(True)
    options = Options(raw_mode=True)
    options.create_if_missing(True)
    options.set_block_based_table_factory(table)
    options.set_write_buffer_size(_WRITE_BUFFER_BYTES)
    options.set_memtable_whole_key_filtering(True)
    options.set_memtable_prefix_bloom_ratio(0.1)
    # Hashes do not compress.
    options.set_compression_type(DBCompressionType.none())
    options.set_keep_log_file_num(2)
    return options
