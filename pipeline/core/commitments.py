"""Spend commitments: what was promised to be spent, and what the close adds when it was not, or was exceeded. Pure.

A commitment is an amount per window. Usage up to it costs what it costs; usage beyond it costs ``overage_factor`` times
that; and with ``true_up`` what is missing at the window's end is charged too. Each window settles alone: what is left
of one does not carry into the next. A commitment to a quantity is one to the price of that quantity.

Law 3 holds for it: ``settle`` gives a window's total, and what is booked is the difference to what was booked before,
so a yearly window may be settled at each monthly close and trued up at the last.
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal
from itertools import combinations
from typing import Literal, NamedTuple, TypeAlias
from zoneinfo import ZoneInfo

from pipeline.core.contracts import Contract, phase_spans
from pipeline.core.cycles import in_words
from pipeline.core.money import Amount, Micros, round_half_up_div
from pipeline.core.periods import NEVER, Period, local_midnight, month_of, to_datetime
from pipeline.core.plans import Plan
from pipeline.core.proration import share_of

#: term: the whole time of the commitment is one window. Days, months and years are those of the billing time zone, a
#: year counts from the month the commitment starts in; hours are those of UTC.
Window: TypeAlias = Literal["hour", "day", "month", "year", "term"]


@dataclass(frozen=True, slots=True)
class Commitment:
    """An amount (1e-12) to be spent in each window of ``[start_us, end_us)``; a term needs an end."""

    id: str
    amount: Amount
    start_us: Micros
    end_us: Micros | None = None
    window: Window = "month"
    true_up: bool = True
    #: Price of usage beyond the commitment, as a multiple of its own.
    overage_factor: Decimal = Decimal(1)
    #: Charges whose amounts count; none named: all of the currency.
    charges: frozenset[str] = frozenset()
    #: Whether a window that the commitment covers in part owes that part only.
    prorate: bool = True

    def counts(self, charge: str) -> bool:
        return not self.charges or charge in self.charges


class Spend(NamedTuple):
    """An amount spent at a time: an event's, or a close entry's at its segment's last moment."""

    at_us: Micros
    charge: str
    amount: Amount


@dataclass(frozen=True, slots=True)
class Settlement:
    """What one window costs. ``within`` + ``overage`` + ``true_up`` = ``total``."""

    #: At its own price, up to the commitment.
    within: Amount
    #: Beyond it, at its price times the factor.
    overage: Amount
    #: What was missing, charged at the window's end.
    true_up: Amount
    #: As priced, before the commitment.
    spent: Amount

    @property
    def total(self) -> Amount:
        return self.within + self.overage + self.true_up

    @property
    def adjustment(self) -> Amount:
        """What the commitment adds to the usage as priced: the close's entry."""
        return self.total - self.spent

    @property
    def parts(self) -> tuple[Amount, ...]:
        """The amounts that are not 0, in order: within, overage, true-up."""
        return tuple(part for part in (self.within, self.overage, self.true_up) if part)


@dataclass(frozen=True, slots=True)
class SettledWindow:
    """A window of a commitment, cut where the commitment begins or ends, and what it came to."""

    start_us: Micros
    end_us: Micros
    committed: Amount
    #: Whether the window had ended when it was settled; only then is it trued up.
    ended: bool
    settlement: Settlement


class Sold(NamedTuple):
    """A time in which a contract has a plan: what a commitment may count."""

    contract: Contract
    plan: Plan
    start_us: Micros
    end_us: Micros


def sold(contracts: Iterable[Contract], plan_at: Callable[[str, Micros], Plan | None]) -> tuple[Sold, ...]:
    """What contracts sell, phase by phase; ``plan_at``: a plan as it stands at a time, None where it does not yet."""
    return tuple(
        Sold(contract, plan, start_us, end_us)
        for contract in contracts
        for name, start_us, end_us in phase_spans(contract)
        if (plan := plan_at(name, start_us)) is not None
    )


def check_sold(commitment: Commitment, currency: str, of_account: Iterable[Sold]) -> None:
    """Raise ValueError for contracts of an account that one commitment cannot count together.

    What a window adds is on one seller's document, and that document has to know all that the window holds: so while
    the commitment counts, all it counts has one legal entity, and contracts at the same time have one billing cycle.
    """
    end_us = NEVER if commitment.end_us is None else commitment.end_us
    counted = sorted(
        (
            one._replace(start_us=max(one.start_us, commitment.start_us), end_us=min(one.end_us, end_us))
            for one in of_account
            if one.start_us < end_us and commitment.start_us < one.end_us and one.plan.currency == currency
            if any(commitment.counts(charge.id) for charge in one.plan.charges)
        ),
        key=lambda one: (one.start_us, one.contract.id),
    )
    named = f"commitment {commitment.id}" if commitment.id else "a commitment"
    for one, other in combinations(counted, 2):
        a, b = one.contract, other.contract
        if a.legal_entity != b.legal_entity and a.legal_entity and b.legal_entity:
            raise ValueError(
                f"expected one legal entity to sell what {named} counts, got {a.legal_entity} by {a.id} and "
                f"{b.legal_entity} by {b.id}: let it count the charges of one of them, or end before the other begins"
            )
        if a.cycle != b.cycle and one.start_us < other.end_us and other.start_us < one.end_us:
            raise ValueError(
                f"expected one billing cycle for what {named} counts at a time, got {in_words(a.cycle)} of {a.id} and "
                f"{in_words(b.cycle)} of {b.id}: let it count the charges of one of them"
            )


