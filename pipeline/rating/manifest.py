"""What a partition's state on disk consists of: one small file that is replaced whole, and a log behind it.

``manifest`` names the segments, the log, the changelog positions that the segments hold, and the stamp of the cluster
and topics they came from. It is JSON on one line and its checksum on the next. Replacing it is what makes a change of
the files true; files it does not name are left-overs.

A log holds what came since, a record a batch: length of the body (4 bytes, little-endian), its checksum (8), and the
body: both positions (8 each), number of days (4); for each its number (4), rows (4), and rows of identity and payload
(24 each); the rest are rows of counter hash and quantity (32 each). It is written without ``fsync``: killing the
process loses nothing, and what a power failure leaves of the last records fails its checksum and is cut off.
"""

import json
import os
import secrets
import struct
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from xxhash import xxh3_64_digest, xxh3_64_hexdigest

from pipeline.infra.wire import IDENTITY_BYTES, PAYLOAD_BYTES
from pipeline.rating.segments import Damaged, Described

SEEN_ROW_BYTES = IDENTITY_BYTES + PAYLOAD_BYTES
_FILE = "manifest"
_FORMAT = 1
_HEAD = struct.Struct("<I8s")
_POSITIONS = struct.Struct("<qqI")
_DAY = struct.Struct("<II")


class Positions(NamedTuple):
    """Next offset to read of each changelog."""

    seen: int
    totals: int


class Listed(NamedTuple):
    """A segment and the span of expiry days it belongs to."""

    span: int
    segment: Described


@dataclass(frozen=True, slots=True)
class Manifest:
    stamp: Mapping[str, str]
    positions: Positions | None
    log_number: int
    #: Oldest first within a span.
    segments: tuple[Listed, ...]

    @property
    def log(self) -> str:
        return log_name(self.log_number)

    @property
    def last_number(self) -> int:
        """Highest number in a file's name."""
        return max(self.log_number, *(int(one.segment.name.partition("-")[0]) for one in self.segments), 0)

    @property
    def files(self) -> frozenset[str]:
        """Everything that belongs here; the rest of the directory does not."""
        return frozenset((_FILE, self.log, *(listed.segment.name for listed in self.segments)))

    def write(self, directory: Path, *, sync: bool = False) -> None:
        """Replace the manifest there. Raises OSError."""
        text = json.dumps({"format": _FORMAT, **asdict(self)}).encode()
        new = directory / f"{_FILE}.new-{secrets.token_hex(4)}"
        with new.open("wb") as file:
            file.write(text + b"\n" + xxh3_64_hexdigest(text).encode() + b"\n")
            if sync:
                file.flush()
                os.fsync(file.fileno())
        new.replace(directory / _FILE)

    @classmethod
    def read(cls, directory: Path) -> "Manifest | None":
        """The manifest there, None when there is none. Raises OSError, Damaged."""
        try:
            text, checksum, *_ = (directory / _FILE).read_bytes().split(b"\n")
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise Damaged(f"the manifest holds no checksum: {error}") from error
        if xxh3_64_hexdigest(text).encode() != checksum:
            raise Damaged("the manifest's checksum is not that of its text")
        stored: dict[str, Any] = json.loads(text)
        if stored["format"] != _FORMAT:
            raise Damaged(f"expected format {_FORMAT} of the state, got {stored['format']}: written by another Tally")
        return cls(
            stored["stamp"],
            None if stored["positions"] is None else Positions(*stored["positions"]),
            stored["log_number"],
            tuple(Listed(span, Described(*segment)) for span, segment in stored["segments"]),
        )


def log_name(number: int) -> str:
    return f"{number:08d}.log"


class Change(NamedTuple):
    """What one batch changes: packed rows of identities by expiry day, and of counters; and the positions after it."""

    seen: Mapping[int, bytes]
    totals: bytes
    positions: Positions


class Log:
    """Changes since the manifest was written, in order."""

    def __init__(self, path: Path) -> None:
        """Open for appending, creating it if need be. Raises OSError."""
        self.path = path
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self.size = os.fstat(self._fd).st_size

    def append(self, change: Change) -> None:
        """Add a change. Raises OSError; what was written of it then fails its checksum."""
        parts = [_POSITIONS.pack(*change.positions, len(change.seen))]
        for day, rows in change.seen.items():
            parts += (_DAY.pack(day, len(rows) // SEEN_ROW_BYTES), rows)
        body = b"".join((*parts, change.totals))
        record = _HEAD.pack(len(body), xxh3_64_digest(body)) + body
        if (written := os.write(self._fd, record)) != len(record):
            raise OSError(f"the disk took {written} of {len(record)} bytes of the log")
        self.size += written

    def close(self) -> None:
        os.close(self._fd)


def replay(path: Path) -> Iterator[Change]:
    """The changes of a log, which is cut where a record is not whole. A missing one is empty. Raises OSError."""
    if not path.exists():
        return
    log = memoryview(path.read_bytes())
    at = 0
    while len(log) - at >= _HEAD.size:
        length, checksum = _HEAD.unpack_from(log, at)
        body = log[at + _HEAD.size : at + _HEAD.size + length]
        if len(body) < length or xxh3_64_digest(body) != checksum:
            break
        yield _change(body)
        at += _HEAD.size + length
    if at < len(log):
        os.truncate(path, at)


def _change(body: memoryview) -> Change:
    *positions, days = _POSITIONS.unpack_from(body)
    at = _POSITIONS.size
    seen = {}
    for _ in range(days):
        day, rows = _DAY.unpack_from(body, at)
        end = at + _DAY.size + rows * SEEN_ROW_BYTES
        seen[day] = bytes(body[at + _DAY.size : end])
        at = end
    return Change(seen, bytes(body[at:]), Positions(*positions))
