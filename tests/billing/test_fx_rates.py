"""Stored rates of exchange: loaded once, never changed, and which one counts on a day."""

from collections.abc import Iterator
from datetime import date
from decimal import Decimal
from typing import Any

import psycopg
import pytest
from psycopg import Connection

from pipeline.billing.fx_rates import Loaded, RatesDiffer, load, published
from pipeline.billing.invoicing_store import mark
from pipeline.core.fx import NoRate, rate_on
from pipeline.infra.embedded import Endpoints
from pipeline.infra.postgres import connect
from pipeline.infra.settings import Settings
from tests.conftest import fresh_settings

FRIDAY, MONDAY = date(2026, 10, 30), date(2026, 11, 2)
RATES = [(FRIDAY, "USD", Decimal("1.1050")), (FRIDAY, "JPY", Decimal("156.33")), (MONDAY, "USD", Decimal("1.2"))]


@pytest.fixture(scope="module")
def shared(services: Endpoints, template_database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    with fresh_settings(services, template_database, tmp_path_factory.mktemp("rates")) as settings:
        yield settings


@pytest.fixture
def database(shared: Settings) -> Iterator["Connection[Any]"]:
    """Of each test nothing stays."""
    with connect(shared.dsn, application="test") as connection, connection.transaction(force_rollback=True):
        assert load(connection, "ECB", "EUR", RATES, actor="ada") == Loaded(3, 0, 0, FRIDAY, MONDAY)
        yield connection


def test_the_last_rate_on_or_before_a_day(database: "Connection[Any]") -> None:
    def rate(day: date, base: str = "EUR", quote: str = "USD") -> Decimal:
        return rate_on(base, quote, day, published(database, day, [base, quote])).rate

    assert rate(FRIDAY) == rate(date(2026, 11, 1)) == Decimal("1.1050")  # over a weekend
    assert rate(MONDAY) == Decimal("1.2")
    assert rate(MONDAY, "USD", "EUR").quantize(Decimal("0.0001")) == Decimal("0.8333")
    with pytest.raises(NoRate):
        rate(date(2026, 10, 29))
    with pytest.raises(NoRate):
        rate(MONDAY, "EUR", "GBP")
    assert published(database, MONDAY, source="another") == []


def test_loading_again_changes_nothing(database: "Connection[Any]") -> None:
    assert load(database, "ECB", "EUR", RATES, actor="bob") == Loaded(0, 3, 0, FRIDAY, MONDAY)
    assert database.execute("SELECT count(*) FROM billing.audit WHERE action = 'fx.load'").fetchone() == (1,)


def test_another_rate_is_refused_unless_it_is_a_correction(database: "Connection[Any]") -> None:
    other = [(FRIDAY, "USD", Decimal("1.1")), (MONDAY, "JPY", Decimal(157))]
    before = mark(database)
    with pytest.raises(RatesDiffer, match=r"expected 1\.1050 for USD on 2026-10-30, as loaded before, got 1\.1$"):
        load(database, "ECB", "EUR", other, actor="bob")
    assert len(published(database, MONDAY)) == 3  # nothing of it was loaded
    loaded = load(database, "ECB", "EUR", other, actor="bob", correct=True, reason="misread")
    assert loaded == Loaded(1, 0, 1, FRIDAY, MONDAY)
    assert rate_on("EUR", "USD", FRIDAY, published(database, FRIDAY)).rate == Decimal("1.1")
    assert rate_on("EUR", "USD", FRIDAY, published(database, FRIDAY, loaded_until=before)).rate == Decimal("1.1050")
    rows = database.execute(
        "SELECT rate, revision, reason FROM finance.exchange_rates WHERE currency = 'USD' ORDER BY day"
    ).fetchall()
    assert rows == [(Decimal("1.1"), 2, "misread"), (Decimal("1.2"), 1, "")]


def test_rates_are_never_changed(database: "Connection[Any]") -> None:
    database.execute("RESET ROLE")  # the owner is held as well
    for statement in ("UPDATE billing.fx_rate SET rate = 1", "DELETE FROM billing.fx_rate", "TRUNCATE billing.fx_rate"):
        with pytest.raises(psycopg.errors.RaiseException, match="append only"), database.transaction():
            database.execute(statement)


def test_no_rate_at_all(database: "Connection[Any]") -> None:
    with pytest.raises(ValueError, match="expected rates of exchange, got none"):
        load(database, "ECB", "EUR", [], actor="ada")
