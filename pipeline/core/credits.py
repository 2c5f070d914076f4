"""Credits: which grant pays for what. Grants, the order they are drawn in, overdraft and rollover. Pure.

A grant reduces *units* (before anything is priced), the *net* amount of lines (a discount, before tax) or the *total*
to pay (a payment, after tax). One function draws all of them, ``draw``: quantities of 1e-9 for units, amounts of 1e-12
of one currency for the others.

In the order of law 6 a close does this, each step with the grants of its kind:

1. units: ``credit_segment`` over the counters' members; what each counter gets is ``credited`` in its closing price.
2. net: ``spread`` each line's rounded amount over its events, ``draw``; the draws are discounts of the lines.
3. total: ``spread`` the document's total, tax included, over its events, ``draw``; the draws pay it.

Spread in steps of the currency's minor unit, every draw is a whole number of them, and nothing is left to round.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Literal, NamedTuple, TypeAlias, get_args

from pipeline.core.charges import Charge, check_metering
from pipeline.core.closing import Counter, close_pools
from pipeline.core.members import Member
from pipeline.core.meters import Meter
from pipeline.core.money import AMOUNT_DECIMALS, Amount, Micros, Quantity, minor_units, round_half_up_div
from pipeline.core.plans import Pool

#: prepaid: paid for. promotional: given away, mostly with an end. service: for an outage or a breach of what was
#: promised. correction: sets right what was billed wrongly.
GrantKind: TypeAlias = Literal["prepaid", "promotional", "service", "correction"]
Reduces: TypeAlias = Literal["units", "net", "total"]
#: Why there is a grant, or why it is void; by kind of grant the codes that fit it.
ReasonCode: TypeAlias = Literal[
    "purchase",
    "contract",
    "campaign",
    "trial",
    "referral",
    "outage",
    "sla_breach",
    "goodwill",
    "billing_error",
    "migration",
    "rollover",
    "granted_in_error",
    "refunded",
    "fraud",
]

GRANT_KINDS: tuple[GrantKind, ...] = get_args(GrantKind)
#: A promotion is a discount and lowers the tax; what was paid, or is owed, pays like money.
REDUCES_BY_DEFAULT: Mapping[GrantKind, Reduces] = {
    "promotional": "net",
    "prepaid": "total",
    "service": "total",
    "correction": "total",
}
GRANT_REASONS: Mapping[GrantKind, frozenset[ReasonCode]] = {
    "prepaid": frozenset({"purchase", "contract", "migration", "rollover"}),
    "promotional": frozenset({"campaign", "trial", "referral", "contract", "goodwill", "migration", "rollover"}),
    "service": frozenset({"outage", "sla_breach", "goodwill", "rollover"}),
    "correction": frozenset({"billing_error", "migration", "rollover"}),
}
VOID_REASONS: frozenset[ReasonCode] = frozenset({"granted_in_error", "refunded", "fraud", "migration"})

#: Drawn before those of a higher number.
PRIORITY_DEFAULT = 100


@dataclass(frozen=True, slots=True)
class Rollover:
    """What of a grant's balance goes on when it ends: between a minimum and a maximum, in the grant's own scale.

    ``preserve_overage`` takes off what was used beyond the grant and is not billed otherwise: the new balance starts
    with that debt paid.
    """

    maximum: int
    minimum: int = 0
    preserve_overage: bool = False


@dataclass(frozen=True, slots=True)
class Grant:
    """Credits an account was given, to be drawn for usage at ``[start_us, end_us)``; an end of None never comes.

    ``amount`` and all numbers about it are quantities (1e-9) where it reduces units, else amounts (1e-12).
    """

    id: str
    amount: int
    start_us: Micros = 0
    end_us: Micros | None = None
    kind: GrantKind = "prepaid"
    reduces: Reduces = "total"
    priority: int = PRIORITY_DEFAULT
    #: When it was given, which decides between equals: the oldest goes first.
    granted_us: Micros = 0
    #: Charges it pays for; none named: all of them.
    charges: frozenset[str] = frozenset()
    #: On a document for several accounts the one whose lines it pays for; "": all of them.
    account: str = ""

    def valid_at(self, at_us: Micros) -> bool:
        return self.start_us <= at_us and (self.end_us is None or at_us < self.end_us)

    def pays_for(self, charge: str) -> bool:
        return not self.charges or charge in self.charges


class Owed(NamedTuple):
    """A use that credits may pay for. Compares in the order credits are drawn in: event time, then key.

    ``line`` says what it is a part of: a line's id, a counter as text. Below zero it gives back: usage that was voided,
    a volume tier turned cheaper.
    """

    at_us: Micros
    key: str
    line: str
    charge: str
    amount: int


class Draw(NamedTuple):
    """What a grant paid of a line."""

    grant: str
    line: str
    amount: int


@dataclass(frozen=True, slots=True)
class Drawn:
    """What became of uses and grants. A line's draws + overdraft + uncovered are what it owed (0 if less)."""

    #: One for each grant and line with an amount, in the order of first use.
    draws: tuple[Draw, ...]
    #: Balance of every grant given, by id, also of those that have ended.
    left: Mapping[str, int]
    #: Used on credit, by line: nothing to pay now, to be drawn from what is granted next.
    overdrawn: Mapping[str, int]
    #: What no credit paid for, by line: to be billed.
    uncovered: Mapping[str, int]

    @property
    def amount(self) -> int:
        return sum(draw.amount for draw in self.draws)

    @property
    def overdraft(self) -> int:
        return sum(self.overdrawn.values())

    @property
    def balance(self) -> int:
        """What is left of all grants, less the overdraft."""
        return sum(self.left.values()) - self.overdraft


