"""What a correction would change, held against what it then changes: priced by the rater, written by the sink."""

from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import pytest

from pipeline.core.money import AMOUNT_DECIMALS
from pipeline.infra.postgres import connect
from pipeline.infra.settings import Settings
from pipeline.operations import corrections
from pipeline.operations.events import Mend, parse_mend
from pipeline.operations.previews import Preview, preview, unread
from tests.scenarios.database import DatabaseWorld

PRICES = """
meters:
  - {id: tokens, event_type: call, aggregation: sum, value: tokens, unit: token, dimensions: [model]}
  - {id: cached, event_type: call, aggregation: sum, expression: "default(cached, 0)", unit: token}
  - {id: peak, event_type: call, aggregation: max, value: tokens, unit: token}
  - {id: big, event_type: call, aggregation: count, unit: call, filters: {size: [big]}}
  - {id: paid, event_type: call, aggregation: sum, value: paid, unit: USD}
plans:
  - id: api
    name: API
    currency: USD
    pools: [{id: free, included: 100, unit: token, charges: [cached]}]
    charges:
      - {id: tiered, meter: tokens, model: graduated, tiers: [{up_to: 10, unit_price: 3, flat: 1}, {unit_price: 1}]}
      - {id: split, meter: tokens, model: per_unit, unit_price: 2, by: [model], references: [order]}
      - {id: each, meter: tokens, per_subject: true, model: volume, tiers: [{up_to: 5, unit_price: 2}, {unit_price: 1}]}
      - {id: card, meter: paid, model: percentage, rate: 2.9, fixed: 0.3}
      - {id: cached, meter: cached, model: per_unit, unit_price: 1}
      - {id: peak, meter: peak, model: per_unit, unit_price: 1}
      - {id: big, meter: big, model: per_unit, unit_price: 7}
"""
ACCOUNTS = "accounts: [{id: acme, name: Acme, contracts: [{id: acme-1, plan: api, start: 2026-01-01}]}]"
#: Charges whose price only the close can tell.
AT_THE_CLOSE = {"cached", "peak"}


@pytest.fixture
def world(settings: Settings, tmp_path: Path) -> DatabaseWorld:
    made = DatabaseWorld(tmp_path, settings)
    made.publish(PRICES, "prices", None)
    made.publish(ACCOUNTS, "accounts", None)
    made.use(
        [
            "2026-10-03T00:00:00Z acme/a call ann tokens=8 paid=100 model=m1",
            "2026-10-04T00:00:00Z acme/b call ann tokens=4 paid=50 model=m2 cached=5",
            "2026-10-05T00:00:00Z acme/c call ben tokens=9 paid=10 model=m1 size=big order=o1",
        ],
        None,
    )
    return made


def look(world: DatabaseWorld, keys: Sequence[str], *sets: str) -> Preview:
    with connect(world.settings.dsn, application="test", autocommit=True) as connection:
        found = corrections.find(connection, [("acme", key) for key in keys])
        return preview(connection, list(found.values()), parse_mend(list(sets)) if sets else Mend())


def changes(seen: Preview) -> dict[str, Decimal | None]:
    return {one.charge: one.change for one in seen.held}


def moved(world: DatabaseWorld, since: int) -> dict[str, Decimal]:
    """What the rows written since then add up to, by charge."""
    sums: defaultdict[str, Decimal] = defaultdict(Decimal)
    for row in world.rows[since:]:
        sums[row.terms.charge] += Decimal(row.amount).scaleb(-AMOUNT_DECIMALS)
    return sums


@pytest.mark.parametrize(
    ("keys", "sets"),
    [
        (["a"], ["tokens=2"]),
        (["a"], ["tokens=20", "model=m9"]),  # over a tier, into a cell that no event has reached
        (["b", "c"], ["tokens=1", "paid=7"]),
        (["a", "b", "c"], ["size=big", "tokens=0"]),
        (["c"], ["size=small"]),
    ],
)
def test_replacements_change_what_was_said(world: DatabaseWorld, keys: list[str], sets: list[str]) -> None:
    seen = look(world, keys, *sets)
    assert (seen.refused, seen.unread) == ([], {})
    before = len(world.rows)
    for key in keys:
        world.replace("acme", key, **dict(one.split("=") for one in sets))
    assert {charge: change for charge, change in changes(seen).items() if change is not None} == {
        charge: amount for charge, amount in moved(world, before).items() if charge not in AT_THE_CLOSE
    }
    quantities = {one.charge: one.new_quantity for one in look(world, keys).held}
    now = {one.charge: one.quantity for one in look(world, keys).held}
    assert set(quantities.values()) <= {Decimal(0), None}
    assert {one.charge: one.new_quantity for one in seen.held if one.new_quantity} == {
        charge: quantity for charge, quantity in now.items() if quantity
    }


