"""First stage: is this a usage event, where it belongs, and inside the time window?

Judges each record by itself. Age is the broker's append time against the event's own time; no clock is asked.
"""

from collections.abc import Mapping
from typing import NamedTuple

from pipeline.core.catalog import EARLY_US
from pipeline.core.periods import NEVER
from pipeline.core.reasons import Reason, Rejection, Stage
from pipeline.core.usage import DecodedEvent, Event, Record, Refused
from pipeline.infra.topics import EVENT_BYTES_MAX, partition_of
from pipeline.infra.wire import FRAME_BYTES, Malformed, UnstorableText, read_event
from pipeline.rating import compiled
from pipeline.rating.arrivals import Arrivals

#: How far an event's time may lie before its arrival (law 5).
AGE_MAX_US = 35 * 24 * 60 * 60 * 1_000_000
#: How far it may lie after it: clocks of product services drift.
AHEAD_MAX_US = 5 * 60 * 1_000_000
KEY_BYTES_MAX = 255
ACCOUNT_BYTES_MAX = 128
EVENT_TYPE_BYTES_MAX = 128
#: A receipt names the sources of a whole batch and has to fit into one record.
SOURCE_BYTES_MAX = 255


#: Partition of each account met, per partition count: at most this many, then it is learned anew.
_HOMES_MAX = 1 << 20
_homes: dict[int, dict[bytes, int]] = {}

#: Past a named tuple's own constructor, which costs twice as much.
_new = tuple.__new__


class Accepted(NamedTuple):
    """What the stage made of a run of records."""

    events: list[Event]
    refused: list[Refused]


def accept(
    records: list[Record],
    *,
    partition: int,
    partitions: int,
    frames: dict[bytes, bytes],
    now_ms: int,
    arrivals: Arrivals,
    own_only: bool = False,
) -> Accepted:
    """Decode records and check shape, place and time window.

    ``fastpath`` takes what is plain where it was compiled; what it leaves is judged here, record by record.
    ``frames`` holds the five framing bytes of every known usage-event schema; ``arrivals`` is told the sequence number
    of every record that can be read, refused ones too: they did arrive. With ``own_only`` the records had been
    parked: one need not carry its account as Kafka key (it was keyed again on the way), and whether it is too early for
    its prices is judged by ``now_ms``, the worker's clock, no longer by its arrival.
    """
    events: list[Event] = []
    refused: list[Refused] = []
    homes, fastpath = _homes.setdefault(partitions, {}), compiled.fastpath
    latest_us = now_ms * 1000 + EARLY_US if own_only else NEVER
    keep = events.append
    at, end = 0, len(records)
    while True:
        if fastpath is not None:
            at = fastpath.accept_plain(
                records, at, frames, homes, partition, own_only, latest_us, _LIMITS, events, arrivals
            )
        if at == end:
            break
        record = records[at]
        at += 1
        value = record.value
        if value is None or value[:FRAME_BYTES] not in frames or len(value) > EVENT_BYTES_MAX:
            refused.append(Refused(record, _not_an_event(value, frames)))
            continue
        try:
            identity, payload, key, account, event_type, timestamp_us, properties, source, sequence = read_event(value)
        except UnstorableText as error:
            refused.append(Refused(record, _reject(Reason.WRONG_SHAPE, f"expected texts without NUL, got a {error}")))
            continue
        except Malformed as error:
            refused.append(
                Refused(record, _reject(Reason.UNDECODABLE, f"expected one usage event, got bytes that are {error}"))
            )
            continue
        if len(source) <= SOURCE_BYTES_MAX:
            arrivals.add(source, sequence)
        ahead_us = timestamp_us - record.timestamp * 1000
        if (
            -AGE_MAX_US <= ahead_us <= AHEAD_MAX_US
            and 0 < len(key) <= KEY_BYTES_MAX
            and 0 < len(account) <= ACCOUNT_BYTES_MAX
            and 0 < len(event_type) <= EVENT_TYPE_BYTES_MAX
            and sequence >= 0
            and len(source) <= SOURCE_BYTES_MAX
            and _home(account, partitions, homes) == partition
            and (own_only or record.key == account)
        ):
            if timestamp_us - (now_ms if own_only else record.timestamp) * 1000 > EARLY_US:
                refused.append(Refused(record, _AHEAD_OF_PRICES, account, key, event_type, timestamp_us))
                continue
            keep(_new(DecodedEvent, (record, identity, payload, key, account, event_type, timestamp_us, properties)))
            continue
        rejection = _judge(record, key, account, event_type, ahead_us, source, sequence, partition, partitions)
        refused.append(Refused(record, rejection, account, key, event_type, timestamp_us))
    return Accepted(events, refused)


