"""Explanations of what the stream rated and the close priced: every number of them adds up."""

from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from pipeline.billing.explain import explain
from pipeline.billing.rerate import Month, rerate
from pipeline.infra.settings import Settings
from tests.billing.running import query
from tests.scenarios.database import DatabaseWorld

PRICES = """
meters:
  - {id: paid, event_type: payment, aggregation: sum, value: amount, unit: USD}
  - {id: payments, event_type: payment, aggregation: count, unit: payment}
plans:
  - id: pay
    name: Pay
    currency: USD
    charges:
      - {id: card, meter: paid, model: percentage, rate: 2.9, fixed: 0.3, event_maximum: 5}
      - id: seats
        meter: payments
        per_subject: true
        model: graduated
        tiers: [{up_to: 1, unit_price: 3}, {unit_price: 1}]
      - {id: least, meter: payments, model: per_unit, unit_price: 0.5, minimum: 20}
      - {id: first, meter: payments, model: percentage, rate: 100, free_events: 2}
"""
ACCOUNTS = "accounts: [{id: acme, name: Acme, contracts: [{id: acme-1, plan: pay, start: 2026-01-01}]}]"


@pytest.fixture
def world(settings: Settings, tmp_path: Path) -> DatabaseWorld:
    """Ann has paid 100 and 1,000, Ben 10."""
    made = DatabaseWorld(tmp_path, settings)
    made.publish(PRICES, "prices", None)
    made.publish(ACCOUNTS, "accounts", None)
    made.use(
        [
            "2026-10-03T00:00:00Z acme/a payment ann amount=100",
            "2026-10-04T00:00:00Z acme/b payment ann amount=1000",
            "2026-10-05T00:00:00Z acme/c payment ben amount=10",
        ],
        None,
    )
    return made


def told(world: DatabaseWorld, what: str) -> dict[str, Any]:
    found = explain(world.settings, what)
    assert found is not None
    return found


def line_of(world: DatabaseWorld, charge: str) -> dict[str, Any]:
    ((line,),) = query(world.settings, "SELECT id FROM billing.invoice_line WHERE charge = %s", charge)
    return told(world, f"line:{line}")


def words(parts: list[Mapping[str, Any]]) -> list[tuple[str, Decimal]]:
    return [(part["text"], part["amount"]) for part in parts]


def test_an_event_priced_by_itself(world: DatabaseWorld) -> None:
    (row,) = (row for row in told(world, "acme/b")["rows"] if row["charge"] == "card")
    assert words(row["arithmetic"]["parts"]) == [("1 event: 2.9 % of 1,000 and 0.3 USD each, at most 5 USD each", 5)]
    assert (row["arithmetic"]["how"], row["arithmetic"]["proved"], row["amount"]) == ("event", True, 5)


def test_an_event_that_was_taken_back(world: DatabaseWorld) -> None:
    world.void("acme", "b")
    for row in told(world, "acme/b")["rows"]:
        assert row["arithmetic"]["how"] == "provisional" or row["arithmetic"]["proved"], row["charge"]
    line = line_of(world, "card")
    assert [(event["kind"], event["amount"]) for event in line["first_events"]][1:3] == [("usage", 5), ("void", -5)]
    assert line["arithmetic"]["proved"]


def test_each_subject_has_its_own_arithmetic(world: DatabaseWorld) -> None:
    arithmetic = line_of(world, "seats")["arithmetic"]
    assert [(part["subject"], part["text"], part["amount"]) for part in arithmetic["parts"]] == [
        ("ann", "the first 1 payment at 3 USD each", 3),
        ("ann", "1 payment over 1 up to 2 at 1 USD each", 1),
        ("ben", "the first 1 payment at 3 USD each", 3),
    ]
    assert (arithmetic["cost"], arithmetic["proved"]) == (7, True)


