"""Fees in advance: what an account's flat charges cost for periods that are not over, by today's catalog. Pure.

A fee in advance is billed when the period before it is, and settled when its own period closes: the close prices the
period as it was, and a document bills what should be minus what was booked. So an upgrade on day 10 of 30 gives the
unused part of the old fee back and charges the new one's, a contract that ended gives its rest back, and a period that
went as foreseen bills nothing again. ``pipeline.core.proration.change`` is that difference in closed form.
"""

from dataclasses import dataclass
from typing import NamedTuple

from pipeline.core.catalog import Catalog, Segment
from pipeline.core.charges import Charge
from pipeline.core.closing import Closing, closing_price
from pipeline.core.money import Amount, Micros
from pipeline.core.periods import Period


class FeeKey(NamedTuple):
    """Names a fee: the close's own line for it has the same three, whatever was booked in advance."""

    contract: str
    charge: str
    segment_start_us: Micros


@dataclass(frozen=True, slots=True)
class Fee:
    """A flat charge's price for one segment of a period, paid in advance; the service period is the segment's."""

    segment: Segment
    charge: Charge
    closing: Closing

    @property
    def amount(self) -> Amount:
        """Exact, 1e-12 of the plan's currency."""
        return self.closing.amount

    @property
    def key(self) -> FeeKey:
        return FeeKey(self.segment.contract.id, self.charge.id, self.segment.start_us)


def due_in_advance(catalog: Catalog, account: str, at_us: Micros) -> tuple[Fee, ...]:
    """The fees in advance of every billing period of the account that holds an instant, the first period to end first.

    Asked at the first instant after a closed month, it is all that is to be billed ahead: the next month of a contract
    billed by months, the year that has begun of one billed by years. What was booked of it before is to be taken off;
    a year stays due, booked and at difference 0, until it ends. A fee of 0 (in a trial) is not due.

    Raises ValueError for a fee that cannot be priced, OverflowError for a time outside the years 1 to 9999.
    """
    return tuple(fee for period in catalog.periods_at(account, at_us) for fee in fees_of(catalog, account, period))


def fees_of(catalog: Catalog, account: str, period: Period) -> tuple[Fee, ...]:
    """The fees in advance of one billing period of the account, a first one included. Raises as ``due_in_advance``."""
    return tuple(
        fee
        for segment in catalog.segments_of(account, period)
        for charge in segment.charges
        if charge.in_advance and (fee := _fee(segment, charge)).amount
    )


def _fee(segment: Segment, charge: Charge) -> Fee:
    return Fee(segment, charge, closing_price(charge, None, (), segment.span))
