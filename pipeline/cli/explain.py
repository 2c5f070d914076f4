"""`tally explain ID`: why an event, a line or an invoice is what it is."""

from collections.abc import Iterable
from datetime import datetime
from decimal import Decimal
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from pipeline.billing.explain import Ambiguous, Explanation
from pipeline.billing.explain import explain as look_up
from pipeline.cli.context import DataDir, Json, settings_for
from pipeline.cli.output import EXIT_NOT_FOUND, EXIT_USAGE, emit_json, fail, out
from pipeline.core.money import plain


def register(app: typer.Typer) -> None:
    app.command()(explain)


def explain(
    what: Annotated[
        str,
        typer.Argument(
            metavar="ID",
            help="An event (KEY or ACCOUNT/KEY), where one arrived (usage.events/2/17), a line (line:123) or an "
            "invoice (invoice:5).",
        ),
    ],
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Inputs, price version, tier arithmetic and links both ways, of an event, a line or an invoice."""
    try:
        found = look_up(settings_for(data_dir), what)
    except Ambiguous as error:
        fail(str(error), EXIT_USAGE)
    if found is None:
        fail(
            "expected an event's KEY or ACCOUNT/KEY, usage.events/PARTITION/OFFSET, line:ID or invoice:ID, "
            f"got {what!r}, which nothing has. Usage on its way shows after some seconds: `tally status` tells the lag",
            EXIT_NOT_FOUND,
        )
    if as_json:
        emit_json(found)
        return
    show = {"event": _event, "line": _line, "invoice": _invoice}[found["kind"]]
    for panel in show(found):
        out.print(panel)


# -- events


def _event(found: Explanation) -> Iterable[RenderableType]:
    name = "event" if found["account"] is None else f"event {found['account']}/{found['idempotency_key']}"
    facts = [
        ("state", found["state"].replace("_", " ")),
        ("arrived", f"{found['origin']} at {_time(found['arrived_at'])}"),
    ]
    facts.append(("receipt", _receipt(found["receipt"])))
    if (event := found["event"]) is None:
        facts.append(("content", "not readable"))
    else:
        facts += [
            ("happened", f"{_time(event['event_time'])}, {event['event_type']}"),
            ("subject", event["subject"] or "none"),
            ("sent by", f"{event['source']}, number {event['sequence']}"),
            *((f"  {name}", value) for name, value in sorted(event["properties"].items())),
        ]
    if found["state"] == "duplicate":
        facts.append(("repeats", ", ".join(sorted({row["origin"] for row in found["rows"]}))))
    yield _panel(name, _facts(facts))
    for row in found["rows"]:
        yield _rated(row)
    for unrated in found["unrated"]:
        yield _unrated(unrated)
    if found["quarantined"]:
        table = Table("quarantined as", "charge", "stands at", "put aside")
        for one in found["quarantined"]:
            place = f"{one['topic']}/{one['partition']}/{one['offset']}"
            table.add_row(one["reason"], one["charge"], place, _time(one["at"]))
        yield table


def _receipt(receipt: Explanation | None) -> str:
    if receipt is None:
        return "none yet: no rater has come to it"
    return (
        f"offsets {receipt['first_offset']} to {receipt['next_offset'] - 1}, {receipt['records']} records by "
        f"{receipt['worker']} at {_time(receipt['committed_at'])}"
    )


def _rated(row: Explanation) -> Panel:
    facts = [
        ("priced by", _prices(row)),
        ("quantity", _quantity(row)),
        ("running", f"{plain(row['quantity_before'])} before, {plain(row['quantity_after'])} after"),
        ("counted from", _time(row["segment_start"])),
        ("amount", f"{plain(row['amount'])} {row['currency']}" + (" (late)" if row["late"] else "")),
        ("on", f"{row['line']} of {row['invoice']}"),
        ("period", f"{_time(row['period_start'])} to {_time(row['period_end'])}"),
        ("arrived", row["origin"]),
        ("rated row", f"usage.rated/{row['rated_partition']}/{row['rated_offset']}, catalog {row['catalog_offset']}"),
    ]
    content: list[RenderableType] = [_facts(facts)]
    arithmetic = row["arithmetic"]
    if arithmetic is None:
        content.append(Text(_NO_PRICE))
    else:
        for side in ("before", "after"):
            quantity, cost, parts = (arithmetic[side][name] for name in ("quantity", "cost", "parts"))
            content.append(_parts(parts, f"price of {plain(quantity)} ({side})", cost))
        content.append(
            Text(
                f"{plain(arithmetic['after']['cost'])} - {plain(arithmetic['before']['cost'])} = "
                f"{plain(arithmetic['difference'])}: {_verdict(arithmetic['proved'], row['amount'])}"
            )
        )
    entry = "" if row["kind"] == "usage" else f", {row['kind']} {row['entry']}"
    return _panel(f"charge {_charge(row)}{entry}", Group(*content))


def _unrated(one: Explanation) -> Panel:
    facts = [
        ("state", one["state"].replace("_", " ")),
        ("arrived", one["origin"]),
        ("reason", f"{one['reason']} (stage {one['stage']})" if one["reason"] else "its letter has not come yet"),
        ("message", one["message"] or ""),
        ("tried", f"{one['attempts']} times, replayed {one['replays']} times"),
    ]
    if one["state"] == "parked" and one["not_before"] is not None:
        facts.append(("tried again", f"not before {_time(one['not_before'])}"))
    if one["decision"]:
        facts.append(("decision", f"{one['decision']} by {one['decided_by']} at {_time(one['decided_at'])}"))
        facts.append(("because", one["decision_reason"] or "no reason given"))
    return _panel("not rated at first sight", _facts(facts))


# -- lines and invoices


def _line(found: Explanation) -> Iterable[RenderableType]:
    facts = [
        ("on", f"{found['invoice']} of {found['account']} ({found['invoice_state']})"),
        ("period", f"{_time(found['period_start'])} to {_time(found['period_end'])}"),
        ("counted from", _time(found["segment_start"])),
        ("charge", _charge(found)),
        ("priced by", _prices(found)),
        ("quantity", _quantity(found)),
        ("amount", f"{plain(found['exact_amount'])} {found['currency']} exact, {found['rounded_amount']} rounded"),
        ("events", f"{found['events']:,}, {found['late_events']:,} of them late"),
    ]
    for name, kept in found["reference_values"].items():
        facts.append((f"  {name}", ", ".join(kept["values"]) + (", …" if kept["more"] else "")))
    yield _panel(f"line:{found['line_id']}", _facts(facts))
    if (arithmetic := found["arithmetic"]) is None:
        yield Text(_NO_PRICE)
    else:
        if len(arithmetic["lines"]) > 1:
            yield _counter(arithmetic)
        yield _parts(arithmetic["parts"], f"price of {plain(arithmetic['quantity'])}", arithmetic["cost"])
        yield Text(_verdict(arithmetic["proved"], arithmetic["amount"]))
    table = Table("first events", "happened", "quantity", "amount", "arrived at")
    for event in found["first_events"]:
        quantity, amount = plain(event["quantity"]), plain(event["amount"])
        table.add_row(escape(event["event"]), _time(event["event_time"]), quantity, amount, event["origin"])
    yield table


def _invoice(found: Explanation) -> Iterable[RenderableType]:
    period = f"{_time(found['period_start'])} to {_time(found['period_end'])}"
    yield _panel(
        f"invoice:{found['id']}",
        _facts([("account", found["account"]), ("state", found["state"]), ("period", period)]),
    )
    table = Table("line", "charge", "plan", "events", show_footer=True)
    for column, footer in (
        ("quantity", ""),
        ("exact", plain(found["exact_amount"])),
        ("rounded", str(found["rounded_amount"])),
    ):
        table.add_column(column, footer, justify="right")
    for line in found["lines"]:
        table.add_row(
            line["line"],
            escape(_charge(line)),
            f"{line['plan']} version {line['plan_version']}",
            f"{line['events']:,}",
            plain(line["quantity"]),
            plain(line["exact_amount"]),
            str(line["rounded_amount"]),
        )
    yield table
    yield Text(f"Amounts in {found['currency']}.")


# -- pieces

_NO_PRICE = "The catalog has no such price: no arithmetic to show."


def _charge(one: Explanation) -> str:
    return f"{one['charge']} [{one['cell']}]" if one["cell"] else str(one["charge"])


def _prices(one: Explanation) -> str:
    plan = f"plan {one['plan']} version {one['plan_version']}"
    return f"contract {one['contract']}, {plan}, price {one['price_version']}"


def _quantity(one: Explanation) -> str:
    return f"{plain(one['quantity'])} by meter {one['meter']} version {one['meter_version']}"


def _parts(parts: list[Explanation], title: str, cost: Decimal) -> Table:
    table = Table(title=title, title_justify="left", show_footer=True)
    table.add_column("units", "cost", justify="left")
    for column, footer in (("quantity", ""), ("unit price", ""), ("flat fee", ""), ("amount", plain(cost))):
        table.add_column(column, footer, justify="right")
    for part in parts:
        packages = "" if part["packages"] is None else f" in {part['packages']} packages"
        table.add_row(
            f"over {plain(part['over'])} up to {plain(part['up_to'])}",
            plain(part["quantity"]) + packages,
            plain(part["unit_price"]),
            plain(part["flat"]),
            plain(part["amount"]),
        )
    return table


def _counter(arithmetic: Explanation) -> Table:
    """The lines that share a running quantity, where the meter changed in the middle."""
    title = "the meter changed: these lines count on, and are priced together"
    table = Table("line", "meter version", title=title, title_justify="left", show_footer=True)
    for column in ("quantity", "amount"):
        table.add_column(column, plain(arithmetic[column]), justify="right")
    for line in arithmetic["lines"]:
        table.add_row(line["line"], str(line["meter_version"]), plain(line["quantity"]), plain(line["amount"]))
    return table


def _verdict(proved: bool, amount: Decimal) -> str:
    return "equals the stored amount" if proved else f"NOT the stored amount {plain(amount)}"


def _facts(facts: Iterable[tuple[str, Any]]) -> Table:
    table = Table.grid(padding=(0, 2))
    for name, value in facts:
        table.add_row(Text(name, style="dim"), Text(str(value)))
    return table


def _panel(title: str, content: RenderableType) -> Panel:
    return Panel(content, title=escape(title), title_align="left", expand=False)


def _time(at: datetime | None) -> str:
    return "unknown" if at is None else at.replace(tzinfo=None).isoformat(sep=" ") + " UTC"
