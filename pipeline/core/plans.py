"""What a customer agrees to: a plan's charges in one currency, and the price lists that change some of its prices.

A plan is what everybody pays. A price list overrides some of its charges for some customers: those of a customer
segment, one account, or the contracts whose phase names it. The later of these wins, charge by charge, field by field.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any, Literal, TypeAlias

from pipeline.core.charges import Charge, Model, check_charge
from pipeline.core.money import Micros, Quantity

#: What a segment shorter than its period shortens, in proportion to time: included units (of charges and pools), these
#: and the bounds of tiers, or nothing, so that each segment has them whole.
Prorate: TypeAlias = Literal["pool", "pool_and_tiers", "none"]
#: What a segment's share of its period is counted in (``pipeline.core.proration``): the time that passes, calendar
#: days, or nothing smaller than the period.
ProrateBy: TypeAlias = Literal["second", "day", "period"]


@dataclass(frozen=True, slots=True)
class Pool:
    """Included units per period that several charges share, in a unit all their meters count in.

    The close allots them to the charges in the plan's order of charges, then by event time.
    """

    id: str
    unit: str
    included: Quantity
    #: Ids of the charges that draw from it, in the plan's order of charges. A charge draws from one pool at most.
    charges: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """One version of a plan; it prices events from valid_from_us until a later version does."""

    id: str
    version: int
    name: str
    currency: str
    valid_from_us: Micros
    #: In the file's order, which is the order pools are allotted in.
    charges: tuple[Charge, ...]
    pools: tuple[Pool, ...] = ()
    prorate: Prorate = "pool"
    #: Calendar days, in the billing time zone, at the start of a contract on this plan in which everything is free.
    trial_days: int = 0
    prorate_by: ProrateBy = "second"

    @property
    def prorate_units(self) -> Prorate:
        """What a shorter segment's share of included units and tiers is taken of: nothing, by whole periods."""
        return "none" if self.prorate_by == "period" else self.prorate


@dataclass(frozen=True, slots=True)
class Override:
    """What a price list changes of one charge of its plan: fields of ``Charge`` by name, with their values.

    With ``model`` among the names the charge's price is replaced as a whole, else field by field. Sorted by name.
    """

    charge: str
    changes: tuple[tuple[str, Any], ...]


@dataclass(frozen=True, slots=True)
class PoolOverride:
    """What a price list changes of one pool of its plan: its included units."""

    pool: str
    included: Quantity


@dataclass(frozen=True, slots=True)
class PriceList:
    """One version of a price list; it overrides from valid_from_us until a later version does. Empty, it has ended.

    It holds for the accounts of ``customer_segment``, or for ``account``, or, with neither, for the contracts whose
    phase names it.
    """

    id: str
    version: int
    name: str
    plan: str
    currency: str
    valid_from_us: Micros
    overrides: tuple[Override, ...] = ()
    pools: tuple[PoolOverride, ...] = ()
    customer_segment: str | None = None
    account: str | None = None


def overridden(plan: Plan, price_lists: Iterable[PriceList]) -> tuple[tuple[Charge, ...], tuple[Pool, ...]]:
    """A plan's charges and pools under price lists, of which a later one wins. What the plan lacks is passed over.

    Raises ValueError for a charge that cannot be priced then.
    """
    charges = {charge.id: charge for charge in plan.charges}
    pools = {pool.id: pool for pool in plan.pools}
    for price_list in price_lists:
        for override in price_list.overrides:
            if override.charge in charges:
                charges[override.charge] = changed(charges[override.charge], override)
        for pool_override in price_list.pools:
            if pool_override.pool in pools:
                pools[pool_override.pool] = replace(pools[pool_override.pool], included=pool_override.included)
    return tuple(charges.values()), tuple(pools.values())


def free(charge: Charge) -> Charge:
    """The charge as a trial has it: the same usage on the same lines, at price 0."""
    model: Model = "flat" if charge.meter is None else "per_unit"
    return replace(_without_price(charge, model), unit_price=Decimal(0))


_ANY = frozenset({"minimum", "maximum", "prorate"})
_METERED = _ANY | {"by", "per_subject"}
_RUNNING = _METERED | {"included"}
_TIERED = _RUNNING | {"tiers", "flat_on_zero", "bound", "beyond"}
_PER_EVENT = _METERED | {"event_minimum", "event_maximum"}
#: The fields that price a charge, by its model: what a price list may change. Others mean nothing to it, or show alone.
PRICE_FIELDS: Mapping[Model, frozenset[str]] = {
    "per_unit": _RUNNING | {"unit_price", "per_level"},
    "graduated": _TIERED | {"per_level"},
    "volume": _TIERED,
    "stairstep": _TIERED,
    "graduated_percentage": _TIERED,
    "block": _TIERED | {"package_size", "min_packages"},
    "package": _RUNNING | {"package_size", "package_price", "min_packages"},
    "matrix": _RUNNING | {"unit_price", "cells"},
    "percentage": _PER_EVENT | {"rate", "fixed", "free_events", "free_amount"},
    "dynamic": _PER_EVENT | {"amount_property", "multiplier"},
    "flat": _ANY | {"unit_price", "quantity", "in_advance"},
}


def changed(charge: Charge, override: Override) -> Charge:
    """The charge under an override. Raises ValueError for one that cannot be priced then."""
    changes = dict(override.changes)
    if "model" in changes:
        charge = _without_price(charge, changes["model"])
    if strangers := sorted(changes.keys() - PRICE_FIELDS[charge.model] - {"model"}):
        raise ValueError(f"charge {charge.id}: expected fields of a {charge.model} charge, got {', '.join(strangers)}")
    charge = replace(charge, **changes)
    check_charge(charge)
    return charge


def _without_price(charge: Charge, model: Model) -> Charge:
    """The charge with what it counts and shows, and nothing of what it costs."""
    return Charge(
        charge.id,
        charge.meter,
        model,
        references=charge.references,
        by=charge.by,
        per_subject=charge.per_subject,
        name=charge.name,
        tax_category=charge.tax_category,
    )
