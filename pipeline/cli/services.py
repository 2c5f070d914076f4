"""``tally up``, ``down``, ``doctor``, ``topics`` and ``migrate``: what everything else runs on."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from pipeline.cli.context import DataDir, Json, settings_for
from pipeline.cli.output import EXIT_FINDINGS, emit_json, err, fail, out
from pipeline.infra import doctor as checks
from pipeline.infra import embedded, processes
from pipeline.infra.postgres import connect
from pipeline.infra.postgres import migrate as apply_migrations
from pipeline.infra.processes import Worker
from pipeline.infra.settings import Settings
from pipeline.infra.topics import ensure_topics

#: Time that started workers are given to join their groups, seconds. Measured: 2–3 on two cores.
_JOINED_S = 30.0


def register(app: typer.Typer) -> None:
    app.command()(up)
    app.command()(down)
    app.command()(doctor)
    app.command()(topics)
    app.command()(migrate)


def up(
    data_dir: DataDir = None,
    kafka_port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port of the embedded Kafka.")] = None,
    raters: Annotated[int | None, typer.Option(min=1, help="Rater processes (1 unless given).")] = None,
    sinks: Annotated[int | None, typer.Option(min=1, help="Sink processes (1 unless given).")] = None,
    no_workers: Annotated[bool, typer.Option("--no-workers", help="Services only.")] = False,
    json: Json = False,
) -> None:
    """Start Kafka, PostgreSQL and the workers; they stay until `tally down`. Finds those that run already."""
    settings = settings_for(data_dir)
    _refuse_other_counts(settings, raters, sinks)
    started = False
    if not (settings.kafka_bootstrap and settings.postgres_dsn):
        with starting_progress() as progress:
            _, started = embedded.start(settings.data_dir, kafka_port=kafka_port, progress=progress)
        settings = settings_for(data_dir)
    migrations = apply_migrations(settings.dsn)
    finance_dsn = _let_finance_in(settings)
    created = ensure_topics(settings)
    running = processes.detached(settings.data_dir)
    workers_started = running is None and not no_workers
    if workers_started:
        processes.start_detached(
            workers(settings, raters=raters or 1, sinks=sinks or 1),
            settings.data_dir,
            log_dir=settings.data_dir / "logs",
            env=worker_env(settings),
        )
        with err.status("waiting for the workers"):
            _await_members(settings, {"rater": raters or 1, "sink": sinks or 1})
        running = processes.detached(settings.data_dir)
    if json:
        emit_json(
            {
                "started": started,
                "kafka_bootstrap": settings.kafka_bootstrap,
                "postgres_dsn": _without_password(settings.dsn),
                "finance_dsn": finance_dsn,
                "data_dir": str(settings.data_dir),
                "topics_created": created,
                "migrations_applied": migrations,
                "workers_started": workers_started,
                "workers": [{"name": status.name, "pid": status.pid} for status in running or []],
            }
        )
        return
    for name, value in (
        ("Kafka", settings.kafka_bootstrap),
        ("PostgreSQL", _without_password(settings.dsn)),
        ("finance", finance_dsn or "GRANT tally_finance TO a user of yours: it reads schema finance"),
        ("data, logs", settings.data_dir),
        ("workers", ", ".join(status.name for status in running or []) or "none"),
    ):
        out.print(f"{name:<12}{value}", markup=False, highlight=False, soft_wrap=True)
    err.print("started" if started or workers_started else "was running already", "- stop with `tally down`")


def _refuse_other_counts(settings: Settings, raters: int | None, sinks: int | None) -> None:
    """Workers that run are left as they are; being asked for another number of them is an error, not a wish."""
    running = processes.detached(settings.data_dir)
    for kind, asked in (("rater", raters), ("sink", sinks)):
        there = sum(status.name.startswith(kind) for status in running or [])
        if running is not None and asked is not None and asked != there:
            fail(f"{there} {kind}(s) run, {asked} asked for: `tally down` first, or start more with `tally {kind}`")


def _let_finance_in(settings: Settings) -> str | None:
    """The read-only DSN of the embedded PostgreSQL, where the socket's directory is the access control."""
    found = embedded.find(settings.data_dir)
    if found is None or found.postgres_dsn != settings.dsn:
        return None
    with connect(settings.dsn, application="up", autocommit=True, role=None) as connection:
        connection.execute("ALTER ROLE tally_finance LOGIN")
    return settings.dsn.replace("//postgres@", "//tally_finance@")


