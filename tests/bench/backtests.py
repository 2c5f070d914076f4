"""A price manager's tools: backtests of stored usage on one core, and `tally plans check` of 1,000 plans."""

import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from tempfile import TemporaryDirectory

from psycopg.types.json import Jsonb

from pipeline.billing.backtest import Backtested, backtest
from pipeline.billing.rerate import Month
from pipeline.core.charges import Charge
from pipeline.core.documents import Item, kind_of, to_document
from pipeline.core.meters import Meter
from pipeline.core.plans import Plan
from pipeline.infra.postgres import connect
from pipeline.infra.settings import Settings
from pipeline.infra.topics import Topics
from tests.bench import world
from tests.bench.figures import RUNS, Figure, median
from tests.bench.raters import rated
from tests.bench.sinks import own_database, sunk

EVENTS = 400_000
PLANS = 1_000


def backtests(settings: Settings) -> Iterator[Figure]:
    """Of one month's usage by 1,000 accounts: a dearer tier, priced by totals, and a meter that measures otherwise."""
    last = datetime.now(UTC) - timedelta(days=5)
    month = Month(last.year, last.month)
    first = max(last.replace(day=1, hour=12), last - timedelta(days=14))
    with own_database(settings, "bench_backtest") as own, world.deployment(own, "backtest") as here:
        _publish(here.dsn, world.catalog())
        times_us = int(first.timestamp() * 1e6), int(last.timestamp() * 1e6)
        world.send(here, Topics(here.topic_prefix).events, world.events(EVENTS, 7, times_us))
        rated(here, EVENTS)
        with connect(here.dsn, application="bench", autocommit=True, role=None) as connection:
            sunk(here, connection)
        for way, candidate in (("totals", _dearer(world.catalog())), ("events", _in_tens(world.catalog()))):
            rates = []
            for _ in range(RUNS):
                started = time.perf_counter()
                found = list(backtest(here.dsn, month, candidate, jobs=1))
                rates.append(_rows(found, way) / (time.perf_counter() - started))
            yield Figure(f"backtest_{way}_rows_per_s", median(rates), "rated rows/s, one process")
    yield Figure("plans_check_1000_plans_s", median(_check_seconds() for _ in range(RUNS)), "s")


def _rows(found: list[Backtested], way: str) -> int:
    """Rated rows priced. Raises RuntimeError where they were not priced that way, or not at all."""
    if wrong := [one for one in found if one.events and (one.way != way or one.problem or not one.prices)]:
        raise RuntimeError(f"expected all accounts priced by {way}, got {wrong[0]}")
    return sum(one.events for one in found)


def _dearer(items: list[Item]) -> list[Item]:
    def dearer(charge: Charge) -> Charge:
        tiers = tuple(replace(tier, unit_price=tier.unit_price * Decimal("1.1")) for tier in charge.tiers)
        return replace(charge, tiers=tiers)

    return [
        replace(item, version=2, charges=tuple(map(dearer, item.charges))) for item in items if isinstance(item, Plan)
    ]


def _in_tens(items: list[Item]) -> list[Item]:
    """Meters that round each event up to tens: no sum of the old quantities tells."""
    return [
        replace(item, version=2, value=None, expression="ceil(tokens / 10) * 10")
        for item in items
        if isinstance(item, Meter)
    ]


def _publish(dsn: str, items: list[Item]) -> None:
    """Put items into the database as published long ago. Raters know them from the topic."""
    with connect(dsn, application="bench") as connection, connection.cursor() as cursor:
        rows = [(kind_of(item), item.id, Jsonb(to_document(item))) for item in items]
        cursor.executemany(_INSERT, rows)


_INSERT = """
INSERT INTO billing.catalog_version (kind, id, version, valid_from, document, published_by)
VALUES (%s, %s, 1, 'epoch', %s, 'bench')
"""


def _check_seconds() -> float:
    with TemporaryDirectory() as folder:
        file = Path(folder) / "prices.yaml"
        file.write_text(_many_plans())
        started = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "pipeline.cli", "plans", "check", str(file)], check=True, capture_output=True
        )
        return time.perf_counter() - started


def _many_plans() -> str:
    meter = "meters:\n  - {id: tokens, event_type: completion, aggregation: sum, value: tokens, unit: token}\nplans:\n"
    charges = "".join(
        f"      - {{id: charge-{number}, meter: tokens, model: graduated, "
        "tiers: [{up_to: 1000, unit_price: 0.003}, {unit_price: 0.002}]}\n"
        for number in range(6)
    )
    return meter + "".join(
        f"  - id: plan-{number}\n    name: Plan {number}\n    currency: USD\n    charges:\n{charges}"
        for number in range(PLANS)
    )
