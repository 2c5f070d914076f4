"""What is read of stored events is what their prices look at: nothing they need is left out."""

from pathlib import Path

import pytest

from pipeline.billing.members import read_uses
from pipeline.billing.rerate import Month, price_period
from pipeline.core.rerating import close_period
from pipeline.infra.postgres import connect
from pipeline.infra.settings import Settings
from tests.scenarios.database import DatabaseWorld

OCTOBER = Month(2026, 10)
PRICES = """
meters:
  - {id: tokens, event_type: call, aggregation: sum, value: tokens, unit: token, dimensions: [model]}
  - {id: work, event_type: call, aggregation: sum, expression: 'default(cached, 0) + property("gpu.s")', unit: second}
  - {id: big, event_type: call, aggregation: count, unit: call, filters: {size: [big]}}
  - {id: who, event_type: call, aggregation: unique, value: user, unit: user}
plans:
  - id: api
    name: API
    currency: USD
    charges:
      - {id: split, meter: tokens, model: per_unit, unit_price: 2, by: [model]}
      - {id: work, meter: work, model: per_unit, unit_price: 1}
      - {id: big, meter: big, model: per_unit, unit_price: 7}
      - {id: who, meter: who, model: per_unit, unit_price: 11}
      - {id: given, meter: tokens, model: dynamic, amount_property: cost}
"""
ACCOUNTS = "accounts: [{id: acme, name: Acme, contracts: [{id: acme-1, plan: api, start: 2026-01-01}]}]"


@pytest.fixture
def world(settings: Settings, tmp_path: Path) -> DatabaseWorld:
    """From the 6th on, tokens are measured by another property."""
    made = DatabaseWorld(tmp_path, settings)
    made.publish(PRICES, "prices", None)
    made.publish(ACCOUNTS, "accounts", None)
    made.publish(PRICES.replace("value: tokens", "value: units"), "prices", "2026-10-06T00:00:00Z")
    made.use(
        [
            "2026-10-03T00:00:00Z acme/a call ann tokens=8 gpu.s=2 size=big user=ann cost=0.5 model=m1 note=x",
            "2026-10-07T00:00:00Z acme/b call ben units=3 gpu.s=1 cached=4 user=ben cost=0.25 tokens=99",
        ],
        None,
    )
    return made


def test_prices_see_every_property_that_they_look_at(world: DatabaseWorld) -> None:
    period = OCTOBER.period_in("UTC")
    whole = close_period(world.catalog, "acme", period, [event.use for event in world.events.values()])
    with connect(world.settings.dsn, application="test") as connection:
        narrow = price_period(connection, world.catalog, "acme", period)
    assert (narrow, narrow.refused) == (whole, ())
    assert {line.charge.id: line.events for line in narrow.lines if line.events} == {
        "split": 1, "work": 2, "big": 1, "who": 2, "given": 2
    }  # fmt: skip


@pytest.mark.parametrize("rows", [None, 2, 1_000_000])
def test_only_the_properties_asked_for_are_read(world: DatabaseWorld, rows: int | None) -> None:
    with connect(world.settings.dsn, application="test") as connection:
        uses = list(read_uses(connection, "acme", OCTOBER.period_in("UTC"), {"gpu.s", "cached", "it's"}, rows=rows))
    assert [use.properties for use in uses] == [{b"gpu.s": b"2"}, {b"gpu.s": b"1", b"cached": b"4"}]
    whole = [event.use for event in world.events.values()]
    assert [use._replace(properties={}) for use in uses] == [use._replace(properties={}) for use in whole]
