"""What other prices would make of usage that is already rated: pure. ``billing.backtest`` reads the usage.

An account is priced twice, by the catalog as it is and by one in which the candidate documents have always held, and
the difference is the candidate's alone. Where every price takes nothing but the sum of a quantity (class running), the
sums that invoice lines keep are enough, and ``price_totals`` gives what pricing event by event gives.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import NamedTuple

from pipeline.core.catalog import Catalog, Segment
from pipeline.core.cells import cell_text, cell_values
from pipeline.core.charges import Charge
from pipeline.core.closing import Counter, close_segment
from pipeline.core.documents import DATED, Entry, Item, kind_of, to_document
from pipeline.core.members import Member
from pipeline.core.meters import Meter
from pipeline.core.money import AMOUNT_DECIMALS, Amount, Micros, Quantity, amount_decimal, round_to_minor, scaled
from pipeline.core.periods import BEGINNING, Period
from pipeline.core.rerating import ClosedPeriod, class_in


class Total(NamedTuple):
    """What an invoice line, or a part of its events, adds up to, and the versions they were rated by."""

    contract: str
    price_version: str
    segment_start_us: Micros
    charge: str
    meter: str
    cell: str
    quantity: Quantity
    first_event_us: Micros
    last_event_us: Micros
    #: Of a part: its events' subject, and what these properties of theirs are.
    subject: str | None = None
    properties: tuple[tuple[str, str], ...] = ()
    #: Whether any event is left of it, once the voided ones are gone; None where only the sum is known.
    alive: bool | None = None


@dataclass(frozen=True, slots=True)
class PricedLine:
    """One charge, in one segment and cell, at its closing price. Quantity in 1e-9 as measured, amount in 1e-12."""

    segment: Segment
    charge: Charge
    cell: str
    quantity: Quantity
    amount: Amount


@dataclass(frozen=True, slots=True)
class Side:
    """What a charge of a contract comes to in a period, before or after."""

    quantity: Quantity
    #: Exact; and rounded to the currency's minor unit line by line, as it would be billed. Both in 1e-12.
    amount: Amount
    billed: Amount
    #: How many segments its tiers and included units count anew in.
    segments: int
    #: As it holds in the last of them: overrides merged, prorated.
    charge: Charge


@dataclass(frozen=True, slots=True)
class Compared:
    """A charge of a contract before and after; None where it is not there."""

    contract: str
    charge: str
    currency: str
    before: Side | None
    after: Side | None

    @property
    def moved(self) -> Amount:
        return (self.after.amount if self.after else 0) - (self.before.amount if self.before else 0)


# The candidate catalog ----------------------------------------------------------------------------------------------


def differing(entries: Iterable[Entry], items: Iterable[Item], start_us: Micros, end_us: Micros) -> list[Item]:
    """Those of the items that say anything else than what holds at any time in ``[start_us, end_us)``."""
    versions: defaultdict[tuple[str, str], list[Entry]] = defaultdict(list)
    for entry in entries:
        versions[entry.kind, entry.id].append(entry)
    found = []
    for item in items:
        known = sorted(versions[kind_of(item), item.id], key=lambda entry: (entry.valid_from_us, entry.version))
        begun = [entry for entry in known if entry.valid_from_us <= start_us][-1:]
        holding = begun + [entry for entry in known if start_us < entry.valid_from_us < end_us]
        document = to_document(item)
        if not begun or any(entry.document != document for entry in holding):
            found.append(item)
    return found


def with_candidates(entries: Iterable[Entry], items: Sequence[Item]) -> list[Entry]:
    """The entries as if each item had always held: one version of its document, from the beginning.

    Raises ValueError for anything but meters, plans and price lists: accounts and contracts are no prices.
    """
    keys = {(kind_of(item), item.id) for item in items}
    if wrong := sorted(kind for kind, _ in keys if kind not in DATED):
        raise ValueError(f"expected meters, plans and price lists to backtest, got {', '.join(wrong)}")
    newest: defaultdict[tuple[str, str], int] = defaultdict(int)
    kept = []
    for entry in entries:
        if (entry.kind, entry.id) in keys:
            newest[entry.kind, entry.id] = max(newest[entry.kind, entry.id], entry.version)
        else:
            kept.append(entry)
    for item in items:
        kind = kind_of(item)
        kept.append(Entry(kind, item.id, newest[kind, item.id] + 1, BEGINNING, to_document(item)))
    return kept


def moving(today: Catalog, candidate: Catalog, account: str, period: Period) -> frozenset[str]:
    """The charges of an account's period that the two catalogs may price differently, by id.

    Charges do not depend on each other's prices, so nothing else moves, and nothing else need be priced.
    """
    before, after = (catalog.segments_of(account, period) for catalog in (today, candidate))
    charges = everything(today, candidate, account, period)
    if list(map(_place, before)) != list(map(_place, after)):
        return charges
    return frozenset(
        charge
        for charge in charges
        for old, new in zip(before, after, strict=True)
        if _price_of(today, old, charge) != _price_of(candidate, new, charge)
    )


def everything(today: Catalog, candidate: Catalog, account: str, period: Period) -> frozenset[str]:
    """Every charge of an account's period in either catalog, by id."""
    return frozenset(
        charge.id
        for catalog in (today, candidate)
        for segment in catalog.segments_of(account, period)
        for charge in segment.charges
    )


