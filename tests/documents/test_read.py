"""What was written for a document is what its pages, files and e-invoice are made of."""

from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from typing import Any

import psycopg
import pytest
from psycopg import Connection

from pipeline.core.parties import Branding
from pipeline.documents.model import Document, DocumentReference, LineReference
from pipeline.documents.read import NotReadable, Wanted, find, read, read_each
from pipeline.infra.settings import Settings
from tests.documents import samples
from tests.documents.stored import store

SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="4" height="4"><rect width="4" height="4"/></svg>'


@pytest.fixture
def connection(settings: Settings) -> "Iterator[Connection[Any]]":
    with psycopg.connect(settings.dsn, autocommit=True) as opened:
        yield opened


def read_one(connection: "Connection[Any]", id: int) -> Document:
    [found] = read(connection, [id])
    return found


def without_ids(document: Document) -> Document:
    return replace(document, id=0, lines=tuple(replace(line, id=0) for line in document.lines))


def test_what_is_stored_is_read_back_whole(connection: "Connection[Any]") -> None:
    for sample in (samples.domestic(), replace(samples.cross_border(), number="2026-000018"), samples.yen()):
        id = store(connection, sample)
        found = read_one(connection, id)
        # Only a document that was issued has its dates and rates.
        expected = sample if sample.number else replace(sample, due_date=None)
        assert without_ids(found) == without_ids(expected)


def test_a_credit_note_names_its_invoice_and_an_adjustment_its_lines(connection: "Connection[Any]") -> None:
    invoice = store(connection, samples.cross_border())
    credit = samples.french_credit_note()
    found = read_one(connection, store(connection, credit, corrects_id=invoice))
    assert without_ids(found) == without_ids(credit)
    assert found.corrects == DocumentReference("2026-000017", "invoice", samples.cross_border().issue_date)
    fourth = connection.execute(
        "SELECT id FROM billing.document_line WHERE document_id = %s AND position = 4", [invoice]
    )
    [(line_id,)] = fourth.fetchall()
    long = replace(samples.long(), number="2026-000018", span=samples.NOVEMBER)
    adjusting = read_one(connection, store(connection, long, adjusts={45: line_id, 46: line_id}))
    assert [line.adjusts for line in adjusting.lines[43:]] == [None, *[LineReference("2026-000017", 4)] * 2]
    assert [line.reversal for line in adjusting.lines[43:]] == [False, True, False]
    assert dict(adjusting.accounts) == {"acme-eu": "Acme Robotics Europe", "acme-us": "Acme Robotics USA"}


def test_the_logo_that_was_applied_comes_along(connection: "Connection[Any]") -> None:
    digest = sha256(SVG).hexdigest()
    connection.execute("INSERT INTO billing.asset VALUES (%s, 'image/svg+xml', %s)", [digest, SVG])
    sample = replace(samples.domestic(), branding=Branding(logo=digest))
    assert read_one(connection, store(connection, sample)).logo == ("image/svg+xml", SVG)


def test_a_share_is_told_in_the_longest_unit_it_is_a_number_of(connection: "Connection[Any]") -> None:
    id = store(connection, replace(samples.domestic(), state="draft", number="", due_date=None, issue_date=None))
    hour = 3_600_000_000
    for start, whole, shown in ((15 * 24, 31 * 24, (16, 31, "day")), (1, 31 * 24, (743, 744, "hour"))):
        share = {"start": start * hour, "end": whole * hour, "whole": whole * hour}
        with psycopg.connect(connection.info.dsn, autocommit=True) as other:
            other.execute("SET session_replication_role = replica")  # past the trigger: lines never change
            other.execute(
                "UPDATE billing.document_line SET detail = detail || jsonb_build_object('share', %s::jsonb) "
                "WHERE document_id = %s AND position = 2",
                [psycopg.types.json.Json(share), id],
            )
        assert read_one(connection, id).lines[1].share == shown


def test_changes_that_cannot_be_told_are_that_documents_trouble_alone(connection: "Connection[Any]") -> None:
    """What changed since the invoice before is read for many at once; one's price version is none."""
    before = store(connection, samples.domestic())
    other = store(connection, replace(samples.cross_border(), number="2026-000018"))
    november = replace(samples.domestic(), number="2026-000019", span=samples.NOVEMBER)
    lines = tuple(replace(line, span=samples.NOVEMBER, price_version="standard@?") for line in november.lines)
    broken = store(connection, replace(november, lines=lines))
    with psycopg.connect(connection.info.dsn, autocommit=True) as past:
        past.execute("SET session_replication_role = replica")  # past the trigger: issued documents never change
        past.execute("UPDATE billing.document SET content = content - 'notices'")
    found = list(read_each(connection, [before, broken, other]))
    assert [type(one) for one in found] == [Document, NotReadable, Document]
    with pytest.raises(NotReadable, match="2026-000019: expected a document"):
        list(read(connection, [before, broken, other]))


def test_documents_are_found_by_number_month_account_and_entity(connection: "Connection[Any]") -> None:
    october = store(connection, samples.domestic())
    other = replace(samples.domestic(), seller=replace(samples.SELLER, id="südwind"), span=samples.NOVEMBER)
    november = store(connection, other)
    draft = store(connection, samples.yen())
    assert find(connection, Wanted(month="2026-10")) == [october]
    assert find(connection, Wanted(month="2026-10", every_state=True)) == [october, draft]
    assert find(connection, Wanted(month="2026-11", account="muster")) == [november]
    assert find(connection, Wanted(account="muster", legal_entity="nordwind")) == [october]
    assert find(connection, Wanted(names=(str(draft),))) == [draft]
    assert find(connection, Wanted(names=("2026-000017",), legal_entity="südwind")) == [november]
    with pytest.raises(LookupError, match="nordwind, südwind"):
        find(connection, Wanted(account="muster"))
    with pytest.raises(LookupError, match=r"'2026-000099'.*there is none"):
        find(connection, Wanted(names=("2026-000017", "2026-000099"), legal_entity="nordwind"))
    with pytest.raises(LookupError, match="got 4711"):
        list(read(connection, [october, 4711]))
