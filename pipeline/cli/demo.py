"""`tally demo`: the whole way on real usage, on services and data of its own, from nothing to issued invoices.

The usage is real (``deploy/demo/CREDITS.md``); customers and prices are invented. On purpose it also sends every 50th
event twice, an event of an account nobody knows, one whose quantity is no number, and bytes that are no event at all,
and shows what became of each. Then finance closes the month (``demo_close``).
"""

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any

import typer
from confluent_kafka import Producer
from psycopg import Connection
from psycopg.rows import dict_row
from pydantic import SecretStr
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from pipeline.billing.reconcile import Reconciliation, reconcile
from pipeline.catalog.files import read_account_files, read_price_files
from pipeline.catalog.publish import publish
from pipeline.cli import demo_close
from pipeline.cli import reconcile as reconciling
from pipeline.cli.context import DataDir, Json, settings_for
from pipeline.cli.output import EXIT_FINDINGS, CommandError, emit_json, err, out
from pipeline.cli.services import starting_progress, worker_env, workers
from pipeline.core.money import plain
from pipeline.infra import embedded, processes
from pipeline.infra.avro import EVENTS, load_schemas
from pipeline.infra.postgres import connect, migrate
from pipeline.infra.processes import Worker, WorkerGroup
from pipeline.infra.resources import demo_dir
from pipeline.infra.settings import Settings
from pipeline.infra.topics import Topics, ensure_topics
from pipeline.producer import Usage, UsageProducer
from pipeline.producer.files import BadRow, ColumnMapping, read_csv

ACCOUNTS = 12
#: Every event whose row number this divides is sent twice.
TWICE_EVERY = 50
EVENT_TYPE = "llm.request"
#: Says that a directory is a demo's, to be deleted by the next one.
_MARK = "tally-demo"
_USAGE_FILE = "llm_requests_code.csv"
#: What is used too late.
_LATE = {"input_tokens": "250000", "output_tokens": "40000"}
#: Everything has to be billed by then; a cold, slow machine takes a tenth of it. Seconds.
_PATIENCE = 180.0
#: The last rows may be this long behind the last receipt. Seconds.
_SETTLED = 30.0


@dataclass(frozen=True, slots=True)
class Special:
    """A message sent on purpose to see what becomes of it."""

    what: str
    partition: int
    offset: int


def register(app: typer.Typer) -> None:
    app.command()(demo)


def demo(
    data_dir: DataDir = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave services and workers up afterwards.")] = False,
    json: Json = False,
) -> None:
    """See everything at work on real usage: events in, invoices out, every cent reconciled."""
    started = time.monotonic()
    directory = data_dir or settings_for().data_dir / "demo"
    _start_fresh(directory)
    with starting_progress() as progress, embedded.running(directory, progress=progress) as services:
        settings = Settings(
            data_dir=directory,
            kafka_bootstrap=services.endpoints.kafka_bootstrap,
            postgres_dsn=SecretStr(services.endpoints.postgres_dsn),
            topic_prefix="",
            partitions=4,
        )
        report = _run(settings, started)
        if keep:
            processes.start_detached(
                workers(settings, raters=1, sinks=1), directory, log_dir=directory / "logs", env=worker_env(settings)
            )
            services.keep()
    if json:
        emit_json(report.as_json())
    else:
        report.show(directory, kept=keep)
    if not report.reconciled:
        raise typer.Exit(EXIT_FINDINGS)


def _start_fresh(directory: Path) -> None:
    """Stop what an earlier demo left running there, and forget its data."""
    processes.stop_detached(directory)
    embedded.stop(directory)
    if directory.exists():
        if any(directory.iterdir()) and not (directory / _MARK).exists():
            raise CommandError(f"{directory} holds other files: expected an empty directory, or one of an earlier demo")
        shutil.rmtree(directory)
    directory.mkdir(parents=True)
    (directory / _MARK).touch()


