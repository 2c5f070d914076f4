"""Price changes under four eyes, on a real PostgreSQL."""

import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.rows import TupleRow

from pipeline.catalog import store
from pipeline.catalog.approvals import (
    AlreadyDecided,
    NoReason,
    NoSuchProposal,
    NothingEarlier,
    Outdated,
    Proposal,
    SamePerson,
    approve,
    earlier,
    needs_approval,
    proposals,
    propose,
    reject,
)
from pipeline.catalog.diff import changes
from pipeline.catalog.files import Drafts, read_price_files
from pipeline.catalog.publish import Refused, publish
from pipeline.core.periods import to_micros
from pipeline.infra.postgres import connect
from pipeline.infra.settings import Settings

PRICES = """\
meters:
  - {id: tokens, event_type: call, aggregation: sum, value: tokens, unit: token}
plans:
  - id: standard
    name: Standard
    currency: USD
    charges:
      - {id: tokens, meter: tokens, model: per_unit, unit_price: 0.10}
"""
DEARER = PRICES.replace("0.10", "0.20")
Read = Callable[[str], Drafts]


@pytest.fixture
def prices(tmp_path: Path) -> Read:
    def read(text: str) -> Drafts:
        file = tmp_path / "prices.yaml"
        file.write_text(text)
        return read_price_files([file])

    return read


@pytest.fixture
def launched(settings: Settings, prices: Read) -> Settings:
    publish(settings.dsn, prices(PRICES), actor="ada", reason="launch")
    return settings


def rows(settings: Settings, statement: str) -> list[TupleRow]:
    """As the owner, who is held by the triggers as the program is."""
    with connect(settings.dsn, application="test", autocommit=True, role=None) as connection:
        return connection.execute(statement).fetchall()


def proposed(settings: Settings, drafts: Drafts, **options: Any) -> int:
    proposal = propose(settings.dsn, drafts, actor="ada", reason="dearer", **options)
    assert isinstance(proposal, Proposal)
    return proposal.id


def versions(settings: Settings) -> list[TupleRow]:
    return rows(settings, "SELECT version, document -> 'charges' -> 0 ->> 'unit_price' FROM billing.catalog_version "
        "WHERE kind = 'plan' ORDER BY version")  # fmt: skip


def test_the_first_publication_needs_nobody_else(settings: Settings, prices: Read) -> None:
    assert not needs_approval(settings.dsn)
    publish(settings.dsn, prices(PRICES), actor="ada")
    assert needs_approval(settings.dsn)


def test_from_proposal_to_version(launched: Settings, prices: Read) -> None:
    proposal = proposed(launched, prices(DEARER))
    assert versions(launched) == [(1, "0.1")], "a proposal publishes nothing"
    assert rows(launched, "SELECT count(*) FROM billing.outbox WHERE version > 1") == [(0,)]
    with connect(launched.dsn, application="test") as connection:
        (found,) = proposals(connection)
    (document,) = found.documents
    assert (found.proposed_by, found.reason, found.decision) == ("ada", "dearer", None)
    assert (document.kind, document.id, document.before and document.before.version) == ("plan", "standard", 1)
    assert [change.words for change in changes(document.before, document.after)] == [
        "charge tokens: unit price 0.1 → 0.2 (+100 %)"
    ]

    (published,) = approve(launched.dsn, proposal, actor="bob", reason="agreed")
    assert (published.id, published.version, published.outcome) == ("standard", 2, "changed")
    assert versions(launched) == [(1, "0.1"), (2, "0.2")]
    assert rows(launched, "SELECT kind, id, version FROM billing.outbox WHERE version > 1") == [("plan", "standard", 2)]
    record = rows(
        launched,
        "SELECT proposal_id, kind, id, state, version_before, version_after, proposed_by, reason, decided_by, "
        "decision_reason, valid_from > decided_at FROM finance.price_changes",
    )
    assert record == [(proposal, "plan", "standard", "approved", 1, 2, "ada", "dearer", "bob", "agreed", True)]
    audit = rows(launched, "SELECT actor, action, target FROM billing.audit ORDER BY id")
    assert audit[2:] == [
        ("ada", "proposal.made", f"proposal/{proposal}"),
        ("bob", "proposal.approved", f"proposal/{proposal}"),
        ("ada", "plan.publish", "plan/standard/2"),
    ]


