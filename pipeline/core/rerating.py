"""An account's period at its closing prices: every line as it should be, from its events and the catalog (law 3).

The close, ``tally rerate`` and the stories of the tests ask the same question here: given the usage that counts, with
the versions valid at each event's time, what does every line hold? What is booked is the difference to what it holds.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import NamedTuple, TypeAlias

from pipeline.core.aggregation import Opening, carried, is_additive
from pipeline.core.catalog import Catalog, Segment
from pipeline.core.cells import cell_text
from pipeline.core.charges import Charge, ChargeClass, charge_class, compile_amount
from pipeline.core.closing import Closing, Counter, close_segment
from pipeline.core.credits import Grant, credit_segment
from pipeline.core.members import Member
from pipeline.core.meters import Cell, Measure, Meter, Properties, compile_cell, compile_measure
from pipeline.core.money import Amount, Micros, Quantity
from pipeline.core.periods import Period, format_instant
from pipeline.core.reasons import Reason, Rejection, Stage


class Use(NamedTuple):
    """One event that counts: neither voided nor replaced. Properties in UTF-8, as sent."""

    event_type: str
    at_us: Micros
    key: str
    subject: str
    properties: Properties


@dataclass(frozen=True, slots=True)
class ClosedLine:
    """One charge, in one segment and dimension cell, as it should stand at the close."""

    segment: Segment
    charge: Charge
    #: The last version that counts in the segment; None for a charge without a meter.
    meter: Meter | None
    cell: str
    price_class: ChargeClass
    events: int
    #: What a line shows, by meter version: the sum of what its events measured; of a meter that is no sum, the priced
    #: quantity, all of it under the last version. Version 0 where there is no meter.
    quantities: Mapping[int, Quantity]
    #: Of its counters, one unless each subject has its own; their amounts add up to ``amount``.
    closings: Mapping[Counter, Closing]
    #: Units that each grant of unit credits for the charge paid for (1e-9), 0 too, by grant.
    units: Mapping[str, Quantity] = field(default_factory=dict)
    #: Where there are such grants, what it would cost without them: what its rows come to, which no credit pays for.
    uncredited: Amount | None = None

    @property
    def quantity(self) -> Quantity:
        return sum(self.quantities.values())

    @property
    def amount(self) -> Amount:
        return sum(closing.amount for closing in self.closings.values())


@dataclass(frozen=True, slots=True)
class ClosedPeriod:
    """All lines of an account's period, and the events that the catalog has no price for."""

    account: str
    period: Period
    segments: tuple[Segment, ...]
    lines: tuple[ClosedLine, ...]
    refused: tuple[tuple[Use, Rejection], ...]

    @property
    def amount(self) -> Amount:
        return sum(line.amount for line in self.lines)


def close_period(
    catalog: Catalog,
    account: str,
    period: Period,
    uses: Iterable[Use],
    earlier: Iterable[Use] = (),
    *,
    grants: Sequence[Grant] = (),
) -> ClosedPeriod:
    """Price an account's whole period anew. ``uses`` are its events in the period, in any order.

    ``earlier`` are its events before ``first_moment``, of the types that ``carried_event_types`` names. An event is in
    all its counters or, where one of its meters cannot measure it, in none (law 2): then it is ``refused``, as is one
    whose contract by now has other billing periods.

    ``grants``: the account's unit credits with what is there for the period; they are drawn before units are priced.

    Raises ValueError for a charge that cannot be priced, also where usage lies beyond a last tier that parks, or where
    units were granted for a charge that is not priced by a quantity.
    """
    by_segment: defaultdict[_Place, _Counters] = defaultdict(lambda: defaultdict(_Gathered))
    refused: list[tuple[Use, Rejection]] = []
    credited = frozenset(charge for grant in grants for charge in grant.charges)
    finder = _Finder(catalog, account, period, credited)
    for use in uses:
        found = finder.find(use)
        if isinstance(found, Rejection):
            refused.append((use, found))
            continue
        members = _members(use, found.ways)
        if isinstance(members, Rejection):
            refused.append((use, members))
            continue
        counters = by_segment[found.place]
        for way, member in members:
            counters[_counter(use, way)].collect(member, way)
    segments = catalog.segments_of(account, period)
    levels = _Levels(catalog, earlier)
    lines: list[ClosedLine] = []
    for segment in segments:
        closed, grants = _close_segment(catalog, segment, by_segment[_place(segment)], levels, grants)
        lines += closed
    return ClosedPeriod(account, period, segments, tuple(lines), tuple(refused))


