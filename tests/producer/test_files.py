"""Rows of files as usage events, and what is wrong with those that are none."""

import io
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.producer import InvalidUsage, Usage
from pipeline.producer.files import BadRow, ColumnMapping, MappingError, parse_timestamp, read_csv, read_jsonl

MAPPING = ColumnMapping(
    account="acct-{Customer}",
    event_type="llm.request",
    key="code-{row:03d}",
    timestamp="TIMESTAMP",
    properties={"input_tokens": "ContextTokens", "model": "Model"},
    subject="{User name}",
)
HEADER = "TIMESTAMP,Customer,ContextTokens,Model,User name\n"


def csv_rows(text: str | bytes, mapping: ColumnMapping = MAPPING) -> list[Usage | BadRow]:
    data = text.encode() if isinstance(text, str) else text
    return list(read_csv(io.BytesIO(data), mapping))


def jsonl_rows(*objects: object) -> list[Usage | BadRow]:
    lines = [item if isinstance(item, str) else json.dumps(item) for item in objects]
    return list(read_jsonl(io.BytesIO("\n".join(lines).encode())))


def test_a_row_becomes_an_event_by_its_mapping() -> None:
    assert csv_rows(HEADER + '2023-11-16 18:17:03.9799600,7,4808,"m-1, large",ann\n') == [
        Usage(
            account="acct-7",
            event_type="llm.request",
            timestamp=datetime(2023, 11, 16, 18, 17, 3, 979960, UTC),
            idempotency_key="code-000",
            properties={"input_tokens": "4808", "model": "m-1, large"},
            subject="ann",
        )
    ]


def test_a_byte_order_mark_empty_lines_and_empty_cells_do_no_harm() -> None:
    first, second = csv_rows(("\ufeff" + HEADER + "2023-11-16,7,1,,\n\n2023-11-17,7,2,m,\n").encode())
    assert isinstance(first, Usage) and isinstance(second, Usage)
    assert first.properties == {"input_tokens": "1"}
    assert second.idempotency_key == "code-001"


def test_bad_rows_say_line_and_reason_and_good_ones_keep_their_number() -> None:
    good = "2023-11-16 00:00:00,7,1,m,ann\n"
    rows = csv_rows(
        HEADER.encode()
        + good.encode()
        + b"yesterday,7,1,m,ann\n"
        + b"2023-11-16 00:00:00,7,1\n"
        + b"2023-11-16 00:00:00,\xff,1,m,ann\n"
        + b'2023-11-16 00:00:00,7,1,"m"x,ann\n'
        + b"2023-11-16 00:00:00.00000001,7,1,m,ann\n"
        + good.encode()
    )
    bad = [(row.line, row.reason) for row in rows if isinstance(row, BadRow)]
    assert [line for line, _ in bad] == [3, 4, 5, 6, 7]
    for (_, reason), says in zip(
        bad, ["ISO 8601", "expected 5 cells, got 3", "valid Unicode", "not CSV", "at most microseconds"], strict=True
    ):
        assert says in reason
    assert [row.idempotency_key for row in rows if isinstance(row, Usage)] == ["code-000", "code-006"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"account": "{Kunde}"}, "no column 'Kunde' in the header TIMESTAMP,"),
        ({"timestamp": "At"}, "no column 'At'"),
        ({"properties": {"x": "Y"}}, "no column 'Y'"),
        ({"key": "{row"}, "key"),
        ({"key": "{row!r}"}, "conversion"),
        ({"time_zone": "Mars/Olympus"}, "time zone"),
    ],
)
def test_a_mapping_that_cannot_work_is_told_before_any_row(change: dict[str, object], says: str) -> None:
    fields = {name: getattr(MAPPING, name) for name in MAPPING.__slots__}
    with pytest.raises(MappingError, match=says):
        csv_rows(HEADER, ColumnMapping(**(fields | change)))


def test_a_column_that_stands_twice_is_refused() -> None:
    with pytest.raises(MappingError, match="stands twice"):
        csv_rows("TIMESTAMP,Customer,ContextTokens,Model,User name,Customer\n")


def test_an_empty_file_holds_nothing() -> None:
    assert csv_rows("") == []
    assert csv_rows(HEADER) == []
    assert jsonl_rows() == []


@given(st.datetimes(timezones=st.just(UTC)), st.integers(0, 4))
def test_every_microsecond_is_read_exactly_and_zeros_beyond_it_are_ignored(at: datetime, zeros: int) -> None:
    text = at.strftime("%Y-%m-%d %H:%M:%S.%f").rjust(26, "0") + "0" * zeros
    assert parse_timestamp(text, "iso", ZoneInfo("UTC")) == at
    assert parse_timestamp(text, "%Y-%m-%d %H:%M:%S.%f", ZoneInfo("UTC")) == at


