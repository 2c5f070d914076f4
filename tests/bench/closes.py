"""Closing a month: invoices per second, each with five lines; and 100,000 accounts, from end to end."""

import os
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import psutil
from psycopg import Connection
from psycopg.types.json import Jsonb

from pipeline.billing import queue
from pipeline.billing.close import work, work_off
from pipeline.billing.invoicing_store import mark
from pipeline.core.charges import Charge, Tier
from pipeline.core.contracts import Account, Contract
from pipeline.core.documents import Item, kind_of, to_document
from pipeline.core.invoicing_documents import Item as InvoicingItem
from pipeline.core.invoicing_documents import TaxTable, id_of
from pipeline.core.invoicing_documents import kind_of as invoicing_kind_of
from pipeline.core.invoicing_documents import to_document as invoicing_document
from pipeline.core.meters import Meter
from pipeline.core.parties import Address, Customer, LegalEntity
from pipeline.core.plans import Plan
from pipeline.core.tax import TaxRate
from pipeline.infra.postgres import connect
from pipeline.infra.settings import Settings
from tests.bench.figures import RUNS, Figure, median
from tests.bench.sinks import own_database

ACCOUNTS, MANY_ACCOUNTS = 4_000, 100_000
MONTH = "2026-10"
_START, _END = datetime(2026, 10, 1, tzinfo=UTC), datetime(2026, 11, 1, tzinfo=UTC)
_UNIT = 10**9


def close(settings: Settings) -> Iterator[Figure]:
    """One worker, without progress and gate, and what it and its PostgreSQL backend cost of a core."""
    with own_database(settings, "bench_close") as own:
        rates, costs = [], []
        for number in range(RUNS):
            with connect(own.dsn, application="bench", autocommit=True, role=None) as connection:
                fill(connection, f"run{number}-", ACCOUNTS)
                backend: dict[int, float] = {}
                run = _begin(connection)
                began, used = time.perf_counter(), time.process_time()
                for _ in work(own.dsn, run.id, "bench"):
                    backend.update(_backends(connection))
                rates.append(ACCOUNTS / (time.perf_counter() - began))
                costs.append((time.process_time() - used + sum(backend.values())) / ACCOUNTS)
                _check(connection, run, ACCOUNTS)
        yield Figure("close_invoices_per_s", median(rates), "invoices/s of 5 lines, one worker")
        yield Figure("close_invoices_per_cpu_s", 1 / median(costs), "invoices per second of CPU, worker and backend")


def _backends(connection: "Connection[Any]") -> dict[int, float]:
    """CPU seconds of the close's backends so far; none where PostgreSQL is on another machine."""
    statement = (
        "SELECT pid FROM pg_stat_activity WHERE application_name = 'tally-close' AND datname = current_database()"
    )
    found = {}
    for (pid,) in connection.execute(statement):
        if psutil.pid_exists(pid) and "postgres" in psutil.Process(pid).name():
            times = psutil.Process(pid).cpu_times()
            found[pid] = times.user + times.system
    return found


def close_100k(settings: Settings) -> Iterator[Figure]:
    """100,000 accounts on all cores, from the plan to the last commit; and what a worker grew by on the way."""
    with (
        own_database(settings, "bench_close_100k") as own,
        connect(own.dsn, application="bench", autocommit=True, role=None) as connection,
    ):
        fill(connection, "a", MANY_ACCOUNTS)
        memory: list[tuple[int, int]] = []  # payers done, bytes of the largest worker

        def tell(tasks: queue.Progress) -> None:
            sizes = [child.memory_full_info().uss for child in psutil.Process().children() if child.is_running()]
            memory.append((tasks.done, max(sizes, default=0)))

        began = time.perf_counter()
        closed(own, connection, MANY_ACCOUNTS, workers=os.cpu_count() or 1, tell=tell)
        seconds = time.perf_counter() - began
        early = max(size for done, size in memory if done <= MANY_ACCOUNTS / 5)
        late = max(size for done, size in memory if done >= MANY_ACCOUNTS / 2)
        yield Figure("close_100k_s", seconds, f"s, {os.cpu_count()} workers")
        yield Figure("close_100k_invoices_per_s", MANY_ACCOUNTS / seconds, f"invoices/s, {os.cpu_count()} workers")
        yield Figure("close_100k_worker_mib", late / 2**20, "MiB of a worker in the second half")
        yield Figure("close_100k_worker_growth", late / early, "times its size in the first fifth")


def closed(
    settings: Settings,
    connection: "Connection[Any]",
    accounts: int,
    *,
    workers: int,
    tell: Callable[[queue.Progress], None] = lambda _: None,
) -> None:
    """Close so many accounts as a command does after its gate. Raises RuntimeError for any other number of invoices."""
    run = _begin(connection)
    work_off(settings, connection, run, actor="bench", workers=workers, tell=tell)
    _check(connection, run, accounts)


def _begin(connection: "Connection[Any]") -> queue.Run:
    run = queue.begin(connection, MONTH, (), invoicing_mark=mark(connection), consolidating=(), actor="bench")
    if run is None:
        raise RuntimeError("expected payers to close, got none")
    return run