_AHEAD_OF_PRICES = Rejection(
    Stage.ACCEPT,
    Reason.AHEAD_OF_PRICES,
    f"expected a time at most {EARLY_US // 1_000_000} s after arrival, or a price for it could still be published: "
    "waits until then; check the clock of its source",
)

#: What ``fastpath`` takes: early events are left to be judged here.
_LIMITS = (
    AGE_MAX_US,
    EARLY_US,
    EVENT_BYTES_MAX,
    KEY_BYTES_MAX,
    ACCOUNT_BYTES_MAX,
    EVENT_TYPE_BYTES_MAX,
    SOURCE_BYTES_MAX,
)


def _home(account: bytes, partitions: int, homes: dict[bytes, int]) -> int:
    home = homes.get(account)
    if home is None:
        if len(homes) >= _HOMES_MAX:
            homes.clear()
        home = homes[account] = partition_of(account, partitions)
    return home


def _not_an_event(value: bytes | None, frames: Mapping[bytes, bytes]) -> Rejection:
    if value is None:
        return _reject(Reason.UNDECODABLE, "expected a usage event, got a message without a value")
    if len(value) > EVENT_BYTES_MAX:
        return _reject(Reason.MESSAGE_TOO_LARGE, f"expected at most {EVENT_BYTES_MAX} bytes, got {len(value)}")
    if len(value) < FRAME_BYTES or value[0] != 0:
        return _reject(
            Reason.UNDECODABLE, f"expected byte 0 and a 4-byte schema id, got {value[:FRAME_BYTES].hex() or 'nothing'}"
        )
    known = ", ".join(str(int.from_bytes(frame[1:], "big")) for frame in frames)
    got = int.from_bytes(value[1:FRAME_BYTES], "big")
    return _reject(Reason.UNKNOWN_SCHEMA, f"expected a usage event schema id of {known}, got {got}")


def _judge(
    record: Record,
    key: bytes,
    account: bytes,
    event_type: bytes,
    ahead_us: int,
    source: bytes,
    sequence: int,
    partition: int,
    partitions: int,
) -> Rejection:
    """Name the first rule that a record breaks which is known to break one."""
    if not key:
        return _reject(Reason.KEY_EMPTY, "expected an idempotency key, got an empty one")
    if len(key) > KEY_BYTES_MAX:
        return _reject(
            Reason.KEY_TOO_LONG, f"expected an idempotency key of at most {KEY_BYTES_MAX} bytes, got {len(key)}"
        )
    if not 0 < len(account) <= ACCOUNT_BYTES_MAX:
        return _reject(
            Reason.ACCOUNT_INVALID, f"expected an account of 1 to {ACCOUNT_BYTES_MAX} bytes, got {len(account)}"
        )
    if not 0 < len(event_type) <= EVENT_TYPE_BYTES_MAX:
        return _reject(
            Reason.EVENT_TYPE_INVALID,
            f"expected an event type of 1 to {EVENT_TYPE_BYTES_MAX} bytes, got {len(event_type)}",
        )
    if sequence < 0:
        return _reject(Reason.WRONG_SHAPE, f"expected a sequence number from 0, got {sequence}")
    if len(source) > SOURCE_BYTES_MAX:
        return _reject(Reason.WRONG_SHAPE, f"expected a source of at most {SOURCE_BYTES_MAX} bytes, got {len(source)}")
    if ahead_us < -AGE_MAX_US:
        days = -ahead_us / 86_400_000_000
        return _reject(
            Reason.TOO_OLD, f"expected an event at most 35 days old when it arrived, got one of {days:.1f} days"
        )
    if ahead_us > AHEAD_MAX_US:
        return _reject(
            Reason.IN_THE_FUTURE,
            f"expected a time at most 5 minutes after arrival, got {ahead_us // 1_000_000} s after: check the clock",
        )
    place = partition_of(account, partitions)
    if place != partition:
        message = f"account belongs on partition {place}, came on {partition}: produce with murmur2 and key = account"
    else:
        message = f"expected the message key to be the account, got {(record.key or b'')[:40]!r}"
    return _reject(Reason.WRONG_PARTITION, message)


def _reject(reason: Reason, message: str) -> Rejection:
    return Rejection(Stage.ACCEPT, reason, message)