def _place(segment: Segment) -> tuple[str, str, Micros, Micros]:
    return segment.contract.id, segment.plan.currency, segment.start_us, segment.end_us


def _price_of(catalog: Catalog, segment: Segment, charge: str) -> object:
    """All that the price of a charge in a segment depends on, but for usage."""
    return [(one, meter, segment.pool_of(charge)) for one, meter in catalog.metered(segment) if one.id == charge]


# Pricing ------------------------------------------------------------------------------------------------------------


def priced_lines(closed: ClosedPeriod, charges: Collection[str]) -> list[PricedLine]:
    """The lines of these charges, of a period that was priced event by event."""
    return [
        PricedLine(line.segment, line.charge, line.cell, line.quantity, line.amount)
        for line in closed.lines
        if line.charge.id in charges
    ]


def price_totals(
    today: Catalog,
    catalog: Catalog,
    account: str,
    period: Period,
    totals: Iterable[Total],
    *,
    charges: Collection[str],
    changed: Collection[str] = (),
) -> list[PricedLine] | None:
    """These charges of an account's period at the prices of ``catalog``, from the sums that its lines hold.

    ``today`` is the catalog the usage was rated by, ``changed`` the meters that measure otherwise in ``catalog``.
    Exact, and equal to pricing event by event, which is what remains where this is None: where a price needs more than
    sums (unique counts, pools, single events' fees), a charge splits usage otherwise than the totals do, a segment
    begins amid a total's events, other meters count them, or they were rated by other prices than today's.

    Raises ValueError for a charge that cannot be priced, also where usage lies beyond a last tier that parks.
    """
    held = _held(today, account, period, totals)
    if held is None:
        return None
    lines: list[PricedLine] = []
    for segment in catalog.segments_of(account, period):
        counting = catalog.metered(segment)
        priced = [(charge, meter) for charge, meter in counting if charge.id in charges]
        if any(meter is not None and class_in(segment, charge, meter) != "running" for charge, meter in priced):
            return None
        usage = _usage(priced, _meters_by_type(counting), segment, held, changed)
        if usage is None:
            return None
        lines += _price(segment, priced, usage)
    return lines


class Split(NamedTuple):
    """Into which parts lines have to be split so that their sums do, where those of whole lines do not."""

    properties: tuple[str, ...]
    subjects: bool
    #: Instants, ascending: events on different sides of one are in different parts.
    cuts: tuple[Micros, ...]


def split_for(
    catalog: Catalog, account: str, period: Period, charges: Collection[str], changed: Collection[str] = ()
) -> Split | None:
    """The parts that these charges take the sums of; None where no sum does, so that events have to be priced.

    ``changed`` are meters that measure otherwise in ``catalog``: sums of what was measured tell nothing of theirs.
    """
    segments = catalog.segments_of(account, period)
    names: set[str] = set()
    subjects = False
    for segment in segments:
        for charge, meter in catalog.metered(segment):
            if charge.id not in charges or meter is None:
                continue
            if class_in(segment, charge, meter) != "running" or meter.id in changed:
                return None
            names |= set(charge.by)
            subjects = subjects or charge.per_subject
    return Split(tuple(sorted(names)), subjects, tuple(sorted({segment.start_us for segment in segments})))


@dataclass(frozen=True, slots=True)
class _Held:
    """A segment as it was rated: which charges its events went to, and what of each."""

    contract: str
    charges: Sequence[tuple[Charge, Meter | None]]
    totals: Sequence[Total]


def _held(today: Catalog, account: str, period: Period, totals: Iterable[Total]) -> list[_Held] | None:
    """The totals by the segments they were rated in; None where today's catalog would rate them otherwise."""
    segments = {(segment.start_us, segment.contract.id): segment for segment in today.segments_of(account, period)}
    held = []
    for place, group in groupby(sorted(totals, key=_place_of), key=_place_of):
        segment, here = segments.get(place), list(group)
        for total in here:
            if segment is None or segment.price_version != total.price_version:
                return None
            if not segment.start_us <= total.first_event_us <= total.last_event_us < segment.end_us:
                return None
        if segment is not None:
            held.append(_Held(segment.contract.id, today.metered(segment), here))
    return held


def _place_of(total: Total) -> tuple[Micros, str]:
    return total.segment_start_us, total.contract


