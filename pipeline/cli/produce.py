"""``tally produce``: usage from a file to Kafka, over as many runs as it takes."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, BinaryIO, Self, TextIO

import typer
import yaml
from confluent_kafka.admin import AdminClient
from pydantic import BaseModel, ConfigDict
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from pipeline.cli.context import DataDir, Json, settings_for
from pipeline.cli.output import EXIT_FINDINGS, EXIT_NOT_FOUND, EXIT_USAGE, emit_json, err, fail, out
from pipeline.infra.settings import Settings
from pipeline.infra.topics import TopicMismatch, Topics
from pipeline.producer import BufferFull, SpoolError, Usage, UsageProducer
from pipeline.producer.files import BadRow, ColumnMapping, MappingError, read_csv, read_jsonl
from pipeline.producer.load import AGE_MAX, Checkpoint, file_identity, load, read_checkpoint, write_checkpoint

_BAD_ROWS_SHOWN = 20
_KAFKA_ANSWERS_SECONDS = 15
#: After Ctrl-C; what is not delivered by then waits in the spool for the next run.
_INTERRUPTED_CLOSE_SECONDS = 3.0
#: Fields of ``--map``, and the mapping's name for them.
_MAP_FIELDS = {"account": "account", "event_type": "event_type", "idempotency_key": "key", "subject": "subject"}


class Format(StrEnum):
    CSV = "csv"
    JSONL = "jsonl"


_SUFFIXES = {".csv": Format.CSV, ".jsonl": Format.JSONL, ".ndjson": Format.JSONL}


class MappingFile(BaseModel):
    """A mapping as YAML: the fields of ColumnMapping, each optional since options may add them."""

    model_config = ConfigDict(extra="forbid", strict=True)

    account: str | None = None
    event_type: str | None = None
    key: str | None = None
    timestamp: str | None = None
    subject: str | None = None
    timestamp_format: str | None = None
    time_zone: str | None = None
    properties: dict[str, str] = {}


@dataclass(frozen=True, slots=True)
class Job:
    """One file, how to read it, and the folder of its checkpoint and spool."""

    path: Path
    mapping: ColumnMapping | None
    folder: Path

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.json"

    def rows(self, file: BinaryIO) -> Iterator[Usage | BadRow]:
        return read_jsonl(file) if self.mapping is None else read_csv(file, self.mapping)


def register(app: typer.Typer) -> None:
    app.command()(produce)


def produce(
    file: Annotated[Path, typer.Argument(help="CSV with a header, or JSON lines (usage events or CloudEvents).")],
    file_format: Annotated[Format | None, typer.Option("--format", help="Default: by the file's name.")] = None,
    mapping: Annotated[Path | None, typer.Option(help="CSV: a YAML file with the mapping; options add to it.")] = None,
    fields: Annotated[
        list[str] | None,
        typer.Option(
            "--map", metavar="FIELD=COLUMN", help="CSV: account, event_type, idempotency_key or subject of a column."
        ),
    ] = None,
    properties: Annotated[
        list[str] | None,
        typer.Option("--property", metavar="NAME=COLUMN", help="CSV: a property and its column; repeat."),
    ] = None,
    account: Annotated[str | None, typer.Option(help="CSV: template of the account, e.g. 'acct-{Customer}'.")] = None,
    event_type: Annotated[
        str | None, typer.Option("--type", help="CSV: template of the event type, e.g. llm.request.")
    ] = None,
    key_template: Annotated[
        str | None, typer.Option(help="CSV: template of the idempotency key, e.g. 'code-{row}' or '{Invoice}-{Line}'.")
    ] = None,
    subject: Annotated[str | None, typer.Option(help="CSV: template of the subject.")] = None,
    timestamp_column: Annotated[str | None, typer.Option(help="CSV: column of the event's time.")] = None,
    timestamp_format: Annotated[
        str | None, typer.Option(help="CSV: iso (default), unix, unix-ms, unix-us, or a strptime pattern.")
    ] = None,
    time_zone: Annotated[str | None, typer.Option(help="CSV: zone of times without an offset (default UTC).")] = None,
    rate: Annotated[str | None, typer.Option(metavar="N/s", help="At most N events a second.")] = None,
    rejects: Annotated[Path | None, typer.Option(help="Write bad rows here, as JSON lines.")] = None,
    source: Annotated[str, typer.Option(help="Name the events carry as their source.")] = "tally-produce",
    again: Annotated[
        bool, typer.Option("--again", help="Send a finished file once more; the rater drops repeats.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Read and check every row, send nothing.")] = False,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Send a file's usage to Kafka, each row once. Interrupted or killed, the same command resumes.

    Exit code 4 when rows were bad or refused; the good ones are sent.
    """
    if not file.is_file():
        fail(f"expected a file, got {file}", EXIT_NOT_FOUND)
    options = {
        "account": account,
        "event_type": event_type,
        "key": key_template,
        "subject": subject,
        "timestamp": timestamp_column,
        "timestamp_format": timestamp_format,
        "time_zone": time_zone,
    }
    columns = None
    if (file_format or format_of(file)) is Format.CSV:
        columns = _mapping(mapping, options, fields or [], properties or [])
    elif mapping or fields or properties or any(options.values()):
        fail("a mapping is for CSV; JSON lines carry the fields by name", EXIT_USAGE)
    per_second = rate_of(rate)

    if dry_run:
        result = _check(Job(file, columns, Path()), rejects)
    else:
        settings = settings_for(data_dir)
        identity = file_identity(file, repr(columns), source, Topics(settings.topic_prefix).events, _cluster(settings))
        job = Job(file, columns, settings.data_dir / "produce" / identity)
        job.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        result = _send(job, settings, source, per_second, rejects, again=again)
    if as_json:
        emit_json(result)
    else:
        _show(result)
    if result["bad_rows"] or result["refused"]:
        raise typer.Exit(EXIT_FINDINGS)