def test_what_a_line_will_hold_after_the_close(world: DatabaseWorld) -> None:
    before = line_of(world, "first")["arithmetic"]
    assert words(before["parts"]) == [("2 events free, 2 payments in all", 0), ("1 event: 100 % of 1", 1)]
    list(rerate(world.settings.dsn, Month(2026, 10), actor="ada", note="early"))
    line = line_of(world, "first")
    assert line["arithmetic"]["proved"] and line["arithmetic"]["note"] is None
    assert line["rows_amount"] + line["entries_amount"] == line["exact_amount"] == 1


def test_a_minimum_before_and_after_it_is_booked(world: DatabaseWorld) -> None:
    before = line_of(world, "least")["arithmetic"]
    assert (before["cost"], before["proved"]) == (Decimal("1.5"), True)
    list(rerate(world.settings.dsn, Month(2026, 10), actor="ada", note="early"))
    line = line_of(world, "least")
    assert words(line["arithmetic"]["parts"]) == [
        ("3 payments at 0.5 USD each", Decimal("1.5")),
        ("what is missing to the minimum of 20 USD", Decimal("18.5")),
    ]
    assert line["entries"][0]["reasons"] == ["minimum"]


def test_a_line_of_prices_that_no_longer_hold(world: DatabaseWorld) -> None:
    world.publish(PRICES.replace("unit_price: 0.5", "unit_price: 0.7"), "prices", "2026-10-01T00:00:00Z")
    arithmetic = line_of(world, "least")["arithmetic"]
    assert (arithmetic["cost"], arithmetic["proved"]) == (Decimal("1.5"), True)  # by the version it names
    list(rerate(world.settings.dsn, Month(2026, 10), actor="ada", note="dearer since the 1st"))
    old, new = query(
        world.settings, "SELECT exact_amount, plan_version FROM finance.invoice_lines WHERE charge = 'least' ORDER BY 2"
    )
    assert (old, new) == ((0, 1), (20, 2))


def test_a_month_adds_up(world: DatabaseWorld) -> None:
    month = told(world, "month:acme/2026-10")
    assert (month["month"], month["refused"]) == ("2026-10", [])
    for line in month["lines"]:
        assert sum(part["amount"] for part in line["parts"]) == line["amount"], line["charge"]
    (total,) = month["totals"]
    assert sum(line["amount"] for line in month["lines"]) == total["amount"] == total["held"] + total["to_book"]
    assert told(world, "line:1")["kind"] == "line"
    assert explain(world.settings, "month:nobody/2026-10") is None


def test_a_month_has_every_period_that_ends_in_it(world: DatabaseWorld) -> None:
    """Else those it is in the midst of: Umbrella's only period is a quarter."""
    help_ = "  - {id: help, name: Help, currency: USD, charges: [{id: help, model: flat, unit_price: 30}]}\n"
    world.publish(PRICES + help_, "prices", None)
    quarterly = "{id: NAME-2, plan: help, start: 2026-10-01, cycle: quarter}"
    both = ACCOUNTS.replace(
        "}]}]",
        "}, " + quarterly.replace("NAME", "acme") + "]}, "
        "{id: umbrella, name: Umbrella, contracts: [" + quarterly.replace("NAME", "umbrella") + "]}]",
    )
    world.publish(both, "accounts", None)
    found = {name: told(world, f"month:{name}") for name in ("acme/2026-11", "acme/2026-12", "umbrella/2026-11")}
    assert {name: [segment["contract"] for segment in one["segments"]] for name, one in found.items()} == {
        "acme/2026-11": ["acme-1"],
        "acme/2026-12": ["acme-2", "acme-1"],
        "umbrella/2026-11": ["umbrella-2"],
    }
    december = found["acme/2026-12"]
    assert (f"{december['period_start']:%Y-%m-%d}", f"{december['period_end']:%Y-%m-%d}") == (
        "2026-10-01",
        "2027-01-01",
    )
    assert december["totals"][0]["amount"] == 50, "the quarter's fee and December's minimum"