def _check(connection: "Connection[Any]", run: queue.Run, accounts: int) -> None:
    queue.finish(connection, run.id)
    found = queue.progress(connection, run.id)
    if found != queue.Progress(0, accounts, 0, accounts):
        raise RuntimeError(f"expected {accounts} invoices, got {found}: {queue.failed(connection, run.id, 1)}")


_USED = 5_000


def prices() -> list[Item]:
    """A plan of a monthly fee and four charges."""
    meters: list[Item] = [
        Meter(f"m{number}", 1, f"type-{number}", "sum", "n", "call", (), allow_negative=False, valid_from_us=0)
        for number in range(4)
    ]
    charges = (
        Charge("fee", None, "flat", unit_price=Decimal(20)),
        Charge("c0", "m0", "per_unit", unit_price=Decimal("0.0012")),
        Charge("c1", "m1", "per_unit", unit_price=Decimal("0.0034"), included=1_000 * _UNIT),
        Charge("c2", "m2", "graduated", tiers=(Tier(1_000 * _UNIT, Decimal("0.01")), Tier(None, Decimal("0.005")))),
        Charge("c3", "m3", "package", package_size=1_000 * _UNIT, package_price=Decimal("1.5")),
    )
    return [*meters, Plan("standard", 1, "Standard", "EUR", 0, charges)]


def invoicing() -> list[InvoicingItem]:
    """A seller with VAT of one country."""
    address = Address(("Ring 1",), "Wien", "AT", "1010")
    rate = TaxRate("VAT", "AT", "standard", Decimal(20), datetime(2020, 1, 1, tzinfo=UTC).date())
    return [LegalEntity("tally", 1, "Tally GmbH", address, vat_number="ATU12345675"), TaxTable("vat", 1, (rate,))]


_AMOUNTS = (Decimal(6), Decimal("13.6"), Decimal(30), Decimal("7.5"))

_COPY_CATALOG = """
COPY billing.catalog_version (kind, id, version, valid_from, document, published_at, published_by) FROM STDIN
"""
_COPY_INVOICING = "COPY billing.invoicing_version (kind, id, version, document, applied_by) FROM STDIN"
_FILL_CONTAINERS = """
INSERT INTO billing.invoice (account, currency, period_start, period_end)
SELECT %s || lpad(number::text, 6, '0'), 'EUR', %s, %s FROM generate_series(1, %s) AS number
"""
_FILL_LINES = """
INSERT INTO billing.invoice_line (invoice_id, contract, plan, plan_version, price_version, meter, meter_version, charge,
    segment_start, quantity, amount, events, first_event_at, last_event_at)
SELECT invoice.id, invoice.account || '-main', 'standard', 1, 'standard@1', 'm' || used.number, 1, 'c' || used.number,
    %(start)s, %(quantity)s, used.amount, 100, %(start)s, %(end)s - interval '1 hour'
FROM billing.invoice, unnest(%(amounts)s::numeric[]) WITH ORDINALITY AS given (amount, place),
LATERAL (SELECT given.place - 1 AS number, given.amount) AS used
WHERE invoice.account LIKE %(prefix)s || '%%'
"""


def fill(connection: "Connection[Any]", prefix: str, accounts: int) -> None:
    """So many accounts with a contract, a customer, and a container of four used charges; a fee is due besides."""
    published = datetime(2026, 1, 1, tzinfo=UTC)
    names = [f"{prefix}{number:06d}" for number in range(1, accounts + 1)]
    with connection.cursor() as cursor:
        known = connection.execute("SELECT EXISTS (SELECT FROM billing.catalog_version)").fetchone()
        items: list[Item] = [] if known == (True,) else prices()
        selling: list[InvoicingItem] = [] if items == [] else invoicing()
        with cursor.copy(_COPY_CATALOG) as copy:
            for item in items:
                copy.write_row((kind_of(item), item.id, 1, published, Jsonb(to_document(item)), published, "bench"))
            for name in names:
                for one in (Account(name, 1, name, "UTC"), Contract(f"{name}-main", 1, name, "standard", 0, None)):
                    copy.write_row((kind_of(one), one.id, 1, published, Jsonb(to_document(one)), published, "bench"))
        with cursor.copy(_COPY_INVOICING) as copy:
            for thing in selling:
                row = invoicing_kind_of(thing), id_of(thing), 1, Jsonb(invoicing_document(thing)), "bench"
                copy.write_row(row)
            for name in names:
                customer = Customer(name, 1, f"Customer {name}", Address(("Gasse 2",), "Graz", "AT", "8010"))
                copy.write_row(("customer", name, 1, Jsonb(invoicing_document(customer)), "bench"))
        cursor.execute(_FILL_CONTAINERS, [prefix, _START, _END, accounts])
        cursor.execute(
            _FILL_LINES,
            {"start": _START, "end": _END, "quantity": _USED, "amounts": list(_AMOUNTS), "prefix": prefix},
        )
        cursor.execute("VACUUM ANALYZE billing.catalog_version, billing.invoicing_version, billing.invoice_line")
        cursor.execute("VACUUM ANALYZE billing.invoice")
