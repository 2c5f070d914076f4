"""Adjustments: a month that was billed comes out differently, since usage of it came, or was taken back, later.

What came stands in open supplements of the month (``pipeline.billing.lines``). The whole month is priced anew over all
its containers, with the versions valid at each event's time, and goes through discounts and tax once more as its own
invoice did: its tax date, the rates and the coupons that counted then. What comes out, less what was booked for it, is
billed: of each line that changed, a reversal of what was billed and a new line that links to it.

These lines are finished: they go on the account's next invoice (``core.invoice.build(settled=...)``) beside its own,
and no tier, minimum, commitment or coupon of that one sees them. Where no invoice follows, they are a document of their
own.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import Any

from psycopg import Connection

from pipeline.billing.billed_months import Place, Seen, committed, look
from pipeline.billing.close_entries import CloseEntry
from pipeline.billing.documents import NewLine
from pipeline.billing.late_months import Late, OpenContainer
from pipeline.billing.originals import Original, basis_of, originals_of
from pipeline.billing.reckoning import Basis, reckon, reversal_of, reversal_row
from pipeline.billing.rerate import Month
from pipeline.billing.statements import Booked, Difference, Due, Key
from pipeline.billing.unit_credits import UnitDraw, Units
from pipeline.core.catalog import Catalog
from pipeline.core.commitments import Spend
from pipeline.core.credits import Grant, minor_step
from pipeline.core.invoice import Line
from pipeline.core.money import Minor
from pipeline.core.periods import Period


@dataclass(frozen=True, slots=True)
class Adjustment:
    """What a payer's closed month is billed differently, with one legal entity, in one currency."""

    payer: str
    legal_entity: str
    currency: str
    month: Month
    #: The month by the payer's clock.
    period: Period
    #: The month's own invoice; None where nothing was billed then.
    original: int | None
    tax_date: date
    #: Reversals and new lines, as ``reckoning.reckon(settled=...)`` takes them.
    lines: tuple[tuple[Line, NewLine], ...]
    #: What the month's open supplements lack to stand at the closing prices, with the account: book it. Containers hold
    #: what several sellers bill, so of a month's adjustments the first one in a currency has them, and its containers.
    entries: tuple[tuple[str, CloseEntry], ...]
    #: Open containers that are billed with it: set them to issued with the document.
    containers: tuple[int, ...]
    #: What the month draws from unit credits beyond what it drew before, or gives back: book it with the entries.
    units: tuple[UnitDraw, ...]
    #: Net credits that its own invoice drew and that the month does not need any more, by grant.
    unneeded_credits: dict[int, Minor]

    @property
    def total(self) -> Minor:
        """What it comes to, with tax; below 0 is the customer's."""
        return sum(line.total for line, _ in self.lines)


def restate(
    connection: "Connection[Any]",
    catalog: Catalog,
    late: Late,
    opened: Iterable[OpenContainer],
    units: Units | None = None,
    earlier: Sequence[Adjustment] = (),
) -> list[Adjustment]:
    """What a closed month is billed differently, by legal entity and currency. Writes nothing.

    For a transaction that holds the accounts' open containers, ``opened`` (``lock_open``), and the payer's grants.
    Nothing to bill is an Adjustment without lines, whose entries and containers are settled all the same.

    The month has the unit credits it drew, and of those that count at its events' time what is left by now. ``units``
    goes on with what it leaves of them; None: nothing else is reckoned in the transaction. ``earlier``: of the same
    accounts, what was restated before in the transaction and is not written yet: commitments of many months see it.

    Raises NotAdjustable for usage that has no price, and for a legal entity or customer that is not known.
    """
    payer, month = late.payer, late.month
    closable = {one.id for one in opened}
    seen = look(connection, catalog, payer, late.accounts, month, units or Units(connection, late.accounts))
    originals = originals_of(connection, payer, seen.period)
    found: list[Adjustment] = []
    for place in seen.places:
        parts, pending = seen.parts(place), spent_beside(earlier, place.currency)
        for number, (part, owed, standing) in enumerate(parts, 1):
            is_first = all(one.currency != place.currency for one in found)
            original = next((one for one in originals.get(place, ()) if part in (None, one.period)), None)
            basis = basis_of(connection, catalog, payer, place, month, original)
            owed, standing = _of_document(seen, place, owed, standing, original)
            if number == len(parts):
                # What a window that goes on adds is settled anew with every later invoice.
                adding = committed(connection, catalog, seen, place, basis, pending)
                promised = [due for due in adding if seen.is_over(due)]
                owed = [*owed, *promised]
                standing = [*standing, *seen.committed_before(place, promised)]
            lines, drawn = restated(owed, standing, basis, place.currency, original)
            found.append(
                Adjustment(
                    payer=payer,
                    legal_entity=place.legal_entity,
                    currency=place.currency,
                    month=month,
                    period=seen.period,
                    original=None if original is None else original.id,
                    tax_date=basis.tax_date,
                    lines=tuple(lines),
                    entries=seen.entries_in(place.currency) if is_first else (),
                    containers=seen.open_in(place.currency, closable) if is_first else (),
                    units=seen.units_in(place.currency) if is_first else (),
                    unneeded_credits=_unneeded(basis.grants, drawn, place.currency),
                )
            )
    return found