def _send(
    job: Job, settings: Settings, source: str, rate: float | None, rejects: Path | None, *, again: bool
) -> dict[str, object]:
    before = read_checkpoint(job.checkpoint)
    if before.finished_at is not None:
        if not again:
            _note(f"{job.path} was sent before, finished {before.finished_at}; --again sends it once more")
            return _summary(job, before, before, refused=0, seconds=0.0)
        before = Checkpoint()
        job.checkpoint.unlink()
    if before.rows:
        _note(f"resuming {job.path} after row {before.rows:,}")
    started = time.monotonic()
    with ExitStack() as stack:
        try:
            producer = stack.enter_context(
                UsageProducer.from_settings(settings, source=source, spool_dir=job.folder / "spool")
            )
        except SpoolError as error:
            fail(f"{error}\nIs another `tally produce` sending this file?")
        meter = stack.enter_context(_Meter(job.path, producer))
        bad = stack.enter_context(_BadRows(rejects))
        try:
            after = load(
                producer,
                job.rows(meter.file),
                before,
                save=lambda checkpoint: write_checkpoint(job.checkpoint, checkpoint),
                on_bad=bad.take,
                on_outside=_warn_once(),
                on_row=meter.show,
                rate=rate,
            )
            while producer.flush(0.2):
                meter.show(after)
            meter.show(after, always=True)
        except MappingError as error:
            fail(str(error), EXIT_USAGE)
        except BufferFull as error:
            fail(f"{error}\nThe same command resumes where this one stopped.")
        except KeyboardInterrupt:
            _note("stopping; the same command resumes here")
            producer.close(_INTERRUPTED_CLOSE_SECONDS)
            raise
        refused = producer.stats.failed
    write_checkpoint(job.checkpoint, replace(after, finished_at=datetime.now(UTC).isoformat(timespec="seconds")))
    return _summary(job, before, after, refused=refused, seconds=time.monotonic() - started)


def _check(job: Job, rejects: Path | None) -> dict[str, object]:
    started = time.monotonic()
    after = Checkpoint()
    with _BadRows(rejects) as bad, job.path.open("rb") as file:
        try:
            for row in job.rows(file):
                is_bad = isinstance(row, BadRow)
                if isinstance(row, BadRow):
                    bad.take(row)
                after = replace(after, rows=after.rows + 1, bad_rows=after.bad_rows + is_bad)
        except MappingError as error:
            fail(str(error), EXIT_USAGE)
    return _summary(job, Checkpoint(), after, refused=0, seconds=time.monotonic() - started)


def _cluster(settings: Settings) -> str:
    """The cluster's id, once it answered and has the topic; a file is sent once per cluster."""
    topic = Topics(settings.topic_prefix).events
    metadata = AdminClient(settings.kafka).list_topics(timeout=_KAFKA_ANSWERS_SECONDS)
    if topic not in metadata.topics:
        raise TopicMismatch(f"topic {topic} does not exist: run `tally up`, or `tally topics` on your own Kafka")
    return str(metadata.cluster_id)


def format_of(file: Path) -> Format:
    if (found := _SUFFIXES.get(file.suffix.lower())) is None:
        fail(f"expected a name ending in {', '.join(_SUFFIXES)}, got {file.name}: say --format", EXIT_USAGE)
    return found


def mapping_of(path: Path | None) -> ColumnMapping:
    """The mapping of a YAML file. Fails where it lacks a field that events need."""
    return _mapping(path, {}, [], [])


