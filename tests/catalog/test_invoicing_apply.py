"""Applying invoicing files to PostgreSQL: versions, which of them count on a day, and what is refused."""

from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import Connection
from psycopg.types.json import Jsonb

from pipeline.billing.invoicing_store import Invoicing, load, mark, versions
from pipeline.catalog.invoicing_apply import Applied, apply
from pipeline.catalog.invoicing_files import read_invoicing_files
from pipeline.catalog.publish import Refused
from pipeline.core.contracts import Account
from pipeline.core.documents import Item, kind_of, to_document
from pipeline.infra.embedded import Endpoints
from pipeline.infra.postgres import connect
from pipeline.infra.settings import Settings
from tests.billing.running import per_unit
from tests.conftest import fresh_settings

DAY = date(2026, 10, 31)
ENTITY = "legal_entities: [{id: e, name: %s, address: {lines: [a], city: B, country: DE}%s}]\n"
CUSTOMER = "customers: [{account: acct, name: Acct, address: {lines: [a], city: B, country: DE}%s}]\n"


class World:
    def __init__(self, connection: "Connection[Any]", folder: Path) -> None:
        self.connection, self._file = connection, folder / "invoicing.yaml"

    def apply(self, text: str, **options: Any) -> list[Applied]:
        self._file.write_text(text)
        return apply(self.connection, read_invoicing_files([self._file]), actor="ada", **options)

    def outcomes(self, text: str, **options: Any) -> list[tuple[str, int, str]]:
        return [(one.id, one.version, one.outcome) for one in self.apply(text, **options)]

    def load(self, on: date = DAY, **options: Any) -> Invoicing:
        options.setdefault("applied_until", mark(self.connection))
        return load(self.connection, on=on, **options)

    def publish(self, item: Item) -> None:
        self.connection.execute(
            """INSERT INTO billing.catalog_version (kind, id, version, valid_from, document, published_by)
            VALUES (%s, %s, 1, '1970-01-01Z', %s, 'test')""",
            [kind_of(item), item.id, Jsonb(to_document(item))],
        )


