"""Worked pricing examples of other billing systems in our own terms: one function for each kind, and their table.

A function takes a case's inputs, prices them with the product's functions, and returns everything it knows about the
result by the names that examples use; the case says which of it it expects. Nothing is priced here.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from functools import partial
from itertools import pairwise
from typing import Any, get_args

from pipeline.cli.case_numbers import (
    Inputs,
    Results,
    Run,
    amount_of,
    both,
    decimal_of,
    money_of,
    named_amount,
    quantity_of,
    units_of,
)
from pipeline.cli.credit_cases import CREDIT_CASES
from pipeline.cli.invoice_cases import INVOICE_CASES, document, line_amounts, shown
from pipeline.cli.proration_cases import PRORATION_CASES
from pipeline.core.aggregation import Opening, aggregate, carried
from pipeline.core.charges import Cell, Charge, Model, Tier, check_charge, compile_price
from pipeline.core.closing import Closing, Counter, Member, Span, close_segment, closing_price
from pipeline.core.commitments import settle
from pipeline.core.documents import Entry, from_document
from pipeline.core.meters import Aggregation, Conversion, Meter, Rounding, RoundingMode, compile_measure
from pipeline.core.money import (
    AMOUNT_DECIMALS,
    Amount,
    Micros,
    Quantity,
    scaled,
)
from pipeline.core.periods import Period, parse_instant
from pipeline.core.plans import Pool

_DAY_US: Micros = 86_400_000_000
_MONTH = Period(0, 30 * _DAY_US)
_SPAN = Span(_MONTH.start_us, _MONTH.end_us, _MONTH)
_USAGE = Meter("usage", 1, "usage", "sum", "value", "unit", (), True, 0)
_CENTS = 100


def _cents(amount: Amount) -> Fraction:
    return money_of(amount) * _CENTS


# -- charges by quantity


def _charge(model: Model, inputs: Inputs, **more: Any) -> Charge:
    """The charge that the inputs describe. Beyond the last tier an example names, that tier's price goes on."""
    tiers = tuple(_tier(line) for line in inputs.get("tiers", ()))
    charge = Charge(
        "case",
        "usage",
        model,
        unit_price=decimal_of(inputs["unit"]) if "unit" in inputs else None,
        tiers=tiers,
        package_size=quantity_of(inputs["package_size"]) if "package_size" in inputs else None,
        package_price=decimal_of(inputs.get("package_price", 0)),
        included=quantity_of(inputs.get("free_units") or 0),
        flat_on_zero=inputs.get("flat_on_zero", True),
        bound=inputs.get("bound", "inclusive"),
        beyond=inputs.get("beyond"),
        minimum=decimal_of(inputs["minimum"]) if "minimum" in inputs else None,
        maximum=decimal_of(inputs["maximum"]) if "maximum" in inputs else None,
    )
    charge = replace(charge, **more)
    if charge.tiers and charge.tiers[-1].up_to is not None and charge.beyond is None:
        charge = replace(charge, beyond="last_tier")
    check_charge(charge)
    return charge


def _tier(line: Inputs) -> Tier:
    return Tier(
        None if line["up_to"] is None else quantity_of(line["up_to"]),
        decimal_of(line.get("unit", 0)),
        decimal_of(line.get("flat", line.get("price", 0))),
        decimal_of(line["rate_pct"]) if "rate_pct" in line else None,
        decimal_of(line["cap"]) if "cap" in line else None,
    )


def _closed(charge: Charge, quantity: Quantity) -> Closing:
    return closing_price(charge, _USAGE, [Member(0, "all", quantity)], _SPAN)


def _part(closing: Closing, kind: str) -> Amount:
    return sum(part.amount for part in closing.parts if part.kind == kind)


