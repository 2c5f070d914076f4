"""A segment's share of what a plan grants per period, in proportion to time.

Shares are cut from one ruler: what is granted up to an instant of the period is rounded, and a segment has the
difference between its end and its start. So a whole period has exactly the whole, however often it was cut.
"""

from collections.abc import Iterable
from dataclasses import replace

from pipeline.core.charges import Charge
from pipeline.core.money import Micros, Quantity, round_half_up_div
from pipeline.core.periods import Period
from pipeline.core.plans import Pool, Prorate


def share_of(quantity: Quantity, period: Period, start_us: Micros, end_us: Micros) -> Quantity:
    """What ``[start_us, end_us)`` of a period has of a quantity per period; within 1e-9 of the exact part."""
    length = period.end_us - period.start_us
    granted = (round_half_up_div(quantity * (at_us - period.start_us), length) for at_us in (end_us, start_us))
    return next(granted) - next(granted)


def prorated(
    charges: Iterable[Charge], pools: Iterable[Pool], prorate: Prorate, period: Period, start_us: Micros, end_us: Micros
) -> tuple[tuple[Charge, ...], tuple[Pool, ...]]:
    """A plan's charges and pools for ``[start_us, end_us)`` of the period. The whole period has them as they are.

    Prorated are included units and, with ``pool_and_tiers``, the bounds of tiers; never prices, fees, minimums or
    maximums, nor anything of a charge ``per_level``, which pays each level for its share of the period already. No
    tier is lost: each holds at least 1e-9, in a segment however short.
    """
    if prorate == "none" or (start_us, end_us) == (period.start_us, period.end_us):
        return tuple(charges), tuple(pools)

    def part(quantity: Quantity) -> Quantity:
        return share_of(quantity, period, start_us, end_us)

    def of(charge: Charge) -> Charge:
        if charge.per_level:
            return charge
        if charge.included:
            charge = replace(charge, included=part(charge.included))
        if prorate == "pool_and_tiers" and charge.tiers:
            tiers, lower = [], 0
            for tier in charge.tiers:
                if tier.up_to is not None:
                    lower = max(lower + 1, part(tier.up_to))
                    tier = replace(tier, up_to=lower)
                tiers.append(tier)
            charge = replace(charge, tiers=tuple(tiers))
        return charge

    return tuple(map(of, charges)), tuple(replace(pool, included=part(pool.included)) for pool in pools)
