"""Coupons: what they take off lines, in the sequence they are given in. Pure.

A *line* coupon lowers the price of the lines it applies to, before a charge's maximum and minimum and what commitments
add. An *invoice* coupon takes off what its lines come to together, after them; each line has its share in proportion.
Each coupon sees what those before it left, and none takes more than is there.

What a coupon takes is a whole number of the currency's smallest unit, rounded half up once: of each line where it is a
line coupon's percentage, else of its lines together. Shares of an invoice coupon stay exact (1e-12) until the last one,
then each line's are rounded together by largest remainder.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from decimal import Decimal
from typing import Literal, TypeAlias

from pipeline.core.apportion import apportion, round_together
from pipeline.core.credits import minor_step
from pipeline.core.items import Item, Limits
from pipeline.core.money import Amount, Minor, round_half_up_div
from pipeline.core.parties import CustomerCoupon

CouponLevel: TypeAlias = Literal["line", "invoice"]


@dataclass(frozen=True, slots=True)
class Coupon:
    """A discount: a percentage, or an amount for each document. What a document is too small for lapses."""

    id: str
    version: int
    name: str
    level: CouponLevel = "invoice"
    #: Either this, above 0 up to 100,
    percent: Decimal | None = None
    #: or this (1e-12 of ``currency``), for documents of that currency only.
    amount: Amount | None = None
    currency: str | None = None
    #: In how many billing periods a customer may use it: 1 is once; None: in all while it is given. A period in which
    #: it took nothing does not count.
    uses: int | None = None
    #: What it applies to, both; none named: to all.
    charges: frozenset[str] = frozenset()
    plans: frozenset[str] = frozenset()

    def applies_to(self, item: Item) -> bool:
        return (not self.charges or item.charge in self.charges) and (not self.plans or item.plan in self.plans)


@dataclass(frozen=True, slots=True)
class Discount:
    """What a coupon, or a grant of net credits, takes off, in the currency's smallest unit; above 0 takes off."""

    amount: Minor
    coupon: str = ""
    grant: str = ""
    name: str = ""
    #: ``Item.id`` of the line it is on; None: the whole document.
    line: str | None = None
    #: Whether it pays the total, instead of lowering what is taxed.
    after_tax: bool = False
    #: Of the whole document: each line's exact share (1e-12), by ``Item.id``; together the amount.
    shares: tuple[tuple[str, Amount], ...] = ()
    #: Whether it is of lines that take back or restate lines of other documents, as those ones had it.
    restates: bool = False


@dataclass(frozen=True, slots=True)
class LineDiscount:
    """What of a discount is on one line, in the currency's smallest unit. Below 0 where the line takes back."""

    amount: Minor
    coupon: str = ""
    grant: str = ""
    name: str = ""
    #: Whether it is the line's share of one on the whole document.
    shared: bool = False
    #: Whether it pays the line's total: then it is no part of ``Line.discount``.
    after_tax: bool = False


def check_coupon(coupon: Coupon) -> None:
    """Raise ValueError, saying what was expected and what came, for a coupon that cannot be applied."""
    if (coupon.percent is None) == (coupon.amount is None):
        raise ValueError(f"coupon {coupon.id}: expected a percentage or an amount, got {_both(coupon)}")
    if coupon.percent is not None and not (coupon.percent.is_finite() and 0 < coupon.percent <= 100):
        raise ValueError(f"coupon {coupon.id}: expected a percentage above 0 up to 100, got {coupon.percent}")
    if (coupon.amount is None) != (coupon.currency is None):
        raise ValueError(f"coupon {coupon.id}: expected a currency with an amount, and only then")
    step = 1 if coupon.currency is None else minor_step(coupon.currency)
    if coupon.amount is not None and (coupon.amount <= 0 or coupon.amount % step):
        raise ValueError(
            f"coupon {coupon.id}: expected an amount above 0 in steps of {coupon.currency}'s smallest unit, "
            f"got {coupon.amount}e-12"
        )
    if coupon.uses is not None and coupon.uses < 1:
        raise ValueError(f"coupon {coupon.id}: expected 1 use or more, got {coupon.uses}")


def _both(coupon: Coupon) -> str:
    return "neither" if coupon.percent is None else "both"


def usable(
    given: Iterable[CustomerCoupon],
    coupons: Mapping[str, Coupon],
    used: Mapping[str, int],
    period_start: date,
    currency: str,
) -> list[Coupon]:
    """The coupons that count for a document, in the customer's sequence.

    ``coupons``: all there are, by id. ``used``: in how many billing periods the customer used each before
    (``billing.coupon_use``). ``period_start``: first day of the billing period, by the customer's clock.

    Raises ValueError for a coupon that nobody knows.
    """
    found = []
    for one in given:
        if one.coupon not in coupons:
            raise ValueError(f"expected a coupon of {', '.join(sorted(coupons)) or 'none'}, got {one.coupon!r}")
        coupon = coupons[one.coupon]
        left = coupon.uses is None or used.get(coupon.id, 0) < coupon.uses
        if one.valid_on(period_start) and left and coupon.currency in (None, currency):
            found.append(coupon)
    return found


# -- of single lines


