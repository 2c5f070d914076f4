"""The commands, on documents in a real database: files as asked for, whole, and a run that was cut short goes on."""

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import Connection
from pypdf import PdfReader
from typer.testing import CliRunner, Result

from pipeline.cli import app
from pipeline.documents import render
from pipeline.documents.files import NotWritten
from pipeline.documents.render import write_pdfs
from pipeline.infra.settings import Settings
from tests.documents import samples
from tests.documents.stored import store

BRANDING = Path(__file__).parents[2] / "deploy" / "branding"


@pytest.fixture
def connection(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> "Iterator[Connection[Any]]":
    monkeypatch.setenv("TALLY_POSTGRES_DSN", settings.dsn)
    monkeypatch.setenv("TALLY_KAFKA_BOOTSTRAP", settings.kafka_bootstrap or "")
    with psycopg.connect(settings.dsn, autocommit=True) as opened:
        yield opened


def invoices(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["invoices", *map(str, arguments)])


def test_pdf_writes_each_document_once_and_says_what_it_could_not(
    connection: "Connection[Any]", tmp_path: Path
) -> None:
    store(connection, samples.domestic())
    store(
        connection, replace(samples.cross_border(), number="2026-000018", seller=replace(samples.SELLER, vat_number=""))
    )
    unprintable = replace(samples.domestic(), number="2026-000019", buyer=replace(samples.BUYER, id="x", name="雪"))
    store(connection, unprintable)
    done = invoices("pdf", "--month", "2026-10", "--to", tmp_path, "--branding", BRANDING, "--workers", 1)
    assert done.exit_code == 4
    assert done.stdout.split() == [f"{tmp_path}/2026-000017.pdf", f"{tmp_path}/2026-000018.pdf"]
    assert "2 written, 0 there already, 1 failed." in done.stderr
    assert "2026-000019: no font has the letters '雪'" in done.stderr
    assert "2026-000018: EN 16931 is for VAT, and its seller has no VAT number" in done.stderr
    with_xml, without = (PdfReader(tmp_path / f"2026-00001{number}.pdf") for number in (7, 8))
    assert [*with_xml.attachments] == ["factur-x.xml"] and not without.attachments
    again = invoices("pdf", "2026-000017", "--to", tmp_path, "--branding", BRANDING, "--json")
    assert json.loads(again.stdout) == [
        {
            "document": "2026-000017", "path": f"{tmp_path}/2026-000017.pdf", "changed": False, "e_invoice": True,
            "problem": None,
        }
    ]  # fmt: skip


def spoil(connection: "Connection[Any]", number: str) -> None:
    """Give an issued document a notice that no version of this program writes."""
    notices = [{"kind": "price_changed", "name": "Calls", "before": "cheap", "after": "dear"}]
    with psycopg.connect(connection.info.dsn, autocommit=True) as other:
        other.execute("SET session_replication_role = replica")  # past the trigger: issued documents never change
        other.execute(
            "UPDATE billing.document SET content = content || jsonb_build_object('notices', %s::jsonb) "
            "WHERE number = %s",
            [psycopg.types.json.Json(notices), number],
        )


def test_one_that_cannot_be_read_does_not_stop_the_others(connection: "Connection[Any]", tmp_path: Path) -> None:
    for serial in (17, 18, 19):
        buyer = replace(samples.BUYER, id=f"b{serial}")
        store(connection, replace(samples.domestic(), number=f"2026-0000{serial}", buyer=buyer))
    spoil(connection, "2026-000018")
    told = "2026-000018: expected a document as this program writes it, got what it cannot read (InvalidOperation"
    done = invoices("pdf", "--month", "2026-10", "--to", tmp_path, "--workers", 1)
    assert done.exit_code == 4
    assert done.stdout.split() == [f"{tmp_path}/2026-000017.pdf", f"{tmp_path}/2026-000019.pdf"]
    assert "2 written, 0 there already, 1 failed." in done.stderr and told in " ".join(done.stderr.split())
    for ending in ("xml", "json", "csv"):
        done = invoices(ending, "--month", "2026-10", "--to", tmp_path)
        assert (done.exit_code, told in " ".join(done.stderr.split())) == (4, True)
        assert done.stdout.split() == [f"{tmp_path}/2026-000017.{ending}", f"{tmp_path}/2026-000019.{ending}"]
    done = invoices("json", "--month", "2026-10")
    assert [one["number"] for one in json.loads(done.stdout)] == ["2026-000017", "2026-000019"]
    assert done.exit_code == 4


def test_processes_share_the_work_and_write_the_same(
    connection: "Connection[Any]", settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [samples.domestic(), samples.cross_border(), samples.french_credit_note()]
    invoice = store(connection, replace(made[0], number="N-0"))
    ids = [invoice] + [
        store(
            connection,
            replace(of, number=f"N-{number}", buyer=replace(of.buyer, id=f"b{number}")),
            corrects_id=invoice if of.is_credit else None,
        )
        for number, of in enumerate(made, 1)
    ]
    monkeypatch.setattr(render, "_CHUNK", 2)
    by_two = list(write_pdfs(settings.dsn, ids, tmp_path / "two", workers=2))
    assert [one.name for one in by_two] == ["N-0", "N-1", "N-2", "N-3"] and all(one.changed for one in by_two)
    alone = list(write_pdfs(settings.dsn, ids, tmp_path / "one"))
    for left, right in zip(by_two, alone, strict=True):
        assert left.path is not None and right.path is not None
        assert left.path.read_bytes() == right.path.read_bytes()


def test_a_run_that_cannot_write_stops_and_the_next_goes_on(
    connection: "Connection[Any]", settings: Settings, tmp_path: Path
) -> None:
    ids = [
        store(connection, samples.domestic()),
        store(connection, replace(samples.cross_border(), number="2026-000018")),
    ]
    (tmp_path / "2026-000018.pdf").mkdir()  # in the way, as a full disk would be
    with pytest.raises(NotWritten, match="2026-000018"):
        list(write_pdfs(settings.dsn, ids, tmp_path))
    stopped = invoices("pdf", "--account", "acme", "--to", tmp_path)
    assert stopped.exit_code == 1 and "is not written: Is a directory" in str(stopped.exception)
    (tmp_path / "2026-000018.pdf").rmdir()
    assert [one.changed for one in write_pdfs(settings.dsn, ids, tmp_path)] == [False, True]


def test_xml_json_and_csv(connection: "Connection[Any]", tmp_path: Path) -> None:
    store(connection, samples.domestic())
    store(connection, samples.yen())
    xml = invoices("xml", "2026-000017")
    assert xml.stdout.startswith("<?xml") and "<ram:GrandTotalAmount>2926.03<" in xml.stdout
    [data] = json.loads(invoices("json", "2026-000017").stdout)
    assert data["totals"]["payable"] == "2826.03"
    rows = list(csv.DictReader(io.StringIO(invoices("csv", "--month", "2026-10", "--drafts").stdout)))
    assert [row["number"] for row in rows] == ["2026-000017"] * 6 + [""] * 3
    for ending in ("json", "csv"):
        done = invoices(ending, "--month", "2026-10", "--drafts", "--to", tmp_path)
        assert len(done.stdout.split()) == 2
    assert json.loads((tmp_path / "2026-000017.json").read_text()) == data
    # A draft is no invoice.
    assert getattr(invoices("xml", "--account", "tokyo").exception, "code", None) == 3


def test_what_is_asked_wrongly_is_told(connection: "Connection[Any]") -> None:
    store(connection, samples.domestic())
    for arguments, code, said in (
        (["pdf"], 2, "expected the number of a document, --month or --account"),
        (["pdf", "--month", "2026-13"], 2, "expected a month as 2026-10, got 2026-13"),
        (["pdf", "2026-000099"], 3, "got '2026-000099': there is none"),
        (["csv", "--month", "2026-11"], 3, "no such document is issued"),
        (["pdf", "2026-000017", "--branding", "/nowhere"], 2, "/nowhere: expected a brand.yaml, found none"),
    ):
        done = invoices(*arguments)
        assert (getattr(done.exception, "code", None), said in str(done.exception)) == (code, True), done.exception
