"""Which class a charge is of (law 3), and what makes one that cannot be priced."""

from pipeline.core.aggregation import is_additive
from pipeline.core.charges.model import PER_EVENT, Charge, ChargeClass
from pipeline.core.charges.numbers import flat_fee, scaled_amount, scaled_price
from pipeline.core.charges.per_event import compile_event_price
from pipeline.core.charges.running import compile_price
from pipeline.core.charges.tiers import block_size, in_units
from pipeline.core.meters import Meter


def charge_class(charge: Charge, meter: Meter | None, *, pooled: bool = False) -> ChargeClass:
    """When the charge's amounts are final.

    running: its price takes an additive quantity, whose order and splitting do not matter. per_event: each event's
    amount is its own. period: everything else, so that amounts in the stream are provisional: meters that are not
    additive, units from a shared pool (``pooled``), free events, flat fees, and a maximum over several events' own
    amounts or over several counters.
    """
    if meter is None or pooled or not is_additive(meter):
        return "period"
    if charge.model in PER_EVENT:
        whole_period = charge.free_events is not None or charge.free_amount is not None or charge.maximum is not None
        return "period" if whole_period else "per_event"
    return "period" if charge.maximum is not None and charge.split else "running"


def check_charge(charge: Charge) -> None:
    """Raise ValueError with every one of ``charge_faults``, for a charge that has any."""
    if found := charge_faults(charge):
        raise ValueError(f"charge {charge.id}: {'; '.join(found)}")


def charge_faults(charge: Charge) -> list[str]:
    """Why a charge cannot be priced as it stands, each as what was expected and what came; none for one that can be."""
    found = []
    for check in (_check_price, _check_model, _check_free, _check_blocks, _check_levels, _check_cells, _check_limits):
        try:
            check(charge)
        except ValueError as error:
            found.append(str(error).removeprefix(f"charge {charge.id}: "))
    return found


def check_metering(charge: Charge, meter: Meter, *, pooled: bool = False) -> None:
    """Raise ValueError for a charge that its meter, or the pool it draws from, does not fit.

    Events priced by themselves, and units from a pool, need quantities of single events that add up.
    """
    if charge.model in PER_EVENT or pooled:
        why = "to draw from a pool" if pooled else f"to price single events ({charge.model})"
        _expect(charge, is_additive(meter), f"a meter of sum or count, converted per event, {why}", f"meter {meter.id}")
    if pooled:
        _expect(charge, charge.model not in PER_EVENT, "a charge by quantity to draw from a pool", charge.model)
    if charge.per_level:
        means = meter.aggregation == "time_weighted" and meter.time_unit == "period" and not pooled
        _expect(charge, means, "a time-weighted meter in periods, without a pool, for per_level", f"meter {meter.id}")
    missing = [name for name in charge.by if name not in meter.dimensions]
    _expect(charge, not missing, f"dimensions of meter {meter.id}, one of {list(meter.dimensions)}, as by", missing)


def _check_price(charge: Charge) -> None:
    match charge.model:
        case "flat":
            flat_fee(charge)
        case "percentage" | "dynamic":
            compile_event_price(charge)
        case _:
            compile_price(charge)


def _check_model(charge: Charge) -> None:
    if charge.model == "flat":
        _expect(charge, charge.meter is None, "no meter for a flat fee", charge.meter)
        _expect(charge, charge.quantity >= 0, "a quantity of 0 or more", charge.quantity)
        _expect(charge, not charge.split, "no cells or subjects of a flat fee", (*charge.by, charge.per_subject))
    else:
        _expect(charge, charge.meter is not None, "a meter", charge.meter)
    if charge.model in PER_EVENT:
        _expect(charge, charge.included == 0, "no included units where single events are priced", charge.included)


def _check_free(charge: Charge) -> None:
    if charge.free_events is not None or charge.free_amount is not None:
        _expect(charge, charge.model == "percentage", "free events in a percentage charge only", charge.model)
    _expect(charge, (charge.free_events or 0) >= 0, "free_events of 0 or more", charge.free_events)
    _expect(charge, (charge.free_amount or 0) >= 0, "a free_amount of 0 or more", charge.free_amount)


def _check_blocks(charge: Charge) -> None:
    _expect(charge, charge.min_packages >= 0, "min_packages of 0 or more", charge.min_packages)
    if charge.model == "block":
        inclusive = charge.bound == "inclusive"
        _expect(charge, inclusive, "bounds that belong to their tier, since blocks are whole", charge.bound)
        bounds = [tier.up_to for tier in charge.tiers if tier.up_to is not None]
        ends = {-(-bound // block_size(charge)) for bound in bounds}
        shown = f"bounds {in_units(bounds)} with blocks of {in_units([block_size(charge)])[0]}"
        _expect(charge, len(ends) == len(bounds), "a block at least in each tier", shown)


def _check_levels(charge: Charge) -> None:
    if charge.per_level:
        _expect(charge, charge.model in ("per_unit", "graduated"), "per_unit or graduated for per_level", charge.model)
        capped = any(tier.cap is not None for tier in charge.tiers)
        _expect(charge, not capped, "no caps of tiers per_level", [tier.cap for tier in charge.tiers])
        _expect(charge, charge.beyond != "park", "a last tier that goes on for levels", charge.beyond)


def _check_cells(charge: Charge) -> None:
    if charge.model == "matrix":
        _expect(charge, bool(charge.by), "dimensions (by) of a matrix", charge.by)
    else:
        _expect(charge, not charge.cells, "prices by cell in a matrix only", charge.model)
    seen = set()
    for cell in charge.cells:
        scaled_price(charge, cell.unit_price, f"unit_price of cell {cell.values}")
        _expect(charge, len(cell.values) == len(charge.by), f"a value for each of {charge.by}", cell.values)
        _expect(charge, cell.values not in seen, "each cell once", cell.values)
        seen.add(cell.values)


def _check_limits(charge: Charge) -> None:
    if charge.minimum is not None:
        least = scaled_amount(charge, charge.minimum, "minimum")
        if charge.maximum is not None:
            most = scaled_amount(charge, charge.maximum, "maximum")
            _expect(charge, most >= least, f"a maximum of at least the minimum {charge.minimum}", charge.maximum)
    if charge.maximum is not None:
        scaled_amount(charge, charge.maximum, "maximum")


def _expect(charge: Charge, condition: bool, expected: str, got: object) -> None:
    if not condition:
        raise ValueError(f"charge {charge.id}: expected {expected}, got {got}")
