"""What a document says has changed since the one before: plans, prices, and what a meter counts. Pure."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from zoneinfo import ZoneInfo

from pipeline.core.catalog import Catalog, Segment
from pipeline.core.charges import Charge
from pipeline.core.money import plain
from pipeline.core.periods import Period, to_datetime


def notices_of(catalog: Catalog, account: str, periods: Iterable[Period]) -> list[dict[str, Any]]:
    """Changes that took effect in these billing periods, or with their beginning, as ``content.notices`` keeps them.

    ``since`` is a day in the account's time zone. A price that is more than one number is said to have changed,
    without the numbers.
    """
    found: list[dict[str, Any]] = []
    zone = ZoneInfo(catalog.accounts[account].time_zone)
    for period in periods:
        for segment in catalog.segments_of(account, period):
            before = catalog.segment(account, segment.start_us - 1, segment.contract.id)
            if isinstance(before, Segment) and before.contract.id == segment.contract.id:
                since = to_datetime(segment.start_us).astimezone(zone).date().isoformat()
                found += ({**notice, "since": since} for notice in _between(catalog, before, segment))
    return found


def _between(catalog: Catalog, before: Segment, after: Segment) -> Iterator[dict[str, Any]]:
    if before.plan.id != after.plan.id:
        yield {
            "kind": "plan_changed",
            "name": after.plan.name,
            "before": before.plan.name,
            "after": after.plan.name,
        }
        return
    meters = {charge.id: meter for charge, meter in catalog.metered(after)}
    meters_before = {charge.id: meter for charge, meter in catalog.metered(before)}
    if before.price_version != after.price_version and before.trial == after.trial:
        charges = _as_published(before)
        for charge in _as_published(after).values():
            was, meter = charges.get(charge.id), meters.get(charge.id)
            if was is not None and _price(was) != _price(charge):
                unit = meter.unit if meter else ""
                yield {"kind": "price_changed", "name": charge.title, "unit": unit, **_numbers(was, charge)}
    for charge in after.charges:
        meter, meter_before = meters.get(charge.id), meters_before.get(charge.id)
        if meter is not None and meter_before is not None and meter.version != meter_before.version:
            yield {"kind": "meter_changed", "name": charge.title}


def _as_published(segment: Segment) -> Mapping[str, Charge]:
    return {charge.id: charge for charge in segment.charges}


def _price(charge: Charge) -> tuple[object, ...]:
    """What a customer would call the price: not what a short segment is granted of it."""
    tiers = tuple((tier.unit_price, tier.flat, tier.rate, tier.cap) for tier in charge.tiers)
    fields = charge.model, charge.unit_price, charge.package_size, charge.package_price, charge.rate, charge.fixed
    return *fields, charge.cells, charge.multiplier, charge.minimum, charge.maximum, tiers


def _numbers(before: Charge, after: Charge) -> dict[str, str]:
    if before.model != after.model or before.unit_price is None or after.unit_price is None:
        return {}
    if before.unit_price == after.unit_price:
        return {}
    return {"before": plain(before.unit_price), "after": plain(after.unit_price)}