def _of_document(
    seen: Seen, place: Place, owed: Sequence[Due], standing: Sequence[Booked], original: Original | None
) -> tuple[list[Due], list[Booked]]:
    """What a month's own invoice is reckoned over: with the fees that it bills in advance, without those of the month
    that an earlier one did."""
    before: defaultdict[Key, list[Booked]] = defaultdict(list)
    for one in standing:
        before[one.key].append(one)
    id = None if original is None else original.id
    elsewhere = {due.key for due in owed if seen.billed_elsewhere(due, before.get(due.key, ()), id)}
    ahead = [] if id is None else seen.billed_ahead(place, id)
    return (
        [*(due for due in owed if due.key not in elsewhere), *(due for due, _ in ahead)],
        [*(one for one in standing if one.key not in elsewhere), *(booked for _, booked in ahead)],
    )


def spent_beside(earlier: Iterable[Adjustment], currency: str) -> dict[str, list[Spend]]:
    """What accounts spent more, or less, in restated months that are not written yet: close entries, and coupons on
    their lines."""
    found: defaultdict[str, list[Spend]] = defaultdict(list)
    for one in earlier:
        for account, entry in one.entries:
            if entry.terms.currency == currency:
                found[account].append(Spend(entry.terms.period_end_us - 1, entry.terms.charge, entry.amount))
        if one.currency != currency:
            continue
        for line, row in one.lines:
            off = sum(part.amount for part in line.discounts if part.coupon and not part.shared)
            found[row.account].append(Spend(row.service.end_us - 1, row.charge, -off * minor_step(currency)))
    return dict(found)


def restated(
    owed: Sequence[Due], standing: Iterable[Booked], basis: Basis, currency: str, original: Original | None
) -> tuple[list[tuple[Line, NewLine]], dict[str, Minor]]:
    """The lines that bring a billed month to what is owed for it, and what it draws of each net credit. Pure.

    What its invoice is reckoned over comes as a whole, since a discount on all of it, or a tax rounded over all of it,
    may move a line whose own usage did not change.
    """
    before: defaultdict[Key, list[Booked]] = defaultdict(list)
    for one in standing:
        before[one.key].append(one)
    own = [due for due in owed if not due.is_nothing]
    whole = reckon([Difference((), due) for due in own], basis, currency=currency)
    moved: list[tuple[list[Booked], tuple[Line, NewLine] | None]] = []
    for due, line, row in zip(own, whole.document.lines, whole.lines, strict=True):
        lines = before.pop(due.key, [])
        if not (len(lines) == 1 and _is_same(lines[0], due, line)):
            moved.append((lines, (line, row)))
    moved += [(lines, None) for lines in before.values()]
    found: list[tuple[Line, NewLine]] = []
    for lines, new in moved:
        found += (_taken_back(one, currency) for one in lines)
        if new is not None:
            found.append(_billed_anew(*new, lines, original))
    drawn: defaultdict[str, Minor] = defaultdict(int)
    for draw in whole.document.draws:
        if draw.line is not None:
            drawn[draw.grant] += draw.amount
    return found, dict(drawn)


def _is_same(booked: Booked, due: Due, line: Line) -> bool:
    was = booked.line
    return (booked.quantity, was.exact, was.amount, was.discount, was.net, was.tax, was.paid_by_coupons) == (
        due.quantity,
        line.exact,
        line.amount,
        line.discount,
        line.net,
        line.tax,
        line.paid_by_coupons,
    )


def _taken_back(booked: Booked, currency: str) -> tuple[Line, NewLine]:
    line = reversal_of(booked)
    adjusts = {"kind": booked.key.kind, "number": booked.number}
    return line, reversal_row(line, booked, currency, kind="adjustment", parts=[], adjusts=adjusts)


def _billed_anew(
    line: Line, row: NewLine, taken_back: Sequence[Booked], original: Original | None
) -> tuple[Line, NewLine]:
    kind = "commitment" if row.kind == "commitment" else "usage" if row.meter else "fee"
    number = taken_back[0].number if taken_back else original.number if original else ""
    anew = replace(
        row,
        kind="adjustment",
        adjusts_id=taken_back[0].document_line_id if taken_back else None,
        detail={**row.detail, "adjusts": {"kind": kind, "number": number}},
    )
    return replace(line, id=f"adjustment {line.id}"), anew


def _unneeded(grants: Iterable[Grant], drawn: Mapping[str, Minor], currency: str) -> dict[int, Minor]:
    step = minor_step(currency)
    left = {int(grant.id): grant.amount // step - drawn.get(grant.id, 0) for grant in grants}
    return {grant: amount for grant, amount in left.items() if amount > 0}
