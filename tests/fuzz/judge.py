"""What has to become of a message, by another reader: fastavro, and the rules as README and DESIGN state them.

Nothing of ``pipeline.infra.wire`` or the rater is used. fastavro is lenient: where Tally refuses what it reads, that is
one of the ``STRICTER`` rules, and nothing else.
"""

import io
import json
import re
from collections.abc import Iterable
from fractions import Fraction
from typing import Any, NamedTuple

import fastavro

from pipeline.infra.avro import EVENTS, load_schemas
from pipeline.infra.topics import EVENT_BYTES_MAX, partition_of
from tests.fuzz.mutate import ACCOUNTS, EVENT_TYPE, FRAME_BYTES, FRAMES

#: Where Tally refuses what fastavro reads, and why it must.
STRICTER = {
    "padded varint": "one idempotency key would have two spellings, and so two identities: billed twice",
    "more than 64 bits": "fastavro drops the bits beyond; Avro's long has 64",
    "negative size of a block": "no number of bytes; fastavro skips the size unread",
    "count of a block beyond the message": "fastavro negates -2^63 into no entries at all",
    "property twice": "readers of maps differ in which of the two counts: two prices for one event",
    "bytes left over": "fastavro stops behind the record; a second event behind the first would never be billed",
    "NUL": "PostgreSQL's text cannot hold it, so no invoice line could show it",
}
_AS_WRONG_SHAPE = frozenset({"NUL"})
#: Reasons that need no more than the message.
_AT_SIGHT = frozenset(
    ("key_empty", "key_too_long", "account_invalid", "event_type_invalid", "wrong_shape", "too_old", "in_the_future")
)
_AGE_MAX_US, _AHEAD_MAX_US, _EARLY_US = 35 * 86_400_000_000, 300_000_000, 60_000_000


class Event(NamedTuple):
    """A well-formed event. ``payload`` is what a repeat must share with the first."""

    account: str
    key: str
    payload: tuple[str, int, str, frozenset[tuple[str, str]]]
    source: str
    sequence: int
    timestamp_us: int

    @property
    def identity(self) -> tuple[str, str]:
        return self.account, self.key


class Verdict(NamedTuple):
    """What may become of a message, looked at by itself."""

    #: None where it is no event at all.
    event: Event | None
    #: Reasons of which its dead letter must name one; empty when nothing is wrong with it.
    dead: frozenset[str] = frozenset()
    #: Reason it is parked for, where it has to be.
    parked: str | None = None
    #: Does it stand where it does not belong: is it parked first, and judged again where it does?
    misplaced: bool = False
    #: Is it parked first since prices for its time may still be published?
    early: bool = False
    #: What it measures, where it is good.
    tokens: Fraction = Fraction(0)
    #: The rules of ``STRICTER`` it breaks that fastavro does not mind.
    stricter: frozenset[str] = frozenset()

    @property
    def refused_at_sight(self) -> bool:
        """Is it refused before anyone asks whether its key was rated already?"""
        return self.event is None or bool(self.dead & _AT_SIGHT)

    @property
    def good(self) -> bool:
        return self.event is not None and not self.dead and self.parked is None


def judge(value: bytes | None, key: bytes | None, partition: int, appended_ms: int, partitions: int) -> Verdict:
    """Judge one message of ``usage.events`` by itself: what stands before it is not known here."""
    if value is None:
        return _dead("undecodable")
    if len(value) > EVENT_BYTES_MAX:
        return _dead("message_too_large")
    if len(value) < FRAME_BYTES or value[0] != 0:
        return _dead("undecodable")
    if value[:FRAME_BYTES] not in FRAMES:
        return _dead("unknown_schema")
    rest = io.BytesIO(value[FRAME_BYTES:])
    try:
        record: Any = fastavro.schemaless_reader(rest, _SCHEMA, None)
    except UnicodeDecodeError:  # whether the text before it holds a NUL is not looked into
        return _dead("undecodable", "wrong_shape")
    except Exception:  # noqa: BLE001  whatever it makes of broken bytes, it does not read them
        return _dead("undecodable")
    if stricter := _stricter(value, record, rest.tell()):
        allowed = {"wrong_shape" if rule in _AS_WRONG_SHAPE else "undecodable" for rule in stricter}
        return Verdict(None, frozenset(allowed), stricter=stricter)
    return _judge_event(record, key, partition, appended_ms, partitions)