def _run(settings: Settings, started: float) -> "Report":
    _say("preparing database, topics, prices and accounts")
    migrate(settings.dsn)
    ensure_topics(settings)
    publish(settings.dsn, read_price_files([demo_dir() / "prices.yaml"]), actor="demo", reason="demo")
    publish(settings.dsn, read_account_files([demo_dir() / "accounts.yaml"]), actor="demo", reason="demo")
    relay, *others = workers(settings, raters=1, sinks=1)
    log_dir = settings.data_dir / "logs"
    with WorkerGroup([relay], log_dir, worker_env(settings)), connect(settings.dsn, application="demo") as connection:
        connection.autocommit = True
        _await(connection, "SELECT count(*) FROM billing.outbox WHERE relayed_at IS NULL", 0, "the relay", log_dir)
        with WorkerGroup(others, log_dir, worker_env(settings)):
            received, specials, last = _send(settings)
            _watch(connection, received, log_dir, others)
            usage = _report(connection, reconcile(settings, wait_s=_SETTLED), received, specials)
            late = replace(last, account=demo_close.SHOWN, idempotency_key=demo_close.LATE_KEY, properties=_LATE)
            closing = demo_close.close_and_adjust(
                settings, late, received, lambda records: _watch(connection, records, log_dir, others)
            )
            after = reconcile(settings, wait_s=_SETTLED)
            return Report(usage, closing, after, time.monotonic() - started)


# -- usage


def _usage() -> Iterator[Usage]:
    """The file's rows as events of the demo's accounts, on the last day of the previous month."""
    mapping = ColumnMapping(
        account="acct-00",
        event_type=EVENT_TYPE,
        key="code-{row}",
        timestamp="TIMESTAMP",
        properties={"input_tokens": "ContextTokens", "output_tokens": "GeneratedTokens"},
    )
    day = datetime.now(UTC).date().replace(day=1) - timedelta(days=1)
    for number, usage in enumerate(read_csv(demo_dir() / _USAGE_FILE, mapping)):
        if isinstance(usage, BadRow):
            raise CommandError(f"{_USAGE_FILE}:{usage.line}: {usage.reason}")
        account = f"acct-{number % ACCOUNTS:02d}"
        yield replace(usage, account=account, timestamp=datetime.combine(day, usage.timestamp.timetz()))


def _send(settings: Settings) -> tuple[int, list[Special], Usage]:
    """Send everything: the number of records on ``usage.events``, where the special ones are, and the last usage."""
    last: Usage | None = None
    with UsageProducer.from_settings(settings, source="demo-gateway") as producer, _progress("sending usage") as step:
        for number, usage in enumerate(_usage()):
            producer.emit_usage(usage)
            if number % TWICE_EVERY == 0:
                # What a retry looks like: the same event under the next sequence number, its map in another order.
                producer.emit_usage(replace(usage, properties=dict(reversed(list(usage.properties.items())))))
            last = usage
            step(producer.stats.emitted, None)
        if remaining := producer.flush(_PATIENCE):
            raise CommandError(f"{remaining} events were not delivered: {producer.stats.trouble}")
        sent = producer.stats.delivered
    assert last is not None
    specials = _send_specials(settings, last.timestamp)
    return sent + len(specials), specials, last


def _send_specials(settings: Settings, at: datetime) -> list[Special]:
    """Send what a producer would refuse, or should not have sent, with a plain Kafka client."""
    schemas = load_schemas(settings.registry_url)
    event: dict[str, Any] = {
        "idempotency_key": "code-nobody",
        "account": "acct-99",
        "event_type": EVENT_TYPE,
        "timestamp": at,
        "subject": "",
        "properties": {"input_tokens": "120000", "output_tokens": "9000"},
        "source": "demo-special",
        "sequence": 0,
    }
    many = event | {
        "idempotency_key": "code-many",
        "account": "acct-00",
        "properties": {"input_tokens": "many", "output_tokens": "10"},
    }
    messages = [
        ("an event of acct-99, which no one knows", "acct-99", schemas.encode(EVENTS, event)),
        ('an event of acct-00 with input_tokens = "many"', "acct-00", schemas.encode(EVENTS, many)),
        ("40 bytes that begin with 0xFF", "acct-00", b"\xff" + bytes(range(39))),
    ]
    specials: list[Special] = []
    producer = Producer({**settings.kafka, "partitioner": "murmur2_random", "acks": "all"})
    for what, key, value in messages:

        def delivered(error: Any, message: Any, what: str = what) -> None:
            if error is not None:
                raise CommandError(f"{what} was not delivered: {error}")
            specials.append(Special(what, message.partition(), message.offset()))

        producer.produce(Topics(settings.topic_prefix).events, value, key, on_delivery=delivered)
    producer.flush(_PATIENCE)
    if len(specials) != len(messages):
        raise CommandError("Kafka did not confirm the special messages in time")
    return specials


