"""The bytes of an event, and what is refused before anything is sent."""

import io
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import fastavro
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.infra.avro import EVENTS, load_schemas
from pipeline.producer import InvalidUsage
from pipeline.producer.usage import BODY_BYTES_MAX, encode, source_field, varint

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
GOOD: dict[str, Any] = {
    "account": "acct-1",
    "event_type": "llm.request",
    "properties": {"input_tokens": 1},
    "timestamp": datetime(2025, 3, 1, tzinfo=UTC),
    "idempotency_key": "k-1",
    "subject": "",
}


def short(bytes_max: int) -> st.SearchStrategy[str]:
    return TEXT.filter(lambda text: 1 <= len(text.encode()) <= bytes_max)


@given(
    account=short(128),
    event_type=short(128),
    key=short(255),
    subject=TEXT,
    properties=st.dictionaries(
        short(128),
        TEXT
        | st.integers(-(10**99), 10**99)
        | st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**30), max_value=10**30, places=9),
    ),
    timestamp=st.datetimes(timezones=st.just(UTC) | st.just(timezone(timedelta(hours=-7)))),
    source=short(100),
    sequence=st.integers(1, 2**63 - 1),
)
def test_bytes_equal_fastavros_and_read_back(
    account: str,
    event_type: str,
    key: str,
    subject: str,
    properties: dict[str, str | int | Decimal],
    timestamp: datetime,
    source: str,
    sequence: int,
) -> None:
    schema = load_schemas().newest(EVENTS).parsed()
    record = {
        "idempotency_key": key,
        "account": account,
        "event_type": event_type,
        "timestamp": timestamp,
        "subject": subject,
        "properties": {name: v if isinstance(v, str) else format(Decimal(v), "f") for name, v in properties.items()},
        "source": source,
        "sequence": sequence,
    }
    expected = io.BytesIO()
    fastavro.schemaless_writer(expected, schema, record)
    message_key, body, micros = encode(account, event_type, properties, timestamp, key, subject)
    written = body + source_field(source) + varint(sequence)
    assert message_key == account.encode()
    assert written == expected.getvalue()
    assert datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=micros) == timestamp
    assert fastavro.schemaless_reader(io.BytesIO(written), schema, None) == record


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (Decimal("1E+3"), "1000"),
        (Decimal("0.000000001"), "0.000000001"),
        (Decimal("1.50"), "1.50"),
        (-7, "-7"),
        (10**18, "1000000000000000000"),
        ("many", "many"),
        ("", ""),
    ],
)
def test_numbers_are_written_as_exact_plain_decimals(value: str | int | Decimal, written: str) -> None:
    schema = load_schemas().newest(EVENTS).parsed()
    _, body, _ = encode(**{**GOOD, "properties": {"n": value}})
    record = fastavro.schemaless_reader(io.BytesIO(body + source_field("s") + varint(1)), schema, None)
    assert isinstance(record, dict)
    assert record["properties"] == {"n": written}


REFUSED = {
    "account empty": ("account", "", "at least one byte"),
    "account over-long in bytes": ("account", "é" * 65, "at most 128 bytes"),
    "account no text": ("account", 7, "expected text, got int"),
    "account unhashable": ("account", ["acct"], "expected text, got list"),
    "event type over-long": ("event_type", "t" * 129, "at most 128 bytes"),
    "event type no text": ("event_type", None, "expected text, got NoneType"),
    "key empty": ("idempotency_key", "", "at least one byte"),
    "key over-long": ("idempotency_key", "k" * 256, "at most 255 bytes"),
    "key with lone surrogate": ("idempotency_key", "k\ud800", "valid Unicode"),
    "key with NUL": ("idempotency_key", "k\0", "no NUL"),
    "subject no text": ("subject", None, "expected text"),
    "timestamp naive": ("timestamp", datetime(2025, 3, 1), "with a time zone"),  # noqa: DTZ001
    "timestamp no datetime": ("timestamp", 1700000000, "expected an aware datetime"),
    "properties no mapping": ("properties", [("a", 1)], "expected a mapping"),
    "property float": ("properties", {"n": 0.1}, "Decimal('0.1')"),
    "property bool": ("properties", {"n": True}, "got the bool"),
    "property None": ("properties", {"n": None}, "got NoneType"),
    "property NaN": ("properties", {"n": Decimal("NaN")}, "finite"),
    "property infinite": ("properties", {"n": Decimal("-Infinity")}, "finite"),
    "property of absurd size": ("properties", {"n": Decimal("1E+100000")}, "100 digits"),
    "property int of absurd size": ("properties", {"n": 10**100}, "100 digits"),
    "property of absurd precision": ("properties", {"n": Decimal("1E-101")}, "100 digits"),
    "property name empty": ("properties", {"": 1}, "at least one byte"),
    "property name no text": ("properties", {1: 1}, "expected text"),
    "property with lone surrogate": ("properties", {"n": "\udfff"}, "valid Unicode"),
    "too large": ("properties", {"n": "x" * BODY_BYTES_MAX}, f"at most {BODY_BYTES_MAX} bytes"),
}


@pytest.mark.parametrize(("field", "value", "says"), REFUSED.values(), ids=REFUSED)
def test_refused_with_the_field_and_what_to_do(field: str, value: object, says: str) -> None:
    call: Callable[..., object] = encode
    with pytest.raises(InvalidUsage) as caught:
        call(**{**GOOD, field: value})
    assert caught.value.field.startswith(field)
    assert says in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_limits_themselves_are_taken() -> None:
    encode(**{**GOOD, "account": "a" * 128, "event_type": "t" * 128, "idempotency_key": "k" * 255})