def _lines(closing: Closing) -> list[Amount]:
    """Usage and flat fee of each tier as lines of their own. The first tier's usage is shown even where it is free."""
    lines = []
    for number, part in enumerate(part for part in closing.parts if part.kind == "usage"):
        flat = scaled(part.flat, AMOUNT_DECIMALS)
        usage = part.amount - flat
        if usage or number == 0:
            lines.append(usage)
        if flat:
            lines.append(flat)
    return lines


def _by_quantity(model: Model, inputs: Inputs, **more: Any) -> Results:
    charge = _charge(model, inputs, **more)
    return _shown(charge, _closed(charge, quantity_of(inputs["quantity"])))


def _shown(charge: Charge, closing: Closing) -> Results:
    usage = [part for part in closing.parts if part.kind == "usage"]
    packages = sum(part.packages or 0 for part in usage)
    discount = -_part(closing, "maximum")
    return {
        "total": money_of(closing.amount),
        "usage": money_of(_part(closing, "usage")),
        "minimum_line": money_of(_part(closing, "minimum")),
        "discount": money_of(discount),
        "tier_amounts": [money_of(part.amount) for part in usage],
        "line_amounts": [money_of(line) for line in _lines(closing)],
        "packages": Fraction(packages),
        "billed_units": units_of(packages * (charge.package_size or 0)),
    }


def _stairstep(inputs: Inputs) -> Results:
    return _by_quantity("stairstep", {**inputs, "tiers": inputs["ranges"]})


def _block_graduated(inputs: Inputs) -> Results:
    """Tiers hold so many blocks each; ours are bounded by their sum."""
    size, bound, tiers = decimal_of(inputs["block_size"]), Decimal(0), []
    for line in inputs["tiers"]:
        bound += size * decimal_of(line["blocks"] or 0)
        tiers.append({"up_to": None if line["blocks"] is None else bound, "unit": line["price"]})
    return _by_quantity("block", {**inputs, "tiers": tiers, "package_size": size})


def _block_volume(inputs: Inputs) -> Results:
    parts = []
    for part in inputs["parts"]:
        one_tier = {"tiers": [{"up_to": None, "unit": part["price"]}], "package_size": 1, "quantity": part["blocks"]}
        parts.append(_by_quantity("block", one_tier)["total"])
    return {"part_amounts": parts, "total": sum(parts)}


def _detail_sum(inputs: Inputs) -> Results:
    amounts = [
        _by_quantity("per_unit", {"unit": row["price"], "quantity": row["quantity"]})["total"] for row in inputs["rows"]
    ]
    return {"amounts": amounts, "total": sum(amounts)}


def _capacity_tier(inputs: Inputs) -> Results:
    """Each unit's peak reaches a step; the highest is paid."""
    reached = [
        _by_quantity(
            "stairstep",
            {"tiers": [{"up_to": limit, "price": inputs["tier_price"]}], "quantity": inputs["peaks"][unit]},
            beyond="park",
        )["total"]
        for unit, limit in inputs["tier_limits"].items()
    ]
    return {"total": max(reached)}


def _incremental(model: Model, inputs: Inputs) -> Results:
    """What more usage adds to what was used before: a difference of prices, line by line."""
    charge = _charge(model, inputs)
    free = replace(charge, maximum=None)
    names = ("cumulative_before", "amount") if model == "graduated_percentage" else ("quantity_before", "quantity")
    used, more = (quantity_of(inputs[name]) for name in names)
    before, after = _closed(charge, used), _closed(charge, used + more)
    billed = amount_of(inputs["previously_billed"]) if "previously_billed" in inputs else before.amount
    usage = _closed(free, used + more).amount - _closed(free, used).amount
    lines = _added_lines(_closed(free, used), _closed(free, used + more))
    totals = _up_to(after.amount - billed, lines)
    return {
        "total": money_of(after.amount - billed),
        "usage": money_of(usage),
        "discount": money_of(usage - (after.amount - billed)),
        "line_amounts": [money_of(line) for line in lines],
        "line_totals": [money_of(total) for total in totals],
        "line_discounts": [money_of(line - total) for line, total in zip(lines, totals, strict=True)],
    }


