"""Usage from files: CSV with a column mapping, and JSON lines.

Plain generators that yield, row by row, a Usage that ``emit`` will take or a BadRow that says why not. They send
nothing and remember nothing (``pipeline.producer.load`` does).
"""

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from string import Formatter
from typing import Any, BinaryIO, NamedTuple
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pipeline.producer.errors import InvalidUsage
from pipeline.producer.usage import PropertyValue, Usage, encode

Source = Path | BinaryIO

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
#: Formats of a bare number since 1970 UTC, and its digits after the point down to the microsecond.
_EPOCH_UNITS = {"unix": 6, "unix-ms": 3, "unix-us": 0}
_NUMBER = re.compile(r"(-?)([0-9]{1,20})(?:\.([0-9]*))?")
_FRACTION = re.compile(r"[.,](\d{6})(\d+)")
_LINE_CHARACTERS_MAX = 1024 * 1024
_OWN_FIELDS = frozenset({"account", "event_type", "timestamp", "idempotency_key", "properties", "subject"})
#: Fields of a written event that a new sending replaces, and those ``rejected.jsonl`` adds.
_REPLACED_FIELDS = frozenset({"source", "sequence", "rejected_at", "rejected_because"})


class BadRow(NamedTuple):
    """A row that is no usage event."""

    #: Line in the file, from 1, where the row ends.
    line: int
    #: What was expected and what came.
    reason: str
    #: The row as read.
    text: str


class MappingError(ValueError):
    """A mapping that cannot work: the message names the field or column."""


@dataclass(frozen=True, slots=True)
class ColumnMapping:
    """How a CSV row becomes a usage event.

    ``account``, ``event_type``, ``key`` and ``subject`` are templates: ``{Column}`` is that column's text, ``{row}``
    the row's number (from 0, the header not counted, so ``{row:05d}`` works), everything else stands as it is.
    ``properties`` maps property to column; an empty cell leaves the property out. ``timestamp_format`` is ``iso``,
    ``unix``, ``unix-ms``, ``unix-us`` or a ``strptime`` pattern; times without an offset are in ``time_zone``.
    """

    account: str
    event_type: str
    key: str
    timestamp: str
    properties: Mapping[str, str] = field(default_factory=dict)
    subject: str = ""
    timestamp_format: str = "iso"
    time_zone: str = "UTC"


def read_csv(source: Source, mapping: ColumnMapping) -> Iterator[Usage | BadRow]:
    """Events of a CSV file with a header line, UTF-8. Raises MappingError when the header lacks a mapped column."""
    zone = _zone(mapping.time_zone)
    names = ("account", "event_type", "idempotency_key", "subject")
    templates = [_Template(name, text) for name, text in zip(names, _templates(mapping), strict=True)]
    with _text(source) as lines:
        rows = csv.reader(lines, strict=True)
        header = next(rows, None)
        if header is None:
            return
        _check_columns(header, mapping, templates)
        row_number = -1
        while True:
            try:
                cells = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield BadRow(rows.line_num, f"not CSV: {error}", "")
                row_number += 1
                continue
            if not cells:  # an empty line
                continue
            row_number += 1
            if len(cells) != len(header):
                yield BadRow(rows.line_num, f"expected {len(header)} cells, got {len(cells)}", _joined(cells))
                continue
            row = dict(zip(header, cells, strict=True))
            try:
                account, event_type, key, subject = (template.fill(row, row_number) for template in templates)
                usage = Usage(
                    account=account,
                    event_type=event_type,
                    timestamp=parse_timestamp(row[mapping.timestamp], mapping.timestamp_format, zone),
                    idempotency_key=key,
                    properties={name: row[column] for name, column in mapping.properties.items() if row[column] != ""},
                    subject=subject,
                )
                yield _checked(usage)
            except InvalidUsage as error:
                yield BadRow(rows.line_num, str(error), _joined(cells))


def read_jsonl(source: Source) -> Iterator[Usage | BadRow]:
    """Events of a file with one JSON object a line: a usage event's own fields, or a CloudEvent. UTF-8.

    A number is taken exactly as written. ``source`` and ``sequence`` of a written event are ignored: they are the
    sender's.
    """
    with _text(source) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield _checked(_from_object(line))
            except InvalidUsage as error:
                yield BadRow(number, str(error), line.rstrip("\n")[:_LINE_CHARACTERS_MAX])


def from_cloudevent(event: Mapping[str, Any]) -> Usage:
    """A CloudEvent 1.0 in JSON as a usage event. Raises InvalidUsage.

    type → event type, time → timestamp, subject → subject, data → properties, extension attribute ``account`` →
    account. A CloudEvent is one by its source and id together, so the idempotency key is ``source#id``.
    """
    if event.get("specversion") != "1.0":
        raise InvalidUsage("specversion", f"expected 1.0, got {event.get('specversion')!r}")
    if not event.get("account"):
        raise InvalidUsage("account", "expected the CloudEvents extension attribute account, got none")
    for name in ("id", "source", "type"):
        if not isinstance(event.get(name), str) or not event[name]:
            raise InvalidUsage(name, f"expected text, got {event.get(name)!r}")
    return Usage(
        account=event["account"],
        event_type=event["type"],
        timestamp=_json_timestamp("time", event.get("time")),
        idempotency_key=f"{event['source']}#{event['id']}",
        properties=_json_properties("data", event.get("data", {})),
        subject=event.get("subject") or "",
    )


