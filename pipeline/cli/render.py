"""`tally invoices pdf`, `xml`, `json`, `csv`: documents as files that customers, tax offices and programs read."""

import io
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pipeline.cli.context import DataDir, Json, settings_for
from pipeline.cli.output import EXIT_ERROR, EXIT_FINDINGS, EXIT_NOT_FOUND, EXIT_USAGE, emit_json, err, fail, out
from pipeline.documents.brand import BrandError
from pipeline.documents.exports import as_json, json_text, write_csv
from pipeline.documents.files import NotWritten, file_name, write
from pipeline.documents.model import Document
from pipeline.documents.read import NotReadable, Wanted, find, read_each
from pipeline.infra.postgres import connect
from pipeline.infra.settings import Settings

if TYPE_CHECKING:
    from pipeline.documents.render import Made

_MONTH = re.compile(r"\d{4}-(0[1-9]|1[0-2])")
#: Problems named before the rest is only counted.
_SHOWN_MAX = 20

Numbers = Annotated[list[str] | None, typer.Argument(metavar="NUMBER", help="Numbers of documents, or ids of drafts.")]
InMonth = Annotated[str | None, typer.Option("--month", metavar="YYYY-MM", help="All issued for this month.")]
Account = Annotated[str | None, typer.Option(help="Only documents this account pays.")]
Entity = Annotated[str | None, typer.Option(help="Only documents of this legal entity.")]
Drafts = Annotated[bool, typer.Option("--drafts", help="Drafts and void documents too.")]


def commands(invoices: typer.Typer) -> None:
    """Add these commands to the group ``tally invoices``."""
    invoices.command()(pdf)
    invoices.command()(xml)
    invoices.command(name="json")(json_)
    invoices.command()(csv)