def _added_lines(before: Closing, after: Closing) -> list[Amount]:
    """The lines of each tier that changed between two closings of a counter."""
    known = {part.tier: part for part in before.parts}
    lines = []
    for part in after.parts:
        earlier = known.get(part.tier)
        flat = scaled(part.flat, AMOUNT_DECIMALS) if earlier is None else 0
        usage = part.amount - (earlier.amount if earlier else 0) - flat
        lines += [line for line in (usage, flat) if line]
    return lines


def _up_to(limit: Amount, lines: Iterable[Amount]) -> list[Amount]:
    """Lines in order, as far as the limit goes."""
    totals = []
    for line in lines:
        totals.append(min(line, limit))
        limit -= totals[-1]
    return totals


# -- charges by event


def _percentage(inputs: Inputs) -> Results:
    charge = Charge(
        "case",
        "usage",
        "percentage",
        rate=decimal_of(inputs["rate_pct"]),
        fixed=decimal_of(inputs.get("fixed_per_event", 0)),
        free_events=inputs.get("free_events"),
        free_amount=quantity_of(inputs["free_amount"]) if inputs.get("free_amount") is not None else None,
        event_minimum=decimal_of(inputs["min"]) if inputs.get("min") is not None else None,
        event_maximum=decimal_of(inputs["max"]) if inputs.get("max") is not None else None,
    )
    check_charge(charge)
    members = [Member(number, "", quantity) for number, quantity in enumerate(_event_quantities(inputs))]
    after = [closing_price(charge, _USAGE, members[:count], _SPAN) for count in range(len(members) + 1)]
    charged = [part for part in after[-1].parts if part.kind == "events"]
    return {
        "total": money_of(after[-1].amount),
        "per_event": [money_of(now.amount - before.amount) for before, now in pairwise(after)],
        "percentage_part": sum((units_of(part.quantity) * Fraction(part.unit_price) for part in charged), Fraction(0)),
        "fixed_part": sum((Fraction(part.flat) * (part.events or 0) for part in charged), Fraction(0)),
    }


def _event_quantities(inputs: Inputs) -> list[Quantity]:
    """Each event's own; some examples give the total after each of the first ones, and after all."""
    if isinstance(inputs["events"], list):
        return [quantity_of(event) for event in inputs["events"]]
    totals = [0, *(quantity_of(total) for total in inputs["running_total"]), quantity_of(inputs["units"])]
    return [after - before for before, after in pairwise(totals)]


def _given_amounts(
    amounts: Sequence[Amount], *, multiplier: Decimal = Decimal(1), maximum: Decimal | None = None
) -> Amount:
    charge = Charge("case", "usage", "dynamic", amount_property="amount", multiplier=multiplier, maximum=maximum)
    check_charge(charge)
    members = [Member(number, "", 0, amount=amount) for number, amount in enumerate(amounts)]
    return closing_price(charge, _USAGE, members, _SPAN).amount


def _dynamic_events(inputs: Inputs) -> Results:
    events = inputs["events"]
    units = _aggregated(
        _USAGE, [Member(number, "", quantity_of(event["units"])) for number, event in enumerate(events)]
    )
    return {
        "units": units_of(units),
        "total": money_of(_given_amounts([amount_of(event["amount"]) for event in events])),
    }


def _dynamic(inputs: Inputs) -> Results:
    """One more amount after those before it, marked up, under the charge's maximum."""
    multiplier = decimal_of(inputs.get("multiplier", 1))
    maximum = decimal_of(inputs["maximum"]) if "maximum" in inputs else None
    before = [amount_of(inputs["amount_before"])] if "amount_before" in inputs else []
    after = [*before, amount_of(inputs["amount"])]

    def added(limit: Decimal | None) -> Amount:
        costs = (_given_amounts(amounts, multiplier=multiplier, maximum=limit) for amounts in (after, before))
        return next(costs) - next(costs)

    usage, total = added(None), added(maximum)
    return {"usage": money_of(usage), "discount": money_of(usage - total), "total": money_of(total)}


