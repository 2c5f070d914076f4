"""Threshold billing: a payer's usage is billed within its period once enough of it is unbilled.

A progress document bills the usage so far, less what earlier ones of the period billed. The containers stay open; the
period's own invoice bills the whole period, with its minimums, fees, commitments, coupons and credits, and takes the
lines of its progress documents back. So what was billed early is billed once, whatever it turns out to cost.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from decimal import Decimal
from typing import Any

from psycopg import Connection

from pipeline.billing.billed_months import NotAdjustable, Place, look
from pipeline.billing.close_money import Wallet, read_money
from pipeline.billing.composing import ToWrite
from pipeline.billing.documents import issue_date
from pipeline.billing.invoicing_store import Invoicing, load, mark
from pipeline.billing.late_months import lock_open
from pipeline.billing.own_documents import Made, issue_own
from pipeline.billing.prices import read_catalog
from pipeline.billing.queue import Task
from pipeline.billing.reckoning import Basis, compose, reckon
from pipeline.billing.rerate import Month
from pipeline.billing.statements import Booked, Due, differences
from pipeline.billing.unit_credits import Units
from pipeline.core.credits import Grant
from pipeline.core.money import Minor, amount_decimal
from pipeline.core.parties import Customer
from pipeline.core.periods import Period, to_datetime
from pipeline.core.thresholds import reached


@dataclass(frozen=True, slots=True)
class Unbilled:
    """How a payer's usage of a month stands against its threshold; exact, in whole units of the currency."""

    payer: str
    currency: str
    month: Month
    used: Decimal
    billed: Decimal
    threshold: Decimal
    #: The document that billed it; None: the threshold is not reached, or was asked about only.
    made: Made | None


def bill_if_reached(
    connection: "Connection[Any]", payer: Task, month: Month, *, now: datetime, actor: str, dry_run: bool = False
) -> list[Unbilled]:
    """Bill a payer's usage of a month that is not over, in each currency in which its threshold is reached.

    The tax date is the day of issue. A payer without a threshold has nothing to be billed early. Called twice, the
    second finds nothing unbilled. Raises NotAdjustable for usage without a price, ValueError where a rate is not known.
    """
    with connection.transaction(force_rollback=dry_run):
        known = load(connection, applied_until=mark(connection), on=now.date(), accounts=[payer.payer])
        customer = known.customers.get(payer.payer)
        if customer is None or customer.threshold is None:
            return []
        catalog = read_catalog(connection, payer.members)
        if now >= _end_of(month, catalog.accounts[payer.payer].time_zone):
            return []
        lock_open(connection, payer.members)
        money = read_money(connection, payer.members, lock=True)
        # Units are drawn by the period's own invoice; until then what it will draw is not billed.
        seen = look(connection, catalog, payer.payer, payer.members, month, Units(connection, payer.members))
        found = []
        for place, owed in sorted(seen.owed.items()):
            usage = [due for due in owed if due.key.kind == "usage" and not due.is_nothing]
            before = [one for one in seen.standing.get(place, ()) if one.kind == "progress"]
            used, billed = sum(due.exact_amount for due in usage), sum(one.line.exact for one in before)
            times = len({one.document_id for one in before})
            made = None
            if not dry_run and reached(
                customer.threshold, used, billed, times=times, repeats=customer.threshold_repeats
            ):
                wallet = Wallet(payer.payer, *place)
                grants = [one for one in money.grants(wallet, payer.members) if one.reduces == "total"]
                basis = _basis(known, customer, place, grants, money.balance(wallet), now)
                new = _document(payer.payer, basis, place, usage, before, seen.period, actor)
                made = issue_own(connection, new, {}, corrects=None, actor=actor, note=f"usage of {month}", now=now)
                money.take(wallet, new.reckoned.document)
            amounts = amount_decimal(used), amount_decimal(billed), amount_decimal(customer.threshold)
            found.append(Unbilled(payer.payer, place.currency, month, *amounts, made))
        return found


def _end_of(month: Month, time_zone: str) -> datetime:
    return to_datetime(month.period_in(time_zone).end_us)


def _basis(
    known: Invoicing, customer: Customer, place: Place, grants: Sequence[Grant], balance: Minor, now: datetime
) -> Basis:
    """No coupons and no net credits: these are the period's own invoice's. Credits that pay the total may pay."""
    entity = known.legal_entity(place.legal_entity)
    if entity is None:
        raise NotAdjustable(f"expected legal entity {place.legal_entity!r} to be valid today: `tally invoicing apply`")
    return Basis(entity, customer, known.taxes, issue_date(entity, now), grants=grants, balance=balance)


def _document(
    payer: str,
    basis: Basis,
    place: Place,
    usage: Sequence[Due],
    before: Sequence[Booked],
    period: Period,
    actor: str,
) -> ToWrite:
    """The usage so far as lines, and the lines of earlier progress documents taken back."""
    reckoned = reckon(differences(usage, before), basis, currency=place.currency)
    reckoned = replace(reckoned, lines=tuple(replace(row, kind="progress") for row in reckoned.lines))
    document = compose(reckoned, basis, kind="progress", payer=payer, period=period, actor=actor)
    return ToWrite(payer, basis, reckoned, replace(document, reason_code="threshold"))


_SELECT_WITH_THRESHOLD = """
SELECT id FROM (
    SELECT DISTINCT ON (id) id, document FROM billing.invoicing_version
    WHERE kind = 'customer' AND valid_from <= %s ORDER BY id, version DESC
) AS customer WHERE document ? 'threshold' ORDER BY id
"""


def with_threshold(connection: "Connection[Any]", now: datetime) -> list[str]:
    """The customers that are billed within a period once they owe enough."""
    return [id for (id,) in connection.execute(_SELECT_WITH_THRESHOLD, [now.date()])]