@pytest.mark.parametrize("name", ["ada", "ADA", " Ada "])
def test_nobody_approves_their_own(launched: Settings, prices: Read, name: str) -> None:
    proposal = proposed(launched, prices(DEARER))
    with pytest.raises(SamePerson, match="expected another person than its proposer ada"):
        approve(launched.dsn, proposal, actor=name)
    with pytest.raises(psycopg.Error, match="is ada's own"):
        rows(
            launched,
            "INSERT INTO billing.proposal_decision (proposal_id, verdict, decided_by) "
            f"VALUES ({proposal}, 'approved', '{name}') RETURNING 1",
        )
    assert versions(launched) == [(1, "0.1")]


def test_decided_once(launched: Settings, prices: Read) -> None:
    proposal = proposed(launched, prices(DEARER))
    reject(launched.dsn, proposal, actor="ada", reason="a mistake")
    with pytest.raises(AlreadyDecided, match="rejected by ada at 2"):
        approve(launched.dsn, proposal, actor="bob")
    with pytest.raises(AlreadyDecided):
        reject(launched.dsn, proposal, actor="bob", reason="again")
    with pytest.raises(NoSuchProposal, match="expected a proposal, got 99"):
        approve(launched.dsn, 99, actor="bob")
    assert versions(launched) == [(1, "0.1")]