def _sum_of_amounts(inputs: Inputs) -> Results:
    return {"total": money_of(_given_amounts([amount_of(part) for part in inputs["parts"]]))}


# -- cells, fees and pools


def _matrix(inputs: Inputs) -> Results:
    """Usage by cell: each cell's quantity at its price, or the default's."""
    by = tuple(inputs["by"])
    cells = tuple(Cell(tuple(cell["values"]), decimal_of(cell["unit"])) for cell in inputs["cells"])
    charge = _charge("matrix", inputs, by=by, cells=cells)
    usage = {
        Counter(charge.id, tuple(part["values"])): [Member(0, "all", quantity_of(part["quantity"]))]
        for part in inputs["usage"]
    }
    closings = close_segment([(charge, _USAGE)], [], usage, _SPAN)
    return {
        "cell_amounts": [money_of(closings[counter].amount) for counter in usage],
        "minimum_line": money_of(sum(_part(closing, "minimum") for closing in closings.values())),
        "total": money_of(sum(closing.amount for closing in closings.values())),
    }


def _flat_fee(inputs: Inputs) -> Results:
    """A fee of so many seats, for a segment of the period."""
    days = inputs.get("period_days", 30)
    period = Period(0, days * _DAY_US)
    span = Span(0, inputs.get("days_used", days) * _DAY_US, period)
    charge = Charge(
        "fee",
        None,
        "flat",
        decimal_of(inputs["unit"]),
        quantity=quantity_of(inputs.get("quantity", 1)),
        in_advance=inputs.get("in_advance", False),
        prorate=inputs.get("prorate", True),
    )
    check_charge(charge)
    return {"total": money_of(closing_price(charge, None, [], span).amount)}


def _included_pool(inputs: Inputs) -> Results:
    """Units that several charges share, in the order they are listed."""
    charges = [(replace(_charge("per_unit", line), id=line["id"]), _USAGE) for line in inputs["charges"]]
    pool = Pool("pool", "unit", quantity_of(inputs["included"]), tuple(line["id"] for line in inputs["charges"]))
    usage = {Counter(line["id"]): [Member(0, "all", quantity_of(line["quantity"]))] for line in inputs["charges"]}
    closings = close_segment(charges, [pool], usage, _SPAN)
    free = {
        c.charge: sum(part.quantity for part in found.parts if part.kind == "pool") for c, found in closings.items()
    }
    return {
        "from_pool": {charge: units_of(quantity) for charge, quantity in free.items()},
        "amounts": {counter.charge: money_of(closing.amount) for counter, closing in closings.items()},
        "total": money_of(sum(closing.amount for closing in closings.values())),
    }


def _beyond_last_tier(inputs: Inputs) -> Results:
    """The greatest of some quantities that a charge prices, where what lies beyond its last tier is parked."""
    price = compile_price(_charge("graduated", {"beyond": "park", **inputs}))
    costs = [price(quantity_of(quantity)) for quantity in inputs["quantities"]]
    return {"totals": ["parked" if cost is None else money_of(cost) for cost in costs]}


# -- minimums


def _true_up(minimum: Amount, amount: Amount, span: Span = _SPAN) -> tuple[Amount, Amount]:
    """What is missing to a charge's minimum, and what it costs with it, where its usage costs so much."""
    charge = Charge("case", "usage", "dynamic", amount_property="amount", minimum=Decimal(f"{minimum}E-12"))
    closing = closing_price(charge, _USAGE, [Member(0, "all", 0, amount=amount)], span)
    return _part(closing, "minimum"), closing.amount


def _minimum(inputs: Inputs) -> Results:
    true_up, total = _true_up(amount_of(inputs["minimum"]), amount_of(inputs["usage_amount"]))
    return {"true_up": money_of(true_up), "total": money_of(total)}