def carried_event_types(catalog: Catalog, account: str, period: Period) -> frozenset[str]:
    """Event types whose earlier events matter in the period, since a charge's meter carries over."""
    segments = catalog.segments_of(account, period)
    meters = (meter for segment in segments for _, meter in catalog.metered(segment) if meter is not None)
    return frozenset(meter.event_type for meter in meters if meter.carries_over)


def first_moment(catalog: Catalog, account: str, period: Period) -> Micros:
    """When the period's first segment starts; in the midst of a period that a contract begins in. Else the period's."""
    return min((segment.start_us for segment in catalog.segments_of(account, period)), default=period.start_us)


def class_in(segment: Segment, charge: Charge, meter: Meter | None) -> ChargeClass:
    """The class of a charge in a segment: what draws from a shared pool has its price at the close only."""
    return charge_class(charge, meter, pooled=segment.pool_of(charge.id) is not None)


# -- from events to counters


class _Way(NamedTuple):
    """How an event gets into a charge's counters."""

    charge: Charge
    meter: Meter
    measure: Measure
    cell: Cell
    #: Of a dynamic charge: the amount an event brings.
    amount: Callable[[Properties], Amount | Rejection] | None
    #: Whether the price takes the sum of the events' quantities and nothing else of them.
    summed: bool
    #: The property whose texts are counted, of a unique count.
    text: bytes | None
    #: The charge's only counter, where it has one.
    counter: Counter | None


#: Names a segment of an account: its contract and its start.
_Place: TypeAlias = tuple[str, Micros]


def _place(segment: Segment) -> _Place:
    return segment.contract.id, segment.start_us


class _Found(NamedTuple):
    """Where events of a type and time in ``[start_us, end_us)`` count."""

    start_us: Micros
    end_us: Micros
    place: _Place
    ways: tuple[_Way, ...]


class _Finder:
    """Where events count, looked up once for each span of time in which that does not change."""

    def __init__(self, catalog: Catalog, account: str, period: Period, credited: Collection[str]) -> None:
        self._catalog, self._account, self._period, self._credited = catalog, account, period, credited
        self._spans: defaultdict[str, list[_Found]] = defaultdict(list)

    def find(self, use: Use) -> _Found | Rejection:
        spans = self._spans[use.event_type]
        for found in reversed(spans):
            if found.start_us <= use.at_us < found.end_us:
                return found
        terms = self._catalog.terms(self._account, use.event_type, use.at_us)
        if isinstance(terms, Rejection):
            return terms
        if terms.segment.period != self._period:
            return _elsewhere(terms.segment)
        # The meters that count within a segment all make one quantity of its events in the same way.
        closing = {charge.id: meter for charge, meter in self._catalog.metered(terms.segment)}
        ways = tuple(
            _way(charge, meter, summed=self._is_summed(terms.segment, charge, closing[charge.id]))
            for charge, meter in terms.priced
        )
        spans.append(_Found(terms.start_us, terms.end_us, _place(terms.segment), ways))
        return spans[-1]

    def _is_summed(self, segment: Segment, charge: Charge, meter: Meter | None) -> bool:
        return class_in(segment, charge, meter) == "running" and charge.id not in self._credited


def _elsewhere(segment: Segment) -> Rejection:
    start, end = format_instant(segment.period.start_us), format_instant(segment.period.end_us)
    return Rejection(
        Stage.RATE,
        Reason.NO_PRICE,
        f"expected a contract with the period it was billed in, got {segment.contract.id!r} with {start} to {end}",
    )


