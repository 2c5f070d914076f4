"""What spend commitments add to a period's documents: what an account spent, window by window, against its promise.

Spending is what usage and fees cost after line discounts (law 6), at the time of the usage; a fee counts at its
segment's last moment, and so does whatever no event brings. A window that goes over several periods is settled with
each of them as far as it is known, and what it adds is billed less what was billed for it before.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from psycopg import Connection

from pipeline.billing.credits import commitments_of
from pipeline.billing.statements import Due, Key
from pipeline.core.catalog import Catalog
from pipeline.core.commitments import Commitment, SettledWindow, Spend, check_sold, first_start, settle_windows, sold
from pipeline.core.credits import minor_step
from pipeline.core.money import AMOUNT_DECIMALS, QUANTITY_ONE, Amount, Micros, amount_decimal, plain, scaled
from pipeline.core.periods import Period, to_datetime, to_micros

_SELECT_PROMISING = "SELECT DISTINCT account FROM billing.commitment WHERE account = ANY(%s)"


def promising(connection: "Connection[Any]", accounts: Collection[str]) -> frozenset[str]:
    """Those of the accounts that ever asked for a commitment: few, and only they are looked at."""
    return frozenset(account for (account,) in connection.execute(_SELECT_PROMISING, [sorted(accounts)]))


def check_promises(connection: "Connection[Any]", catalog: Catalog, account: str, month: Period) -> None:
    """Raise ValueError for commitments of a month that the account's contracts do not let anybody settle."""
    contracts = [one for one in catalog.contracts.values() if one.account == account]
    for currency, commitment in commitments_of(connection, account):
        if commitment.start_us < month.end_us and (commitment.end_us is None or commitment.end_us > month.start_us):
            check_sold(commitment, currency, sold(contracts, catalog.plan))


def commitments_until(connection: "Connection[Any]", catalog: Catalog, account: str) -> list[tuple[str, Commitment]]:
    """An account's commitments with their currencies, none beyond the last billing period of its contracts.

    No invoice follows that one: what is missing then, nobody would charge.
    """
    ends = [one.end_us for one in catalog.contracts.values() if one.account == account]
    last_us = max((end for end in ends if end is not None), default=None)
    if last_us is None or None in ends:
        return commitments_of(connection, account)
    over_us = max((period.end_us for period in catalog.periods_at(account, last_us - 1)), default=last_us)
    return [
        (currency, one if one.end_us is not None and one.end_us <= over_us else replace(one, end_us=over_us))
        for currency, one in commitments_of(connection, account)
        if one.start_us < over_us
    ]


def commitment_dues(
    connection: "Connection[Any]",
    catalog: Catalog,
    account: str,
    time_zone: str,
    period: Period,
    dues: Sequence[Due],
    off_lines: Mapping[Key, int],
    *,
    legal_entity: str,
    currency: str,
    sells: Collection[str] = (),
    pending: Sequence[Spend] = (),
) -> list[Due]:
    """What an account's commitments in a currency add to a period that is over, as known at its end; 0 too.

    ``dues``: what its usage and fees of the period cost in that currency. ``off_lines``: what line coupons take off
    them, in smallest units. ``sells``: charges of the legal entity of which nothing may be due; a commitment that
    counts none of its charges is another's to settle. ``pending``: what months before cost differently by now and is
    not written yet.

    Raises ValueError for a commitment that cannot be settled.
    """
    found = []
    sold_here = {charge.id for due in dues if due.segment for charge in due.segment.plan.charges}.union(sells)
    for of_currency, commitment in commitments_until(connection, catalog, account):
        begun = commitment.start_us < period.end_us
        over = commitment.end_us is not None and commitment.end_us <= period.start_us
        if of_currency != currency or not begun or over or not any(map(commitment.counts, sold_here)):
            continue
        since_us = first_start(commitment, time_zone, max(period.start_us, commitment.start_us))
        spends = [
            *_earlier(connection, account, currency, commitment, since_us, period.start_us),
            *pending,
            *_now(connection, dues, off_lines, commitment, currency),
        ]
        for window in settle_windows(commitment, spends, time_zone, period.start_us, period.end_us):
            found.append(_due(account, commitment, window, legal_entity, currency))
    return found