def pdf(
    numbers: Numbers = None,
    month: InMonth = None,
    account: Account = None,
    entity: Entity = None,
    drafts: Drafts = False,
    to: Annotated[Path, typer.Option("--to", metavar="FOLDER", help="Where the files go.")] = Path(),
    branding: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="A brand.yaml with logo, fonts and words; default: what was applied."),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes; default: one per core.")] = os.cpu_count() or 1,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Write documents as PDF/A-3 with the e-invoice (Factur-X, EN 16931) inside, NUMBER.pdf each.

    The same document gives the same bytes, and files that are there unchanged are left alone: a run that was cut short
    goes on. Exit code 4 where a document could not be read or laid out; the others are written.
    """
    from pipeline.documents.render import write_pdfs  # typesetting and XML: slow to load, and few commands need them

    settings = settings_for(data_dir)
    ids = _found(settings, numbers, month, account, entity, drafts)
    made: list[Made] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as display:
            for one in display.track(
                write_pdfs(settings.dsn, ids, to, branding=branding, workers=workers), len(ids), description="writing"
            ):
                made.append(one)
                if not as_json and one.path is not None:
                    out.print(escape(str(one.path)), highlight=False)
    except NotWritten as error:
        fail(f"{error}\nWritten before it: {len(made):,} of {len(ids):,}.", EXIT_ERROR)
    except BrandError as error:
        fail(str(error), EXIT_USAGE)
    if as_json:
        emit_json([_shown(one) for one in made])
    _report(made)


def _shown(made: "Made") -> dict[str, object]:
    return {
        "document": made.name,
        "path": None if made.path is None else str(made.path),
        "changed": made.changed,
        "e_invoice": made.path is not None and not made.no_e_invoice,
        "problem": made.problem or made.no_e_invoice or None,
    }


def _report(made: "list[Made]") -> None:
    failed, without = [one for one in made if one.problem], [one for one in made if one.no_e_invoice]
    written = sum(one.changed for one in made)
    err.print(f"{written:,} written, {len(made) - written - len(failed):,} there already, {len(failed):,} failed.")
    for texts in ([one.no_e_invoice for one in without], [one.problem for one in failed]):
        for text in texts[:_SHOWN_MAX]:
            err.print(f"  {escape(text)}", highlight=False)
        if len(texts) > _SHOWN_MAX:
            err.print(f"  and {len(texts) - _SHOWN_MAX:,} more; --json has all")
    if without:
        err.print(f"{len(without):,} without an e-invoice, for the reasons above.")
    if failed:
        raise typer.Exit(EXIT_FINDINGS)


To = Annotated[Path | None, typer.Option("--to", metavar="FOLDER", help="A file each in this folder, not on stdout.")]


def xml(
    numbers: Numbers = None,
    month: InMonth = None,
    account: Account = None,
    entity: Entity = None,
    to: To = None,
    data_dir: DataDir = None,
) -> None:
    """The e-invoice by EN 16931 (CII), as it stands inside the PDF. One on stdout, or several to a folder.

    Exit code 4 for documents that EN 16931 has no words for, or that could not be read.
    """
    from pipeline.documents.einvoice import NotRepresentable, cii_xml

    settings = settings_for(data_dir)
    ids = _found(settings, numbers, month, account, entity, drafts=False)
    if to is None and len(ids) > 1:
        fail(f"expected one document or --to FOLDER, got {len(ids):,} documents", EXIT_USAGE)
    unsaid = 0
    documents = _Readable(settings, ids)
    for document in documents:
        try:
            made = cii_xml(document)
        except NotRepresentable as error:
            unsaid += 1
            err.print(escape(str(error)), highlight=False)
            continue
        _put(made, to, document, "xml")
    documents.report()
    if unsaid:
        raise typer.Exit(EXIT_FINDINGS)


def json_(
    numbers: Numbers = None,
    month: InMonth = None,
    account: Account = None,
    entity: Entity = None,
    drafts: Drafts = False,
    to: To = None,
    data_dir: DataDir = None,
) -> None:
    """All that documents say, as JSON: a list on stdout, or a file each in a folder. Money is exact text.

    Exit code 4 where a document could not be read; the others are written.
    """
    settings = settings_for(data_dir)
    documents = _Readable(settings, _found(settings, numbers, month, account, entity, drafts))
    if to is None:
        emit_json([as_json(document) for document in documents])
    else:
        for document in documents:
            _put(json_text(document).encode(), to, document, "json")
    documents.report()


def csv(
    numbers: Numbers = None,
    month: InMonth = None,
    account: Account = None,
    entity: Entity = None,
    drafts: Drafts = False,
    to: To = None,
    data_dir: DataDir = None,
) -> None:
    """The lines of documents as CSV, a row each: all on stdout, or a file per document in a folder.

    Exit code 4 where a document could not be read; the others are written.
    """
    settings = settings_for(data_dir)
    documents = _Readable(settings, _found(settings, numbers, month, account, entity, drafts))
    if to is None:
        write_csv(documents, sys.stdout)
    else:
        for document in documents:
            rows = io.StringIO()
            write_csv([document], rows)
            _put(rows.getvalue().encode(), to, document, "csv")
    documents.report()


def _put(content: bytes, to: Path | None, document: Document, ending: str) -> None:
    if to is None:
        sys.stdout.write(content.decode())
        return
    path = to / file_name(document, ending)
    try:
        write(path, content)
    except NotWritten as error:
        fail(str(error), EXIT_ERROR)
    out.print(escape(str(path)), highlight=False)


def _found(
    settings: Settings,
    numbers: list[str] | None,
    month: str | None,
    account: str | None,
    entity: str | None,
    drafts: bool,
) -> list[int]:
    if month is not None and not _MONTH.fullmatch(month):
        fail(f"expected a month as 2026-10, got {month}", EXIT_USAGE)
    if not (numbers or month or account):
        fail("expected the number of a document, --month or --account", EXIT_USAGE)
    wanted = Wanted(tuple(numbers or ()), month, account, entity, every_state=drafts)
    with connect(settings.dsn, application="documents") as connection:
        try:
            ids = find(connection, wanted)
        except LookupError as error:
            fail(str(error.args[0]), EXIT_NOT_FOUND)
    if not ids:
        fail("no such document is issued; --drafts looks at the others too", EXIT_NOT_FOUND)
    return ids


class _Readable:
    """The documents of these ids but for those that cannot be read: they are named on stderr, and counted."""

    def __init__(self, settings: Settings, ids: list[int]) -> None:
        self._settings, self._ids = settings, ids
        self._failed = 0

    def __iter__(self) -> Iterator[Document]:
        with connect(self._settings.dsn, application="documents") as connection:
            for found in read_each(connection, self._ids):
                if isinstance(found, NotReadable):
                    self._failed += 1
                    err.print(escape(str(found)), highlight=False)
                else:
                    yield found

    def report(self) -> None:
        """After the last one: exit code 4 where there were some."""
        if self._failed:
            err.print(f"{self._failed:,} failed.")
            raise typer.Exit(EXIT_FINDINGS)