def _plan_minimum(inputs: Inputs) -> Results:
    """A minimum over all of a plan's charges is a commitment to spend as much in a period, trued up."""
    fee = closing_price(Charge("fee", None, "flat", decimal_of(inputs["subscription_fee"])), None, [], _SPAN).amount
    usage = _closed(_charge("per_unit", {"unit": inputs["unit"]}), quantity_of(inputs["quantity"])).amount
    settled = settle(amount_of(inputs["minimum"]), fee + usage)
    return {"fees": money_of(settled.spent), "true_up": money_of(settled.true_up), "total": money_of(settled.total)}


def _minimum_prorated(inputs: Inputs) -> Results:
    """A segment of some days of the period: its share of the minimum. Two lines, each with its tax."""
    period = Period(0, inputs["period_days"] * _DAY_US)
    span = Span(period.end_us - inputs["days_used"] * _DAY_US, period.end_us, period)
    usage = named_amount(inputs, "usage")
    true_up, _ = _true_up(named_amount(inputs, "minimum"), usage, span)
    found = document({"tax_rounding": "line", **inputs}, {"usage": usage, "true_up": true_up})
    results = {**shown(found), **line_amounts(found)}
    for line in found.lines:
        results |= both(f"{line.id}_tax", line.tax, found.currency)
    return {**results, **both("taxes", found.totals.tax, found.currency)}


# -- meters


def _aggregation(inputs: Inputs) -> Results:
    """Every aggregation of the events' one measured property; an event is known by source and id, and counts once."""
    about = {"id", "source", "time", "timestamp", "type", "subject"}
    names = {name for event in inputs["events"] for name in event} - about
    if len(names) != 1:
        raise ValueError(f"expected events that measure one property, got {sorted(names)}")
    (name,) = names
    events = {(event.get("source"), event["id"]): event for event in inputs["events"]}
    results: Results = {}
    for aggregation in get_args(Aggregation):
        if aggregation == "time_weighted":  # needs a time of each event: weighted_sum
            continue
        meter = _meter(aggregation, value=None if aggregation == "count" else name)
        measure = compile_measure(meter)
        members = []
        for number, event in enumerate(events.values()):
            quantity = measure({name.encode(): str(event[name]).encode()})
            if isinstance(quantity, int):
                members.append(Member(number, "", quantity, str(event[name])))
        if len(members) == len(events):
            results[aggregation] = units_of(_aggregated(meter, members))
    return results


def _metering(inputs: Inputs) -> Results:
    """A meter as the catalog holds it, over a period's events in the order they are listed.

    ``per_event`` has what each of them measures: null where a filter leaves it out, or why it is refused.
    """
    about: Results = {"event_type": "usage", "value": None, "unit": "unit", "filters": [], "allow_negative": False}
    meter = from_document(Entry("meter", "case", 1, 0, {**about, **inputs["meter"]}))
    assert isinstance(meter, Meter), "what such an entry holds"
    start, end = (_instant(text) for text in inputs["period"])
    stood = inputs.get("opening")
    opening = (
        None if stood is None else Opening(quantity_of(stood.get("quantity", 0)), frozenset(stood.get("texts", ())))
    )
    measure = compile_measure(meter)
    members: list[Member] = []
    per_event: list[Fraction | str | None] = []
    for event in inputs["events"]:
        quantity = measure({name.encode(): text.encode() for name, text in event["properties"].items()})
        if isinstance(quantity, int):
            text = event["properties"].get(meter.value, "")
            members.append(Member(_instant(event["at"]), event["id"], quantity, text))
            per_event.append(units_of(quantity))
        else:
            per_event.append(None if quantity is None else quantity.reason.value)
    after = carried(meter, members, opening)
    return {
        "quantity": units_of(_aggregated(meter, members, opening, Period(start, end))),
        "per_event": per_event,
        "end_value": None if after is None else units_of(after.quantity),
    }


def _meter(aggregation: Aggregation, **more: Any) -> Meter:
    return replace(_USAGE, aggregation=aggregation, **more)