def test_a_void_changes_what_was_said(world: DatabaseWorld) -> None:
    seen, before = look(world, ["a", "c"]), len(world.rows)
    for key in ("a", "c"):
        world.void("acme", key)
    # Taken back one after another, the maximum says: each row at the amount it was billed at.
    assert changes(seen) == moved(world, before)


def test_after_a_back_dated_price_rows_go_at_their_amounts_and_replacements_come_at_the_new_price(
    world: DatabaseWorld,
) -> None:
    world.publish(PRICES.replace("unit_price: 3, flat: 1", "unit_price: 5, flat: 2"), "prices", "2026-10-01T00:00:00Z")
    seen, before = look(world, ["a", "b"], "tokens=7"), len(world.rows)
    for key in ("a", "b"):
        world.replace("acme", key, tokens="7")
    assert {charge: change for charge, change in changes(seen).items() if change is not None} == {
        charge: amount for charge, amount in moved(world, before).items() if charge not in AT_THE_CLOSE
    }


def test_only_the_close_tells_what_a_pool_or_a_maximum_costs(world: DatabaseWorld) -> None:
    said = changes(look(world, ["a"], "tokens=2"))
    assert {charge for charge, change in said.items() if change is None} == AT_THE_CLOSE
    [peak] = [one for one in look(world, ["a"], "tokens=2").held if one.charge == "peak"]
    assert (peak.quantity, peak.new_quantity, peak.amount) == (None, None, 8)


def test_a_property_that_nothing_reads_is_named(world: DatabaseWorld) -> None:
    assert look(world, ["a"], "tokns=1").unread == {"tokns": "did you mean tokens?"}
    assert look(world, ["c"], "order=o2").unread == {}  # a reference on the line
    [(name, meant)] = look(world, ["a"], "xyz=1").unread.items()
    assert (name, meant) == ("xyz", "read are cached, model, order, paid, size, tokens")
    with connect(world.settings.dsn, application="test") as connection:
        at = datetime(2026, 10, 3, tzinfo=UTC)
        assert unread(connection, "acme", "call", at, ["tokens", "tokns"]) == ["tokns"]
        assert unread(connection, "nobody", "call", at, ["tokns"]) == []


@pytest.mark.parametrize(
    ("set_", "problem"),
    [
        ("tokens=many", "expected a decimal number as tokens, got 'many'"),
        ("event_type=cal", "expected an event type that plan 'api' version 1 charges, got 'cal'"),
    ],
)
def test_a_replacement_without_a_price_is_refused(world: DatabaseWorld, set_: str, problem: str) -> None:
    [(pick, said)] = look(world, ["a"], set_).refused
    assert (str(pick), said) == ("acme/a", problem)


_DECIDED = """
INSERT INTO billing.correction
    (number, action, account, idempotency_key, identity, event_month, event_time, entry, reason_code, actor, message)
VALUES (%s, 'void', 'acme', 'a', gen_random_uuid(), '2026-10-01', %s, 1, 'other', 'ada', '')
"""


def test_a_correction_in_a_re_rated_month_names_it_once_more(world: DatabaseWorld) -> None:
    """Its line goes by what it was rated at, and the one its price was moved to does not follow."""
    with connect(world.settings.dsn, application="test", autocommit=True) as connection:
        connection.execute(_DECIDED, [1, "2026-10-31T23:59:59Z"])
        connection.execute(_DECIDED, [2, "2026-11-01T00:00:00Z"])
        assert corrections.re_rated(connection, [1, 2]) == []
        world.publish(PRICES.replace("unit_price: 7", "unit_price: 8"), "prices", "2026-10-01T00:00:00Z")
        world.rerate("acme", "2026-10")
        assert corrections.re_rated(connection, [1, 2]) == [("acme", "2026-10")]
        assert corrections.re_rated(connection, [2]) == []
