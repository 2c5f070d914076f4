import pytest

from pipeline.infra.avro import EVENTS, load_schemas
from pipeline.operations.events import Mend, NotAnEvent, mended, parse_mend, parse_time, read_event

SCHEMAS = load_schemas()
EVENT = {
    "idempotency_key": "k",
    "account": "a",
    "event_type": "t",
    "timestamp": 2**62,  # in no calendar
    "subject": "",
    "properties": {"tokens": "many", "account": "a property"},
    "source": "s",
    "sequence": 3,
}
VALUE = SCHEMAS.encode(EVENTS, EVENT)


def test_reads_a_time_that_no_calendar_holds() -> None:
    assert read_event(VALUE, SCHEMAS) == EVENT


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "without a value"),
        (b"", "without a value"),
        (b"\xff" * 40, "ff ff ff ff ff"),
        (VALUE[:-1], "do not decode"),
        (VALUE + b"x", "1 bytes more"),
        (b"\x00\x00\x00\x00\x02" + VALUE[5:], "00 00 00 00 02"),
    ],
    ids=["none", "empty", "no frame", "truncated", "left over", "another subject's schema"],
)
def test_what_is_no_event_is_said(value: bytes | None, said: str) -> None:
    with pytest.raises(NotAnEvent, match=said):
        read_event(value, SCHEMAS)


def test_a_mend_changes_what_it_names_and_nothing_else() -> None:
    mend = parse_mend(["tokens=5", "model=a=b", "account=b", "properties.account=mine", "timestamp=2026-01-31"])
    after = read_event(mended(VALUE, mend, SCHEMAS), SCHEMAS)
    assert after == EVENT | {
        "account": "b",
        "timestamp": 1_769_817_600_000_000,
        "properties": {"tokens": "5", "account": "mine", "model": "a=b"},
    }
    assert mend.texts() == {
        "account": "b",
        "timestamp": "2026-01-31T00:00:00+00:00",
        "tokens": "5",
        "model": "a=b",
        "properties.account": "mine",
    }


def test_no_mend_is_false() -> None:
    assert not parse_mend([])
    assert parse_mend(["subject="]) == Mend({"subject": ""})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tokens", "NAME=VALUE"),
        ("=5", "NAME=VALUE"),
        ("idempotency_key=x", "never changed"),
        ("source=x", "never changed"),
        ("sequence=1", "never changed"),
        ("timestamp=yesterday", "a date or time"),
    ],
)
def test_wrong_mends_are_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_mend([text])


def test_a_time_without_zone_is_utc() -> None:
    assert parse_time("2026-01-31T12:00:00") == parse_time("2026-01-31T13:00:00+01:00")
