"""One usage event: its limits, and its bytes.

Written by hand rather than with fastavro because what repeats (account, event type, property names) is checked and
encoded once and remembered; a test holds the bytes equal to fastavro's.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from functools import lru_cache

from pipeline.infra.topics import EVENT_BYTES_MAX
from pipeline.producer.errors import InvalidUsage

#: A measure must be exact: float is refused. Text is passed on as it stands.
PropertyValue = str | int | Decimal

KEY_BYTES_MAX = 255
ACCOUNT_BYTES_MAX = 128
EVENT_TYPE_BYTES_MAX = 128
PROPERTY_NAME_BYTES_MAX = 128
#: Digits of a number on either side of the point. Far above what is billable (18 and 9), so only typos meet it.
NUMBER_DIGITS_MAX = 100
SOURCE_BYTES_MAX = 255
#: Account and body. The rest of EVENT_BYTES_MAX is for frame, source, sequence and the broker's own headers, which
#: count even where compression gains nothing.
BODY_BYTES_MAX = EVENT_BYTES_MAX - 1024

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_NUMBER_END = 10**NUMBER_DIGITS_MAX


@dataclass(frozen=True, slots=True)
class Usage:
    """What was used, when and by whom: the arguments of ``UsageProducer.emit``."""

    account: str
    event_type: str
    #: Aware; when the use happened, exact to the microsecond.
    timestamp: datetime
    #: Names the event once and for all inside the account; a retry sends the same.
    idempotency_key: str
    properties: Mapping[str, PropertyValue] = field(default_factory=dict)
    #: Who inside the account: a user, project or seat. May be empty.
    subject: str = ""


def encode(
    account: str,
    event_type: str,
    properties: Mapping[str, PropertyValue],
    timestamp: datetime,
    idempotency_key: str,
    subject: str,
) -> tuple[bytes, bytes, int]:
    """The message's key, the Avro body up to, not including, source and sequence, and the timestamp in microseconds.

    Raises InvalidUsage, naming the argument, what was expected and what came.
    """
    if not isinstance(account, str):
        raise InvalidUsage("account", f"expected text, got {type(account).__name__}")
    if not isinstance(event_type, str):
        raise InvalidUsage("event_type", f"expected text, got {type(event_type).__name__}")
    if not isinstance(properties, Mapping):
        raise InvalidUsage("properties", f"expected a mapping of names to values, got {type(properties).__name__}")
    account_bytes, prefixed_account = _account(account)
    key = _text("idempotency_key", idempotency_key, KEY_BYTES_MAX)
    at = micros(timestamp)
    parts = [
        varint(len(key)),
        key,
        prefixed_account,
        _event_type(event_type),
        varint(at),
        _subject(subject),
    ]
    if properties:
        parts.append(varint(len(properties)))
        for name, value in properties.items():
            data = _property(name, value)
            parts += (_property_name(name), varint(len(data)), data)
    parts.append(b"\x00")
    body = b"".join(parts)
    if len(account_bytes) + len(body) > BODY_BYTES_MAX:
        raise InvalidUsage("properties", f"expected an event of at most {BODY_BYTES_MAX} bytes, got {len(body)}")
    return account_bytes, body, at


def source_field(source: str) -> bytes:
    """The source, encoded; after it the sequence number ends the event. Raises InvalidUsage."""
    data = _text("source", source, SOURCE_BYTES_MAX)
    return varint(len(data)) + data


def micros(timestamp: datetime) -> int:
    """Microseconds since 1970 UTC, exactly. Raises InvalidUsage on anything but an aware datetime."""
    if not isinstance(timestamp, datetime):
        raise InvalidUsage("timestamp", f"expected an aware datetime, got {type(timestamp).__name__}")
    try:
        since = timestamp - _EPOCH
    except TypeError:
        raise InvalidUsage(
            "timestamp",
            f"expected a datetime with a time zone, got the naive {timestamp.isoformat()}: "
            "say datetime.now(UTC), or add tzinfo",
        ) from None
    return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds


def _zigzag(number: int) -> bytes:
    number = (number << 1) ^ (number >> 63)
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


_SMALL = tuple(_zigzag(number) for number in range(1024))


def varint(number: int) -> bytes:
    """Avro's long: zigzag, seven bits a byte, least significant first."""
    return _SMALL[number] if 0 <= number < 1024 else _zigzag(number)


def _text(field_name: str, value: str, bytes_max: int | None, *, empty: bool = False) -> bytes:
    if not isinstance(value, str):
        raise InvalidUsage(field_name, f"expected text, got {type(value).__name__}")
    try:
        data = value.encode()
    except UnicodeEncodeError as error:
        raise InvalidUsage(
            field_name, f"expected text that is valid Unicode, got {_short(value)} ({error.reason})"
        ) from None
    if not data and not empty:
        raise InvalidUsage(field_name, "expected at least one byte, got none")
    if bytes_max is not None and len(data) > bytes_max:
        raise InvalidUsage(field_name, f"expected at most {bytes_max} bytes of UTF-8, got {len(data)}: {_short(value)}")
    if b"\x00" in data:  # PostgreSQL's text cannot hold it
        raise InvalidUsage(field_name, f"expected no NUL character, got {_short(value)}")
    return data


def _property(name: str, value: object) -> bytes:
    where = f"properties[{_short(name)}]"
    if isinstance(value, str):
        return _text(where, value, None, empty=True)
    if isinstance(value, int) and not isinstance(value, bool):
        if -_NUMBER_END < value < _NUMBER_END:
            return b"%d" % value
        raise InvalidUsage(where, f"expected a number of at most {NUMBER_DIGITS_MAX} digits, got more")
    if isinstance(value, Decimal):
        if not value.is_finite():
            raise InvalidUsage(where, f"expected a finite number, got {value}")
        exponent = value.as_tuple().exponent
        if value.adjusted() >= NUMBER_DIGITS_MAX or (isinstance(exponent, int) and exponent < -NUMBER_DIGITS_MAX):
            raise InvalidUsage(where, f"expected at most {NUMBER_DIGITS_MAX} digits on either side of the point")
        return format(value, "f").encode()
    if isinstance(value, float):
        raise InvalidUsage(
            where, f"expected an exact value, got the float {value!r}: say Decimal({str(value)!r}), an int, or text"
        )
    if isinstance(value, bool):
        raise InvalidUsage(
            where, f'expected text, int or Decimal, got the bool {value}: say "true" or 1, as the meter reads'
        )
    raise InvalidUsage(where, f"expected text, int or Decimal, got {type(value).__name__}")


# What repeats from event to event: checked and encoded once.
@lru_cache(maxsize=8192)
def _account(value: str) -> tuple[bytes, bytes]:
    data = _text("account", value, ACCOUNT_BYTES_MAX)
    return data, varint(len(data)) + data


@lru_cache(maxsize=1024)
def _event_type(value: str) -> bytes:
    data = _text("event_type", value, EVENT_TYPE_BYTES_MAX)
    return varint(len(data)) + data


@lru_cache(maxsize=4096)
def _property_name(value: str) -> bytes:
    data = _text("properties", value, PROPERTY_NAME_BYTES_MAX)
    return varint(len(data)) + data


def _subject(value: str) -> bytes:
    if value == "":
        return b"\x00"
    data = _text("subject", value, None)
    return varint(len(data)) + data


def _short(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."
