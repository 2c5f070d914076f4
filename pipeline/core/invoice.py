"""The arithmetic of a document, from exact items to what is left to pay (law 6). Pure.

Items are exact (1e-12); on a line everything is in the currency's smallest unit (``Minor``). ``build`` is the whole
way. Lines that take back or restate lines of other documents are reckoned before, and go into it as ``settled``.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from pipeline.core.apportion import apportion
from pipeline.core.balances import carry
from pipeline.core.credits import Grant, Owed, draw, minor_step, spread
from pipeline.core.discounts import Coupon, Discount, LineDiscount, invoice_discounts, line_discounts, on_lines
from pipeline.core.items import Item, Limits, LineKind
from pipeline.core.money import Amount, Micros, Minor, round_half_up_div
from pipeline.core.parties import Policy
from pipeline.core.tax import LineTax, Tax, Treatment, compute

__all__ = [
    "CreditDraw",
    "Document",
    "Item",
    "Limits",
    "Line",
    "LineKind",
    "TaxTotal",
    "Totals",
    "build",
    "settled_discounts",
    "tax_totals",
    "totals_of",
]


@dataclass(frozen=True, slots=True)
class Line:
    """An item as it is billed. total = net + tax, and tax is the sum of its taxes.

    Prices without tax: net = amount - discount. With tax: total = amount - discount. Below 0 where it takes back.
    """

    id: str
    exact: Amount
    #: The exact amount rounded once, half up.
    amount: Minor
    discount: Minor
    net: Minor
    tax: Minor
    total: Minor
    taxes: tuple[LineTax, ...]
    #: What credits look at: grants may pay for some charges only, for usage of some time, and for one account.
    charge: str = ""
    at_us: Micros = 0
    account: str = ""
    #: Those before tax add up to ``discount``.
    discounts: tuple[LineDiscount, ...] = ()

    @property
    def paid_by_coupons(self) -> Minor:
        """What coupons after tax pay of its total."""
        return sum(one.amount for one in self.discounts if one.after_tax)


@dataclass(frozen=True, slots=True)
class TaxTotal:
    """A row of the tax table: its base and its amount are the sums of its lines'."""

    tax: Tax
    base: Minor
    amount: Minor


class CreditDraw(NamedTuple):
    """What a grant pays: of a line, a net credit, which is one of its discounts too; without a line, of the total."""

    grant: str
    line: str | None
    amount: Minor


class Totals(NamedTuple):
    """The header. The first five are sums of the lines'; payable = total - credits - balance."""

    amount: Minor
    discount: Minor
    net: Minor
    tax: Minor
    total: Minor
    #: Paid by total credits and, where the policy says so, by coupons after tax.
    credits: Minor
    #: Paid by the balance carried forward; below 0: carried forward by this document.
    balance: Minor
    payable: Minor


@dataclass(frozen=True, slots=True)
class Document:
    """A document's arithmetic."""

    currency: str
    #: In the order of the items, then those that were settled before.
    lines: tuple[Line, ...]
    taxes: tuple[TaxTotal, ...]
    #: Line coupons by line, then invoice coupons in their sequence, then net credits; after tax; of settled lines last.
    discounts: tuple[Discount, ...]
    draws: tuple[CreditDraw, ...]
    totals: Totals
    #: The customer's balance after it.
    balance_after: Minor