# -- waiting


def _await(connection: "Connection[Any]", query: str, wanted: int, who: str, log_dir: Path) -> None:
    deadline = time.monotonic() + _PATIENCE
    while _count(connection, query) != wanted:
        if time.monotonic() > deadline:
            raise CommandError(f"{who} is not done after {_PATIENCE:.0f} s: its log is in {log_dir}")
        time.sleep(0.1)


def _watch(connection: "Connection[Any]", received: int, log_dir: Path, running: list[Worker]) -> None:
    """Show how the receipts come in until they cover everything that was sent."""
    deadline = time.monotonic() + _PATIENCE
    with _progress("rating and writing") as step:
        while True:
            done = _count(connection, _RECEIVED)
            step(done, received)
            if done >= received:
                return
            if time.monotonic() > deadline:
                names = ", ".join(worker.name for worker in running)
                raise CommandError(f"{done} of {received} records after {_PATIENCE:.0f} s: see {names} in {log_dir}")
            time.sleep(0.1)


def _count(connection: "Connection[Any]", query: str) -> int:
    row = connection.execute(query).fetchone()
    assert row is not None
    return int(row[0])


_RECEIVED = "SELECT coalesce(sum(records), 0) FROM billing.receipt WHERE topic = 'usage.events'"


# -- the report


@dataclass(frozen=True, slots=True)
class UsageReport:
    """What became of the usage, before the close. Amounts are exact, in the currency's major unit."""

    received: int
    rated_events: int
    rated_rows: int
    duplicates: int
    parked: int
    dead_letters: dict[str, int]
    lines: list[dict[str, Any]]
    specials: list[tuple[str, str]]
    reconciliation: Reconciliation
    rated_per_second: float

    def accounts(self) -> dict[str, list[dict[str, Any]]]:
        by_account: dict[str, list[dict[str, Any]]] = {}
        for line in self.lines:
            by_account.setdefault(line["account"], []).append(line)
        return by_account

    def as_json(self) -> dict[str, Any]:
        return {
            "received": self.received,
            "rated_events": self.rated_events,
            "rated_rows": self.rated_rows,
            "duplicates": self.duplicates,
            "parked": self.parked,
            "dead_letters": self.dead_letters,
            "accounts": [
                {
                    "account": account,
                    "lines": [
                        {"charge": line["charge"], "quantity": plain(line["quantity"]), "amount": plain(line["amount"])}
                        for line in lines
                    ],
                    "subtotal": plain(sum((line["amount"] for line in lines), Decimal(0))),
                }
                for account, lines in self.accounts().items()
            ],
        }

    def show(self) -> None:
        table = Table("account", "charge", title="Open invoices, last month", title_justify="left")
        for name in ("events", "quantity", "exact amount", "rounded line"):
            table.add_column(name, justify="right")
        for account, lines in self.accounts().items():
            for number, line in enumerate(lines):
                table.add_row(
                    account if number == 0 else "",
                    line["charge"],
                    f"{line['events']:,}",
                    f"{Decimal(plain(line['quantity'])):,}",
                    f"{plain(line['amount'])} {line['currency']}",
                    f"{line['rounded_amount']} {line['currency']}",
                )
            exact, rounded = (sum((line[name] for line in lines), Decimal(0)) for name in ("amount", "rounded_amount"))
            currency = lines[0]["currency"]
            table.add_row("", "[bold]in all", "", "", f"{plain(exact)} {currency}", f"[bold]{rounded} {currency}")
            table.add_section()
        out.print(table)
        letters = Table("what was sent", "what became of it", title="The special ones", title_justify="left")
        for what, became in self.specials:
            letters.add_row(what, became)
        out.print(letters)
        dead = Table("reason", "dead letters", title="Dead letters by reason", title_justify="left")
        for reason, count in self.dead_letters.items():
            dead.add_row(reason, str(count))
        out.print(dead)
        reconciling.show(self.reconciliation)
        out.print(
            f"received {self.received:,} = rated {self.rated_events:,} (rated rows {self.rated_rows:,}) "
            f"+ duplicates {self.duplicates} + parked {self.parked} + dead letters {sum(self.dead_letters.values())}"
        )
        out.print(f"{self.rated_per_second:,.0f} events/s from the first receipt to the last\n")


