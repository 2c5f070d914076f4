"""`tally plans …`: from price files to published, immutable versions."""

import re
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.table import Table

from pipeline.catalog import store
from pipeline.catalog.files import read_price_files
from pipeline.cli.context import DataDir, Json, settings_for
from pipeline.cli.output import EXIT_FINDINGS, EXIT_NOT_FOUND, EXIT_USAGE, emit_json, err, fail, out
from pipeline.cli.publishing import WAIT_S, Wait, counts_from, publish_and_show, show_findings
from pipeline.core.charges import Charge
from pipeline.core.meters import Meter
from pipeline.core.money import Micros, Quantity, plain, quantity_decimal
from pipeline.core.periods import format_instant, parse_instant
from pipeline.core.plans import Plan
from pipeline.infra.postgres import connect

_plans = typer.Typer(no_args_is_help=True, help="Price files: check, publish, and look at what is published.")

PriceFiles = Annotated[
    list[Path], typer.Argument(help="Price files; together they are one whole.", exists=True, dir_okay=False)
]


def register(app: typer.Typer) -> None:
    app.add_typer(_plans, name="plans")


@_plans.command()
def check(files: PriceFiles, as_json: Json = False) -> None:
    """Find every mistake in price files, with its line. Publishes nothing; exit code 4 on mistakes."""
    drafts = read_price_files(files)
    if drafts.findings:
        show_findings(drafts.findings, as_json=as_json)
        raise typer.Exit(EXIT_FINDINGS)
    counts = {
        "meters": len(drafts.meters),
        "plans": len(drafts.plans),
        "charges": sum(len(draft.item.charges) for draft in drafts.plans),
    }
    if as_json:
        emit_json({**counts, "findings": []})
    else:
        said = [f"{count} {what.removesuffix('s') if count == 1 else what}" for what, count in counts.items()]
        out.print(f"No mistakes: {', '.join(said)}.", highlight=False)


@_plans.command()
def publish(
    files: PriceFiles,
    reason: Annotated[str, typer.Option(help="Why, for the audit log.")] = "",
    valid_from: Annotated[
        str | None,
        typer.Option(
            metavar="WHEN",
            help="When new and changed versions begin to count, by event time: now (that is in 60 seconds), +5m, +2h, "
            "+1d, or 2026-02-01T00:00:00Z. Default: what the files say; else from the beginning for what is new, and "
            "in 60 seconds for what changed.",
        ),
    ] = None,
    wait: Wait = WAIT_S,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Publish price files: each changed meter and plan becomes a new version, all or none."""
    begin = None if valid_from is None else _when(valid_from)
    drafts = read_price_files(files)
    publish_and_show(settings_for(data_dir), drafts, reason=reason, wait=wait, as_json=as_json, valid_from=begin)


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
        meters = {charge.meter: store.versions(connection, "meter", charge.meter)[-1] for charge in item.charges}
    if as_json:
        emit_json(
            {
                **_version_json(chosen),
                "meters": [_version_json(meter) for meter in meters.values()],
                "versions": [_version_json(other, document=False) for other in versions],
            }
        )
        return
    out.print(f"[bold]{item.id}[/] version {item.version}: {item.name}, prices in {item.currency}", highlight=False)
    prices = Table("charge", "meter", "model", "for", "unit price", "flat fee", "shown on the line")
    for charge in item.charges:
        meter = cast(Meter, meters[charge.meter].item)
        for index, (units, price, flat) in enumerate(_price_rows(charge, meter.unit)):
            head = (charge.id, charge.meter, charge.model) if index == 0 else ("", "", "")
            prices.add_row(*head, units, price, flat, "" if index else ", ".join(charge.references))
    out.print(prices)
    history = Table(*_VERSION_COLUMNS, "reason")
    for other in versions:
        history.add_row(*_version_row(other), other.reason)
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
    """What each part of a counter costs: the units it is for, the unit price, the flat fee."""
    rows = [(f"the first {_units(charge.included)}, included", "0", "")] if charge.included else []
    match charge.model:
        case "per_unit":
            rows.append((f"every {unit}", plain(charge.unit_price or Decimal(0)), ""))
        case "package":
            rows.append(
                (f"every {_units(charge.package_size or 0)} begun", plain(charge.package_price or Decimal(0)), "")
            )
        case "graduated" | "volume":
            lower = 0
            for tier in charge.tiers:
                reach = f"above {_units(lower)}" if tier.up_to is None else f"{_units(lower)} to {_units(tier.up_to)}"
                whole = "all, if " if charge.model == "volume" else ""
                rows.append((whole + reach, plain(tier.unit_price), plain(tier.flat) if tier.flat else ""))
                lower = tier.up_to or lower
    return rows


def _units(quantity: Quantity) -> str:
    """With thousands set apart: tiers are read by people."""
    whole, point, fraction = plain(quantity_decimal(quantity)).partition(".")
    return f"{int(whole):,}{point}{fraction}"


_DURATION = re.compile(r"\+([0-9]{1,6})([smhd])")
_UNIT = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def _when(text: str) -> timedelta | Micros:
    if text == "now":
        return timedelta(0)
    if match := _DURATION.fullmatch(text):
        return timedelta(**{_UNIT[match[2]]: int(match[1])})
    try:
        return parse_instant(text)
    except ValueError:
        fail(f"expected --valid-from now, +5m, +2h, +1d or 2026-02-01T00:00:00Z, got {text!r}", EXIT_USAGE)
