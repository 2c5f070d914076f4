"""What `tally plans publish` and `tally accounts apply` share: publish drafts, then say what became of them."""

from datetime import timedelta

import typer
from rich.table import Table

from pipeline.catalog.files import Drafts
from pipeline.catalog.publish import Refused, publish
from pipeline.catalog.source import Finding
from pipeline.cli.output import EXIT_FINDINGS, emit_json, err, out
from pipeline.core.money import Micros
from pipeline.core.periods import BEGINNING, format_instant
from pipeline.infra.settings import Settings


def publish_and_show(
    settings: Settings, drafts: Drafts, *, reason: str, as_json: bool, valid_from: timedelta | Micros | None = None
) -> None:
    """Publish all or none and show each document's version; with findings, show them and exit 4."""
    try:
        published = publish(settings.dsn, drafts, actor=settings.actor, reason=reason, valid_from=valid_from)
    except Refused as refused:
        show_findings(list(refused.findings), as_json=as_json)
        raise typer.Exit(EXIT_FINDINGS) from None
    if as_json:
        rows = [
            {
                "kind": one.kind,
                "id": one.id,
                "version": one.version,
                "valid_from": format_instant(one.valid_from_us),
                "outcome": one.outcome,
            }
            for one in published
        ]
        emit_json({"published": rows})
        return
    table = Table("", "id", "version", "", "counts from (event time)")
    for one in published:
        begins = counts_from(one.valid_from_us) if one.kind in ("meter", "plan") else ""
        table.add_row(one.kind, one.id, str(one.version), one.outcome, begins)
    out.print(table)
    new = sum(one.outcome != "unchanged" for one in published)
    err.print(f"{new} published, {len(published) - new} unchanged." if new else "Nothing changed, nothing published.")


def show_findings(findings: list[Finding], *, as_json: bool) -> None:
    """Every finding with its place: one JSON object on stdout, or a line each on stderr."""
    if as_json:
        rows = [{"file": f.file, "line": f.line, "path": f.path, "message": f.message} for f in findings]
        emit_json({"published": [], "findings": rows})
        return
    for finding in findings:
        err.print(str(finding), markup=False, highlight=False, soft_wrap=True)
    err.print(f"{len(findings)} mistake{'s' * (len(findings) != 1)}; nothing published.", highlight=False)


def counts_from(valid_from_us: Micros) -> str:
    """From when a version counts, as a person reads it."""
    return "the beginning" if valid_from_us == BEGINNING else format_instant(valid_from_us)
