"""What the commands that publish share: publish drafts, or propose them, then say what became of them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Annotated, TypeAlias

import typer
from rich.table import Table

from pipeline.catalog.approvals import NoReason, NoSuchProposal, NothingEarlier, Proposal, ProposalError, propose
from pipeline.catalog.files import Drafts
from pipeline.catalog.publish import Published, Refused, publish
from pipeline.catalog.relay import Relayed, await_relayed
from pipeline.catalog.source import Finding
from pipeline.cli.differences import proposal_json, show_proposal
from pipeline.cli.output import EXIT_FINDINGS, EXIT_NOT_FOUND, EXIT_USAGE, emit_json, err, fail, out
from pipeline.core.documents import DATED
from pipeline.core.money import Micros
from pipeline.core.periods import BEGINNING, format_instant, to_micros
from pipeline.infra.settings import Settings

Wait: TypeAlias = Annotated[
    float, typer.Option(min=0, metavar="SECONDS", help="Wait so long for the relay to carry it to the raters.")
]
#: A relay that runs takes less than a second; one that `tally up` has just started, a few.
WAIT_S = 10.0


def publish_and_show(
    settings: Settings,
    drafts: Drafts,
    *,
    reason: str,
    wait: float,
    as_json: bool,
    valid_from: timedelta | Micros | None = None,
    back_dated: bool = False,
) -> None:
    """Publish all or none, show each document's version, and whether raters have it; with findings, show them, exit 4.

    That no relay carried it in time is a warning and not an error: it is published, and will be carried.
    """
    with refusals_shown(as_json=as_json):
        published = publish(
            settings.dsn, drafts, actor=settings.actor, reason=reason, valid_from=valid_from, back_dated=back_dated
        )
    show_published(settings, published, wait=wait, as_json=as_json, back_dated=back_dated)


def propose_and_show(
    settings: Settings,
    drafts: Drafts,
    *,
    reason: str,
    wait: float,
    as_json: bool,
    valid_from: timedelta | Micros | None = None,
    back_dated: bool = False,
) -> None:
    """Put what changes to a second person, and show what that person will see; with findings, show them, exit 4.

    Where nothing changes, show what is published, as ``publish_and_show`` does.
    """
    with refusals_shown(as_json=as_json):
        proposed = propose(
            settings.dsn, drafts, actor=settings.actor, reason=reason, valid_from=valid_from, back_dated=back_dated
        )
    if not isinstance(proposed, Proposal):
        show_published(settings, proposed, wait=wait, as_json=as_json)
        return
    if as_json:
        emit_json({"published": [], "relayed": False, "proposal": proposal_json(proposed)})
        return
    for part in show_proposal(proposed):
        out.print(part)
    err.print(
        f"Proposed, not published yet: another person than {proposed.proposed_by} looks at it and approves it with "
        f"`tally plans approve {proposed.id} --by NAME`, or says no with `tally plans reject`.",
        highlight=False,
        soft_wrap=True,
    )


@contextmanager
def refusals_shown(*, as_json: bool) -> Iterator[None]:
    """Findings that refuse a publication, or a proposal that cannot be, end the command with exit code 4 (2, 3)."""
    try:
        yield
    except Refused as refused:
        show_findings(list(refused.findings), as_json=as_json)
        raise typer.Exit(EXIT_FINDINGS) from None
    except ProposalError as error:
        codes = {NoReason: EXIT_USAGE, NoSuchProposal: EXIT_NOT_FOUND, NothingEarlier: EXIT_NOT_FOUND}
        fail(str(error), codes.get(type(error), EXIT_FINDINGS))


def show_published(
    settings: Settings, published: Sequence[Published], *, wait: float, as_json: bool, back_dated: bool = False
) -> None:
    """Each document's version, whether raters have it, and what is left to do for a back-dated change."""
    if not as_json:
        _show(published)
    with err.status("waiting for the relay"):
        relayed = await_relayed(settings.dsn, published, wait)
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
        emit_json({"published": rows, "relayed": not relayed.waiting, "proposal": None})
    if relayed.waiting:
        _warn(published, relayed)
    elif relayed.at is not None and not as_json:
        err.print(f"Raters have it since {format_instant(to_micros(relayed.at))}.", highlight=False)
    if back_dated and not as_json and any(one.outcome != "unchanged" for one in published):
        err.print(
            "What was rated before keeps its amounts until `tally rerate --period YYYY-MM`, for each open month.",
            highlight=False,
        )


def _show(published: Sequence[Published]) -> None:
    table = Table("", "id", "version", "", "counts from (event time)")
    for one in published:
        begins = counts_from(one.valid_from_us) if one.kind in DATED else ""
        table.add_row(one.kind.replace("_", " "), one.id, str(one.version), one.outcome, begins)
    out.print(table)
    new = sum(one.outcome != "unchanged" for one in published)
    err.print(f"{new} published, {len(published) - new} unchanged." if new else "Nothing changed, nothing published.")


def _warn(published: Sequence[Published], relayed: Relayed) -> None:
    """That raters rate without what is published, what follows from that, and what to do."""
    if relayed.active:
        why, fix = "the relay runs but has not carried it", "`tally status` and `tally doctor` say what holds it up"
    else:
        why, fix = "no relay is running (`tally status`)", "start it: `tally up`, or `tally relay`"
    replaced = [one.valid_from_us for one in published if one.kind in DATED and one.version > 1]
    effect = (
        f"It counts from {format_instant(min(replaced))} anyway: usage from then on that is rated before raters have "
        "it gets the old price."
        if replaced
        else "Until then usage that needs it is refused or parked, or rated as before."
    )
    err.print(
        f"[bold red]WARNING:[/] raters do not have this yet: {why}. {relayed.waiting} of {len(published)} wait. "
        f"{effect} Now {fix}. The same command again tells whether raters have it.",
        highlight=False,
        soft_wrap=True,
    )


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