def line_discounts(items: Sequence[Item], coupons: Iterable[Coupon], currency: str) -> list[Discount]:
    """What line coupons take off each line, one discount for each coupon and line, none of 0. Other coupons: nothing.

    Lines of usage and fees only. Percentages are taken of what was priced before the charge's maximum and minimum;
    what they take off in the end is what the line costs less, after these, than without them.
    """
    chosen = [coupon for coupon in coupons if coupon.level == "line"]
    if not chosen:
        return []
    step = minor_step(currency)
    lines = [item for item in items if item.kind in ("usage", "fee")]
    left = {item.id: round_half_up_div(item.amount if item.limits is None else item.gross, step) for item in lines}
    taken: dict[str, list[Discount]] = {item.id: [] for item in lines}
    for coupon in chosen:
        on = [item.id for item in lines if coupon.applies_to(item)]
        for id, amount in zip(on, _cuts(coupon, [left[id] for id in on], currency), strict=True):
            left[id] -= amount
            taken[id].append(Discount(amount, coupon.id, name=coupon.name, line=id))
    taken |= _after_limits(lines, taken, step)
    return [discount for item in lines for discount in taken[item.id] if discount.amount]


def _cuts(coupon: Coupon, amounts: Sequence[Minor], currency: str) -> list[Minor]:
    """What a line coupon takes off each amount. A percentage also of what is below 0: that takes back a price."""
    if coupon.percent is not None:
        numerator, denominator = coupon.percent.as_integer_ratio()
        return [round_half_up_div(amount * numerator, denominator * 100) for amount in amounts]
    positive = [max(amount, 0) for amount in amounts]
    return apportion(min(_amount_of(coupon, currency), sum(positive)), positive)


def _amount_of(coupon: Coupon, currency: str) -> Minor:
    if coupon.amount is None or coupon.currency != currency:
        raise ValueError(f"coupon {coupon.id}: expected an amount in {currency}, got one in {coupon.currency}")
    return coupon.amount // minor_step(currency)


def _after_limits(
    lines: Sequence[Item], taken: Mapping[str, Sequence[Discount]], step: Amount
) -> dict[str, list[Discount]]:
    """The discounts of charges with a maximum or minimum, lowered to what they change of the charge's amount."""
    groups: defaultdict[Limits, list[Item]] = defaultdict(list)
    for item in lines:
        if item.limits is not None:
            groups[item.limits].append(item)
    lowered: dict[str, list[Discount]] = {}
    for limits, items in groups.items():
        gross = sum(item.gross for item in items)
        wanted = [discount.amount for item in items for discount in taken[item.id]]
        effective = limits.applied(gross) - limits.applied(gross - sum(wanted) * step)
        parts = iter(apportion(round_half_up_div(effective, step), wanted))
        for item in items:
            left = round_half_up_div(item.amount, step)
            lowered[item.id] = []
            for discount in taken[item.id]:
                # Parts were rounded, and so was the line: together they may be beyond it by the smallest unit.
                part = next(parts)
                part = min(part, max(left, 0)) if part > 0 else part
                left -= part
                lowered[item.id].append(replace(discount, amount=part))
    return lowered


# -- of the whole document


def invoice_discounts(
    items: Sequence[Item],
    amounts: Sequence[Minor],
    coupons: Iterable[Coupon],
    currency: str,
    *,
    at_most: Minor | None = None,
) -> tuple[list[Discount], list[Minor]]:
    """What invoice coupons take off lines that come to these amounts: a discount for each coupon, none of 0, and what
    each line bears of them all. Line coupons: nothing.

    A coupon takes nothing where its lines come to 0 or less together; each of them bears its share, in proportion, so a
    line below 0 bears less than nothing. Ties go to the first line. Together they take ``at_most`` so much, 0 or more.
    """
    step = minor_step(currency)
    left = [amount * step for amount in amounts]
    discounts = []
    for coupon in coupons:
        on = [number for number, item in enumerate(items) if coupon.level == "invoice" and coupon.applies_to(item)]
        base = sum(left[number] for number in on)
        if base <= 0:
            continue
        if coupon.percent is not None:
            numerator, denominator = coupon.percent.as_integer_ratio()
            wanted = round_half_up_div(base * numerator, denominator * 100 * step)
        else:
            wanted = _amount_of(coupon, currency)
        # Shares taken before may have left a part of the smallest unit: that is not taken.
        taken = min(wanted, base // step)
        if at_most is not None:
            taken = min(taken, at_most)
            at_most -= taken
        if taken == 0:
            continue
        shares = apportion(taken * step, [left[number] for number in on])
        for number, share in zip(on, shares, strict=True):
            left[number] -= share
        of_lines = tuple((items[number].id, share) for number, share in zip(on, shares, strict=True))
        discounts.append(Discount(taken, coupon.id, name=coupon.name, shares=of_lines))
    borne = round_together([amount * step - rest for amount, rest in zip(amounts, left, strict=True)], step)
    return discounts, borne


def on_lines(discounts: Iterable[Discount], borne: Mapping[str, Minor]) -> dict[str, list[LineDiscount]]:
    """What each line bears of each discount on the whole document, none of 0. ``borne``: of them all, by line."""
    exact: defaultdict[str, list[tuple[Discount, Amount]]] = defaultdict(list)
    for discount in discounts:
        for id, share in discount.shares:
            exact[id].append((discount, share))
    found = {}
    for id, shares in exact.items():
        amounts = apportion(borne[id], [share for _, share in shares])
        found[id] = [
            LineDiscount(amount, one.coupon, name=one.name, shared=True, after_tax=one.after_tax)
            for (one, _), amount in zip(shares, amounts, strict=True)
            if amount
        ]
    return found