@dataclass(slots=True)
class _Gathered:
    """What a counter has collected."""

    events: int = 0
    #: What the events measured, by meter version.
    measured: dict[int, Quantity] = field(default_factory=dict)
    #: The events, but for a counter whose sum is all that matters: its memory does not grow.
    members: list[Member] = field(default_factory=list)

    def collect(self, member: Member, way: _Way) -> None:
        self.events += 1
        version = way.meter.version
        self.measured[version] = self.measured.get(version, 0) + member.quantity
        if not way.summed:
            self.members.append(member)

    def as_members(self, at_us: Micros) -> list[Member]:
        """The events, or one at that time in their stead that brings the same sum."""
        return self.members or [Member(at_us, "", sum(self.measured.values()))]


_Counters: TypeAlias = defaultdict[Counter, _Gathered]


@lru_cache(maxsize=10_000)
def _way(charge: Charge, meter: Meter, *, summed: bool = False) -> _Way:
    """Compiled once for all accounts of a plan: of few events, compiling an expression takes longer than pricing."""
    amount = compile_amount(charge) if charge.model == "dynamic" else None
    text = meter.value.encode() if meter.aggregation == "unique" and meter.value else None
    counter = None if charge.split else Counter(charge.id, (), "")
    return _Way(charge, meter, compile_measure(meter), compile_cell(charge.by), amount, summed, text, counter)


def _members(use: Use, ways: Iterable[_Way]) -> list[tuple[_Way, Member]] | Rejection:
    """The event as a member of each charge that counts it."""
    found = []
    for way in ways:
        member = _member(use, way)
        if isinstance(member, Rejection):
            return member
        if member is not None:
            found.append((way, member))
    return found or _UNMETERED


_UNMETERED = Rejection(
    Stage.RATE, Reason.NO_CHARGE, "no charge of the plan counts this event: the filters of all its meters leave it out"
)


def _member(use: Use, way: _Way) -> Member | Rejection | None:
    """None where the meter's filters leave the event out."""
    quantity = way.measure(use.properties)
    if not isinstance(quantity, int):
        return quantity
    amount = way.amount(use.properties) if way.amount else 0
    if isinstance(amount, Rejection):
        return amount
    text = "" if way.text is None else use.properties.get(way.text, b"").decode()
    return Member(use.at_us, use.key, quantity, text, use.subject, amount)


def _counter(use: Use, way: _Way) -> Counter:
    if way.counter is not None:
        return way.counter
    cell = tuple(value.decode() for value in way.cell(use.properties))
    return Counter(way.charge.id, cell, use.subject if way.charge.per_subject else "")


# -- from counters to lines


def _close_segment(
    catalog: Catalog, segment: Segment, counters: _Counters, levels: "_Levels", grants: Sequence[Grant]
) -> tuple[list[ClosedLine], Sequence[Grant]]:
    """A segment's lines, and what is left of the grants then."""
    charges = catalog.metered(segment)
    openings = levels.before(charges)
    usage = {counter: gathered.as_members(segment.start_us) for counter, gathered in counters.items()}
    left, units = credit_segment(grants, charges, segment.pools, usage) if grants else ([], {})
    credited = {counter: sum(parts.values()) for counter, parts in units.items()}
    closings = close_segment(charges, segment.pools, usage, segment.span, openings=openings, credited=credited)
    levels.advance(charges, usage, openings)
    events = {counter: gathered.events for counter, gathered in counters.items()}
    measured = {counter: gathered.measured for counter, gathered in counters.items()}
    lines = lines_of(segment, charges, closings, events, measured)
    if not grants:
        return lines, left
    whole = close_segment(charges, segment.pools, usage, segment.span, openings=openings) if units else closings
    return [_with_units(line, grants, units, whole) for line in lines], left


def _with_units(
    line: ClosedLine,
    grants: Iterable[Grant],
    units: Mapping[Counter, Mapping[str, Quantity]],
    whole: Mapping[Counter, Closing],
) -> ClosedLine:
    """``whole``: what counters would cost without credits."""
    paying = [grant.id for grant in grants if grant.pays_for(line.charge.id)]
    if not paying:
        return line
    drawn = {id: sum(units.get(counter, {}).get(id, 0) for counter in line.closings) for id in paying}
    uncredited = sum(whole[counter].amount for counter in line.closings if counter in whole)
    return replace(line, units=drawn, uncredited=uncredited)


