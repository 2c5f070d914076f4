"""`tally plans …`: from price files to published, immutable versions."""

from collections.abc import Iterator
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.markup import escape
from rich.table import Table

from pipeline.catalog import approvals, store
from pipeline.catalog.approvals import needs_approval
from pipeline.catalog.diff import changes
from pipeline.catalog.files import Drafts, read_price_files
from pipeline.catalog.publish import Refused, publish_on
from pipeline.catalog.source import Finding
from pipeline.cli.backtest import backtest
from pipeline.cli.context import DataDir, Json, settings_for
from pipeline.cli.differences import difference_json, proposal_json, show_difference, show_proposal, state
from pipeline.cli.durations import duration
from pipeline.cli.output import EXIT_FINDINGS, EXIT_NOT_FOUND, EXIT_USAGE, emit_json, err, fail, out
from pipeline.cli.publishing import (
    WAIT_S,
    Wait,
    counts_from,
    propose_and_show,
    publish_and_show,
    refusals_shown,
    show_findings,
    show_published,
)
from pipeline.core.charges import Charge
from pipeline.core.documents import Kind, from_document, kind_of
from pipeline.core.meters import Meter
from pipeline.core.money import Micros, Quantity, plain, quantity_decimal
from pipeline.core.periods import format_instant, parse_instant
from pipeline.core.plans import Plan
from pipeline.infra.postgres import connect

_plans = typer.Typer(no_args_is_help=True, help="Price files: check, publish, and look at what is published.")

PriceFiles = Annotated[
    list[Path], typer.Argument(help="Price files; together they are one whole.", exists=True, dir_okay=False)
]
ValidFrom = Annotated[
    str | None,
    typer.Option(
        metavar="WHEN",
        help="When new and changed versions begin to count, by event time: now (that is in 60 seconds), +5m, +2h, +1d, "
        "or 2026-02-01T00:00:00Z. Default: what the files say; else from the beginning for what is new, and in 60 "
        "seconds for what changed.",
    ),
]


def register(app: typer.Typer) -> None:
    _plans.command()(backtest)
    app.add_typer(_plans, name="plans")


