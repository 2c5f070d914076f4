"""`tally invoicing …` and `tally fx …`: what invoices need beside prices, from files into versions and stored rates."""

from collections import Counter
from datetime import date, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from pipeline.billing import fx_rates, invoicing_store
from pipeline.catalog.fx_files import EURO, read_rates
from pipeline.catalog.invoicing_apply import ALWAYS, Applied, apply
from pipeline.catalog.invoicing_files import Drafts, read_invoicing_files
from pipeline.catalog.publish import Refused
from pipeline.catalog.source import Finding
from pipeline.cli.context import DataDir, Json, settings_for
from pipeline.cli.output import EXIT_FINDINGS, EXIT_NOT_FOUND, EXIT_USAGE, emit_json, err, fail, out
from pipeline.core.fx import NoRate, rate_on
from pipeline.core.invoicing_documents import kind_of
from pipeline.core.money import plain
from pipeline.infra.postgres import connect

_invoicing = typer.Typer(
    no_args_is_help=True, help="Legal entities, customers, taxes and coupons: check and apply files, and look."
)
_fx = typer.Typer(no_args_is_help=True, help="Rates of exchange: load reference files, and look what counts on a day.")

Files = Annotated[
    list[Path], typer.Argument(help="Invoicing files; together they are one whole.", exists=True, dir_okay=False)
]


def register(app: typer.Typer) -> None:
    app.add_typer(_invoicing, name="invoicing")
    app.add_typer(_fx, name="fx")


# Invoicing files ----------------------------------------------------------------------------------------------------


@_invoicing.command()
def check(files: Files, as_json: Json = False) -> None:
    """Find every mistake in invoicing files, without applying them. Exit code 4 if there is one.

    Whether accounts, plans and coupons that they name are known, `apply --dry-run` tells.
    """
    drafts = read_invoicing_files(files)
    if as_json:
        emit_json({"items": _counts(drafts), "findings": [_finding_json(finding) for finding in drafts.findings]})
    elif not drafts.findings:
        counted = ", ".join(f"{n} {what if n == 1 else _PLURALS[what]}" for what, n in _counts(drafts).items())
        out.print(f"No mistake in {counted or 'nothing'}.")
    if drafts.findings:
        _show_findings(drafts.findings, as_json=as_json)
        raise typer.Exit(EXIT_FINDINGS)