def check_grant(grant: Grant, rollover: Rollover | None = None) -> None:
    """Raise ValueError, saying what was expected and what came, for a grant that cannot be given."""
    if grant.amount <= 0:
        raise ValueError(
            f"expected credits above 0, got {grant.amount} in the smallest unit: void a grant to take it back"
        )
    if grant.end_us is not None and grant.end_us <= grant.start_us:
        raise ValueError("expected credits to end after they begin to count, got an end that is not later")
    if grant.reduces == "units" and not grant.charges:
        raise ValueError("expected the charges that unit credits pay for, got none: units of what?")
    if rollover is not None:
        if not 0 <= rollover.minimum <= rollover.maximum:
            raise ValueError(
                f"expected a rollover of 0 or more, at most its maximum, got {rollover.minimum} to {rollover.maximum}"
            )
        if grant.end_us is None:
            raise ValueError("expected an end of credits that roll over at it, got none")


def check_reason(reason: str, allowed: Iterable[ReasonCode]) -> ReasonCode:
    """The reason code. Raises ValueError, with those that fit, for any other text."""
    fitting = sorted(allowed)
    for code in fitting:
        if code == reason:
            return code
    raise ValueError(f"expected a reason code of {', '.join(fitting)}, got {reason!r}")


def burn_order(grants: Iterable[Grant]) -> list[Grant]:
    """The order grants are drawn in: priority, then the earliest end, unpaid before paid, the oldest, the lowest id."""
    return sorted(
        grants,
        key=lambda grant: (
            grant.priority,
            grant.end_us is None,
            grant.end_us or 0,
            grant.kind == "prepaid",
            grant.granted_us,
            grant.id,
        ),
    )