def _judge_event(
    record: dict[str, Any], key: bytes | None, partition: int, appended_ms: int, partitions: int
) -> Verdict:
    account, event_type, properties = record["account"], record["event_type"], record["properties"]
    payload = (event_type, record["timestamp"], record["subject"], frozenset(properties.items()))
    event = Event(
        account, record["idempotency_key"], payload, record["source"], record["sequence"], record["timestamp"]
    )
    name = account.encode()
    ahead_us = event.timestamp_us - appended_ms * 1000
    key_size, type_size = len(event.key.encode()), len(event_type.encode())
    wrong = {
        "key_empty": key_size == 0,
        "key_too_long": key_size > 255,
        "account_invalid": not 0 < len(name) <= 128,
        "event_type_invalid": not 0 < type_size <= 128,
        "wrong_shape": event.sequence < 0 or len(event.source.encode()) > 255,
        "too_old": ahead_us < -_AGE_MAX_US,
        "in_the_future": ahead_us > _AHEAD_MAX_US,
    }
    if any(wrong.values()):
        return Verdict(event, frozenset(reason for reason, is_so in wrong.items() if is_so))
    misplaced = key != name or partition != partition_of(name, partitions)
    verdict = Verdict(event, misplaced=misplaced, early=ahead_us > _EARLY_US)
    if account not in ACCOUNTS:
        return verdict._replace(parked="unknown_account")
    if event_type != EVENT_TYPE:
        return verdict._replace(dead=frozenset({"no_charge"}))
    tokens, output = (number(properties.get(name)) for name in ("input_tokens", "output_tokens"))
    refused = frozenset[str]().union(*(one for one in (tokens, output) if isinstance(one, frozenset)))
    if refused:
        return verdict._replace(dead=refused)
    assert isinstance(tokens, Fraction)
    return verdict._replace(tokens=tokens)


def _dead(*reasons: str) -> Verdict:
    return Verdict(None, frozenset(reasons))


# -- numbers

_DECIMAL = re.compile(r"([+-]?)([0-9]*)(?:\.([0-9]*))?(?:[eE]([+-]?[0-9]+))?")
_NOT_FINITE = re.compile(r"[+-]?(?:nan|inf(?:inity)?)", re.IGNORECASE)


def number(text: str | None) -> Fraction | frozenset[str]:
    """The number a meter sums, at most 18 digits before the point and 9 behind; or what is wrong with it."""
    if text is None:
        return frozenset({"missing_property"})
    found = _DECIMAL.fullmatch(text)
    if found is None or not (found[2] or found[3]):
        return frozenset({"not_finite" if _NOT_FINITE.fullmatch(text) else "not_a_number"})
    sign, whole, fraction, exponent = found[1], found[2], found[3] or "", found[4] or "0"
    digits = (whole + fraction).strip("0")
    if not digits:
        return Fraction(0)
    # Units of the last digit that is not 0. Of an exponent six characters tell enough: nothing here is so long.
    power = int(exponent[:6]) - len(fraction) + len(whole + fraction) - len((whole + fraction).rstrip("0"))
    if len(digits) > 100 or not -400 < power < 400:
        return frozenset({"quantity_too_large", "quantity_too_precise", "negative_quantity"})
    exact = Fraction(int(digits)) * Fraction(10) ** power
    wrong = set()
    if exact >= 10**18:
        wrong.add("quantity_too_large")
    if (exact * 10**9).denominator != 1:
        wrong.add("quantity_too_precise")
    if sign == "-":
        wrong.add("negative_quantity")
    return frozenset(wrong) if wrong else exact


# -- what fastavro does not mind


def _plain(schema: Any) -> Any:
    """Without logical types: times stay integers, also those no calendar holds."""
    if isinstance(schema, dict):
        return {name: _plain(part) for name, part in schema.items() if name != "logicalType"}
    return [_plain(part) for part in schema] if isinstance(schema, list) else schema


_SCHEMA = fastavro.parse_schema(_plain(json.loads(load_schemas().newest(EVENTS).text())))


def _stricter(value: bytes, record: dict[str, Any], read: int) -> frozenset[str]:
    """The rules of ``STRICTER`` that a message breaks which fastavro has read; ``read``: how many bytes of its body."""
    again = io.BytesIO()
    fastavro.schemaless_writer(again, _SCHEMA, record)
    broken: set[str] = set()
    if read + FRAME_BYTES != len(value):
        broken.add("bytes left over")
    if again.getvalue() != value[FRAME_BYTES : FRAME_BYTES + read]:  # written in another way, which may be a good one
        broken |= _Walk(value).broken
    names = ("idempotency_key", "account", "event_type", "subject", "source")
    texts: Iterable[str] = (*(record[name] for name in names), *record["properties"], *record["properties"].values())
    if "\0" in "".join(texts):
        broken.add("NUL")
    return frozenset(broken)


class _Walk:
    """A slow walk over a body that fastavro has read, that looks at how it is written."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, FRAME_BYTES
        self.broken: set[str] = set()
        try:
            self._walk()
        except IndexError:
            self.broken.add("count of a block beyond the message")

    def _walk(self) -> None:
        for _ in range(3):
            self._text()
        self._long()
        self._text()
        names: list[bytes] = []
        while count := self._long():
            if count < 0:
                count = -count
                if self._long() < 0:
                    self.broken.add("negative size of a block")
            for _ in range(count):
                names.append(self._text())
                self._text()
        if len(set(names)) < len(names):
            self.broken.add("property twice")
        self._text()
        self._long()

    def _long(self) -> int:
        start = self._at
        while self._data[self._at] > 127:
            self._at += 1
        self._at += 1
        groups = self._data[start : self._at]
        if len(groups) > 1 and groups[-1] == 0:
            self.broken.add("padded varint")
        raw = sum((byte & 127) << 7 * place for place, byte in enumerate(groups))
        if raw >> 64:
            self.broken.add("more than 64 bits")
        return raw >> 1 ^ -(raw & 1)

    def _text(self) -> bytes:
        size = self._long()
        if size < 0:  # fastavro was elsewhere by now
            raise IndexError
        start, self._at = self._at, self._at + size
        return self._data[start : self._at]