def _usage(
    charges: Sequence[tuple[Charge, Meter | None]],
    now: Mapping[str, set[str]],
    segment: Segment,
    held: Iterable[_Held],
    changed: Collection[str],
) -> dict[Counter, Quantity] | None:
    """What each counter of these charges has of the lines whose events lie in the segment.

    ``now`` has the meters that count there, by event type.
    """
    usage: defaultdict[Counter, Quantity] = defaultdict(int)
    for past in held:
        here = [total for total in past.totals if _meet(total, segment)]
        then = _meters_by_type(past.charges)
        if past.contract != segment.contract.id:  # another one at the same time has its own events
            if here and not now.keys().isdisjoint(then):
                return None
            continue
        if not all(segment.start_us <= total.first_event_us <= total.last_event_us < segment.end_us for total in here):
            return None
        for event_type in {name for name, meters in then.items() if not meters.isdisjoint(t.meter for t in here)}:
            if then[event_type] != now.get(event_type) or not then[event_type].isdisjoint(changed):
                return None
            for charge, meter in charges:
                if meter is None or meter.event_type != event_type:
                    continue
                shares = _shares(charge, past, here)
                if shares is None:
                    return None
                for counter, quantity in shares:
                    usage[counter] += quantity
    return usage


def _shares(charge: Charge, past: _Held, here: Iterable[Total]) -> list[tuple[Counter, Quantity]] | None:
    """What each of the charge's counters has of the lines of a charge of the same meter, its own if it can be."""
    sources = [one for one, _ in past.charges if one.meter == charge.meter]
    source = min(sources, key=lambda one: (not set(charge.by) <= set(one.by), one.id != charge.id), default=None)
    if source is None:
        return None
    shares = []
    for total in here:
        if total.charge != source.id or total.alive is False:
            continue
        if charge.split and not total.quantity and not total.alive:
            return None  # events that cancel out, or were voided: only they can tell whether the counter is there
        known = {**dict(zip(source.by, cell_values(total.cell, len(source.by)), strict=True)), **dict(total.properties)}
        if not known.keys() >= set(charge.by) or (charge.per_subject and total.subject is None):
            return None
        subject = (total.subject or "") if charge.per_subject else ""
        shares.append((Counter(charge.id, tuple(known[name] for name in charge.by), subject), total.quantity))
    return shares


def _price(
    segment: Segment, charges: Sequence[tuple[Charge, Meter | None]], usage: Mapping[Counter, Quantity]
) -> Iterator[PricedLine]:
    # One event of the whole quantity stands for all: prices of class running cannot tell.
    members = {counter: [Member(segment.start_us, "", quantity)] for counter, quantity in usage.items()}
    closings = close_segment(charges, (), members, segment.span)
    lines: dict[tuple[str, str], PricedLine] = {}  # a line has all subjects of its cell
    by_id = {charge.id: (charge, meter) for charge, meter in charges}
    for counter, closing in closings.items():
        charge, meter = by_id[counter.charge]
        quantity = closing.quantity if meter is None else usage.get(counter, 0)
        key = charge.id, cell_text(counter.cell)
        line = lines.get(key) or PricedLine(segment, charge, key[1], 0, 0)
        lines[key] = replace(line, quantity=line.quantity + quantity, amount=line.amount + closing.amount)
    yield from lines.values()


def _meet(total: Total, segment: Segment) -> bool:
    return total.first_event_us < segment.end_us and segment.start_us <= total.last_event_us


def _meters_by_type(charges: Iterable[tuple[Charge, Meter | None]]) -> dict[str, set[str]]:
    by_type: defaultdict[str, set[str]] = defaultdict(set)
    for _, meter in charges:
        if meter is not None:
            by_type[meter.event_type].add(meter.id)
    return by_type


# Comparing ----------------------------------------------------------------------------------------------------------


def compare(before: Iterable[PricedLine], after: Iterable[PricedLine]) -> list[Compared]:
    """Each charge of each contract, before and after, in the order of the plans' charges."""
    sides = [_sides(before), _sides(after)]
    keys = list(dict.fromkeys(key for side in sides for key in side))
    return [Compared(*key, sides[0].get(key), sides[1].get(key)) for key in keys]


def _sides(lines: Iterable[PricedLine]) -> dict[tuple[str, str, str], Side]:
    grouped: defaultdict[tuple[str, str, str], list[PricedLine]] = defaultdict(list)
    for line in lines:
        grouped[line.segment.contract.id, line.charge.id, line.segment.plan.currency].append(line)
    return {
        key: Side(
            quantity=sum(line.quantity for line in group),
            amount=sum(line.amount for line in group),
            billed=sum(_billed(line.amount, key[2]) for line in group),
            segments=len({line.segment.start_us for line in group}),
            charge=group[-1].charge,
        )
        for key, group in grouped.items()
    }


def _billed(amount: Amount, currency: str) -> Amount:
    return scaled(round_to_minor(amount_decimal(amount), currency), AMOUNT_DECIMALS)
