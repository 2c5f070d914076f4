"""Rates of exchange from the files the European Central Bank publishes: to the rates, or every mistake with its line.

It gives them as CSV and as XML, of one day (``eurofxref.csv``, ``eurofxref-daily.xml``), of 90 days and since 1999
(``eurofxref-hist.csv``, ``eurofxref-hist.xml``), the CSV in a zip of its own. What a file is, its content tells. Rates
are units of a currency for one euro, for every day on which banks trade; a currency without one that day has ``N/A``.
See https://www.ecb.europa.eu/stats/policy_and_exchange_rates/euro_reference_exchange_rates
"""

import csv
import io
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple
from xml.parsers import expat

from pipeline.catalog.source import Finding, shown
from pipeline.core.money import PRICE_DECIMALS, minor_units, parse_decimal
from pipeline.core.reasons import Reason

#: Who publishes these files, and the currency that one unit is of.
ECB = "ECB"
EURO = "EUR"
#: Largest file, unpacked: that of all days since 1999 has 3 MB as XML.
BYTES_MAX = 64 * 2**20
#: What the bank writes for a currency that it gave no rate that day.
_NONE = frozenset({"", "N/A"})
#: Currencies of the bank's history that are no more: their countries took the euro, or another currency.
_FORMER = frozenset(["CYP", "EEK", "HRK", "LTL", "LVL", "MTL", "ROL", "SIT", "SKK", "TRL"])


class Rate(NamedTuple):
    """Units of a currency for one euro on a day, exactly as published."""

    day: date
    currency: str
    rate: Decimal


@dataclass(slots=True)
class Rates:
    """What a file holds. Only without findings is it whole."""

    rates: list[Rate] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)


def read_rates(path: Path) -> Rates:
    """The rates of a file of the bank's, in its order. Raises OSError when unreadable; all else is a finding."""
    file, found = str(path), Rates()
    try:
        text = _content(path).decode("utf-8-sig")
        parts = _of_xml(text) if text.lstrip().startswith("<") else _of_csv(text)
        seen: dict[tuple[date, str], int] = {}
        for line, day, currency, rate in parts:
            try:
                one = _rate(day, currency, rate)
            except ValueError as error:
                found.findings.append(Finding(file, line, "", str(error)))
                continue
            if one is None:
                continue
            first = seen.setdefault((one.day, one.currency), line)
            if first != line:
                again = f"expected one rate of {one.currency} for {one.day}, got it on line {first} too"
                found.findings.append(Finding(file, line, "", again))
            else:
                found.rates.append(one)
    except _NotRates as error:
        found.findings.append(Finding(file, error.line, "", str(error)))
    except UnicodeDecodeError as error:
        found.findings.append(Finding(file, 1, "", f"expected text in UTF-8, got {error}"))
    if not found.rates and not found.findings:
        found.findings.append(Finding(file, 1, "", "expected rates of exchange, got none"))
    return found


class _NotRates(Exception):
    """The file is none of the bank's, as a whole. Says what was expected and what came."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


def _content(path: Path) -> bytes:
    if not zipfile.is_zipfile(path):
        if (size := path.stat().st_size) > BYTES_MAX:
            raise _NotRates(1, f"expected at most {BYTES_MAX:,} bytes, got {size:,}")
        return path.read_bytes()
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if len(names) != 1:
                raise _NotRates(1, f"expected one file in the archive, got {len(names)}")
            with archive.open(names[0]) as member:
                content = member.read(BYTES_MAX + 1)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:  # damaged, or packed or locked unusually
        raise _NotRates(1, f"expected a zip archive, got {error}") from error
    if len(content) > BYTES_MAX:
        raise _NotRates(1, f"expected at most {BYTES_MAX:,} bytes in the archive, got more")
    return content


def _of_csv(text: str) -> Iterator[tuple[int, str, str, str]]:
    """Line, day, currency and rate of each field: a first row of currencies, then a row for each day."""
    rows = csv.reader(io.StringIO(text), skipinitialspace=True)
    try:
        header = [name.strip() for name in next(rows, [])]
        if not header or header[0] != "Date":
            raise _NotRates(1, f"expected a first row of Date and currencies, got {shown(','.join(header))}")
        for row in rows:
            day, *values = [value.strip() for value in row] or [""]
            if not day:
                continue
            if len(values) != len(header) - 1:
                raise _NotRates(rows.line_num, f"expected {len(header) - 1} rates, got {len(values)}")
            yield from ((rows.line_num, day, *pair) for pair in zip(header[1:], values, strict=True) if any(pair))
    except csv.Error as error:
        raise _NotRates(rows.line_num, f"expected CSV, got {error}") from error


def _of_xml(text: str) -> Iterator[tuple[int, str, str, str]]:
    """As ``_of_csv``: a ``Cube`` with a time holds one with currency and rate for each currency."""
    found: list[tuple[int, str, str, str]] = []
    day = ""

    def start(name: str, attributes: dict[str, str]) -> None:
        nonlocal day
        if name.rpartition(":")[2] != "Cube":
            return
        day = attributes.get("time", day)
        if "currency" in attributes:
            found.append((parser.CurrentLineNumber, day, attributes["currency"], attributes.get("rate", "")))

    def doctype(*_: object) -> None:
        # The bank's files have none, and what it could define (entities, other files) nobody wants.
        raise _NotRates(parser.CurrentLineNumber, "expected no document type declaration, got one")

    parser = expat.ParserCreate()
    parser.StartElementHandler = start
    parser.StartDoctypeDeclHandler = doctype
    try:
        parser.Parse(text.encode(), True)
    except expat.ExpatError as error:
        raise _NotRates(error.lineno, f"expected XML, got {expat.ErrorString(error.code)}") from error
    yield from found


def _rate(day: str, currency: str, text: str) -> Rate | None:
    """The rate, None where there was none that day. Raises ValueError."""
    if text in _NONE:
        return None
    try:
        # Of one day the CSV says "30 October 2026", the others write it 2026-10-30.
        on = date.fromisoformat(day) if day[:4].isdigit() else datetime.strptime(day, "%d %B %Y").date()  # noqa: DTZ007
    except ValueError:
        raise ValueError(f"expected a day such as 2026-10-30, got {shown(day)}") from None
    if currency == EURO:
        raise ValueError("expected rates for one euro, got one of EUR itself")
    if currency not in _FORMER:
        minor_units(currency)
    number = parse_decimal(text, decimals=PRICE_DECIMALS)
    if isinstance(number, Reason) or number <= 0:
        raise ValueError(f"expected a rate above 0 for {currency}, got {shown(text)}")
    return Rate(on, currency, Decimal(text))
