"""Sending a file's rows once, over as many runs as it takes.

The checkpoint says how many rows were taken by which sequence number, and is written now and then; the spool says how
far the numbers really went. So a run that was killed goes on at exactly the next row: the checkpoint's rows and the
numbers used since. Rows in the spool but not yet in Kafka need no care, the producer sends them.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pipeline.producer.client import UsageProducer
from pipeline.producer.files import BadRow
from pipeline.producer.spool import write_atomically
from pipeline.producer.usage import Usage

#: Seconds between checkpoints; a run that is killed reads at most this much of the file again.
CHECKPOINT_EVERY = 1.0
#: The rater dead-letters what is older, or further ahead (too_old, in_the_future).
AGE_MAX, AHEAD_MAX = timedelta(days=35), timedelta(minutes=5)
_IDENTITY_BYTES = 64 * 1024
#: A paced run that fell behind catches up at most this many seconds' worth at once.
_BURST_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """How far a file was taken. Counts cover all runs."""

    #: Rows read, good and bad.
    rows: int = 0
    #: Events in the spool or in Kafka.
    emitted: int = 0
    bad_rows: int = 0
    #: Events the rater will dead-letter for their age, judged when they were emitted.
    outside_window: int = 0
    #: ``source/epoch`` of the producer and its next number at this point.
    source: str = ""
    next_sequence: int = 1
    #: When every event was delivered or rejected, ISO 8601.
    finished_at: str | None = None


def file_identity(path: Path, *settings: str) -> str:
    """Names a file, as it is now, sent with these settings: path, size, first bytes, settings."""
    with path.open("rb") as file:
        start = file.read(_IDENTITY_BYTES)
        size = os.fstat(file.fileno()).st_size
    facts = [str(path.resolve()), str(size), hashlib.sha256(start).hexdigest(), *settings]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]


def read_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint; a fresh one when there is none. Raises ValueError when it cannot be read."""
    try:
        return Checkpoint(**json.loads(path.read_text()))
    except FileNotFoundError:
        return Checkpoint()
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is no checkpoint ({error}): remove it to send the file again") from error


def write_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    write_atomically(path, json.dumps(asdict(checkpoint), indent=2) + "\n")


def load(
    producer: UsageProducer,
    rows: Iterator[Usage | BadRow],
    checkpoint: Checkpoint,
    *,
    save: Callable[[Checkpoint], None],
    on_bad: Callable[[BadRow], None],
    on_outside: Callable[[Usage], None],
    on_row: Callable[[Checkpoint], None],
    rate: float | None = None,
) -> Checkpoint:
    """Emit the rows not yet emitted and return where that ends; delivery is the caller's to wait for (``flush``).

    ``save`` is called with what may be relied on after a crash, ``on_bad`` for every bad row from the checkpoint on,
    ``on_outside`` for every event outside the rater's window, ``on_row`` after every row, ``rate`` is events a second.
    Raises BufferFull when Kafka is away for so long that the spool is full. Saves on every way out.
    """
    at = _skip(rows, producer, checkpoint, on_bad)
    saved_at = due = time.monotonic()
    save(at)
    try:
        for row in rows:
            if isinstance(row, BadRow):
                on_bad(row)
                at = replace(at, rows=at.rows + 1, bad_rows=at.bad_rows + 1)
            else:
                if rate is not None:
                    due = _pace(due, rate)
                if outside := _outside_window(row):
                    on_outside(row)
                sequence = producer.emit_usage(row)
                at = replace(
                    at,
                    rows=at.rows + 1,
                    emitted=at.emitted + 1,
                    outside_window=at.outside_window + outside,
                    next_sequence=sequence + 1,
                )
            on_row(at)
            if (now := time.monotonic()) - saved_at >= CHECKPOINT_EVERY:
                saved_at = now
                producer.sync()  # a checkpoint never claims what a power cut can take back
                save(at)
    finally:
        producer.sync()
        save(at)
    return at


def _skip(
    rows: Iterator[Usage | BadRow], producer: UsageProducer, checkpoint: Checkpoint, on_bad: Callable[[BadRow], None]
) -> Checkpoint:
    """Pass over the rows that were taken before, and return where that ends."""
    for _ in zip(range(checkpoint.rows), rows, strict=False):
        pass
    at = checkpoint
    ahead = producer.next_sequence - checkpoint.next_sequence if checkpoint.source == producer.source else 0
    while ahead and (row := next(rows, None)) is not None:
        if isinstance(row, BadRow):
            on_bad(row)
            at = replace(at, rows=at.rows + 1, bad_rows=at.bad_rows + 1)
        else:
            ahead -= 1
            outside = at.outside_window + _outside_window(row)
            at = replace(at, rows=at.rows + 1, emitted=at.emitted + 1, outside_window=outside)
    return replace(at, source=producer.source, next_sequence=producer.next_sequence)


def _outside_window(usage: Usage) -> bool:
    return not -AHEAD_MAX <= datetime.now(UTC) - usage.timestamp <= AGE_MAX


def _pace(due: float, rate: float) -> float:
    """Sleep until an event is due and return when the next one is."""
    now = time.monotonic()
    if due > now:
        time.sleep(due - now)
    return max(due, now - _BURST_SECONDS) + 1 / rate
