"""Reference files of the European Central Bank: one day as CSV and XML, all days as CSV, zipped; and mistakes."""

import zipfile
from datetime import date
from decimal import Decimal
from pathlib import Path

import pytest

from pipeline.catalog import fx_files
from pipeline.catalog.fx_files import Rate, read_rates

DATA = Path(__file__).parent / "data"
DAY = date(2023, 12, 29)


def test_one_day_as_csv() -> None:
    found = read_rates(DATA / "eurofxref.csv")
    assert found.findings == []
    assert len(found.rates) == 30
    assert found.rates[:2] == [Rate(DAY, "USD", Decimal("1.1050")), Rate(DAY, "JPY", Decimal("156.33"))]
    assert str(found.rates[0].rate) == "1.1050"  # as published


def test_all_days_as_csv() -> None:
    found = read_rates(DATA / "eurofxref-hist.csv")
    assert found.findings == []
    of_day = {day: sorted(r.currency for r in found.rates if r.day == day) for day in {r.day for r in found.rates}}
    assert of_day[date(2007, 12, 31)] == ["BGN", "CHF", "CYP", "GBP", "HRK", "JPY", "RUB", "USD"]  # ISK had none
    assert of_day[date(2024, 1, 2)] == ["BGN", "CHF", "GBP", "ISK", "JPY", "USD"]
    assert Rate(date(2022, 12, 30), "HRK", Decimal("7.5365")) in found.rates


def test_one_day_as_xml_is_the_same_as_csv() -> None:
    found = read_rates(DATA / "eurofxref-daily.xml")
    assert found.findings == []
    assert len(found.rates) == 4
    assert set(found.rates) <= set(read_rates(DATA / "eurofxref.csv").rates)


def test_in_a_zip(tmp_path: Path) -> None:
    archive = tmp_path / "eurofxref-hist.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.write(DATA / "eurofxref-hist.csv", "eurofxref-hist.csv")
    assert read_rates(archive).rates == read_rates(DATA / "eurofxref-hist.csv").rates


MISTAKES = {
    "empty": (b"", "1: expected a first row of Date and currencies, got nothing"),
    "another table": (b"Day,USD\n", "1: expected a first row of Date and currencies, got 'Day,USD'"),
    "no day": (b"Date,USD,\n2026-13-01,1.1,\n", "2: expected a day such as 2026-10-30, got '2026-13-01'"),
    "no number": (b"Date,USD,\n2026-10-30,1x,\n", "2: expected a rate above 0 for USD, got '1x'"),
    "not above 0": (b"Date,USD,\n2026-10-30,0,\n", "2: expected a rate above 0 for USD, got '0'"),
    "no currency": (b"Date,USX,\n2026-10-30,1,\n", "2: expected a currency code of ISO 4217 such as USD, got 'USX'"),
    "the euro": (b"Date,EUR,\n2026-10-30,1,\n", "2: expected rates for one euro, got one of EUR itself"),
    "a row cut short": (b"Date,USD,JPY,\n2026-10-30,1.1\n", "2: expected 3 rates, got 1"),
    "twice a day": (
        b"Date,USD,\n2026-10-30,1.1,\n2026-10-30,1.2,\n",
        "3: expected one rate of USD for 2026-10-30, got it on line 2 too",
    ),
    "no rate": (b"Date,USD,\n2026-10-30,N/A,\n", "1: expected rates of exchange, got none"),
    "not UTF-8": (b"Date,\xff", "1: expected text in UTF-8, got"),
    "XML cut short": (b"<Cube time='2026-10-30'>\n<Cube currency='USD' rate='1'/>", "2: expected XML, got"),
    "XML with entities": (
        b"<!DOCTYPE x [<!ENTITY a 'aaaaaaaaaa'>]>\n<Cube time='2026-10-30'/>",
        "1: expected no document type declaration, got one",
    ),
    "XML without rates": (b"<Envelope/>", "1: expected rates of exchange, got none"),
}


@pytest.mark.parametrize(("content", "expected"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes(tmp_path: Path, content: bytes, expected: str) -> None:
    file = tmp_path / "rates"
    file.write_bytes(content)
    found = read_rates(file)
    assert str(found.findings[0]).startswith(f"{file}:{expected}")
    assert len(found.findings) == 1


def test_archives_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tmp_path / "rates.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("a.csv", b"Date,USD,\n" + b"2026-10-30,1.1,\n" * 1000)
    damaged = tmp_path / "damaged.zip"
    damaged.write_bytes(archive.read_bytes().replace(b"PK\x03\x04", b"PK\x03\x05", 1))
    assert "expected a zip archive" in str(read_rates(damaged).findings[0])
    monkeypatch.setattr(fx_files, "BYTES_MAX", 1000)  # packed it is smaller than that
    assert "expected at most 1,000 bytes in the archive, got more" in str(read_rates(archive).findings[0])
    with zipfile.ZipFile(archive, "a") as packed:
        packed.writestr("b.csv", b"")
    assert "expected one file in the archive, got 2" in str(read_rates(archive).findings[0])