@dataclass(frozen=True, slots=True)
class Report:
    """What the demo ends with."""

    usage: UsageReport
    closing: demo_close.Report
    #: After the close and the adjustment.
    reconciliation: Reconciliation
    seconds: float

    @property
    def reconciled(self) -> bool:
        return self.usage.reconciliation.reconciled and self.reconciliation.reconciled

    def as_json(self) -> dict[str, Any]:
        rest = {"reconciled": self.reconciled, "seconds": round(self.seconds, 3)}
        return self.usage.as_json() | {"close": self.closing.as_json()} | rest

    def show(self, directory: Path, *, kept: bool) -> None:
        self.usage.show()
        self.closing.show()
        reconciling.show(self.reconciliation)
        out.print(f"{self.seconds:.1f} s in all")
        here = f" --data-dir {directory}"
        if kept:
            hint = (
                f"Services and workers are up. Try:\n"
                f"  tally status{here}\n  tally invoices list{here}\n  tally explain acct-03/code-3{here}\n"
                f"  tally reconcile{here}\nand stop with\n  tally down{here}"
            )
        else:
            hint = "`tally demo --keep` leaves it up to look around: tally status, tally invoices list, tally explain …"
        err.print(hint, highlight=False, soft_wrap=True)


def _report(
    connection: "Connection[Any]", result: Reconciliation, received: int, specials: list[Special]
) -> UsageReport:
    with connection.cursor(row_factory=dict_row) as cursor:
        lines = cursor.execute(_LINES).fetchall()
        counts = cursor.execute(_COUNTS).fetchone() or {}
        dead = {row["reason"]: row["n"] for row in cursor.execute(_DEAD).fetchall()}
        became = [(special.what, _fate(cursor, special)) for special in specials]
    return UsageReport(
        received=received,
        rated_events=int(counts["rated"]),
        rated_rows=int(counts["rows"]),
        duplicates=int(counts["duplicates"]),
        parked=counts["parked"],
        dead_letters=dead,
        lines=lines,
        specials=became,
        reconciliation=result,
        rated_per_second=float(counts["rated"]) / max(float(counts["seconds"]), 0.001),
    )


def _fate(cursor: Any, special: Special) -> str:
    row = cursor.execute(_FATE, (special.partition, special.offset)).fetchone()
    if row is None:
        return "rated"
    return f"{row['state'].replace('_', '-')}: {row['reason']} ({row['message']})"


_LINES = """
SELECT account, charge, quantity, exact_amount AS amount, rounded_amount, currency, events
FROM finance.invoice_lines ORDER BY account, charge
"""
_COUNTS = """
SELECT sum(rated) AS rated, sum(duplicates) AS duplicates, sum(rated_rows) AS rows,
       extract(epoch FROM max(committed_at) - min(committed_at)) AS seconds,
       (SELECT count(*) FROM billing.unrated_event WHERE state = 'parked') AS parked
FROM billing.receipt
"""
_DEAD = """
SELECT reason, count(*) AS n FROM billing.unrated_event WHERE state = 'dead_lettered' GROUP BY reason ORDER BY reason
"""
_FATE = """
SELECT state::text, reason, message FROM billing.unrated_event
WHERE origin_topic = 'usage.events' AND origin_partition = %s AND origin_offset = %s
"""


# -- progress


def _say(text: str) -> None:
    err.print(text, highlight=False)


@contextmanager
def _progress(text: str) -> Iterator[Callable[[int, int | None], None]]:
    """A bar on a terminal, one line elsewhere."""
    if not err.is_terminal:
        _say(text)
        yield lambda done, total: None
        return
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), console=err, transient=True
    ) as display:
        task = display.add_task(text, total=None)
        yield lambda done, total: display.update(task, completed=done, total=total)