@_plans.command()
def check(
    files: PriceFiles,
    published: Annotated[
        bool,
        typer.Option("--published", help="Also against what is published and the invoices issued: asks the database."),
    ] = False,
    back_dated: Annotated[
        bool, typer.Option("--back-dated", help="With --published: changes may count from a time before now.")
    ] = False,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Find every mistake in price files, with its line. Publishes nothing; exit code 4 on mistakes."""
    drafts = read_price_files(files)
    findings = _refusals(settings_for(data_dir).dsn, drafts, back_dated) if published else drafts.findings
    if findings:
        show_findings(findings, as_json=as_json)
        raise typer.Exit(EXIT_FINDINGS)
    counts = {
        "meters": len(drafts.meters),
        "plans": len(drafts.plans),
        "charges": sum(len(draft.item.charges) for draft in drafts.plans),
        "price lists": len(drafts.price_lists),
    }
    if as_json:
        emit_json({**{what.replace(" ", "_"): count for what, count in counts.items()}, "findings": []})
    else:
        said = [f"{count} {what.removesuffix('s') if count == 1 else what}" for what, count in counts.items() if count]
        out.print(f"No mistakes: {', '.join(said)}.", highlight=False)


def _refusals(dsn: str, drafts: Drafts, back_dated: bool) -> list[Finding]:
    """Why publishing the drafts now would be refused: tried, and taken back."""
    with connect(dsn, application="plans") as connection, connection.transaction(force_rollback=True):
        try:
            publish_on(connection, drafts, actor="check", back_dated=back_dated)
        except Refused as refused:
            return list(refused.findings)
    return []


@_plans.command()
def publish(
    files: PriceFiles,
    reason: Annotated[str, typer.Option(help="Why, for the audit log.")] = "",
    valid_from: ValidFrom = None,
    back_dated: Annotated[
        bool,
        typer.Option(
            "--back-dated",
            help="Let changes count from a time before now, as far back as no issued invoice covers: a correction. "
            "`tally rerate` then brings open months to it.",
        ),
    ] = False,
    wait: Wait = WAIT_S,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Publish price files: what they change becomes new versions, all or none, once a second person approves.

    The first publication, into an empty catalog, changes nobody's bill and needs no approval; nor does any where
    TALLY_FOUR_EYES is false.
    """
    settings, drafts = settings_for(data_dir), read_price_files(files)
    show = propose_and_show if settings.four_eyes and needs_approval(settings.dsn) else publish_and_show
    begin = _when(valid_from)
    show(settings, drafts, reason=reason, wait=wait, as_json=as_json, valid_from=begin, back_dated=back_dated)


@_plans.command()
def diff(files: PriceFiles, data_dir: DataDir = None, as_json: Json = False) -> None:
    """Say in words and numbers what price files would change. Publishes nothing."""
    drafts = read_price_files(files)
    if drafts.findings:
        show_findings(drafts.findings, as_json=as_json)
        raise typer.Exit(EXIT_FINDINGS)
    items = [draft.item for draft in drafts.all()]
    with connect(settings_for(data_dir).dsn, application="plans") as connection:
        entries = store.newest(connection, [(kind_of(item), item.id) for item in items])
    newest = {key: from_document(entry) for key, entry in entries.items()}
    pairs = [(kind_of(item), newest.get((kind_of(item), item.id)), item) for item in items]
    if as_json:
        emit_json([difference_json(*pair) for pair in pairs])
        return
    for pair in pairs:
        for part in show_difference(*pair):
            out.print(part)
    if not any(changes(before, after) for _, before, after in pairs):
        err.print("Nothing would change.")


ProposalId = Annotated[int, typer.Argument(metavar="ID", help="Proposal, as `tally plans proposals` lists them.")]
By = Annotated[str | None, typer.Option(metavar="NAME", help="Who decides (default: TALLY_ACTOR, else the user).")]


@_plans.command()
def proposals(
    proposal: Annotated[int | None, typer.Argument(metavar="ID", help="One, with all it changes.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Also those that are decided.")] = False,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Price changes that wait for a second person; with ID, one of them with everything it changes."""
    with connect(settings_for(data_dir).dsn, application="plans") as connection, refusals_shown(as_json=as_json):
        found = approvals.proposals(connection, only=proposal)
    if proposal is None and not every:
        found = [one for one in found if one.decision is None]
    if as_json:
        emit_json([proposal_json(one) for one in found] if proposal is None else proposal_json(found[0]))
    elif proposal is None:
        table = Table("id", "state", "changes", "proposed (UTC)", "by", "reason", "decided by")
        for one in found:
            documents = ", ".join(f"{document.kind} {document.id}" for document in one.documents)
            decided_by = one.decision.decided_by if one.decision else ""
            at = f"{one.proposed_at:%Y-%m-%d %H:%M:%S}"
            table.add_row(str(one.id), state(one), documents, at, one.proposed_by, escape(one.reason), decided_by)
        out.print(table)
    else:
        for part in show_proposal(found[0]):
            out.print(part)


@_plans.command()
def approve(
    proposal: ProposalId,
    by: By = None,
    reason: Annotated[str, typer.Option(help="What the second person has to say, for the record.")] = "",
    wait: Wait = WAIT_S,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Publish a proposal as its second person. Its proposer cannot; nor can anyone once a document has changed again.

    That the name is yours is recorded, not proved: Tally knows no passwords yet.
    """
    settings = settings_for(data_dir)
    with refusals_shown(as_json=as_json):
        published = approvals.approve(settings.dsn, proposal, actor=by or settings.actor, reason=reason)
        with connect(settings.dsn, application="plans") as connection:
            (decided,) = approvals.proposals(connection, only=proposal)
    show_published(settings, published, wait=wait, as_json=as_json, back_dated=decided.back_dated)


@_plans.command()
def reject(
    proposal: ProposalId,
    reason: Annotated[str, typer.Option(help="Why not, for the record.")],
    by: By = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Decide that a proposal will not be published; also its proposer may."""
    settings = settings_for(data_dir)
    with refusals_shown(as_json=as_json):
        approvals.reject(settings.dsn, proposal, actor=by or settings.actor, reason=reason)
    if as_json:
        emit_json({"id": proposal, "state": "rejected"})
    else:
        err.print(f"Proposal {proposal} is rejected.", highlight=False)


@_plans.command()
def rollback(
    documents: Annotated[
        list[str],
        typer.Argument(metavar="ID…", help="Plans; other documents with their kind: meter/llm-input-tokens."),
    ],
    reason: Annotated[str, typer.Option(help="Why, for the audit log.")],
    version: Annotated[
        int | None, typer.Option(min=1, help="Back to this version; to the one before the newest unless given.")
    ] = None,
    valid_from: ValidFrom = None,
    wait: Wait = WAIT_S,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Publish an earlier version again, as a new one. What was billed in between keeps its price.

    A version that does not count yet is replaced at its own time, so that it never counts.
    """
    settings = settings_for(data_dir)
    keys = [_key(text) for text in documents]
    with connect(settings.dsn, application="plans") as connection, refusals_shown(as_json=as_json):
        drafts = approvals.earlier(connection, keys, version=version)
    show = propose_and_show if settings.four_eyes else publish_and_show
    show(settings, drafts, reason=reason, wait=wait, as_json=as_json, valid_from=_when(valid_from))


@_plans.command("list")
def list_(data_dir: DataDir = None, as_json: Json = False) -> None:
    """The published plans, each in its newest version."""
    with connect(settings_for(data_dir).dsn, application="plans") as connection:
        plans = store.current(connection, "plan")
    if as_json:
        emit_json([_version_json(version) for version in plans])
        return
    table = Table("plan", "name", "currency", "charges", *_VERSION_COLUMNS)
    for version in plans:
        plan = cast(Plan, version.item)
        table.add_row(plan.id, plan.name, plan.currency, str(len(plan.charges)), *_version_row(version))
    out.print(table)
    if not plans:
        err.print("No plan is published yet: `tally plans publish FILE`.")


@_plans.command()
def show(
    plan: Annotated[str, typer.Argument(metavar="ID", help="Plan id.")],
    version: Annotated[int | None, typer.Option(min=1, help="Which version; the newest unless given.")] = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """One plan: its charges, tier by tier, the meters behind them, and its versions."""
    with connect(settings_for(data_dir).dsn, application="plans") as connection:
        versions = store.versions(connection, "plan", plan)
        if not versions:
            fail(f"expected a published plan, got {plan!r}; `tally plans list` shows them", EXIT_NOT_FOUND)
        if version is not None and version > len(versions):
            fail(f"expected a version from 1 to {len(versions)} of plan {plan!r}, got {version}", EXIT_NOT_FOUND)
        chosen = versions[-1] if version is None else versions[version - 1]
        item = cast(Plan, chosen.item)
        approved_by = approvals.approvers(connection, "plan", plan)
        names = dict.fromkeys(charge.meter for charge in item.charges if charge.meter is not None)
        meters = {name: store.versions(connection, "meter", name)[-1] for name in names}
    if as_json:
        emit_json(
            {
                **_version_json(chosen),
                "meters": [_version_json(meter) for meter in meters.values()],
                "versions": [
                    {**_version_json(other, document=False), "approved_by": approved_by.get(other.entry.version)}
                    for other in versions
                ],
            }
        )
        return
    out.print(f"[bold]{item.id}[/] version {item.version}: {item.name}, prices in {item.currency}", highlight=False)
    prices = Table("charge", "meter", "model", "for", "unit price or rate", "flat fee", "shown on the line")
    for charge in item.charges:
        unit = cast(Meter, meters[charge.meter].item).unit if charge.meter else ""
        for index, (units, price, flat) in enumerate(_price_rows(charge, unit)):
            head = (charge.id, charge.meter or "", charge.model) if index == 0 else ("", "", "")
            prices.add_row(*head, units, price, flat, "" if index else ", ".join(charge.references))
    out.print(prices)
    history = Table(*_VERSION_COLUMNS, "reason")
    for other in versions:
        *facts, by = _version_row(other)
        approver = approved_by.get(other.entry.version)
        history.add_row(*facts, f"{by}, approved by {approver}" if approver else by, escape(other.reason))
    out.print(history)


_VERSION_COLUMNS = ("version", "counts from (event time)", "published", "by")


def _version_row(version: store.Version) -> tuple[str, str, str, str]:
    entry = version.entry
    published = f"{version.published_at:%Y-%m-%d %H:%M:%S} UTC"
    return str(entry.version), counts_from(entry.valid_from_us), published, version.published_by


def _version_json(version: store.Version, *, document: bool = True) -> dict[str, Any]:
    entry = version.entry
    return {
        "id": entry.id,
        "version": entry.version,
        "valid_from": format_instant(entry.valid_from_us),
        "published_at": version.published_at,
        "published_by": version.published_by,
        "reason": version.reason,
        **(entry.document if document else {}),
    }


def _price_rows(charge: Charge, unit: str) -> list[tuple[str, str, str]]:
    """What each part of a charge costs: what it is for, the unit price or rate, the flat fee."""
    rows = [(f"the first {_units(charge.included)}, included", "0", "")] if charge.included else []
    price, fee = plain(charge.unit_price or Decimal(0)), plain(charge.fixed) if charge.fixed else ""
    match charge.model:
        case "per_unit":
            rows.append((f"every {unit}", price, ""))
        case "matrix":
            for cell in charge.cells:
                named = [f"{name} {value or 'absent'}" for name, value in zip(charge.by, cell.values, strict=True)]
                rows.append((f"every {unit} of {', '.join(named)}", plain(cell.unit_price), ""))
            rows.append((f"every other {unit}", price, ""))
        case "package":
            what = f"every {_units(charge.package_size or 0)} begun"
            rows.append((what, plain(charge.package_price or Decimal(0)), ""))
        case "percentage":
            rows += [(f"the first {count} events", "0", "") for count in [charge.free_events] if count]
            rows += [(f"the first {_units(free)}, event by event", "0", "") for free in [charge.free_amount] if free]
            rows.append(("every event", f"{plain(charge.rate or Decimal(0))} %", fee))
        case "dynamic":
            rows.append(("every event", f"{plain(charge.multiplier)} × its {charge.amount_property}", fee))
        case "flat":
            rows.append((f"every month, {_units(charge.quantity)} ×", price, ""))
        case "graduated" | "volume" | "stairstep" | "block" | "graduated_percentage":
            rows += _tier_rows(charge)
    limits = (("least", charge.minimum), ("most", charge.maximum))
    rows += [(f"in all at {which} per month", "", plain(limit)) for which, limit in limits if limit is not None]
    return rows


def _tier_rows(charge: Charge) -> Iterator[tuple[str, str, str]]:
    lower = 0
    whole = "all, if " if charge.model in ("volume", "stairstep") else ""
    blocks = f", per {_units(charge.package_size or 0)} begun" if charge.model == "block" else ""
    for tier in charge.tiers:
        reach = f"above {_units(lower)}" if tier.up_to is None else f"{_units(lower)} to {_units(tier.up_to)}"
        price = plain(tier.unit_price) if tier.rate is None else f"{plain(tier.rate)} %"
        cap = "" if tier.cap is None else f", at most {plain(tier.cap)}"
        yield whole + reach + blocks + cap, price, plain(tier.flat) if tier.flat else ""
        lower = tier.up_to or lower


def _units(quantity: Quantity) -> str:
    """With thousands set apart: tiers are read by people."""
    whole, point, fraction = plain(quantity_decimal(quantity)).partition(".")
    return f"{int(whole):,}{point}{fraction}"


def _when(text: str | None) -> timedelta | Micros | None:
    if text is None:
        return None
    if text == "now":
        return timedelta(0)
    if text.startswith("+") and (length := duration(text[1:])) is not None:
        return length
    try:
        return parse_instant(text)
    except ValueError:
        fail(f"expected --valid-from now, +5m, +2h, +1d or 2026-02-01T00:00:00Z, got {text!r}", EXIT_USAGE)


def _key(text: str) -> tuple[Kind, str]:
    """``standard`` is a plan; ``meter/tokens`` names its kind."""
    kind, slash, name = text.rpartition("/")
    if kind not in ("", "meter", "plan", "price_list") or bool(kind) != bool(slash):
        fail(f"expected a plan's id, or meter/ID, plan/ID or price_list/ID, got {text!r}", EXIT_USAGE)
    return cast(Kind, kind or "plan"), name