def draw(
    grants: Iterable[Grant], owed: Iterable[Owed], *, free: Mapping[str, int] | None = None, overdraft: int = 0
) -> Drawn:
    """Pay uses in order of event time, each from the grants valid at its time. Uses in any order.

    ``free``: what each line has free before credits are touched (included units). ``overdraft``: how much may be used
    on credit beyond the grants, over all lines; 0 is none.

    What a use below zero gives back lowers, of its line, what is uncovered, then overdrawn, then the latest draws; the
    grant has it again for later uses. Grants must be of one ``reduces`` and unit: amounts of one scale.
    """
    ordered = burn_order(grants)
    left = {grant.id: grant.amount for grant in ordered}
    used: defaultdict[str, int] = defaultdict(int)
    drawn: defaultdict[str, dict[str, int]] = defaultdict(dict)  # line -> grant -> amount, the latest grant last
    overdrawn: defaultdict[str, int] = defaultdict(int)
    uncovered: defaultdict[str, int] = defaultdict(int)
    settled: defaultdict[str, int] = defaultdict(int)
    credit = overdraft
    for use in sorted(owed):
        line = use.line
        used[line] += use.amount
        due = max(used[line] - (free or {}).get(line, 0), 0) - settled[line]
        settled[line] += due
        if due < 0:
            back = -due
            back -= _take(uncovered, line, back)
            returned = _take(overdrawn, line, back)
            credit += returned
            _give_back(drawn[line], left, back - returned)
            continue
        for grant in ordered:
            if not due:
                break
            if grant.valid_at(use.at_us) and grant.pays_for(use.charge) and (part := min(left[grant.id], due)):
                left[grant.id] -= part
                due -= part
                drawn[line][grant.id] = drawn[line].pop(grant.id, 0) + part
        on_credit = min(due, credit)
        credit -= on_credit
        overdrawn[line] += on_credit
        uncovered[line] += due - on_credit
    return Drawn(
        draws=tuple(
            Draw(grant, line, amount) for line, parts in drawn.items() for grant, amount in parts.items() if amount
        ),
        left=left,
        overdrawn={line: amount for line, amount in overdrawn.items() if amount},
        uncovered={line: amount for line, amount in uncovered.items() if amount},
    )


def _take(amounts: dict[str, int], line: str, wanted: int) -> int:
    """Take up to so much off a line's amount; how much it was."""
    taken = min(amounts.get(line, 0), wanted)
    if taken:
        amounts[line] -= taken
    return taken


def _give_back(drawn: dict[str, int], left: dict[str, int], amount: int) -> None:
    """Return a line's latest draws to their grants."""
    for grant in reversed(list(drawn)):
        part = min(drawn[grant], amount)
        drawn[grant] -= part
        left[grant] += part
        amount -= part


def counter_line(counter: Counter) -> str:
    """A counter's name as the line of an ``Owed``: charge, cell and subject, unambiguous."""
    return repr((counter.charge, counter.cell, counter.subject))


def draw_units(
    grants: Iterable[Grant],
    usage: Mapping[Counter, Sequence[Member]],
    *,
    free: Mapping[Counter, Quantity] | None = None,
) -> tuple[Drawn, dict[Counter, Quantity]]:
    """Draw unit credits for the members of additive counters: the draws, and the units each counter gets.

    ``free``: units each counter has anyway (its charge's included ones, its part of a pool): those go first. What a
    counter gets here is ``credited`` of ``closing_price``. As of a pool, it gets no more than it used in the end, so
    nothing is ever given back, and drawing again with no more than what was drawn comes to the same.
    """
    names = {counter_line(counter): counter for counter in usage}
    owed = (use for line, counter in names.items() for use in _uses(line, counter, usage[counter]))
    drawn = draw(grants, owed, free={counter_line(counter): units for counter, units in (free or {}).items()})
    units: defaultdict[Counter, Quantity] = defaultdict(int)
    for part in drawn.draws:
        units[names[part.line]] += part.amount
    return drawn, dict(units)


def _uses(line: str, counter: Counter, members: Sequence[Member]) -> Iterator[Owed]:
    """What each event adds to a counter that ends at the sum of all: none of it is taken back by a later one."""
    total = sum(member.quantity for member in members)
    used = reached = 0
    for member in sorted(members):
        used += member.quantity
        added = min(used, total) - reached
        if added > 0:
            reached += added
            yield Owed(member.at_us, member.key, line, counter.charge, added)