def _aggregated(meter: Meter, members: Iterable[Member], opening: Opening | None = None, span: Period = _MONTH) -> int:
    period_us = span.end_us - span.start_us
    return aggregate(meter, members, span.start_us, span.end_us, opening, period_us=period_us)


def _weighted_sum(inputs: Inputs) -> Results:
    """The mean of a level over the period; it goes on into the next."""
    meter = _meter("time_weighted", level="add", time_unit="period", carries_over=True)
    start, end = (_instant(text) for text in inputs["period"])
    opening = Opening(quantity_of(inputs.get("initial", 0)))
    members = [Member(_instant(at), str(n), quantity_of(delta)) for n, (at, delta) in enumerate(inputs["deltas"])]
    span = Span(start, end, Period(start, end))
    closing = closing_price(_charge("per_unit", {"unit": inputs.get("unit", 1)}), meter, members, span, opening=opening)
    after = carried(meter, members, opening)
    assert after is not None, "the meter carries over"
    return {
        "units": units_of(closing.quantity),
        "amount_cents": _cents(closing.amount),
        "end_value": units_of(after.quantity),
    }


def _graduated_levels(inputs: Inputs) -> Results:
    """Each level is priced by tier for the time it stands; so after each change of it, were it the last."""
    meter = _meter("time_weighted", level="add", time_unit="period")
    start, end = (_instant(text) for text in inputs["period"])
    span = Span(start, end, Period(start, end))
    charge = _charge("graduated", inputs, per_level=True)
    deltas = [Member(_instant(at), str(n), quantity_of(delta)) for n, (at, delta) in enumerate(inputs["deltas"])]
    amounts = [closing_price(charge, meter, deltas[:count], span).amount for count in range(len(deltas) + 1)]
    levels = [_aggregated(replace(_USAGE, aggregation="sum"), deltas[:count]) for count in range(1, len(deltas) + 1)]
    return {
        "zero_usage_cents": _cents(amounts[0]),
        "cumulative_amount_cents": [_cents(amount) for amount in amounts[1:]],
        "cumulative_units": [units_of(level) for level in levels],
        "invoice_cents": _cents(amounts[-1]),
    }


def _instant(text: str) -> Micros:
    return parse_instant(text if "T" in text else f"{text}T00:00:00Z")


_MONTH_OF_EVENT = re.compile(r"month (\d+) (start|mid|end)")
_WITHIN_MONTH = {"start": 0, "mid": 15 * _DAY_US, "end": 30 * _DAY_US - 1}


def _max_persistent(inputs: Inputs) -> Results:
    """A level that stands until it is set again: each month's greatest, up to the month after the last event."""
    meter = _meter("max", carries_over=True)
    months: dict[int, list[Member]] = {}
    for number, (when, quantity) in enumerate(inputs["events"]):
        match = _MONTH_OF_EVENT.fullmatch(when)
        if match is None:
            raise ValueError(f"expected a time such as 'month 3 mid', got {when!r}")
        month = int(match[1])
        at_us = (month - 1) * _MONTH.end_us + _WITHIN_MONTH[match[2]]
        months.setdefault(month, []).append(Member(at_us, str(number), quantity_of(quantity)))
    opening, found = None, []
    for month in range(1, max(months) + 2):
        span = Period((month - 1) * _MONTH.end_us, month * _MONTH.end_us)
        members = months.get(month, [])
        found.append(units_of(_aggregated(meter, members, opening, span)))
        opening = carried(meter, members, opening)
    return {"monthly_max": found}


_ROUNDING: Mapping[str, RoundingMode] = {
    "ceiling": "up",
    "floor": "down",
    "half_up": "half_up",
    "half_even": "half_even",
}


