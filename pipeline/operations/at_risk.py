"""Money at risk: what a refused event would have cost on its own, priced with the catalog as it is now.

An estimate, for deciding what to look at first: alone it takes the first tier and the included units, in the stream it
takes those it comes to.
"""

from collections.abc import Callable, Iterable
from decimal import Decimal
from functools import cache
from typing import Any, NamedTuple

from psycopg import Connection

from pipeline.core.aggregation import aggregate, is_additive
from pipeline.core.catalog import Catalog, Terms
from pipeline.core.charges import PER_EVENT, Charge, compile_event_price, compile_price
from pipeline.core.documents import Entry
from pipeline.core.members import Member
from pipeline.core.meters import Measure, Meter, Properties, compile_cell, compile_measure
from pipeline.core.money import Amount, Micros, Quantity, amount_decimal
from pipeline.core.periods import to_micros
from pipeline.core.reasons import Rejection
from pipeline.infra.avro import EVENTS, Schemas, frame
from pipeline.infra.wire import FRAME_BYTES, Malformed, read_event


class Money(NamedTuple):
    """An estimated amount, exact for the event alone, in whole units of the currency."""

    amount: Decimal
    currency: str


#: From an event's framed bytes to what it would cost alone; None where nobody can tell.
Estimate = Callable[[bytes | None], Money | None]

_CATALOG = """
SELECT kind, id, version, valid_from, document FROM billing.catalog_version
WHERE kind IN ('meter', 'plan', 'price_list')
    OR kind = 'account' AND id = ANY(%(accounts)s)
    OR kind = 'contract' AND id IN (
        SELECT id FROM billing.catalog_version WHERE kind = 'contract' AND document->>'account' = ANY(%(accounts)s)
    )
ORDER BY kind, id, version
"""


def estimator(connection: "Connection[Any]", accounts: Iterable[str], schemas: Schemas) -> Estimate:
    """Estimates for events of these accounts, with everything published so far.

    Raises ValueError for a catalog this program cannot read.
    """
    catalog = read_catalog(connection, accounts)
    frames = {frame(schema_id) for schema_id in schemas.ids(EVENTS)}

    def estimate(value: bytes | None) -> Money | None:
        if value is None or value[:FRAME_BYTES] not in frames:
            return None
        try:
            event = read_event(value)
            terms = catalog.terms(event.account.decode(), event.event_type.decode(), event.timestamp_us)
        except (Malformed, OverflowError):
            return None
        return None if isinstance(terms, Rejection) else price_alone(terms, event.timestamp_us, event.properties)

    return estimate


def read_catalog(connection: "Connection[Any]", accounts: Iterable[str]) -> Catalog:
    """Everything published so far that prices these accounts.

    Raises ValueError for a catalog this program cannot read.
    """
    rows = connection.execute(_CATALOG, {"accounts": sorted(set(accounts))}).fetchall()
    entries = (
        Entry(kind, id_, version, to_micros(valid_from), document) for kind, id_, version, valid_from, document in rows
    )
    return Catalog.empty().extend(entries, len(rows))


def price_alone(terms: Terms, at_us: Micros, properties: Properties) -> Money | None:
    """What an event would cost if it were its segment's only one; None where a charge cannot price it.

    Without what is due in any case: flat fees, minimums. Free events and pools are for other events.
    """
    total = 0
    for charge, meter in terms.priced:
        quantity = _measure(meter)(properties)
        if isinstance(quantity, Rejection):
            return None
        if quantity is None:
            continue
        if not is_additive(meter):
            quantity = _aggregated(terms, meter, Member(at_us, "", quantity))
        amount = _price(charge)(quantity, properties)
        if not isinstance(amount, int):
            return None
        total += amount
    return Money(amount_decimal(total), terms.segment.plan.currency)


def _aggregated(terms: Terms, meter: Meter, member: Member) -> Quantity:
    segment = terms.segment
    period_us = segment.period.end_us - segment.period.start_us
    return aggregate(meter, [member], segment.start_us, segment.end_us, period_us=period_us)


@cache
def _measure(meter: Meter) -> Measure:
    return compile_measure(meter)


@cache
def _price(charge: Charge) -> Callable[[Quantity, Properties], Amount | Rejection | None]:
    """From an event's quantity and properties to its cost; None or a Rejection where it has no price."""
    if charge.model in PER_EVENT:
        return compile_event_price(charge)
    cell_of = compile_cell(charge.by)
    price = cache(lambda cell: compile_price(charge, tuple(value.decode() for value in cell)))
    return lambda quantity, properties: price(cell_of(properties))(quantity)
