"""A period's closing prices from what its lines add up to, where that is all that its prices need: pure.

``rerating.close_period`` prices from every event. Where each charge that was used takes nothing but the sum of an
additive quantity (class running), the lines' own sums make the same prices, and a close need not read the events.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable
from typing import NamedTuple

from pipeline.core.catalog import Catalog, Segment
from pipeline.core.cells import cell_values
from pipeline.core.charges import Charge
from pipeline.core.closing import Counter, close_segment
from pipeline.core.members import Member
from pipeline.core.meters import Meter
from pipeline.core.money import Micros, Quantity
from pipeline.core.periods import Period
from pipeline.core.rerating import ClosedLine, ClosedPeriod, class_in, lines_of


class LineSum(NamedTuple):
    """What a container's line holds, and the versions its events were rated by."""

    contract: str
    price_version: str
    segment_start_us: Micros
    charge: str
    meter: str
    meter_version: int
    cell: str
    quantity: Quantity
    #: Rated rows; 0 for a line that only close entries made.
    events: int
    #: None without events.
    first_event_us: Micros | None
    last_event_us: Micros | None


def close_sums(
    catalog: Catalog, account: str, period: Period, sums: Iterable[LineSum], *, unsettled: Collection[str] = ()
) -> ClosedPeriod | None:
    """What ``close_period`` makes of the events behind these lines; None where only the events can tell.

    That is where a used charge is not of class running or counts its subjects apart, a meter carries over, lines were
    rated by other prices, meters or segments than the catalog's, or what is left of a cell cannot be known.
    ``unsettled``: meters that may have been published after events they count were rated: a charge of theirs may count
    events that stand on no line of it.

    Raises ValueError as ``close_period``.
    """
    segments = catalog.segments_of(account, period)
    by_segment: defaultdict[tuple[str, Micros], list[LineSum]] = defaultdict(list)
    for one in sums:
        if one.events:
            by_segment[one.contract, one.segment_start_us].append(one)
    if not by_segment.keys() <= {(segment.contract.id, segment.start_us) for segment in segments}:
        return None
    lines: list[ClosedLine] = []
    for segment in segments:
        found = _close(catalog, segment, by_segment.get((segment.contract.id, segment.start_us), ()), unsettled)
        if found is None:
            return None
        lines += found
    return ClosedPeriod(account, period, segments, tuple(lines), ())


def _close(
    catalog: Catalog, segment: Segment, sums: Iterable[LineSum], unsettled: Collection[str]
) -> list[ClosedLine] | None:
    charges = catalog.metered(segment)
    by_id = {charge.id: (charge, meter) for charge, meter in charges}
    used: defaultdict[Counter, dict[int, Quantity]] = defaultdict(dict)
    events: defaultdict[Counter, int] = defaultdict(int)
    for one in sums:
        charge, meter = by_id.get(one.charge, (None, None))
        if charge is None or meter is None or not _sums_suffice(catalog, segment, charge, meter, one):
            return None
        counter = Counter(charge.id, cell_values(one.cell, len(charge.by)))
        versions = used[counter]
        versions[one.meter_version] = versions.get(one.meter_version, 0) + one.quantity
        events[counter] += one.events
    for _, meter in charges:
        if meter is not None and (meter.carries_over or (used and meter.id in unsettled)):
            return None
    if any(by_id[counter.charge][0].split and not sum(versions.values()) for counter, versions in used.items()):
        return None  # events that cancel out or were voided: only they can tell whether the counter is there
    # One event of the whole quantity stands for all: prices of class running cannot tell.
    usage = {counter: [Member(segment.start_us, "", sum(versions.values()))] for counter, versions in used.items()}
    closings = close_segment(charges, segment.pools, usage, segment.span)
    return lines_of(segment, charges, closings, events, used)


def _sums_suffice(catalog: Catalog, segment: Segment, charge: Charge, meter: Meter, line: LineSum) -> bool:
    """Whether a line's events would be rated today as they were, to a price that takes nothing but their sum."""
    if (segment.price_version, meter.id) != (line.price_version, line.meter):
        return False
    if charge.per_subject or class_in(segment, charge, meter) != "running":
        return False
    first_us, last_us = line.first_event_us, line.last_event_us
    if first_us is None or last_us is None or not segment.start_us <= first_us <= last_us < segment.end_us:
        return False
    counting = (catalog.meter(meter.id, at_us) for at_us in (first_us, last_us))
    return all(version is not None and version.version == line.meter_version for version in counting)
