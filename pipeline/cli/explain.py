"""`tally explain ID`: why an event, a line, a document or an account's month is what it is."""

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
            help="A document by its number (or document:7), an event (KEY or ACCOUNT/KEY), where one arrived "
            "(usage.events/2/17), a line (line:123), a period's lines (invoice:5) or an account's month "
            "(month:acme/2026-10).",
        ),
    ],
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Inputs, versions, each part of the price in words, and links both ways, of a document, line, event or month."""
    try:
        found = look_up(settings_for(data_dir), what)
    except Ambiguous as error:
        fail(str(error), EXIT_USAGE)
    if found is None:
        fail(
            "expected a document's number, document:ID, an event's KEY or ACCOUNT/KEY, usage.events/PARTITION/OFFSET, "
            f"line:ID, invoice:ID or month:ACCOUNT/YYYY-MM, got {what!r}, which nothing has. "
            "Usage on its way shows after some seconds: `tally status` tells the lag",
            EXIT_NOT_FOUND,
        )
    if as_json:
        emit_json(found)
        return
    show = {"event": _event, "line": _line, "invoice": _invoice, "document": _document, "month": _month}[found["kind"]]
    for panel in show(found):
        out.print(panel, soft_wrap=False)  # text in panels wraps; soft, it would be cut at their edge


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
    for correction in found["corrections"]:
        yield _correction(correction)
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
    content: list[RenderableType] = [_facts(facts), *_row_arithmetic(row)]
    entry = "" if row["kind"] == "usage" else f", {row['kind']} {row['entry']}"
    return _panel(f"charge {_charge(row)}{entry}", Group(*content))


def _correction(one: Explanation) -> Panel:
    facts = [
        ("decided", f"{_time(one['decided_at'])} by {one['decided_by']}"),
        ("because", _why(one["reason_code"], one["note"])),
        ("state", one["state"]),
    ]
    if one["backfill"]:
        facts.append(("part of", f"the revert of backfill {one['backfill']}"))
    for name, value in one["changed"].items():
        before = "nothing" if value["from"] is None else value["from"]
        facts.append((f"  {name}", f"{before} → {value['to']}"))
    content: list[RenderableType] = [_facts(facts)]
    if one["rows"]:
        table = Table("charge", "row", "on")
        for column in ("quantity", "amount"):
            table.add_column(column, justify="right")
        for row in one["rows"]:
            numbers = plain(row["quantity"]), f"{plain(row['amount'])} {row['currency']}"
            table.add_row(_charge(row), f"{row['kind']} {row['entry']}", row["line"], *numbers)
        content.append(table)
    return _panel(f"{one['action']}: correction {one['number']}", Group(*content))


def _row_arithmetic(row: Explanation) -> Iterable[RenderableType]:
    arithmetic = row["arithmetic"]
    if arithmetic is None:
        yield Text(_NO_PRICE)
        return
    if arithmetic["how"] == "difference":
        for side in ("before", "after"):
            quantity, cost, parts = (arithmetic[side][name] for name in ("quantity", "cost", "parts"))
            yield _parts(parts, f"price of {plain(quantity)} ({side})", cost)
        yield Text(
            f"{plain(arithmetic['after']['cost'])} - {plain(arithmetic['before']['cost'])} = "
            f"{plain(arithmetic['difference'])}: {_verdict(arithmetic['proved'], row['amount'])}"
        )
    elif arithmetic["how"] == "event":
        yield _parts(arithmetic["parts"], "price of this event", arithmetic["difference"])
        yield Text(_verdict(arithmetic["proved"], row["amount"]))
    if arithmetic["note"]:
        yield Text(arithmetic["note"])


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
    if found["entries"]:
        sums = [plain(found[name]) for name in ("rows_amount", "entries_amount", "exact_amount")]
        facts.append(("made of", f"{sums[0]} of events + {sums[1]} booked beside them = {sums[2]}"))
    if not found["documents"]:
        facts.append(("billed on", "no document yet"))
    yield _panel(f"line:{found['line_id']}", _facts(facts))
    if (arithmetic := found["arithmetic"]) is None:
        yield Text(_NO_PRICE)
    else:
        if len(arithmetic["lines"]) > 1:
            yield _counter(arithmetic)
        yield _parts(arithmetic["parts"], f"price of {plain(arithmetic['quantity'])}", arithmetic["cost"])
        yield Text(_verdict(arithmetic["proved"], arithmetic["amount"]))
        if arithmetic["note"]:
            yield Text(arithmetic["note"])
    if found["entries"]:
        yield _entries(found["entries"])
    if found["documents"]:
        yield _billed(found["documents"])
    table = Table("first events", "happened", "quantity", "amount", "arrived at")
    for event in found["first_events"]:
        quantity, amount = plain(event["quantity"]), plain(event["amount"])
        name = event["event"] if event["kind"] == "usage" else f"{event['event']} ({event['kind']})"
        table.add_row(escape(name), _time(event["event_time"]), quantity, amount, event["origin"])
    yield table


def _entries(entries: list[Explanation]) -> Table:
    table = Table("booked", "by", "why", "because")
    for column in ("quantity", "amount"):
        table.add_column(column, justify="right")
    for entry in entries:
        why = ", ".join(reason.replace("_", " ") for reason in entry["reasons"])
        numbers = plain(entry["quantity"]), plain(entry["amount"])
        table.add_row(_time(entry["booked_at"]), escape(entry["booked_by"]), why, escape(entry["note"]), *numbers)
    return table


def _billed(documents: list[Explanation]) -> Table:
    table = Table("billed on", "state", "its line", "", box=None, padding=(0, 1, 0, 0))
    for column in ("quantity", "exact", "rounded", "discount", "tax", "total"):
        table.add_column(column, justify="right", no_wrap=column != "quantity")
    for one in documents:
        amounts = (str(one[f"{name}amount"]) for name in ("", "discount_", "tax_"))
        table.add_row(
            escape(_name(one)),
            one["document_state"],
            str(one["position"]),
            "taken back" if one["role"] == "reversal" else "",
            f"{plain(one['quantity'])} {escape(one['unit'])}",
            plain(one["exact_amount"]),
            *amounts,
            f"{one['total_amount']} {one['currency']}",
        )
    return table


def _invoice(found: Explanation) -> Iterable[RenderableType]:
    period = f"{_time(found['period_start'])} to {_time(found['period_end'])}"
    yield _panel(
        f"invoice:{found['id']}",
        _facts(
            [
                ("account", found["account"]),
                ("state", found["state"]),
                ("period", period),
                ("billed on", ", ".join(map(_name, found["documents"])) or "no document yet"),
            ]
        ),
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


# -- documents


def _document(found: Explanation) -> Iterable[RenderableType]:
    currency = found["currency"]
    facts = [
        ("payer", _party(found["account"], found["buyer"])),
        ("from", _party(found["legal_entity"], found["seller"])),
        ("period", f"{_time(found['period_start'])} to {_time(found['period_end'])}"),
        ("state", found["state"]),
    ]
    if found["payment"] is not None:
        facts.append(("payment", f"{found['payment'].replace('_', ' ')}, {found['open_amount']} {currency} open"))
    dates = (("issued", "issue_date"), ("taxed as of", "tax_date"), ("due", "due_date"))
    facts.append(("days", ", ".join(f"{name} {found[day]}" for name, day in dates if found[day] is not None)))
    for step in ("created", "reviewed", "issued", "voided"):
        if found[f"{step}_at"] is not None:
            facts.append((step, f"{_time(found[f'{step}_at'])} by {found[f'{step}_by']}"))
    for name, code, note in (("because", "reason_code", "note"), ("void because", "void_reason_code", "void_note")):
        if why := _why(found[code], found[note]):
            facts.append((name, why))
    for link in found["links"]:
        why = _why(link["reason_code"], link["note"])
        other = _name(link | {"document_kind": link["kind"]})
        facts.append((link["relation"], f"{other} ({link['state']})" + (f": {why}" if why else "")))
    yield _panel(_name(found), _facts(facts))
    yield _document_lines(found)
    for line in found["lines"]:
        if line["parts"] and not line["lines"]:
            yield _stored_parts(line)
    if any(line["lines"] for line in found["lines"]):
        yield Text("`tally explain line:ID` tells the events behind a line, and its price part by part.")
    if any(found[name] for name in ("discounts", "credits", "settlements")):
        yield _taken_off(found)
    yield from _totals(found)


def _document_lines(found: Explanation) -> Table:
    lines = found["lines"]
    whose = len({line["account"] for line in lines}) > 1
    # What says the same as the column before it is left out: amounts have to fit into a terminal uncut.
    amounts = {"lines": "amount"}
    if any(line["discount_amount"] for line in lines):
        amounts["discounts"] = "discount_amount"
    if any(line["net_amount"] != line["amount"] for line in lines):
        amounts["net"] = "net_amount"
    amounts |= {"tax": "tax_amount", "total": "total_amount"}
    table = Table(box=None, padding=(0, 1, 0, 0), show_footer=True)
    for column in ("", *(["account"] if whose else []), "what", "stands on", "priced by"):
        table.add_column(column, overflow="fold")
    for column in ("quantity", "exact", "rounding"):
        table.add_column(column, justify="right", no_wrap=column != "quantity")
    for total, column in amounts.items():
        heading, footer = column.removesuffix("_amount"), str(found[f"{total}_amount"])
        table.add_column(heading, footer, justify="right", no_wrap=True)
    for line in lines:
        taken_back = " taken back" if line["role"] == "reversal" else ""
        about = line["adjusts"]
        of = f", line {about['position']} of {about['number'] or about['document']}" if about else ""
        cell = f" [{line['cell']}]" if line["cell"] else ""
        table.add_row(
            str(line["position"]),
            *([escape(line["account"])] if whose else []),
            escape(f"{line['name']}{cell}{taken_back}{of}"),
            "\n".join(line["lines"]) or f"no usage: {line['kind']}",
            escape(line["price_version"]),
            f"{plain(line['quantity'])} {escape(line['unit'])}".strip(),
            plain(line["exact_amount"]),
            plain(line["rounding_difference"]),
            *(str(line[column]) for column in amounts.values()),
        )
    return table


def _stored_parts(line: Explanation) -> Table:
    """The price of a line that no usage stands behind, as it was kept with the document."""
    table = Table("part", title=f"price of line {line['position']}", title_justify="left")
    for column in ("quantity", "unit price", "flat", "amount"):
        table.add_column(column, justify="right")
    for part in line["parts"]:
        table.add_row(part["kind"], *(part[name] for name in ("quantity", "unit_price", "flat", "amount")))
    return table


def _taken_off(found: Explanation) -> Table:
    table = Table("taken off", "what")
    table.add_column("amount", justify="right")
    for one in found["discounts"]:
        on = "all lines" if one["line_position"] is None else f"line {one['line_position']}"
        what = f"credit {one['grant_id']}" if one["grant_id"] is not None else f"coupon {one['coupon']}"
        named = f" ({one['name']})" if one["name"] else ""
        table.add_row(f"discount on {on}", escape(what + named), str(one["amount"]))
    for one in found["credits"]:
        table.add_row(f"credit on {one['reduces']}", f"{one['kind']} credit {one['grant_id']}", plain(one["amount"]))
    for one in found["settlements"]:
        what = f"{one['at']:%Y-%m-%d} by {one['by']} {one['reference']}".rstrip()
        undone = " taken back" if one["takes_back"] is not None else ""
        table.add_row(f"{one['kind'].replace('_', ' ')}{undone}", escape(what), str(one["amount"]))
    return table


def _totals(found: Explanation) -> Iterable[RenderableType]:
    for tax in found["taxes"]:
        how = "" if tax["treatment"] == "standard" else f", {tax['treatment'].replace('_', ' ')}"
        note = f" ({tax['note']})" if tax["note"] else ""
        yield Text(f"{tax['tax']} {plain(tax['percent'])} %{how} on {tax['base_amount']}: {tax['tax_amount']}{note}")
    net, tax_, total, credits_, balance, payable = (
        found[f"{name}_amount"] for name in ("net", "tax", "total", "credits", "balance", "payable")
    )
    yield Text(
        f"net {net} + tax {tax_} = total {total}; total {total} - credits {credits_} - balance {balance} = "
        f"payable {payable} {found['currency']}"
    )
    if found["fx_currency"] is not None:
        other = ", ".join(f"{name} {found[f'fx_{name}_amount']}" for name in ("net", "tax", "total"))
        rate = f"{plain(found['fx_rate'])} {found['fx_currency']} ({found['fx_source']}, {found['fx_date']})"
        yield Text(f"1 {found['currency']} = {rate}: {other}")
    wrong = [one for one in found["checks"] if not one["proved"]]
    for one in wrong:
        yield Text(f"{one['what'].removesuffix('_amount')} {one['expected']} is NOT {one['equals']}: {one['found']}")
    if not wrong:
        yield Text("Each total equals the sum of its lines, the tax that of its rates.")


def _name(document: Explanation) -> str:
    """Kind and number; a draft has an id only."""
    kind = document["document_kind"].replace("_", " ")
    return f"{kind} {document['number']}" if document["number"] else f"{kind} {document['document']}"


def _party(id: str, name: str | None) -> str:
    return f"{name} ({id})" if name and name != id else id


def _why(code: str | None, note: str | None) -> str:
    return ": ".join(text for text in ((code or "").replace("_", " "), note) if text)


# -- an account's month


def _month(found: Explanation) -> Iterable[RenderableType]:
    facts = [("period", f"{_time(found['period_start'])} to {_time(found['period_end'])}")]
    for segment in found["segments"]:
        trial = ", on trial" if segment["trial"] else ""
        facts.append(
            (
                f"from {segment['start']:%Y-%m-%d}",
                f"{segment['plan_name']} ({segment['price_version']}{trial}), {segment['share']}, "
                f"contract {segment['contract']}",
            )
        )
        for pool in segment["pools"]:
            facts.append((f"  pool {pool['pool']}", f"{plain(pool['included'])} {pool['unit']} included"))
    yield _panel(f"{found['account']} in {found['month']}", _facts(facts))
    for line in found["lines"]:
        usage = f": {line['usage']}" if line["meter"] else ""
        on = f" ({', '.join(line['lines'])})" if line["lines"] else ""
        title = f"{_charge(line)} from {line['segment_start']:%Y-%m-%d}{usage}{on}"
        yield _parts(line["parts"], title, line["amount"])
    for event in found["refused"]:
        yield Text(f"{event['event']} has no price by today's catalog: {event['problem']}")
    for total in found["totals"]:
        amount, held, to_book = (plain(total[name]) for name in ("amount", "held", "to_book"))
        rest = "as its lines hold" if amount == held else f"its lines hold {held}, {to_book} is booked at the close"
        yield Text(f"In all {amount} {total['currency']}: {rest}.")


# -- pieces

_NO_PRICE = "The catalog has no such price: no arithmetic to show."


def _charge(one: Explanation) -> str:
    return f"{one['charge']} [{one['cell']}]" if one["cell"] else str(one["charge"])


def _prices(one: Explanation) -> str:
    plan = f"plan {one['plan']} version {one['plan_version']}"
    return f"contract {one['contract']}, {plan}, price {one['price_version']}"


def _quantity(one: Explanation) -> str:
    by = f" by meter {one['meter']} version {one['meter_version']}" if one["meter"] else ""
    return f"{plain(one['quantity'])}{by}"


def _parts(parts: list[Explanation], title: str, cost: Decimal) -> Table:
    """Each part in words, with its place in the quantity, and what the parts add up to."""
    table = Table(title=escape(title), title_justify="left", show_footer=True)
    table.add_column("what", "cost", justify="left")
    table.add_column("units", justify="left")
    for column, footer in (("quantity", ""), ("amount", plain(cost))):
        table.add_column(column, footer, justify="right")
    for part in parts:
        subject = f"{part['subject'] or 'nobody'}: " if "subject" in part else ""
        units = f"over {plain(part['over'])} up to {plain(part['up_to'])}" if part["quantity"] else ""
        quantity = plain(part["quantity"]) if part["quantity"] else ""
        table.add_row(escape(subject + part["text"]), units, quantity, plain(part["amount"]))
    return table


def _counter(arithmetic: Explanation) -> Table:
    """The lines that share a running quantity, where the meter changed in the middle or usage came late."""
    versions = {line["meter_version"] for line in arithmetic["lines"]}
    why = "the meter changed" if len(versions) > 1 else "usage came after the close"
    title = f"{why}: these lines count on, and are priced together"
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