def parse_timestamp(text: str, pattern: str = "iso", zone: ZoneInfo | None = None) -> datetime:
    """An aware datetime, exactly what the text says. Raises InvalidUsage.

    Digits beyond the microsecond must be zeros. A time without an offset is in ``zone``, and refused without one, or
    where the zone's clocks skip it or show it twice.
    """
    if pattern in _EPOCH_UNITS:
        return _since_1970(text, _EPOCH_UNITS[pattern])
    fraction = _FRACTION.search(text)
    if fraction and fraction[2].strip("0"):
        raise InvalidUsage("timestamp", f"expected at most microseconds, got {text!r}")
    plain = text if fraction is None else text[: fraction.start(2)] + text[fraction.end(2) :]
    try:
        parsed = datetime.fromisoformat(plain) if pattern == "iso" else datetime.strptime(plain, pattern)  # noqa: DTZ007 - the zone follows
    except ValueError as error:
        expected = "ISO 8601" if pattern == "iso" else pattern
        raise InvalidUsage("timestamp", f"expected {expected}, got {text!r} ({error})") from None
    if parsed.tzinfo is not None:
        return parsed
    if zone is None:
        raise InvalidUsage("timestamp", f"expected an offset or Z, got {text!r}")
    local = parsed.replace(tzinfo=zone)
    if local.utcoffset() != local.replace(fold=1).utcoffset():
        raise InvalidUsage(
            "timestamp", f"{text!r} is skipped or shown twice by the clocks of {zone.key}: give an offset"
        )
    return local


class _Template:
    """Text with ``{Column}`` and ``{row}``; column names may hold any character but braces, ``:`` and ``!``."""

    def __init__(self, name: str, text: str) -> None:
        self.name = name
        try:
            self.parts = list(Formatter().parse(text))
        except ValueError as error:
            raise MappingError(f"{name}: {error} in {text!r}") from None
        self.columns = [column for _, column, _, _ in self.parts if column is not None and column != "row"]
        if any(conversion for *_, conversion in self.parts):
            raise MappingError(f"{name}: expected {{Column}} or {{row}}, got a conversion in {text!r}")

    def fill(self, row: Mapping[str, str], number: int) -> str:
        out = []
        for literal, column, spec, _ in self.parts:
            out.append(literal)
            if column is not None:
                out.append(format(number if column == "row" else row[column], spec or ""))
        return "".join(out)


def _templates(mapping: ColumnMapping) -> tuple[str, str, str, str]:
    return mapping.account, mapping.event_type, mapping.key, mapping.subject


def _check_columns(header: list[str], mapping: ColumnMapping, templates: Iterable[_Template]) -> None:
    wanted = [mapping.timestamp, *mapping.properties.values(), *(c for template in templates for c in template.columns)]
    missing = [column for column in dict.fromkeys(wanted) if column not in header]
    if missing:
        raise MappingError(f"no column {', '.join(map(repr, missing))} in the header {','.join(header)}")
    twice = [column for column in dict.fromkeys(wanted) if header.count(column) > 1]
    if twice:
        raise MappingError(f"column {', '.join(map(repr, twice))} stands twice in the header {','.join(header)}")


def _zone(name: str) -> ZoneInfo:
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError):
        raise MappingError(f"expected a time zone such as UTC or Europe/Berlin, got {name!r}") from None


def _since_1970(text: str, digits: int) -> datetime:
    number = _NUMBER.fullmatch(text.strip())
    if number is None:
        raise InvalidUsage("timestamp", f"expected a number since 1970, got {text!r}")
    sign, whole, fraction = number[1], number[2], (number[3] or "").rstrip("0")
    if len(fraction) > digits:
        raise InvalidUsage("timestamp", f"expected at most microseconds, got {text!r}")
    try:
        return _EPOCH + timedelta(microseconds=int(sign + whole + fraction.ljust(digits, "0")))
    except OverflowError:
        raise InvalidUsage("timestamp", f"expected a time up to the year 9999, got {text!r}") from None


def _from_object(line: str) -> Usage:
    try:
        found = json.loads(line, parse_float=Decimal, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidUsage("line", f"not JSON: {error}") from None
    if not isinstance(found, dict):
        raise InvalidUsage("line", f"expected a JSON object, got {type(found).__name__}")
    if "specversion" in found:
        return from_cloudevent(found)
    if unknown := found.keys() - _OWN_FIELDS - _REPLACED_FIELDS:
        raise InvalidUsage(
            "line", f"unknown field {', '.join(sorted(unknown))}; known: {', '.join(sorted(_OWN_FIELDS))}"
        )
    if missing := _OWN_FIELDS - {"properties", "subject"} - found.keys():
        raise InvalidUsage("line", f"no {', '.join(sorted(missing))}")
    return Usage(
        account=found["account"],
        event_type=found["event_type"],
        timestamp=_json_timestamp("timestamp", found["timestamp"]),
        idempotency_key=found["idempotency_key"],
        properties=_json_properties("properties", found.get("properties", {})),
        subject=found.get("subject") or "",
    )


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is no JSON number")


def _json_timestamp(name: str, value: object) -> datetime:
    if isinstance(value, str):
        return parse_timestamp(value)
    raise InvalidUsage(name, f"expected ISO 8601 text with an offset, got {value!r}")


def _json_properties(name: str, value: object) -> dict[str, PropertyValue]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InvalidUsage(name, f"expected an object, got {type(value).__name__}")
    return {key: item for key, item in value.items() if item is not None}


def _checked(usage: Usage) -> Usage:
    encode(usage.account, usage.event_type, usage.properties, usage.timestamp, usage.idempotency_key, usage.subject)
    return usage


def _text(source: Source) -> io.TextIOWrapper:
    binary = source.open("rb") if isinstance(source, Path) else source
    # Bytes that are not UTF-8 become lone surrogates, which make their row a BadRow instead of ending the file.
    return io.TextIOWrapper(binary, encoding="utf-8-sig", errors="surrogateescape", newline="")


def _joined(cells: list[str]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="").writerow(cells)
    return out.getvalue()[:_LINE_CHARACTERS_MAX]