def check_commitment(commitment: Commitment) -> None:
    """Raise ValueError, saying what was expected and what came, for a commitment that cannot be settled."""
    if commitment.amount <= 0:
        raise ValueError(f"expected a commitment above 0, got {commitment.amount}e-12")
    if commitment.end_us is not None and commitment.end_us <= commitment.start_us:
        raise ValueError("expected a commitment to end after it starts, got an end that is not later")
    if commitment.window == "term" and commitment.end_us is None:
        raise ValueError("expected an end of a commitment over its whole term, got none")
    if not commitment.overage_factor.is_finite() or commitment.overage_factor < 0:
        raise ValueError(f"expected an overage factor of 0 or more, got {commitment.overage_factor}")


def settle(
    committed: Amount, spent: Amount, *, true_up: bool = True, overage_factor: Decimal = Decimal(1), ended: bool = True
) -> Settlement:
    """What so much spending costs against a commitment. The overage is rounded once, half up, to 1e-12.

    Spending below zero counts as it is, and is trued up from 0. Before a window has ``ended``
    there is no true-up: more may come.
    """
    over = max(spent - committed, 0)
    numerator, denominator = overage_factor.as_integer_ratio()
    missing = max(committed - max(spent, 0), 0)
    return Settlement(
        within=spent - over,
        overage=round_half_up_div(over * numerator, denominator),
        true_up=missing if true_up and ended else 0,
        spent=spent,
    )


def settle_windows(
    commitment: Commitment, spends: Iterable[Spend], time_zone: str, start_us: Micros, end_us: Micros
) -> tuple[SettledWindow, ...]:
    """Settle every window that meets ``[start_us, end_us)``, the empty ones too, as known at ``end_us``.

    ``spends`` are all there are in these windows before ``end_us``, also those before ``start_us`` of the first one
    (``first_start`` says from when); of other charges and times they are passed over. Windows that go beyond
    ``end_us`` are not trued up yet.

    Raises ValueError as ``check_commitment``.
    """
    check_commitment(commitment)
    windows = list(_windows(commitment, time_zone, start_us, end_us))
    starts = [cut.start_us for _, cut in windows]
    sums: defaultdict[int, Amount] = defaultdict(int)
    for spend in spends:
        index = bisect_right(starts, spend.at_us) - 1
        if index >= 0 and spend.at_us < min(windows[index][1].end_us, end_us) and commitment.counts(spend.charge):
            sums[index] += spend.amount
    settled = []
    for index, (window, cut) in enumerate(windows):
        partly = commitment.prorate and cut != window
        committed = share_of(commitment.amount, window, cut.start_us, cut.end_us) if partly else commitment.amount
        ended = cut.end_us <= end_us
        settlement = settle(
            committed,
            sums[index],
            true_up=commitment.true_up,
            overage_factor=commitment.overage_factor,
            ended=ended,
        )
        settled.append(SettledWindow(cut.start_us, cut.end_us, committed, ended, settlement))
    return tuple(settled)


def first_start(commitment: Commitment, time_zone: str, at_us: Micros) -> Micros:
    """From when spending counts in the window that holds an instant: its start, or the commitment's."""
    return max(_window_at(commitment, time_zone, at_us).start_us, commitment.start_us)


def last_end(commitment: Commitment, time_zone: str, at_us: Micros) -> Micros:
    """When the window that holds an instant is settled: its end, or the commitment's."""
    end_us = _window_at(commitment, time_zone, at_us).end_us
    return end_us if commitment.end_us is None else min(end_us, commitment.end_us)


def _windows(
    commitment: Commitment, time_zone: str, start_us: Micros, end_us: Micros
) -> Iterable[tuple[Period, Period]]:
    """The windows that meet a time, each whole and as the commitment cuts it."""
    at_us = max(start_us, commitment.start_us)
    until_us = end_us if commitment.end_us is None else min(end_us, commitment.end_us)
    while at_us < until_us:
        window = _window_at(commitment, time_zone, at_us)
        cut_end = window.end_us if commitment.end_us is None else min(window.end_us, commitment.end_us)
        yield window, Period(max(window.start_us, commitment.start_us), cut_end)
        at_us = window.end_us


_HOUR_US: Micros = 3_600_000_000


def _window_at(commitment: Commitment, time_zone: str, at_us: Micros) -> Period:
    match commitment.window:
        case "hour":
            start_us = at_us // _HOUR_US * _HOUR_US
            return Period(start_us, start_us + _HOUR_US)
        case "day":
            return _day_of(at_us, time_zone)
        case "month":
            return month_of(at_us, time_zone)
        case "year":
            return _year_of(commitment.start_us, at_us, time_zone)
        case "term":
            return Period(commitment.start_us, commitment.end_us or commitment.start_us)


def _day_of(at_us: Micros, time_zone: str) -> Period:
    zone = ZoneInfo(time_zone)
    day = to_datetime(at_us).astimezone(zone).date()
    # Where clocks go back over midnight a day begins twice: it is the one that holds the instant.
    days = [day + timedelta(days=step) for step in (-1, 0, 1, 2)]
    starts = [local_midnight(one.year, one.month, one.day, zone) for one in days]
    index = max(index for index, start in enumerate(starts) if start <= at_us)
    return Period(starts[index], starts[index + 1])


def _year_of(first_us: Micros, at_us: Micros, time_zone: str) -> Period:
    """Twelve billing months, counted from the one the commitment starts in."""
    start_us = month_of(first_us, time_zone).start_us
    while True:
        end_us = start_us
        for _ in range(12):
            end_us = month_of(end_us, time_zone).end_us
        if at_us < end_us:
            return Period(start_us, end_us)
        start_us = end_us