def _due(account: str, commitment: Commitment, window: SettledWindow, legal_entity: str, currency: str) -> Due:
    settlement = window.settlement
    adds = settlement.adjustment
    shown = {
        "committed": window.committed,
        "spent": settlement.spent,
        "within": settlement.within,
        "overage": settlement.overage,
        "true_up": settlement.true_up,
    }
    return Due(
        key=Key("commitment", account, "", "", f"commitment {commitment.id}", "", window.start_us),
        legal_entity=legal_entity,
        currency=currency,
        plan="",
        plan_version=0,
        meter="",
        quantity=QUANTITY_ONE if adds else 0,
        unit="",
        exact_amount=adds,
        gross=adds,
        service=Period(window.start_us, window.end_us),
        tax_category="standard",
        charge=None,
        segment=None,
        detail={
            "name": "Spend commitment",
            "commitment": {name: plain(amount_decimal(amount)) for name, amount in shown.items()},
        },
    )


# A quarter of an hour is within one day, hour and month of every time zone; it does not reach over a moment at which
# the commitment begins or ends. So what is read does not grow with the number of events.
_BUCKET = """
date_bin('15 minutes', usage.event_time, 'epoch'), usage.event_time >= %(start)s, usage.event_time >= %(end)s
"""
_SELECT_ROWS = f"""
SELECT line_id, min(event_time), sum(amount) FROM billing.rated_usage AS usage WHERE line_id = ANY(%(lines)s)
GROUP BY line_id, {_BUCKET}
"""
_SELECT_EARLIER = """
SELECT line.id, line.charge, line.amount, invoice.period_end
FROM billing.invoice JOIN billing.invoice_line AS line ON line.invoice_id = invoice.id
WHERE invoice.account = %s AND invoice.currency = %s AND invoice.period_end > %s AND invoice.period_end <= %s
"""
_SELECT_DISCOUNTED = """
SELECT line.charge, discount.amount, line.period_end FROM billing.document_discount AS discount
JOIN billing.document_line AS line ON line.id = discount.document_line_id
JOIN billing.document ON document.id = line.document_id
WHERE line.account = %s AND document.currency = %s AND line.period_end > %s AND line.period_end <= %s
    AND document.state IN ('reviewed', 'issued') AND document.kind IN ('invoice', 'adjustment')
    AND discount.coupon <> ''
"""


def _now(
    connection: "Connection[Any]",
    dues: Iterable[Due],
    off_lines: Mapping[Key, int],
    commitment: Commitment,
    currency: str,
) -> list[Spend]:
    """What the period itself spends."""
    step = minor_step(currency)
    counting = [due for due in dues if commitment.counts(due.key.charge)]
    rows = _rows(connection, [id for due in counting for id in due.line_ids], commitment)
    spends = []
    for due in counting:
        of_rows = [row for id in due.line_ids for row in rows.get(id, ())]
        charge, last_us = due.key.charge, due.service.end_us - 1
        beside = due.exact_amount - sum(amount for _, amount in of_rows) - off_lines.get(due.key, 0) * step
        spends += [Spend(at_us, charge, amount) for at_us, amount in of_rows]
        spends.append(Spend(last_us, charge, beside))
    return spends


def _earlier(
    connection: "Connection[Any]",
    account: str,
    currency: str,
    commitment: Commitment,
    since_us: Micros,
    until_us: Micros,
) -> list[Spend]:
    """What periods before spent, of a window that began before this one."""
    if since_us >= until_us:
        return []
    asked = [account, currency, to_datetime(since_us), to_datetime(until_us)]
    lines = [
        (id, charge, scaled(amount, AMOUNT_DECIMALS), to_micros(end))
        for id, charge, amount, end in connection.execute(_SELECT_EARLIER, asked)
        if commitment.counts(charge)
    ]
    rows = _rows(connection, [id for id, *_ in lines], commitment)
    spends = []
    for id, charge, amount, end_us in lines:
        of_rows = rows.get(id, ())
        spends += [Spend(at_us, charge, part) for at_us, part in of_rows]
        spends.append(Spend(end_us - 1, charge, amount - sum(part for _, part in of_rows)))
    spends += [
        Spend(to_micros(end) - 1, charge, -scaled(amount, AMOUNT_DECIMALS))
        for charge, amount, end in connection.execute(_SELECT_DISCOUNTED, asked)
    ]
    return spends


def _rows(
    connection: "Connection[Any]", lines: Collection[int], commitment: Commitment
) -> dict[int, list[tuple[Micros, Amount]]]:
    """What the rows of lines spent, and when."""
    found: dict[int, list[tuple[Micros, Amount]]] = {}
    end_us = commitment.start_us if commitment.end_us is None else commitment.end_us
    asked = {"lines": list(lines), "start": to_datetime(commitment.start_us), "end": to_datetime(end_us)}
    for line, at, amount in connection.execute(_SELECT_ROWS, asked):
        found.setdefault(line, []).append((to_micros(at), scaled(amount, AMOUNT_DECIMALS)))
    return found