def _mapping(
    path: Path | None, options: dict[str, str | None], fields: list[str], properties: list[str]
) -> ColumnMapping:
    given = MappingFile()
    if path is not None:
        try:
            given = MappingFile.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
        except OSError as error:
            fail(f"cannot read the mapping: {error}", EXIT_NOT_FOUND)
        except yaml.YAMLError as error:
            fail(f"{path} is not YAML: {error}", EXIT_USAGE)
    values = given.model_dump(exclude={"properties"}, exclude_none=True)
    for field, column in _pairs("--map", fields).items():
        if field not in _MAP_FIELDS:
            fail(f"--map: expected a field of {', '.join(_MAP_FIELDS)}, got {field!r}", EXIT_USAGE)
        values[_MAP_FIELDS[field]] = f"{{{column}}}"
    values |= {name: value for name, value in options.items() if value is not None}
    needed = {
        "account": "--account or --map account=COLUMN",
        "event_type": "--type",
        "key": "--key-template or --map idempotency_key=COLUMN",
        "timestamp": "--timestamp-column",
    }
    if missing := [how for name, how in needed.items() if name not in values]:
        fail(f"the mapping lacks {'; '.join(missing)}", EXIT_USAGE)
    return ColumnMapping(**values, properties=given.properties | _pairs("--property", properties))


def _pairs(option: str, texts: list[str]) -> dict[str, str]:
    pairs = {}
    for text in texts:
        name, equals, column = text.partition("=")
        if not (name and equals and column):
            fail(f"{option}: expected NAME=COLUMN, got {text!r}", EXIT_USAGE)
        pairs[name] = column
    return pairs


def rate_of(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        rate = float(text.removesuffix("/s"))
    except ValueError:
        rate = 0.0
    if not 0 < rate < float("inf"):
        fail(f"--rate: expected events a second such as 500/s, got {text!r}", EXIT_USAGE)
    return rate


class _BadRows:
    """Says the first bad rows on stderr and writes all of them to the file asked for."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._file: TextIO | None = None
        self._shown = 0

    def __enter__(self) -> Self:
        if self._path is not None:
            self._file = self._path.open("a", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def take(self, row: BadRow) -> None:
        if self._file is not None:
            self._file.write(json.dumps(row._asdict()) + "\n")
        if self._shown < _BAD_ROWS_SHOWN:
            _note(f"line {row.line}: {row.reason}")
        elif self._shown == _BAD_ROWS_SHOWN:
            _note("more bad rows are not shown" + ("" if self._file else "; --rejects FILE writes them all"))
        self._shown += 1


class _Meter:
    """The file, opened, and a progress bar of how much of it was read."""

    def __init__(self, path: Path, producer: UsageProducer) -> None:
        self._producer = producer
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=err,
            disable=not err.is_terminal,
        )
        size = path.stat().st_size
        self._task = self._progress.add_task(escape(path.name), total=size, note="")
        self.file = self._progress.wrap_file(path.open("rb"), total=size, task_id=self._task)
        self._show_at = 0.0

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        self.file.close()

    def show(self, at: Checkpoint, *, always: bool = False) -> None:
        """Note the counts, at most ten times a second unless ``always``."""
        if (now := time.monotonic()) < self._show_at and not always:
            return
        self._show_at = now + 0.1
        stats = self._producer.stats
        note = f"{at.emitted:,} events, {stats.spooled + stats.in_flight:,} on their way"
        if at.bad_rows:
            note += f", {at.bad_rows:,} bad rows"
        if stats.trouble is not None:
            note += f" [yellow](Kafka: {escape(stats.trouble)})[/]"
        self._progress.update(self._task, note=note)


def _note(text: str) -> None:
    err.print(text, markup=False, highlight=False, soft_wrap=True)


def _warn_once() -> Callable[[Usage], None]:
    warned = False

    def warn(usage: Usage) -> None:
        nonlocal warned
        if not warned:
            warned = True
            _note(
                f"warning: {usage.timestamp.isoformat()} is more than {AGE_MAX.days} days ago or 5 minutes ahead; "
                "the rater dead-letters such events (too_old, in_the_future)"
            )

    return warn


def _summary(job: Job, before: Checkpoint, after: Checkpoint, *, refused: int, seconds: float) -> dict[str, object]:
    emitted = after.emitted - before.emitted
    return {
        "file": str(job.path),
        "source": after.source,
        "rows": after.rows,
        "emitted": after.emitted,
        "emitted_now": emitted,
        "bad_rows": after.bad_rows,
        "refused": refused,
        "outside_window": after.outside_window,
        "already_sent": before.finished_at is not None,
        "seconds": round(seconds, 3),
        "events_per_s": round(emitted / seconds) if seconds else 0,
    }


def _show(result: dict[str, object]) -> None:
    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in result.items():
        text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
        table.add_row(name.replace("_", " "), escape(text))
    out.print(table)
