"""The two changelogs behind a partition's state: what is written with every batch, and read back when a disk is lost.

``rater.seen``: identities packed by the day they expire, at most 512 KiB a record: one version byte, the expiry day
(days since 1970, little-endian uint32), then 24 bytes an identity (16 of identity hash, 8 of payload hash).
``rater.totals``: key is the counter, value its running quantity in units of 1e-9 as decimal digits; compacted. Two more
keys hold the offset that each source was processed up to: what the changelogs say was true then, and no later.
"""

import struct
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

from pipeline.core.usage import Event
from pipeline.infra.wire import IDENTITY_BYTES, PAYLOAD_BYTES
from pipeline.rating import compiled

_HEAD = struct.Struct("<BI")
_VERSION = 1
_ENTRY_BYTES = IDENTITY_BYTES + PAYLOAD_BYTES
_ENTRIES_BYTES_MAX = (512 * 1024 - _HEAD.size) // _ENTRY_BYTES * _ENTRY_BYTES
_DAY_MS = 24 * 60 * 60 * 1000
#: Seen keys live this long after the later of event and append time (law 5).
SEEN_DAYS = 37


def reached(source: str) -> bytes:
    """Key, among the counters, of how far a source was processed. None is named so: ids hold no such character."""
    return b"\x1e" + source.encode()


def day_of(at_ms: int) -> int:
    """Days since 1970 UTC."""
    return at_ms // _DAY_MS


def expiry_day(appended_ms: int, rated_ms: int) -> int:
    """First day (since 1970 UTC) on which an identity may be forgotten that arrived and was rated then.

    Counted from when it was rated where that is later: an old event that was replayed must meet its repeats too. An
    accepted event's own time is at most five minutes after its append time; a day of margin covers that, another the
    part of the day already gone.
    """
    return day_of(max(appended_ms, rated_ms)) + SEEN_DAYS + 2


def by_expiry(rated: list[Event], rated_ms: int) -> dict[int, list[bytes]]:
    """Entries (identity and payload) of events rated at a time, alone or in blocks, by the day they expire."""
    if not rated:
        return {}
    if _latest_arrival_ms(rated) <= rated_ms:  # always, if clocks agree
        return {expiry_day(0, rated_ms): [entries(rated)]}
    days: defaultdict[int, list[bytes]] = defaultdict(list)
    for event in rated:
        days[expiry_day(event.record.timestamp, rated_ms)].append(event.identity + event.payload)
    return days


def entries(events: list[Event]) -> bytes:
    """Identity and payload of each event, one behind the other."""
    if compiled.fastpath is not None:
        made: bytes = compiled.fastpath.entries(events)
        return made
    return b"".join([event.identity + event.payload for event in events])


def _latest_arrival_ms(events: list[Event]) -> int:
    if compiled.fastpath is not None:
        return int(compiled.fastpath.latest_arrival_ms(events))
    return max(event.record.timestamp for event in events)


def pack_seen(days: Mapping[int, Iterable[bytes]]) -> Iterator[bytes]:
    """Changelog records for the entries of a batch, which come alone or in blocks."""
    for day, blocks in sorted(days.items()):
        head, entries = _HEAD.pack(_VERSION, day), b"".join(blocks)
        for start in range(0, len(entries), _ENTRIES_BYTES_MAX):
            yield head + entries[start : start + _ENTRIES_BYTES_MAX]


def unpack_seen(value: bytes) -> tuple[int, bytes]:
    """Expiry day and entries, one behind the other, of a changelog record. Raises ValueError when it is not one."""
    if len(value) < _HEAD.size or (len(value) - _HEAD.size) % _ENTRY_BYTES:
        raise ValueError(f"expected a head and entries of {_ENTRY_BYTES} bytes, got {len(value)} bytes")
    version, day = _HEAD.unpack_from(value)
    if version != _VERSION:
        raise ValueError(f"expected version {_VERSION} of a seen record, got {version}: written by a newer Tally")
    return day, value[_HEAD.size :]


def pack_quantity(quantity: int) -> bytes:
    return b"%d" % quantity


def unpack_quantity(value: bytes) -> int:
    return int(value)