def _conversion(model: Model, inputs: Inputs) -> Results:
    """Convert, then round, then the usage discount, then price (law 6)."""
    convert = Conversion(decimal_of(inputs.get("multiply_by", 1)), decimal_of(inputs.get("divide_by", 1)))
    rounding = Rounding(_ROUNDING[inputs["rounding"]]) if "rounding" in inputs else None
    meter = replace(_USAGE, derived_per="total", convert=convert, rounding=rounding)
    discount = quantity_of(inputs.get("usage_discount", 0))
    charge = _charge(model, inputs, included=discount)
    closing = closing_price(charge, meter, [Member(0, "all", quantity_of(inputs["quantity"]))], _SPAN)
    return {**_shown(charge, closing), "billed_quantity": units_of(max(closing.quantity - discount, 0))}


# -- usage after it was billed


def _late_usage(model: Model, inputs: Inputs) -> Results:
    """What was billed is taken back and billed anew; where the unit price is the same, the difference is one line."""
    charge = _charge(model, inputs)
    billed, now = quantity_of(inputs["billed_quantity"]), quantity_of(inputs["new_cumulative"])
    (before,), (after,) = _closed(charge, billed).parts, _closed(charge, now).parts
    if before.unit_price == after.unit_price:
        lines = [_line(now - billed, after.unit_price, after.amount - before.amount)]
    else:
        lines = [_line(-billed, before.unit_price, -before.amount), _line(now, after.unit_price, after.amount)]
    return {"lines": lines, "net": money_of(after.amount - before.amount)}


def _line(quantity: Quantity, unit: Decimal, amount: Amount) -> Results:
    return {"quantity": units_of(quantity), "unit": Fraction(unit), "amount": money_of(amount)}


# -- the table

_BY_QUANTITY: tuple[Model, ...] = ("per_unit", "graduated", "volume", "package", "graduated_percentage")

#: From a case's model to what runs it.
MODELS: Mapping[str, Run] = {
    **{model: partial(_by_quantity, model) for model in _BY_QUANTITY},
    **{f"{model}_minimum": partial(_by_quantity, model) for model in _BY_QUANTITY},
    **{f"{model}_maximum": partial(_by_quantity, model) for model in _BY_QUANTITY},
    **{f"{model}_incremental": partial(_incremental, model) for model in _BY_QUANTITY},
    **{f"{model}_maximum_incremental": partial(_incremental, model) for model in _BY_QUANTITY},
    "graduated_tier_cap": partial(_by_quantity, "graduated"),
    "package_units": partial(_by_quantity, "package"),
    "package_min_one": partial(_by_quantity, "package", min_packages=1),
    "stairstep": _stairstep,
    "block_graduated": _block_graduated,
    "block_volume": _block_volume,
    "tier_detail_sum": _detail_sum,
    "multi_unit_sum": _sum_of_amounts,
    "capacity_tier": _capacity_tier,
    "beyond_last_tier": _beyond_last_tier,
    "matrix": _matrix,
    "flat_fee": _flat_fee,
    "included_pool": _included_pool,
    "percentage": _percentage,
    "percentage_min_max_per_event": _percentage,
    "dynamic_event_amounts": _dynamic_events,
    "dynamic_multiplier": _dynamic,
    "dynamic_multiplier_max_incremental": _dynamic,
    "minimum_true_up": _minimum,
    "minimum_true_up_prorated": _minimum_prorated,
    "plan_minimum": _plan_minimum,
    "aggregation": _aggregation,
    "metering": _metering,
    "weighted_sum": _weighted_sum,
    "graduated_prorated_recurring": _graduated_levels,
    "max_persistent": _max_persistent,
    "unit_conversion": partial(_conversion, "per_unit"),
    "unit_conversion_graduated": partial(_conversion, "graduated"),
    "unit_conversion_usage_discount": partial(_conversion, "per_unit"),
    "late_usage_delta": partial(_late_usage, "per_unit"),
    "late_usage_delta_volume": partial(_late_usage, "volume"),
    **CREDIT_CASES,
    **INVOICE_CASES,
    **PRORATION_CASES,
}