def build(
    items: Sequence[Item],
    *,
    currency: str,
    policy: Policy,
    treatments: Mapping[str, Treatment],
    coupons: Sequence[Coupon] = (),
    grants: Iterable[Grant] = (),
    balance: Minor = 0,
    settled: Sequence[Line] = (),
) -> Document:
    """Reckon a document over items that are priced, in law 6's order.

    ``treatments``: taxes by category (``tax.treatment``). ``coupons`` in the sequence they are applied in
    (``discounts.usable``). ``grants`` of this currency, with what is left of each. ``balance``: what is carried
    forward, in the customer's favour. ``settled``: lines of other documents, with their taxes and discounts, those
    after tax too, as they are: no coupon and no tax of this one applies to them, but they may be paid by its credits.
    Grants of one account pay for its lines first, then those of all.

    The order of items changes nothing but that of lines. Raises ValueError for an id used twice, an unknown currency, a
    coupon of another one and a balance below 0, KeyError for a category that no treatment is given for.
    """
    step = minor_step(currency)
    ordered = sorted(items, key=lambda item: item.id)
    _check_ids([*(item.id for item in items), *(line.id for line in settled)])

    # Line discounts, with the maximum and minimum that hold after them; each line's one rounding.
    amounts = [round_half_up_div(item.amount, step) for item in ordered]
    off_lines = line_discounts(ordered, coupons, currency)
    left = _less(ordered, amounts, ((discount.line, discount.amount) for discount in off_lines))
    parts: defaultdict[str, list[LineDiscount]] = defaultdict(list)
    _add(parts, off_lines)

    # Invoice discounts, then net credits.
    off_net: list[Discount] = []
    if policy.coupons == "before_tax":
        off_net, borne = invoice_discounts(ordered, left, coupons, currency)
        left = [rest - part for rest, part in zip(left, borne, strict=True)]
        _share(parts, off_net, ordered, borne)
    grants = [_in_steps(grant, step) for grant in grants]
    net_draws = _net_credits(ordered, left, [grant for grant in grants if grant.reduces == "net"], step)
    off_credits = [Discount(drawn.amount, grant=drawn.grant, line=drawn.line) for drawn in net_draws]
    _add(parts, off_credits)
    left = _less(ordered, left, ((drawn.line, drawn.amount) for drawn in net_draws))

    # Tax on what is left.
    taxes = compute(left, [treatments[item.tax_category] for item in ordered], policy)
    found = {
        item.id: _line(item, amount, amount - rest, of_line, inclusive=policy.prices == "inclusive")
        for item, amount, rest, of_line in zip(ordered, amounts, left, taxes, strict=True)
    }

    # What pays the total: coupons, where they are after tax; total credits; the balance carried forward.
    due = {line.id: line.total - line.paid_by_coupons for line in (*found.values(), *settled)}
    off_total: list[Discount] = []
    if policy.coupons == "after_tax":
        totals, at_most = [due[item.id] for item in ordered], max(sum(due.values()), 0)
        off_total, borne = invoice_discounts(ordered, totals, coupons, currency, at_most=at_most)
        off_total = [replace(discount, after_tax=True) for discount in off_total]
        for item, part in zip(ordered, borne, strict=True):
            due[item.id] -= part
        _share(parts, off_total, ordered, borne)
    total_grants = [grant for grant in grants if grant.reduces == "total"]
    total_draws = _total_credits(_uses(ordered, settled, due, step), total_grants, step) if total_grants else []

    lines = (*(replace(found[item.id], discounts=tuple(parts[item.id])) for item in items), *settled)
    paid = sum(line.paid_by_coupons for line in lines) + sum(drawn.amount for drawn in total_draws)
    carried = carry(sum(line.total for line in lines) - paid, balance)
    return Document(
        currency=currency,
        lines=lines,
        taxes=tax_totals(lines),
        discounts=(*off_lines, *off_net, *off_credits, *off_total, *settled_discounts(settled)),
        draws=(*net_draws, *total_draws),
        totals=totals_of(lines, credits=paid, balance=carried.applied),
        balance_after=carried.after,
    )


def totals_of(lines: Iterable[Line], *, credits: Minor = 0, balance: Minor = 0) -> Totals:
    """The header over lines."""
    amount = discount = net = tax = total = 0
    for line in lines:
        amount += line.amount
        discount += line.discount
        net += line.net
        tax += line.tax
        total += line.total
    return Totals(amount, discount, net, tax, total, credits, balance, total - credits - balance)


def tax_totals(lines: Iterable[Line]) -> tuple[TaxTotal, ...]:
    """The tax table over lines, in a fixed order. A tax whose lines cancel out is a row of 0."""
    sums: dict[Tax, list[Minor]] = {}
    for line in lines:
        for part in line.taxes:
            row = sums.setdefault(part.tax, [0, 0])
            row[0] += part.base
            row[1] += part.amount
    return tuple(TaxTotal(tax, base, amount) for tax, (base, amount) in sorted(sums.items()))


def settled_discounts(settled: Iterable[Line]) -> tuple[Discount, ...]:
    """The discounts of lines that take back or restate lines of other documents.

    Of those on a line one each; of shares of one on a whole document together what they come to, none of 0.
    """
    found: list[Discount] = []
    shared: defaultdict[tuple[bool, str, str], Minor] = defaultdict(int)
    for line in settled:
        for one in line.discounts:
            if one.shared:
                shared[one.after_tax, one.coupon, one.name] += one.amount
            else:
                found.append(Discount(one.amount, one.coupon, one.grant, one.name, line.id, restates=True))
    found += [
        Discount(amount, coupon, name=name, after_tax=after_tax, restates=True)
        for (after_tax, coupon, name), amount in sorted(shared.items())
        if amount
    ]
    return tuple(found)


def _add(parts: Mapping[str, list[LineDiscount]], discounts: Iterable[Discount]) -> None:
    """Note on each line what discounts on single lines take off it."""
    for one in discounts:
        parts[one.line or ""].append(LineDiscount(one.amount, one.coupon, one.grant, one.name))


def _share(
    parts: Mapping[str, list[LineDiscount]],
    discounts: Iterable[Discount],
    items: Iterable[Item],
    borne: Iterable[Minor],
) -> None:
    """Note on each line its shares of discounts on the whole document."""
    of_lines = {item.id: amount for item, amount in zip(items, borne, strict=True)}
    for id, shares in on_lines(discounts, of_lines).items():
        parts[id] += shares