@pytest.fixture(scope="module")
def shared(services: Endpoints, template_database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    with fresh_settings(services, template_database, tmp_path_factory.mktemp("invoicing")) as settings:
        yield settings


@pytest.fixture
def world(shared: Settings, tmp_path: Path) -> Iterator[World]:
    """Of each test nothing stays."""
    with connect(shared.dsn, application="test") as connection, connection.transaction(force_rollback=True):
        made = World(connection, tmp_path)
        made.publish(Account("acct", 1, "Acct", "UTC"))
        made.publish(per_unit(input="1"))
        yield made


def test_what_changed_becomes_a_version_and_what_did_not_stays(world: World) -> None:
    text = ENTITY % ("E", "") + CUSTOMER % ""
    assert world.outcomes(text, reason="begin") == [("e", 1, "new"), ("acct", 1, "new")]
    assert world.outcomes(text) == [("e", 1, "unchanged"), ("acct", 1, "unchanged")]
    assert world.outcomes(text.replace("name: E", "name: F")) == [("e", 2, "changed"), ("acct", 1, "unchanged")]
    assert world.load().legal_entity("e").name == "F"  # type: ignore[union-attr]
    stored = versions(world.connection, kind="legal_entity", id="e")
    assert [(one.version, one.applied_by, one.reason) for one in stored] == [(1, "ada", "begin"), (2, "ada", "")]
    audit = world.connection.execute("SELECT actor, action, target FROM billing.audit ORDER BY id").fetchall()
    assert audit == [
        ("ada", "legal_entity.apply", "legal_entity/e/1"),
        ("ada", "customer.apply", "customer/acct/1"),
        ("ada", "legal_entity.apply", "legal_entity/e/2"),
    ]


def test_a_version_counts_from_its_day_and_one_without_on_all(world: World) -> None:
    def name_on(day: date) -> str:
        entity = world.load(day).legal_entity("")  # the only one
        assert entity is not None
        return entity.name

    world.apply(ENTITY % ("Old", ""))
    world.apply(ENTITY % ("New", ", valid_from: 2026-11-01"))
    assert (name_on(date(2026, 10, 31)), name_on(date(2026, 11, 1))) == ("Old", "New")
    with pytest.raises(Refused, match="expected valid_from 2026-11-01, from when version 2 counts, or later"):
        world.apply(ENTITY % ("Between", ", valid_from: 2026-10-01"))
    world.apply(ENTITY % ("All", ""))
    assert (name_on(date(2026, 10, 31)), name_on(date(2026, 11, 1))) == ("All", "All")


def test_a_mark_hides_what_was_applied_later(world: World) -> None:
    world.apply(ENTITY % ("E", ""))
    marked = mark(world.connection)
    world.apply(ENTITY % ("F", ""))
    assert world.load(applied_until=marked).legal_entities["e"].name == "E"
    assert world.load().legal_entities["e"].name == "F"


def test_a_mark_waits_for_an_apply_under_way(shared: Settings, world: World) -> None:
    """Else a version with an earlier time could appear behind the mark."""
    with connect(shared.dsn, application="test") as other:
        other.execute("SELECT billing.lock_invoicing()")
        world.connection.execute("SET lock_timeout = '50ms'")
        with pytest.raises(psycopg.errors.LockNotAvailable), world.connection.transaction():
            mark(world.connection)
    assert abs(mark(world.connection) - datetime.now(UTC)) < timedelta(minutes=5)


def test_customers_are_loaded_by_account(world: World) -> None:
    world.apply(CUSTOMER % "")
    assert world.load(accounts=[]).customers == {}
    assert list(world.load(accounts=["acct", "other"]).customers) == ["acct"]
    assert list(world.load().customers) == ["acct"]
    assert world.load().legal_entity("") is None


def test_names_that_nobody_knows_are_found_all_at_once(world: World) -> None:
    text = (
        CUSTOMER.replace("acct", "akct")
        % ", tax_categories: {imput: reduced}, coupons: [{coupon: of, start: 2026-01-01}]"
    )
    text += "coupons: [{id: off, name: Off, percent: 5, charges: [input, output], plans: [basik]}]\n"
    with pytest.raises(Refused) as refused:
        world.apply(text)
    assert sorted(str(finding).partition(": ")[2] for finding in refused.value.findings) == [
        "coupons[off].charges: expected a charge that there is, got 'output': `tally plans publish` first",
        "coupons[off].plans: expected a plan that there is, got 'basik': did you mean 'basic'?",
        "customers[#1].account: expected an account that there is, got 'akct': did you mean 'acct'?",
        "customers[#1].coupons[#1].coupon: expected a coupon that there is, got 'of': did you mean 'off'?",
        "customers[#1].tax_categories: expected a charge that there is, got 'imput': did you mean 'input'?",
    ]
    assert versions(world.connection) == []


def test_a_file_with_mistakes_and_a_dry_run_change_nothing(world: World) -> None:
    with pytest.raises(Refused, match="unknown key"):
        world.apply(ENTITY % ("E", ", colour: red"))
    assert world.outcomes(ENTITY % ("E", ""), dry_run=True) == [("e", 1, "new")]
    assert versions(world.connection) == []


def test_images_are_stored_by_their_content(world: World, tmp_path: Path) -> None:
    (tmp_path / "logo.svg").write_text("<svg/>")
    text = ENTITY % ("E", ", branding: {logo: logo.svg}")
    assert world.outcomes(text) == [("e", 1, "new")]
    assert world.outcomes(text) == [("e", 1, "unchanged")]
    (tmp_path / "logo.svg").write_text("<svg ></svg>")
    assert world.outcomes(text) == [("e", 2, "changed")]
    stored = world.connection.execute("SELECT sha256, media_type, content FROM billing.asset").fetchall()
    assert {content for *_, content in stored} == {b"<svg/>", b"<svg ></svg>"}
    assert world.load().legal_entities["e"].branding.logo in {digest for digest, *_ in stored}


def test_versions_are_never_changed(world: World) -> None:
    world.apply(ENTITY % ("E", ""))
    world.connection.execute("RESET ROLE")  # the owner is held as well
    for statement in ("UPDATE billing.invoicing_version SET reason = ''", "DELETE FROM billing.invoicing_version"):
        with pytest.raises(psycopg.errors.RaiseException, match="append only"), world.connection.transaction():
            world.connection.execute(statement)