@_invoicing.command("apply")
def apply_(
    files: Files,
    reason: Annotated[str, typer.Option(help="Why, for the audit log.")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would change, change nothing.")] = False,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Apply invoicing files: what is new or changed becomes a version, all or none. Exit code 4 with mistakes.

    What the files do not name stays as it is, and so does everything that was issued.
    """
    settings, drafts = settings_for(data_dir), read_invoicing_files(files)
    try:
        with connect(settings.dsn, application="invoicing") as connection:
            applied = apply(connection, drafts, actor=settings.actor, reason=reason, dry_run=dry_run)
    except Refused as refused:
        if as_json:
            emit_json({"applied": [], "findings": [_finding_json(finding) for finding in refused.findings]})
        _show_findings(list(refused.findings), as_json=as_json)
        raise typer.Exit(EXIT_FINDINGS) from None
    if as_json:
        emit_json({"applied": [_applied_json(one) for one in applied], "findings": [], "dry_run": dry_run})
        return
    table = Table("", "id", "version", "", "counts from (tax date)")
    for one in applied:
        table.add_row(_words(one.kind), one.id, str(one.version), one.outcome, _counts_from(one.valid_from))
    out.print(table)
    changed = sum(one.outcome != "unchanged" for one in applied)
    did = "would be applied; nothing was" if dry_run else "applied"
    err.print(f"{changed} {did}, {len(applied) - changed} unchanged.", highlight=False)


@_invoicing.command()
def show(
    name: Annotated[
        str, typer.Argument(metavar="[KIND/]ID", help="One item, by its id or such as customer/acme; none: all.")
    ] = "",
    on: Annotated[str, typer.Option(metavar="DAY", help="What counts on this tax date; today unless given.")] = "",
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """What counts on a day; of one item everything it says, and all its versions."""
    day = _day(on)
    kind, _, id = name.rpartition("/") if name.partition("/")[0] in _KINDS else ("", "", name)
    with connect(settings_for(data_dir).dsn, application="invoicing") as connection:
        versions = [
            version
            for version in invoicing_store.versions(connection, id=id or None)
            if not kind or version.kind == kind
        ]
    if name and not versions:
        fail(f"expected an item that was applied, got {name!r}; `tally invoicing show` lists them", EXIT_NOT_FOUND)
    counting = {(one.kind, one.id): one for one in versions if one.valid_from <= day}
    if as_json:
        shown = versions if name else list(counting.values())
        emit_json([one._asdict() | {"counts": counting.get((one.kind, one.id)) is one} for one in shown])
        return
    if not name:
        table = Table("", "id", "name", "version", "counts from (tax date)")
        for one in counting.values():
            table.add_row(
                _words(one.kind),
                one.id,
                str(one.document.get("name", "")),
                str(one.version),
                _counts_from(one.valid_from),
            )
        out.print(table)
        if not versions:
            err.print("Nothing yet: `tally invoicing apply FILE`.")
        return
    for current in counting.values():
        out.print(f"[bold]{_words(current.kind)} {current.id}[/], version {current.version}", highlight=False)
        table = Table(show_header=False)
        for path, value in _leaves(current.document):
            table.add_row(path, value)
        out.print(table)
    history = Table("version", "counts from (tax date)", "applied", "by", "reason")
    for one in versions:
        at = f"{one.applied_at:%Y-%m-%d %H:%M:%S}Z"
        history.add_row(str(one.version), _counts_from(one.valid_from), at, one.applied_by, one.reason)
    out.print(history)


_KINDS = ("legal_entity", "customer", "tax", "coupon")
_PLURALS = {"legal entity": "legal entities", "customer": "customers", "tax": "taxes", "coupon": "coupons"}


def _leaves(value: Any, path: str = "") -> list[tuple[str, str]]:
    """Every value in a document with the way to it."""
    if isinstance(value, dict):
        return [leaf for key, part in value.items() for leaf in _leaves(part, f"{path}.{key}" if path else key)]
    if isinstance(value, list) and any(isinstance(part, dict) for part in value):
        return [leaf for n, part in enumerate(value, 1) for leaf in _leaves(part, f"{path}[{n}]")]
    return [(path, ", ".join(map(str, value)) if isinstance(value, list) else str(value))]


# Rates of exchange ----------------------------------------------------------------------------------------------------


@_fx.command()
def load(
    file: Annotated[
        Path,
        typer.Argument(
            help="A reference file of the European Central Bank: eurofxref.csv, eurofxref-hist.csv, either in its zip, "
            "or the XML of one day, 90 days or all.",
            exists=True,
            dir_okay=False,
        ),
    ],
    source: Annotated[str, typer.Option(help="Who published the rates, for documents to name.")] = fx_rates.ECB,
    correct: Annotated[
        bool, typer.Option("--correct", help="Where another rate was loaded before, let this one count.")
    ] = False,
    reason: Annotated[str, typer.Option(help="Why a rate is corrected; it is kept.")] = "",
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Load reference rates of exchange into the stored table. Loading a file again is safe."""
    if correct and not reason.strip():
        fail("expected a reason with --correct: give --reason", EXIT_USAGE)
    settings, found = settings_for(data_dir), read_rates(file)
    if found.findings:
        if as_json:
            emit_json({"loaded": None, "findings": [_finding_json(finding) for finding in found.findings]})
        _show_findings(found.findings, as_json=as_json)
        raise typer.Exit(EXIT_FINDINGS)
    try:
        with connect(settings.dsn, application="fx") as connection:
            loaded = fx_rates.load(
                connection, source, EURO, found.rates, actor=settings.actor, reason=reason, correct=correct
            )
    except fx_rates.RatesDiffer as error:
        fail(f"{error}; nothing was loaded. If the file is right, load it with --correct --reason WHY", EXIT_FINDINGS)
    if as_json:
        emit_json(
            {
                "loaded": {
                    "source": source,
                    "new": loaded.new,
                    "unchanged": loaded.unchanged,
                    "corrected": loaded.corrected,
                    "first_day": loaded.first_day,
                    "last_day": loaded.last_day,
                },
                "findings": [],
            }
        )
        return
    out.print(
        f"{loaded.new:,} rates of {source} loaded, {loaded.corrected:,} corrected, {loaded.unchanged:,} unchanged: "
        f"{loaded.first_day} to {loaded.last_day}.",
        highlight=False,
    )


@_fx.command("show")
def show_rates(
    currencies: Annotated[list[str] | None, typer.Argument(help="Currencies; all unless given.")] = None,
    on: Annotated[str, typer.Option(metavar="DAY", help="What counts on this day; today unless given.")] = "",
    base: Annotated[str, typer.Option(help="Currency that one unit is of.")] = EURO,
    source: Annotated[str, typer.Option(help="Who published the rates.")] = fx_rates.ECB,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """The rates that count on a day: the last ones published on or before it."""
    day = _day(on)
    with connect(settings_for(data_dir).dsn, application="fx") as connection:
        published = fx_rates.published(connection, day, source=source)
    known = sorted({rate.quote for rate in published} | {rate.base for rate in published})
    rates = []
    for currency in currencies or [one for one in known if one != base]:
        try:
            rates.append(rate_on(base, currency, day, published))
        except NoRate as error:
            fail(f"{error}\nLoad a file that has it: `tally fx load FILE`", EXIT_NOT_FOUND)
    if as_json:
        emit_json([{"base": r.base, "currency": r.quote, "rate": r.rate, "day": r.day} for r in rates])
        return
    table = Table(f"1 {base}", "", "published for")
    table.columns[1].justify = "right"
    for rate in rates:
        table.add_row(rate.quote, plain(rate.rate), str(rate.day))
    out.print(table)
    if not rates:
        err.print(f"No rate of {source} on or shortly before {day}: `tally fx load FILE`.", highlight=False)


# What they share ------------------------------------------------------------------------------------------------------


def _day(text: str) -> date:
    try:
        return date.fromisoformat(text) if text else datetime.now().astimezone().date()
    except ValueError:
        fail(f"expected a day such as 2026-10-31, got {text!r}", EXIT_USAGE)


def _words(kind: str) -> str:
    return kind.replace("_", " ")


def _counts_from(day: date) -> str:
    return "always" if day == ALWAYS else str(day)


def _counts(drafts: Drafts) -> dict[str, int]:
    """How many items of each kind, by the kind's name in words."""
    return dict(Counter(_words(kind_of(draft.item)) for draft in drafts.items))


def _applied_json(one: Applied) -> dict[str, Any]:
    return {
        "kind": one.kind,
        "id": one.id,
        "version": one.version,
        "valid_from": one.valid_from,
        "outcome": one.outcome,
    }


def _finding_json(finding: Finding) -> dict[str, Any]:
    return {"file": finding.file, "line": finding.line, "path": finding.path, "message": finding.message}


def _show_findings(findings: list[Finding], *, as_json: bool) -> None:
    if as_json:
        return
    for finding in findings:
        err.print(str(finding), markup=False, highlight=False, soft_wrap=True)
    err.print(f"{len(findings)} mistake{'s' * (len(findings) != 1)}; nothing changed.", highlight=False)
