"""How a month was reckoned: its own invoice, with the taxes, coupons and net credits that counted then."""

from collections import defaultdict
from dataclasses import dataclass, replace
from datetime import date, datetime
from typing import Any
from zoneinfo import ZoneInfo

from psycopg import Connection

from pipeline.billing.billed_months import NotAdjustable, Place
from pipeline.billing.credits import held
from pipeline.billing.invoicing_store import Invoicing, load, mark
from pipeline.billing.reckoning import Basis
from pipeline.billing.rerate import Month
from pipeline.core.catalog import Catalog
from pipeline.core.credits import Grant
from pipeline.core.discounts import Coupon, usable
from pipeline.core.money import AMOUNT_DECIMALS, Micros, scaled
from pipeline.core.parties import Customer
from pipeline.core.periods import Period, to_datetime, to_micros


@dataclass(frozen=True, slots=True)
class Original:
    """A month's own invoice, and until when its legal entity, customer, taxes and coupons had been applied."""

    id: int
    number: str
    period: Period
    issue_date: date
    tax_date: date
    applied_until: datetime


_SELECT_ORIGINALS = """
SELECT document.legal_entity, document.currency, document.id, document.number, document.period_start,
    document.period_end, document.issue_date, document.tax_date, coalesce(run.invoicing_mark, document.issued_at)
FROM billing.document LEFT JOIN billing.close_run AS run ON run.id = document.run_id
WHERE document.account = %s AND document.kind = 'invoice' AND document.state = 'issued'
    AND document.period_end > %s AND document.period_end <= %s
ORDER BY document.id DESC
"""


def originals_of(connection: "Connection[Any]", payer: str, month: Period) -> dict[Place, list[Original]]:
    """The payer's own invoices of the month, the last one first."""
    bounds = [payer, to_datetime(month.start_us), to_datetime(month.end_us)]
    found: defaultdict[Place, list[Original]] = defaultdict(list)
    for entity, currency, id, number, start, end, *rest in connection.execute(_SELECT_ORIGINALS, bounds):
        period = Period(to_micros(start), to_micros(end))
        found[Place(entity, currency)].append(Original(id, number, period, *rest))
    return found


def basis_of(
    connection: "Connection[Any]",
    catalog: Catalog,
    payer: str,
    place: Place,
    month: Month,
    original: Original | None,
) -> Basis:
    """As the month's own invoice was reckoned; where there was none, as it would have been, by what is known now."""
    zone = catalog.accounts[payer].time_zone
    period = month.period_in(zone)
    tax_date = original.tax_date if original else _day(period.end_us - 1, zone)
    known = load(
        connection,
        applied_until=original.applied_until if original else mark(connection),
        on=tax_date,
        accounts=[payer],
    )
    entity, customer = known.legal_entity(place.legal_entity), known.customers.get(payer)
    if entity is None or customer is None:
        missing = f"legal entity {place.legal_entity!r}" if entity is None else f"customer {payer!r}"
        raise NotAdjustable(f"expected {missing} to be known on {tax_date}: `tally invoicing apply`")
    return Basis(
        entity,
        customer,
        known.taxes,
        tax_date,
        coupons=coupons_of(
            connection,
            payer,
            to_datetime(original.period.start_us if original else period.start_us),
            zone,
            known,
            customer,
            place.currency,
        ),
        grants=_net_grants(connection, payer, place.currency, original) if original else (),
    )


def _day(at_us: Micros, zone: str) -> date:
    return to_datetime(at_us).astimezone(ZoneInfo(zone)).date()


_SELECT_USES = """
SELECT coupon, count(DISTINCT period_start) FROM billing.coupon_use
WHERE account = %s AND period_start < %s GROUP BY coupon
"""


def coupons_of(
    connection: "Connection[Any]",
    payer: str,
    start: datetime,
    time_zone: str,
    known: Invoicing,
    customer: Customer,
    currency: str,
) -> list[Coupon]:
    """The coupons that counted for an invoice by its period's start: later uses do not take them away from it."""
    used = dict(connection.execute(_SELECT_USES, [payer, start]).fetchall())
    return usable(customer.coupons, known.coupons, used, start.astimezone(ZoneInfo(time_zone)).date(), currency)


# What a credit note gave back is a gift beside it: the month's own discount stays.
_SELECT_NET = """
SELECT entry.grant_id::text, given.account, sum(entry.amount) FROM billing.credit_entry AS entry
JOIN billing.credit_grant AS given ON given.id = entry.grant_id
WHERE entry.document_id = %s AND given.reduces = 'net' AND entry.kind <> 'credited'
GROUP BY entry.grant_id, given.account HAVING sum(entry.amount) > 0
"""


def _net_grants(connection: "Connection[Any]", payer: str, currency: str, original: Original) -> list[Grant]:
    """Net credits that the month's own invoice drew: they go on paying for it, and for no more."""
    drawn = {id: (account, amount) for id, account, amount in connection.execute(_SELECT_NET, [original.id])}
    if not drawn:
        return []
    found = []
    for one in held(connection, {account for account, _ in drawn.values()}):
        if one.grant.id in drawn:
            account, amount = drawn[one.grant.id]
            pays_for = "" if account == payer else account
            found.append(replace(one.grant, amount=scaled(amount, AMOUNT_DECIMALS), account=pays_for))
    return found