def _less(items: Iterable[Item], amounts: Iterable[Minor], off: Iterable[tuple[str | None, Minor]]) -> list[Minor]:
    """What is left of each item's amount after what is taken off it, by its id."""
    taken: defaultdict[str | None, Minor] = defaultdict(int)
    for id, amount in off:
        taken[id] += amount
    return [amount - taken[item.id] for item, amount in zip(items, amounts, strict=True)]


def _check_ids(ids: Sequence[str]) -> None:
    if len(set(ids)) != len(ids):
        twice = sorted({id for id in ids if ids.count(id) > 1})
        raise ValueError(f"expected lines with ids of their own, got {', '.join(twice)} twice")


def _line(item: Item, amount: Minor, discount: Minor, taxes: tuple[LineTax, ...], *, inclusive: bool) -> Line:
    rest, tax = amount - discount, sum(part.amount for part in taxes)
    net = rest - tax if inclusive else rest
    return Line(
        id=item.id,
        exact=item.amount,
        amount=amount,
        discount=discount,
        net=net,
        tax=tax,
        total=net + tax,
        taxes=taxes,
        charge=item.charge,
        at_us=item.at_us,
        account=item.account,
    )


# -- credits


def _in_steps(grant: Grant, step: Amount) -> Grant:
    """A grant as far as it can be drawn: in whole smallest units. What is left over stays with it."""
    return replace(grant, amount=grant.amount // step * step)


def _net_credits(
    items: Sequence[Item], left: Sequence[Minor], grants: Sequence[Grant], step: Amount
) -> list[CreditDraw]:
    """What net credits take off lines: never more than the lines come to together, those below 0 included."""
    draws: list[CreditDraw] = []
    payable = _payable([item.account for item in items], left) if grants else []
    for account in _own_first(grants):
        owed = [
            use._replace(line=item.id)
            for item, rest in zip(items, payable, strict=True)
            if account in ("", item.account)
            for use in _spread(item, rest, step)
        ]
        found = draw([grant for grant in grants if grant.account == account], owed).draws
        draws += [CreditDraw(part.grant, part.line, part.amount // step) for part in found]
        payable = _less(items, payable, ((part.line, part.amount // step) for part in found))
    return draws


def _payable(accounts: Sequence[str], amounts: Sequence[Minor]) -> list[Minor]:
    """Amounts less those below 0: of each account's own, then of all."""
    found = list(amounts)
    for account in set(accounts):
        places = [place for place, one in enumerate(accounts) if one == account]
        of_account = [amounts[place] for place in places]
        for place, part in zip(places, _at_most(max(sum(of_account), 0), of_account), strict=True):
            found[place] = part
    return _at_most(max(sum(amounts), 0), found)


def _at_most(whole: Minor, amounts: Iterable[Minor]) -> list[Minor]:
    """The whole, in proportion to the amounts above 0."""
    return apportion(whole, [max(amount, 0) for amount in amounts])


def _own_first(grants: Iterable[Grant]) -> list[str]:
    """Accounts of grants, then "" for those of all."""
    return sorted({grant.account for grant in grants}, key=lambda account: (not account, account))


def _total_credits(uses: Iterable[Owed], grants: Sequence[Grant], step: Amount) -> list[CreditDraw]:
    """What total credits pay of a document: never more than it comes to, whatever some lines give back.

    ``uses`` are of accounts, by their ``line``: none of these has more paid by its own than its lines come to, less its
    share in what other accounts' give back.
    """
    draws: list[CreditDraw] = []
    left: list[Owed] = []
    parts: defaultdict[str, list[Owed]] = defaultdict(list)
    for use in uses:
        parts[use.line].append(use)
    sums = {account: sum(use.amount for use in parts[account]) // step for account in sorted(parts)}
    at_most = _at_most(max(sum(sums.values()), 0), sums.values())
    for (account, whole), most in zip(sums.items(), at_most, strict=True):
        own = [grant for grant in grants if account and grant.account == account]
        found = draw(own, spread(most * step, parts[account], step=step)).draws if own else ()
        draws += [CreditDraw(part.grant, None, part.amount // step) for part in found]
        rest = whole * step - sum(part.amount for part in found)
        left += spread(rest, parts[account], step=step) if found else parts[account]
    everybody = draw([grant for grant in grants if not grant.account], (use._replace(line="") for use in left)).draws
    return [*draws, *(CreditDraw(part.grant, None, part.amount // step) for part in everybody)]


def _uses(items: Iterable[Item], settled: Iterable[Line], due: Mapping[str, Minor], step: Amount) -> list[Owed]:
    """What is due, at the time it was used, as uses of one thing of each account: so what a line gives back counts."""
    uses = [use._replace(line=item.account) for item in items for use in _spread(item, due[item.id], step)]
    uses += [Owed(line.at_us, line.id, line.account, line.charge, due[line.id] * step) for line in settled]
    return uses


def _spread(item: Item, amount: Minor, step: Amount) -> list[Owed]:
    """An amount of a line over its uses."""
    uses = [use._replace(line="", charge=item.charge) for use in item.uses]
    return spread(amount * step, uses or [Owed(item.at_us, item.id, "", item.charge, 0)], step=step)