@pytest.mark.parametrize(
    ("text", "pattern", "zone", "expected"),
    [
        ("2025-03-01T10:00:00Z", "iso", None, datetime(2025, 3, 1, 10, tzinfo=UTC)),
        ("2025-03-01T10:00:00,1234560+05:30", "iso", None, datetime(2025, 3, 1, 4, 30, 0, 123456, UTC)),
        ("2025-07-01 10:00", "iso", "Europe/Berlin", datetime(2025, 7, 1, 8, tzinfo=UTC)),
        ("01.03.2025 10:00:00", "%d.%m.%Y %H:%M:%S", "UTC", datetime(2025, 3, 1, 10, tzinfo=UTC)),
        ("1740823200", "unix", None, datetime(2025, 3, 1, 10, tzinfo=UTC)),
        ("1740823200.000001", "unix", None, datetime(2025, 3, 1, 10, 0, 0, 1, UTC)),
        ("1740823200123", "unix-ms", None, datetime(2025, 3, 1, 10, 0, 0, 123000, UTC)),
        ("1740823200123456", "unix-us", None, datetime(2025, 3, 1, 10, 0, 0, 123456, UTC)),
    ],
)
def test_formats_of_time(text: str, pattern: str, zone: str | None, expected: datetime) -> None:
    assert parse_timestamp(text, pattern, ZoneInfo(zone) if zone else None) == expected


@pytest.mark.parametrize(
    ("text", "pattern", "zone", "says"),
    [
        ("2025-03-01T10:00:00", "iso", None, "an offset or Z"),
        ("2025-03-30 02:30:00", "iso", "Europe/Berlin", "skipped or shown twice"),
        ("2025-10-26 02:30:00", "iso", "Europe/Berlin", "skipped or shown twice"),
        ("2025-03-01 10:00:00.1234567", "iso", "UTC", "at most microseconds"),
        ("1740823200.0000001", "unix", None, "at most microseconds"),
        ("soon", "unix", None, "number since 1970"),
        ("NaN", "unix", None, "number since 1970"),
        ("1e400", "unix", None, "number since 1970"),
        ("2025-03-01", "%d.%m.%Y", "UTC", "expected %d.%m.%Y"),
    ],
)
def test_times_that_are_refused(text: str, pattern: str, zone: str | None, says: str) -> None:
    with pytest.raises(InvalidUsage, match=says):
        parse_timestamp(text, pattern, ZoneInfo(zone) if zone else None)


EVENT = {
    "account": "acct-1",
    "event_type": "llm.request",
    "timestamp": "2025-03-01T10:00:00Z",
    "idempotency_key": "k-1",
}


def test_json_lines_carry_events_with_exact_numbers() -> None:
    line = json.dumps(EVENT)[:-1] + ', "properties": {"a": 0.1000, "b": 12, "c": "x", "d": null}, "sequence": 9}'
    assert jsonl_rows(line, "", EVENT | {"subject": "ann"}) == [
        Usage(
            "acct-1",
            "llm.request",
            datetime(2025, 3, 1, 10, tzinfo=UTC),
            "k-1",
            {"a": Decimal("0.1000"), "b": 12, "c": "x"},
        ),
        Usage("acct-1", "llm.request", datetime(2025, 3, 1, 10, tzinfo=UTC), "k-1", {}, "ann"),
    ]


CLOUDEVENT = {
    "specversion": "1.0",
    "id": "42",
    "source": "/gateway",
    "type": "llm.request",
    "time": "2025-03-01T10:00:00Z",
    "account": "acct-1",
    "data": {"tokens": 7},
}


def test_a_cloudevent_is_one_by_its_source_and_id() -> None:
    assert jsonl_rows(CLOUDEVENT) == [
        Usage("acct-1", "llm.request", datetime(2025, 3, 1, 10, tzinfo=UTC), "/gateway#42", {"tokens": 7})
    ]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"a": NaN}', "NaN is no JSON number"),
        ("[1]", "expected a JSON object"),
        (EVENT | {"acount": 1}, "unknown field acount"),
        ({"account": "a"}, "no event_type, idempotency_key, timestamp"),
        (EVENT | {"timestamp": 1740823200}, "ISO 8601 text"),
        (EVENT | {"timestamp": "2025-03-01T10:00:00"}, "offset"),
        (EVENT | {"properties": [1]}, "expected an object"),
        (EVENT | {"properties": {"a": True}}, "bool"),
        (EVENT | {"properties": {"a": {"b": 1}}}, "got dict"),
        (EVENT | {"account": 5}, "expected text"),
        (CLOUDEVENT | {"specversion": "0.3"}, "expected 1.0"),
        ({k: v for k, v in CLOUDEVENT.items() if k != "account"}, "extension attribute account"),
        ({k: v for k, v in CLOUDEVENT.items() if k != "time"}, "time: expected ISO 8601"),
        (CLOUDEVENT | {"id": ""}, "id: expected text"),
    ],
)
def test_json_lines_that_are_no_event(line: object, says: str) -> None:
    (row,) = jsonl_rows(line)
    assert isinstance(row, BadRow)
    assert says in row.reason
    assert row.line == 1


def test_rows_are_read_as_they_are_asked_for() -> None:
    def endless() -> Iterator[bytes]:
        yield HEADER.encode()
        at = datetime(2025, 3, 1, tzinfo=UTC)
        while True:
            yield f"{at.isoformat()},1,1,m,ann\n".encode()
            at += timedelta(seconds=1)

    class Endless(io.RawIOBase):
        chunks = endless()

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
            chunk = next(self.chunks)
            buffer[: len(chunk)] = chunk
            return len(chunk)

    rows = read_csv(io.BufferedReader(Endless(), buffer_size=4096), MAPPING)
    assert [isinstance(next(rows), Usage) for _ in range(1000)] == [True] * 1000