def lines_of(
    segment: Segment,
    charges: Iterable[tuple[Charge, Meter | None]],
    closings: Mapping[Counter, Closing],
    events: Mapping[Counter, int],
    measured: Mapping[Counter, Mapping[int, Quantity]],
) -> list[ClosedLine]:
    """A segment's counters as its lines, in the plan's order of charges, then by cell.

    ``events``: how many each counter has; ``measured``: what they measured, by meter version.
    """
    by_charge: defaultdict[str, defaultdict[str, dict[Counter, Closing]]] = defaultdict(lambda: defaultdict(dict))
    for counter, closing in closings.items():
        by_charge[counter.charge][cell_text(counter.cell)][counter] = closing
    return [
        _line(segment, charge, meter, cell, by_cell[cell], events, measured)
        for charge, meter in charges
        if (by_cell := by_charge.get(charge.id))
        for cell in sorted(by_cell)
    ]


def _line(
    segment: Segment,
    charge: Charge,
    meter: Meter | None,
    cell: str,
    closings: Mapping[Counter, Closing],
    events: Mapping[Counter, int],
    measured: Mapping[Counter, Mapping[int, Quantity]],
) -> ClosedLine:
    count = sum(events.get(counter, 0) for counter in closings)
    quantities: dict[int, Quantity] = {} if count else {meter.version if meter else 0: 0}
    if meter is not None and is_additive(meter):
        for counter in closings:
            for version, quantity in measured.get(counter, {}).items():
                quantities[version] = quantities.get(version, 0) + quantity
    else:
        quantities[meter.version if meter else 0] = sum(closing.quantity for closing in closings.values())
    return ClosedLine(
        segment,
        charge,
        meter,
        cell,
        class_in(segment, charge, meter),
        count,
        quantities,
        dict(sorted(closings.items(), key=lambda item: item[0])),
    )


#: What a level belongs to: the meter, and how charges split it.
_Kind: TypeAlias = tuple[str, tuple[str, ...], bool]


class _Levels:
    """What the counters of meters that carry over open each segment with.

    A level belongs to its meter and cell, not to a plan: a change of plan goes on from it.
    """

    def __init__(self, catalog: Catalog, earlier: Iterable[Use]) -> None:
        self._catalog, self._earlier = catalog, tuple(earlier)
        self._standing: dict[_Kind, dict[Counter, Opening]] = {}

    def before(self, charges: Iterable[tuple[Charge, Meter | None]]) -> dict[Counter, Opening]:
        """What stands now, for each counter of these charges that has seen an event."""
        return {
            counter._replace(charge=charge.id): opening
            for charge, meter in charges
            if meter is not None and meter.carries_over
            for counter, opening in self._of(charge, meter).items()
        }

    def advance(
        self,
        charges: Iterable[tuple[Charge, Meter | None]],
        usage: Mapping[Counter, list[Member]],
        openings: Mapping[Counter, Opening],
    ) -> None:
        """Go on from a segment's events."""
        for charge, meter in charges:
            if meter is None or not meter.carries_over:
                continue
            standing = self._of(charge, meter)
            for counter, members in usage.items():
                if counter.charge == charge.id:
                    standing[counter._replace(charge="")] = _carried(meter, members, openings.get(counter))

    def _of(self, charge: Charge, meter: Meter) -> dict[Counter, Opening]:
        """What stands, by counter without its charge; at first, what the earlier events left."""
        kind = (meter.id, charge.by, charge.per_subject)
        if kind not in self._standing:
            members: defaultdict[Counter, list[Member]] = defaultdict(list)
            ways: dict[int, _Way] = {}
            for use in self._earlier:
                version = self._catalog.meter(meter.id, use.at_us)
                if version is None or version.event_type != use.event_type:
                    continue
                way = ways.get(version.version) or ways.setdefault(version.version, _way(charge, version))
                member = _member(use, way)
                if isinstance(member, Member):  # what it could not measure was refused then, too
                    members[_counter(use, way)._replace(charge="")].append(member)
            self._standing[kind] = {counter: _carried(meter, found) for counter, found in members.items()}
        return self._standing[kind]


def _carried(meter: Meter, members: Iterable[Member], opening: Opening | None = None) -> Opening:
    found = carried(meter, members, opening)
    assert found is not None, "asked of meters that carry over only"
    return found