def credit_segment(
    grants: Sequence[Grant],
    charges: Iterable[tuple[Charge, Meter | None]],
    pools: Iterable[Pool],
    usage: Mapping[Counter, Sequence[Member]],
) -> tuple[list[Grant], dict[Counter, dict[str, Quantity]]]:
    """Draw unit credits for a segment's counters, after their parts of pools and what their charges include.

    The grants with what is left of them, for the next segment, and the units each counter got, by grant. Segments of an
    account follow each other in time, so drawing for one after the other is drawing in the order of event time.

    Raises ValueError for usage whose grant names a charge that is not priced by a quantity: what was granted for it
    cannot be given, and must not be billed either.
    """
    by_id = {charge.id: (charge, meter) for charge, meter in charges}
    concerned = {
        counter: members
        for counter, members in usage.items()
        if any(
            grant.amount and grant.pays_for(counter.charge) and any(grant.valid_at(member.at_us) for member in members)
            for grant in grants
        )
    }
    for counter in concerned:
        _check_takes_units(*by_id[counter.charge])
    free: defaultdict[Counter, Quantity] = defaultdict(int)
    for pool in pools:
        for counter, units in close_pools(pool, usage).items():
            free[counter] += units
    for counter in concerned:
        free[counter] += by_id[counter.charge][0].included
    drawn, _ = draw_units(grants, concerned, free=free)
    names = {counter_line(counter): counter for counter in concerned}
    found: defaultdict[Counter, dict[str, Quantity]] = defaultdict(dict)
    for part in drawn.draws:
        found[names[part.line]][part.grant] = part.amount
    return [replace(grant, amount=drawn.left[grant.id]) for grant in grants], dict(found)


def _check_takes_units(charge: Charge, meter: Meter | None) -> None:
    try:
        if meter is not None:
            check_metering(charge, meter, pooled=True)
    except ValueError as error:
        raise ValueError(
            f"unit credits were granted for charge {charge.id}, which cannot draw units any more than from a pool "
            f"({error}): `tally credits void` them, and grant their worth in money"
        ) from error


def spread(amount: Amount, parts: Sequence[Owed], *, step: Amount = 1) -> list[Owed]:
    """An amount in proportion to parts, each a multiple of ``step``, adding up to it: as a ruler is cut.

    For an amount that is not the sum of its parts: a line after discounts and rounding, a document with its tax. Parts
    in order of time; where they add up to nothing, the last one has it all. The amount must be a multiple of the step:
    ValueError otherwise.
    """
    if amount % step:
        raise ValueError(f"expected an amount in steps of {step}, got {amount}")
    if not parts:
        if amount:
            raise ValueError(f"expected parts to spread {amount} over, got none")
        return []
    ordered = sorted(parts)
    whole = sum(part.amount for part in ordered)
    cut, reached, found = 0, 0, []
    for number, part in enumerate(ordered, 1):
        reached += part.amount
        if number == len(ordered):
            until = amount
        elif whole:
            sign = 1 if whole > 0 else -1
            until = round_half_up_div(amount * reached * sign, abs(whole) * step) * step
        else:
            until = 0
        found.append(part._replace(amount=until - cut))
        cut = until
    return found


def minor_step(currency: str) -> Amount:
    """A currency's smallest unit as an amount: what to spread in. Raises ValueError for an unknown currency."""
    return int(10 ** (AMOUNT_DECIMALS - minor_units(currency)))


def rolled_over(left: int, rule: Rollover, *, overage: int = 0) -> int:
    """Balance of the grant that follows one with so much left and so much used beyond it. May be below zero: a debt."""
    balance = min(rule.maximum, max(rule.minimum, left))
    return balance - overage if rule.preserve_overage else balance


def credits_for(paid: Amount, price: Decimal) -> Amount:
    """How many credits a payment buys at a price per credit, in 1e-12 of a credit, rounded half up once.

    Raises ValueError for a price that is not above 0.
    """
    if not price.is_finite() or price <= 0:
        raise ValueError(f"expected a price per credit above 0, got {price}")
    numerator, denominator = price.as_integer_ratio()
    return round_half_up_div(paid * denominator, numerator)
