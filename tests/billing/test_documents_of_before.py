"""Documents from before lines kept their discounts (0015.after_issue): nothing of them is paid or billed twice."""

from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from psycopg import Connection

from pipeline.billing.credit_notes import Part, credit
from pipeline.billing.own_documents import bill_adjustments, payer_of
from pipeline.core.discounts import Coupon
from pipeline.core.money import QUANTITY_ONE
from pipeline.core.parties import CustomerCoupon, Policy
from pipeline.infra.postgres import connect
from pipeline.infra.settings import Settings
from tests.billing.invoicing import ENTITY, TAXES, apply, close, customer
from tests.billing.running import query, tamper
from tests.billing.test_billed_once import LATE, NOW, OCTOBER, PRICES, acme
from tests.scenarios.database import DatabaseWorld

TEN = Coupon("ten", 1, "Ten percent", percent=Decimal(10))
TWO_OFF = Coupon("two", 1, "2 off calls", amount=2 * 10**12, currency="EUR", charges=frozenset({"calls"}))


@pytest.fixture
def world(database: Settings, tmp_path: Path) -> DatabaseWorld:
    made = DatabaseWorld(tmp_path, database)
    made.publish(PRICES, "prices", None)
    acme(made, "plan: api, start: 2026-01-01", "plan: peaks, start: 2026-01-01")
    return made


@pytest.fixture
def connection(world: DatabaseWorld) -> Iterator["Connection[Any]"]:
    given = (CustomerCoupon("ten", date(2026, 10, 1)), CustomerCoupon("two", date(2026, 10, 1)))
    with connect(world.settings.dsn, application="test", autocommit=True) as made:
        apply(made, ENTITY, TAXES, TEN, TWO_OFF, customer("acme", coupons=given))
        yield made


def use(world: DatabaseWorld, name: str, calls: int, arriving: str | None = None) -> None:
    world.use([f"2026-10-03T00:00:00Z acme/{name} call - n={calls}"], arriving)


def close_october(world: DatabaseWorld, connection: "Connection[Any]") -> int:
    use(world, "a", 100)
    world.use(["2026-10-03T00:00:00Z acme/p peak - n=33"], None)
    (october,) = close(connection, world.settings, OCTOBER)
    return october


def forget(world: DatabaseWorld) -> None:
    """As what there is would have been written before 0015."""
    tamper(world.settings, "UPDATE billing.document_line SET detail = detail - 'discounts'")
    tamper(world.settings, "DELETE FROM billing.document_discount WHERE restates")


def adjust(world: DatabaseWorld, connection: "Connection[Any]", name: str) -> None:
    use(world, name, 100, LATE)
    bill_adjustments(connection, payer_of(connection, "acme", NOW), now=NOW, actor="ada")


def by_coupons(world: DatabaseWorld) -> tuple[Any, ...]:
    """What all documents come to, and what coupons, a tenth and then 2.00, pay of it."""
    sums = "SELECT sum(total_amount), sum(total_amount - payable_amount) FROM billing.document"
    return query(world.settings, sums)[0]


def test_a_coupon_after_tax_pays_once(world: DatabaseWorld, connection: "Connection[Any]") -> None:
    """Of a month that is adjusted for the first time, and again."""
    apply(connection, replace(ENTITY, version=2, policy=Policy(coupons="after_tax")))
    close_october(world, connection)
    forget(world)
    assert by_coupons(world) == (Decimal("159.60"), Decimal("17.96"))
    adjust(world, connection, "b")
    assert by_coupons(world) == (Decimal("279.60"), Decimal("29.96"))
    adjust(world, connection, "c")
    assert by_coupons(world) == (Decimal("399.60"), Decimal("41.96"))


def test_a_coupon_after_tax_pays_for_what_was_adjusted_without_it(
    world: DatabaseWorld, connection: "Connection[Any]"
) -> None:
    """No coupon went with adjustments then."""
    apply(connection, replace(ENTITY, version=2, policy=Policy(coupons="after_tax")))
    close_october(world, connection)
    adjust(world, connection, "b")
    tamper(
        world.settings,
        "UPDATE billing.document SET credits_amount = 0, payable_amount = total_amount WHERE kind = 'adjustment'",
    )
    forget(world)
    assert by_coupons(world) == (Decimal("279.60"), Decimal("17.96"))
    adjust(world, connection, "c")
    assert by_coupons(world) == (Decimal("399.60"), Decimal("41.96"))


def test_lines_billed_since_say_themselves_that_no_coupon_pays_for_them(
    world: DatabaseWorld, connection: "Connection[Any]"
) -> None:
    """The coupon is for calls. What it paid is shared out over the peaks too, until they are billed anew."""
    given = (CustomerCoupon("two", date(2026, 10, 1)),)
    apply(connection, replace(ENTITY, version=2, policy=Policy(coupons="after_tax")), customer("acme", coupons=given))
    close_october(world, connection)
    forget(world)
    for name, total in (("b", "279.60"), ("c", "399.60")):
        adjust(world, connection, name)
        assert by_coupons(world) == (Decimal(total), 2)


def test_finance_finds_nothing_wrong_with_them(world: DatabaseWorld, connection: "Connection[Any]") -> None:
    """Discounts of lines that take back or restate others were not written down."""
    october = close_october(world, connection)
    part = Part(1, 10 * QUANTITY_ONE)
    credit(connection, october, [part], reason="goodwill", note="", to="refund", actor="ada", now=NOW)
    adjust(world, connection, "b")
    forget(world)
    adjust(world, connection, "c")
    assert query(world.settings, "SELECT * FROM finance.document_checks") == []