def test_two_who_approve_at_once_publish_once(launched: Settings, prices: Read) -> None:
    proposal = proposed(launched, prices(DEARER))
    outcomes: list[object] = []

    def decide(name: str) -> None:
        try:
            outcomes.append(approve(launched.dsn, proposal, actor=name))
        except AlreadyDecided as error:
            outcomes.append(error)

    threads = [threading.Thread(target=decide, args=[name]) for name in ("bob", "cleo", "dan")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["AlreadyDecided", "AlreadyDecided", "list"]
    assert versions(launched) == [(1, "0.1"), (2, "0.2")]


def test_what_changed_meanwhile_is_looked_at_anew(launched: Settings, prices: Read) -> None:
    one, other = proposed(launched, prices(DEARER)), proposed(launched, prices(PRICES.replace("0.10", "0.30")))
    approve(launched.dsn, other, actor="bob")
    with pytest.raises(Outdated, match="expected version 1 of plan 'standard' to be the newest, as when ada proposed"):
        approve(launched.dsn, one, actor="bob")
    assert versions(launched) == [(1, "0.1"), (2, "0.3")]
    with connect(launched.dsn, application="test") as connection:
        assert [(found.id, found.decision is None) for found in proposals(connection)] == [(other, False), (one, True)]


def test_the_same_change_made_meanwhile_is_outdated_too(launched: Settings, prices: Read) -> None:
    one, other = proposed(launched, prices(DEARER)), proposed(launched, prices(DEARER))
    approve(launched.dsn, other, actor="bob")
    with pytest.raises(Outdated, match="got version 2"):
        approve(launched.dsn, one, actor="bob")


def test_what_could_not_be_published_is_not_proposed(launched: Settings, prices: Read) -> None:
    with pytest.raises(Refused, match="expected currency USD"):
        propose(launched.dsn, prices(PRICES.replace("USD", "EUR")), actor="ada", reason="euros")
    with pytest.raises(NoReason):
        propose(launched.dsn, prices(DEARER), actor="ada", reason=" ")
    same = propose(launched.dsn, prices(PRICES), actor="ada", reason="")
    assert isinstance(same, list) and [one.outcome for one in same] == ["unchanged", "unchanged"]
    assert rows(launched, "SELECT count(*) FROM billing.proposal") == [(0,)]
    assert versions(launched) == [(1, "0.1")], "trying it published nothing"


def test_when_it_counts(launched: Settings, prices: Read) -> None:
    new_year = to_micros(datetime(2100, 1, 1, tzinfo=UTC))
    (dated,) = approve(launched.dsn, proposed(launched, prices(DEARER), valid_from=new_year), actor="bob")
    assert dated.valid_from_us == new_year

    text = PRICES.replace("0.10", "0.40").replace("currency: USD", "currency: USD\n    valid_from: 2100-02-01")
    (from_file,) = approve(launched.dsn, proposed(launched, prices(text)), actor="bob")
    assert from_file.valid_from_us == to_micros(datetime(2100, 2, 1, tzinfo=UTC))


def test_a_time_after_publishing_counts_from_the_approval(launched: Settings, prices: Read) -> None:
    proposal = proposed(launched, prices(DEARER), valid_from=timedelta(hours=2))
    (published,) = approve(launched.dsn, proposal, actor="bob")
    until = timedelta(microseconds=published.valid_from_us - to_micros(datetime.now(UTC)))
    assert timedelta(hours=1, minutes=59) < until <= timedelta(hours=2, seconds=1)


def test_an_approval_that_comes_too_late_decides_nothing(launched: Settings, prices: Read) -> None:
    soon = to_micros(datetime.now(UTC) + timedelta(seconds=62))
    proposal = proposed(launched, prices(DEARER), valid_from=soon)
    with connect(launched.dsn, application="test", autocommit=True, role=None) as connection:
        connection.execute("ALTER TABLE billing.proposal DISABLE TRIGGER proposal_append_only")
        connection.execute("UPDATE billing.proposal SET valid_from = now() + interval '59 seconds'")
    with pytest.raises(Refused, match="60 seconds after publishing"):
        approve(launched.dsn, proposal, actor="bob")
    assert rows(launched, "SELECT count(*) FROM billing.proposal_decision") == [(0,)]


def test_back_to_an_earlier_version(launched: Settings, prices: Read) -> None:
    approve(launched.dsn, proposed(launched, prices(DEARER)), actor="bob")
    approve(launched.dsn, proposed(launched, prices(PRICES.replace("0.10", "0.30"))), actor="bob")
    time.sleep(1)  # the newest counts in less than the 60 s of notice by now: nothing can take its place any more
    with connect(launched.dsn, application="test") as connection:
        before_last = earlier(connection, [("plan", "standard")], version=None)
        first = earlier(connection, [("plan", "standard")], version=1)
        with pytest.raises(NothingEarlier, match="expected version 3 of plan 'standard' to go back to"):
            earlier(connection, [("plan", "standard")], version=3)
        with pytest.raises(NothingEarlier, match="expected an earlier version of meter 'tokens'"):
            earlier(connection, [("meter", "tokens")], version=None)
        with pytest.raises(NothingEarlier, match="got a plan of 0 versions"):
            earlier(connection, [("plan", "gold")], version=None)
    approve(launched.dsn, proposed(launched, before_last), actor="bob")
    approve(launched.dsn, proposed(launched, first), actor="bob")
    assert versions(launched) == [(1, "0.1"), (2, "0.2"), (3, "0.3"), (4, "0.2"), (5, "0.1")]


def test_a_planned_version_taken_back_never_counts(launched: Settings, prices: Read) -> None:
    new_year = to_micros(datetime(2100, 1, 1, tzinfo=UTC))
    approve(launched.dsn, proposed(launched, prices(DEARER), valid_from=new_year), actor="bob")
    with connect(launched.dsn, application="test") as connection:
        drafts = earlier(connection, [("plan", "standard")], version=None)
    (published,) = approve(launched.dsn, proposed(launched, drafts), actor="bob")
    assert published.valid_from_us == new_year
    with connect(launched.dsn, application="test") as connection:
        newest = store.versions(connection, "plan", "standard")
    assert [version.entry.valid_from_us for version in newest[1:]] == [new_year, new_year], "the newer one counts"


def test_a_price_list_is_a_price_change_too(launched: Settings, prices: Read) -> None:
    listed = PRICES + (
        "price_lists:\n"
        "  - {id: schools, name: Schools, plan: standard, currency: USD, customer_segment: education,\n"
        "     charges: [{id: tokens, unit_price: 0.05}]}\n"
    )
    (first,) = approve(launched.dsn, proposed(launched, prices(listed)), actor="bob")
    assert (first.kind, first.id, first.version) == ("price_list", "schools", 1)
    proposal = proposed(launched, prices(listed.replace("0.05", "0.04")))
    with connect(launched.dsn, application="test") as connection:
        (document,) = proposals(connection, only=proposal)[0].documents
    assert [change.words for change in changes(document.before, document.after)] == [
        "override tokens: unit price 0.05 → 0.04 (-20 %)"
    ]


@pytest.mark.parametrize("table", ["proposal", "proposal_document", "proposal_decision", "proposal_version"])
@pytest.mark.parametrize("statement", ["DELETE FROM billing.{}", "TRUNCATE billing.{} CASCADE"])
def test_the_record_stays(launched: Settings, prices: Read, table: str, statement: str) -> None:
    approve(launched.dsn, proposed(launched, prices(DEARER)), actor="bob")
    with pytest.raises(psycopg.Error, match="append only"):
        rows(launched, statement.format(table))