def _await_members(settings: Settings, wanted: dict[str, int]) -> None:
    """Wait until the workers have joined their groups, for a while: a slow one shows in `tally status`."""
    admin = AdminClient(settings.kafka)
    deadline = time.monotonic() + _JOINED_S
    for kind, count in wanted.items():
        group = f"{settings.topic_prefix}{kind}"
        while (left := deadline - time.monotonic()) > 0:
            try:
                members = admin.describe_consumer_groups([group])[group].result(left).members
            except (TimeoutError, KafkaException):  # a broker that has just started answers late; the workers run
                members = ()
            if len(members) >= count:
                break
            time.sleep(0.2)


def down(data_dir: DataDir = None, json: Json = False) -> None:
    """Stop the workers and the embedded services. Their data stays."""
    directory = settings_for(data_dir).data_dir
    workers_stopped = processes.stop_detached(directory)
    services_stopped = embedded.stop(directory)
    if json:
        emit_json({"workers_stopped": workers_stopped, "services_stopped": services_stopped})
    elif workers_stopped or services_stopped:
        err.print(f"stopped; the data stays in {escape(str(directory))}")
    else:
        err.print(
            f"nothing was running in {escape(str(directory))}; a demo left up is in {escape(str(directory / 'demo'))}"
        )


def doctor(data_dir: DataDir = None, json: Json = False) -> None:
    """Look for what is misconfigured or not running, and say how to fix it. Exit code 4 when there is something."""
    with err.status("looking"):
        findings = list(checks.examine(settings_for(data_dir)))
    if json:
        emit_json([{name: getattr(finding, name) for name in finding.__slots__} for finding in findings])
    else:
        table = Table("", "check", "found", "expected", "what to do")
        for finding in findings:
            mark = "[green]ok[/]" if finding.ok else "[red]no[/]"
            table.add_row(mark, *map(escape, (finding.check, finding.found, finding.expected, finding.fix)))
        out.print(table)
    if not all(finding.ok for finding in findings):
        raise typer.Exit(EXIT_FINDINGS)


def topics(data_dir: DataDir = None, json: Json = False) -> None:
    """Create the topics that are missing on your Kafka, and check those that exist."""
    created = ensure_topics(settings_for(data_dir))
    if json:
        emit_json({"created": created})
    else:
        err.print(f"created {', '.join(created)}" if created else "all topics exist, as needed")


def migrate(data_dir: DataDir = None, json: Json = False) -> None:
    """Bring the database to this version's tables and views. Safe to repeat."""
    applied = apply_migrations(settings_for(data_dir).dsn)
    if json:
        emit_json({"applied": applied})
    else:
        err.print(f"applied {', '.join(applied)}" if applied else "all migrations were applied already")


# -- For other commands that start services or workers (tally demo) ----------------------------------------------------


@contextmanager
def starting_progress() -> Iterator[embedded.Progress]:
    """A progress display on stderr for ``embedded.start`` and ``running``; plain lines where stderr is no terminal."""
    if not err.is_terminal:
        said: list[str] = []

        def say(step: embedded.Step) -> None:
            if step.text not in said:
                said.append(step.text)
                err.print(step.text, highlight=False)

        yield say
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=err, transient=True) as display:
        task = display.add_task("", total=None)
        yield lambda step: display.update(task, description=step.text, completed=step.done, total=step.total or None)


def workers(settings: Settings, *, raters: int, sinks: int) -> list[Worker]:
    """The workers of a deployment on one machine; each has its own metrics port, counted up from the one set."""
    names = [
        ("relay", "relay"),
        *((f"rater-{number}", "rater") for number in range(1, raters + 1)),
        *((f"sink-{number}", "sink") for number in range(1, sinks + 1)),
        ("alerts", "alerts"),
    ]
    return [
        Worker(
            name,
            (sys.executable, "-m", "pipeline.cli", command),
            {"TALLY_METRICS_PORT": str(settings.metrics_port + number)} if settings.metrics_port else {},
        )
        for number, (name, command) in enumerate(names)
    ]


def worker_env(settings: Settings) -> dict[str, str]:
    """What workers must know beyond the environment they inherit."""
    return {
        "TALLY_KAFKA_BOOTSTRAP": settings.kafka_bootstrap or "",
        "TALLY_POSTGRES_DSN": settings.dsn,
        "TALLY_DATA_DIR": str(settings.data_dir),
        "TALLY_TOPIC_PREFIX": settings.topic_prefix,
        "TALLY_PARTITIONS": str(settings.partitions),
    }


def _without_password(dsn: str) -> str:
    if "password" not in conninfo_to_dict(dsn):
        return dsn
    return make_conninfo(dsn, password="***")
