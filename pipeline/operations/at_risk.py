"""Money at risk: what a refused event would have cost on its own, priced with the catalog as it is now.

An estimate, for deciding what to look at first: alone it takes the first tier and the included units, in the stream it
takes those it comes to.
"""

from collections.abc import Callable, Iterable
from decimal import Decimal
from functools import cache
from typing import Any, NamedTuple

from psycopg import Connection

from pipeline.core.catalog import Catalog, Terms
from pipeline.core.charges import Charge, compile_price
from pipeline.core.documents import Entry
from pipeline.core.meters import Meter, compile_measure
from pipeline.core.money import amount_decimal
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
WHERE kind IN ('meter', 'plan')
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
    rows = connection.execute(_CATALOG, {"accounts": sorted(set(accounts))}).fetchall()
    entries = (
        Entry(kind, id_, version, to_micros(valid_from), document) for kind, id_, version, valid_from, document in rows
    )
    catalog = Catalog.empty().extend(entries, len(rows))
    frames = {frame(schema_id) for schema_id in schemas.ids(EVENTS)}

    def estimate(value: bytes | None) -> Money | None:
        if value is None or value[:FRAME_BYTES] not in frames:
            return None
        try:
            event = read_event(value)
            terms = catalog.terms(event.account.decode(), event.event_type.decode(), event.timestamp_us)
        except (Malformed, OverflowError):
            return None
        return None if isinstance(terms, Rejection) else _alone(terms, event.properties)

    return estimate


def _alone(terms: Terms, properties: dict[bytes, bytes]) -> Money | None:
    total = 0
    for charge, meter in terms.priced:
        quantity = _measure(meter)(properties)
        if isinstance(quantity, Rejection):
            return None
        if quantity is not None:
            total += _price(charge)(quantity)
    return Money(amount_decimal(total), terms.segment.plan.currency)


@cache
def _measure(meter: Meter) -> Callable[[dict[bytes, bytes]], int | Rejection | None]:
    return compile_measure(meter)


@cache
def _price(charge: Charge) -> Callable[[int], int]:
    return compile_price(charge)
