"""Charges as price files have them: a plan's own, the pools they share, and what a price list changes of them."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from pydantic import BaseModel

from pipeline.catalog.fields import ID
from pipeline.catalog.models import (
    CHARGE_MODELS,
    OVERRIDES,
    REPLACEMENTS,
    CellModel,
    PoolModel,
    UnknownModel,
)
from pipeline.catalog.source import Data, Part, get, one_of, report_repeats, shown, suggestion
from pipeline.core.charges import Cell, Charge, Tier, charge_faults, check_metering
from pipeline.core.meters import Meter
from pipeline.core.money import Quantity, parse_decimal
from pipeline.core.plans import Override, Plan, Pool, changed
from pipeline.core.reasons import Reason

#: The properties events have, by event type, as far as the files say; None where that has mistakes.
Properties: TypeAlias = Mapping[str, Collection[str] | None]


def check_properties(part: Part, used: Iterable[tuple[str, str | None]], known: Collection[str] | None) -> None:
    """Report each property under a key that events do not have; None: nobody said what they have."""
    for key, name in used:
        if known is not None and name is not None and name not in known:
            hint = suggestion(name, sorted(known))
            part.report(key, f"expected a property of its event type, got {name!r}{hint}")


def read_charge(part: Part, meters: Mapping[str, Meter | None], properties: Properties) -> Charge | None:
    """A charge of a plan, after reporting what is wrong with it; None where it is none at all.

    ``meters``: those the files define, None for one with mistakes.
    """
    name = get(part.data, "meter")
    if isinstance(name, str) and ID.fullmatch(name) and name not in meters:
        hint = suggestion(name, sorted(meters)) or ": give the file that defines it too"
        part.report("meter", f"expected a meter of the files given, got {name!r}{hint}")
    known = meters.get(name) if isinstance(name, str) else None
    before = len(part.source.findings)
    _check_tiers(part)
    if known is not None:
        _check_by(part, known)
        used = [(key, word) for key in ("amount_property", "references") for word in _words(part, key)]
        check_properties(part, used, properties.get(known.event_type))
    model = part.validated(CHARGE_MODELS.get(str(get(part.data, "model")), UnknownModel))
    if model is None:
        return None
    charge = Charge(**{"meter": None, **_price_fields(part, model, dict(model))})
    if len(part.source.findings) == before:
        _check_price(part, charge, known)
    return charge


def _words(part: Part, key: str) -> list[str]:
    """The words under a key that takes one or a list of them; what is none is reported with its field."""
    data = get(part.data, key)
    return [word for word in (data if isinstance(data, list) else [data]) if isinstance(word, str)]


def _price_fields(part: Part, model: BaseModel, values: dict[str, Any]) -> dict[str, Any]:
    """The fields of a charge that a model holds, as the core has them."""
    if tiers := values.get("tiers"):
        values["tiers"] = tuple(Tier(**{name: value for name, value in tier if name != "above"}) for tier in tiers)
    if cells := values.get("cells"):
        values["cells"] = _read_cells(part, cells, values.get("by") or ())
    return values


def _read_cells(part: Part, cells: Sequence[CellModel], by: Sequence[str]) -> tuple[Cell, ...]:
    """Matrix cells, whose values stand in the order of the charge's dimensions."""
    found: dict[tuple[str, ...], Cell] = {}
    for place, cell in zip(part.parts("cells"), cells, strict=True):
        if cell.when.keys() != set(by):
            got = one_of(sorted(cell.when), "and")
            place.report("when", f"expected a value of {one_of(list(by), 'and')}, as in by, got one of {got or 'none'}")
            continue
        values = tuple(cell.when[name] for name in by)
        if values in found:
            place.report(
                "when", f"expected each cell once, got {one_of([repr(value) for value in values], 'and')} again"
            )
        found[values] = Cell(values, cell.unit_price)
    return tuple(found.values())


def _check_by(part: Part, meter: Meter) -> None:
    """Report what is no dimension of the meter among what the charge is split by."""
    for name in _words(part, "by"):
        if name not in meter.dimensions:
            hint = suggestion(name, list(meter.dimensions)) or f": add it to the dimensions of {meter.id!r}"
            part.report("by", f"expected dimensions of meter {meter.id!r}, got {name!r}{hint}")


def _check_price(part: Part, charge: Charge, meter: Meter | None, *, pooled: bool = False) -> None:
    """Whether the core could price it, and by what its meter measures."""
    for fault in charge_faults(charge):
        part.source.report(part.path, fault)
    try:
        if meter is not None:
            check_metering(charge, meter, pooled=pooled)
    except ValueError as error:
        part.source.report(part.path, _without_id(error, charge.id))


def _without_id(error: ValueError, charge: str) -> str:
    """What the core says of a charge, whose place names it already."""
    return str(error).removeprefix(f"charge {charge}: ")


def _check_tiers(part: Part, overridden: Charge | None = None) -> None:
    """Report mistakes in the tiers: bounds ascend, without gaps, and only the last tier may have none.

    ``overridden``: the charge whose fields count where these tiers stand for its own. Bounds that are no numbers are
    reported with their fields.
    """
    tiers = get(part.data, "tiers")
    beyond = get(part.data, "beyond") or (overridden.beyond if overridden else None)
    model = get(part.data, "model") or (overridden.model if overridden else None)
    price = "rate" if model == "graduated_percentage" else "unit_price"
    if tiers == []:
        part.report("tiers", "expected at least one tier, got an empty list")
    lower, lower_text = 0, "0"
    for tier in part.parts("tiers") if isinstance(tiers, list) else ():
        if not isinstance(tier.data, dict):
            continue
        bound, above = tier.data.get("up_to"), tier.data.get("above")
        if model != "stairstep" and not tier.data.keys() & {price, "flat"}:
            tier.source.report(tier.path, f"expected a {price}, a flat or both, got neither")
        begins = _bound(above)
        if begins is not None and begins != lower:
            what = "overlap" if begins < lower else "leave a gap"
            tier.report("above", f"expected {lower_text}, where the tier before ends, got {shown(above)}: they {what}")
        if tier.path[-1] == len(tiers) - 1:
            if bound is not None and beyond is None:
                tier.report(
                    "up_to",
                    "expected no bound on the last tier, or beyond: last_tier or park on the charge to say what lies "
                    f"beyond, got {shown(bound)}",
                )
        elif bound is None:
            tier.report("up_to", "expected a bound, since only the last tier goes on for ever, got nothing")
        number = _bound(bound)
        if number:
            if number <= lower:
                tier.report("up_to", f"expected more than {lower_text}, where the tier before ends, got {shown(bound)}")
            lower, lower_text = number, str(bound)


def _bound(value: Data) -> Quantity | None:
    """A quantity of 0 or more as a file has it, or None for anything else."""
    number = parse_decimal(value) if isinstance(value, str) else Reason.NOT_A_NUMBER
    return None if isinstance(number, Reason) or number < 0 else number


def read_pools(part: Part, charges: Mapping[str, Charge], meters: Mapping[str, Meter | None]) -> tuple[Pool, ...]:
    """A plan's pools: each charge draws from one at most, and counts in its unit. ``charges``: those read."""
    parts = part.parts("pools")
    report_repeats([(pool, get(pool.data, "id")) for pool in parts])
    named = ids_of(part, "charges")
    pool_of: dict[str, Part] = {}
    pools = []
    for place in parts:
        pool = place.validated(PoolModel)
        for name in _words(place, "charges"):
            charge = charges.get(name)
            if name not in named:
                hint = suggestion(name, sorted(charges))
                place.report("charges", f"expected charges of plan {shown(get(part.data, 'id'))}, got {name!r}{hint}")
            elif (other := pool_of.setdefault(name, place)) is not place:
                drawn = f"{name!r}, which draws from {shown(get(other.data, 'id'))}"
                place.report("charges", f"expected charges of no other pool, got {drawn}")
            elif charge is not None:
                _check_pooled(place, charge, meters.get(charge.meter or ""))
        if pool is not None:
            order = tuple(name for name in charges if name in pool.charges)
            pools.append(Pool(pool.id, pool.unit, pool.included, order))
    return tuple(pools)


def _check_pooled(part: Part, charge: Charge, meter: Meter | None) -> None:
    if charge.meter is None:
        part.report("charges", f"expected charges of a meter, got {charge.id!r}, a {charge.model} charge")
    if meter is None:
        return
    unit = get(part.data, "unit")
    if isinstance(unit, str) and meter.unit != unit:
        part.report("charges", f"expected charges per {unit}, got {charge.id!r} per {meter.unit}")
    try:
        check_metering(charge, meter, pooled=True)
    except ValueError as error:
        part.report("charges", f"{charge.id}: {_without_id(error, charge.id)}")


def ids_of(part: Part, key: str) -> set[str]:
    """The ids in a list, also of what has mistakes."""
    return {name for one in part.parts(key) if isinstance(name := get(one.data, "id"), str)}


def read_override(
    part: Part, plan: Plan, named: Collection[str], meters: Mapping[str, Meter | None]
) -> Override | None:
    """What a price list changes of one charge, after reporting what is wrong with it; None where it is none at all.

    ``named``: ids of all charges the plan's file has. One with mistakes cannot be told from its override's.
    """
    name = get(part.data, "id")
    charges = {charge.id: charge for charge in plan.charges}
    charge = charges.get(name) if isinstance(name, str) else None
    if charge is None and name in named:
        return None
    if charge is None:
        hint = suggestion(name, list(charges)) if isinstance(name, str) else ""
        part.report("id", f"expected a charge of plan {plan.id!r}, got {shown(name)}{hint}")
        return None
    before = len(part.source.findings)
    replaces = isinstance(part.data, dict) and "model" in part.data
    if replaces:
        model = part.validated(REPLACEMENTS.get(str(part.data["model"]), REPLACEMENTS["per_unit"]))
    else:
        model = part.validated(OVERRIDES[charge.model])
    _check_tiers(part, None if replaces else charge)
    if model is None:
        return None
    given = {name: getattr(model, name) for name in model.model_fields_set}
    values = _price_fields(part, model, {"by": charge.by, **given})
    del values["id"]
    override = Override(charge.id, tuple(sorted((name, value) for name, value in values.items() if name in given)))
    if len(part.source.findings) == before:
        try:
            after = changed(charge, override)
        except ValueError as error:
            part.source.report(part.path, _without_id(error, charge.id))
        else:
            pooled = any(charge.id in pool.charges for pool in plan.pools)
            _check_price(part, after, meters.get(after.meter or ""), pooled=pooled)
    return override
