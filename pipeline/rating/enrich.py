"""Third stage: which account, contract, plan and price version hold at the event's own time?

Terms are looked up once per account, event type and span of time, and kept in the form the rater needs: compiled
functions, and the part of a rated row that never changes, already encoded.
"""

from typing import NamedTuple

from pipeline.core.catalog import Catalog, Terms
from pipeline.core.charges import Charge, Price, compile_price, price_lines, price_of
from pipeline.core.meters import Measure, Meter, compile_measure
from pipeline.core.reasons import Rejection
from pipeline.core.usage import Event, Refused
from pipeline.infra.wire import text, zigzag
from pipeline.rating import compiled

_USAGE = zigzag(0)  # first symbol of EntryKind


class Priced:
    """One charge for one segment, ready to rate: what to measure, what it costs, and the constant part of its rows."""

    __slots__ = ("constant", "counter", "measure", "memo", "price")

    def __init__(self, terms: Terms, charge: Charge, meter: Meter) -> None:
        segment = terms.segment
        contract, plan = segment.contract, segment.plan
        self.measure = _measure(meter)
        self.price = _price(charge)
        cell = ""
        #: Names the running quantity: account, contract, charge, segment, cell. Ids hold no control character.
        self.counter = "\x1f".join((contract.account, contract.id, charge.id, str(segment.start_us), cell)).encode()
        self.constant = b"".join(
            (
                text(contract.id),
                text(plan.id),
                zigzag(plan.version),
                text(meter.id),
                zigzag(meter.version),
                text(f"{plan.id}@{plan.version}"),
                text(charge.id),
                zigzag(segment.period.start_us),
                zigzag(segment.period.end_us),
                zigzag(segment.start_us),
                text(cell),
                text(plan.currency),
                zigzag(0),
                _USAGE,
            )
        )
        # The last running quantity, its price() and its encoding: the next event's "before". Pure memory; one tuple,
        # since a thread that lost the partition may still be at work on it.
        self.memo: tuple[int | None, int, bytes] = (None, 0, b"")


def _measure(meter: Meter) -> Measure:
    exact = compile_measure(meter)
    if compiled.fastpath is None or meter.aggregation != "sum" or meter.value is None or meter.filters:
        return exact
    plain: Measure = compiled.fastpath.PlainSum(meter.value.encode(), exact)
    return plain


def _price(charge: Charge) -> Price:
    lines = price_lines(charge)
    if lines is None:
        return compile_price(charge)
    exact = price_of(lines)
    if compiled.fastpath is None:
        return exact
    try:
        plain: Price = compiled.fastpath.PlainLines(lines, exact)
    except OverflowError:
        return exact
    return plain


class RatingTerms(NamedTuple):
    """Terms that hold for ``start_us <= t < end_us``."""

    start_us: int
    end_us: int
    period_end_us: int
    priced: tuple[Priced, ...]


class TermsView:
    """A catalog snapshot as the rater reads it. Same answers as ``Catalog.terms``, remembered."""

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog
        self.offset = catalog.offset
        #: What was looked up so far, by account and event type, newest span first.
        self.spans: dict[tuple[bytes, bytes], list[RatingTerms]] = {}

    def find(self, account: bytes, event_type: bytes, at_us: int) -> RatingTerms | Rejection:
        spans = self.spans.get((account, event_type))
        if spans is not None:
            for terms in spans:
                if terms.start_us <= at_us < terms.end_us:
                    return terms
        found = self.catalog.terms(account.decode(), event_type.decode(), at_us)
        if isinstance(found, Rejection):
            return found
        priced = tuple(Priced(found, charge, meter) for charge, meter in found.priced)
        terms = RatingTerms(found.start_us, found.end_us, found.segment.period.end_us, priced)
        # Newest span first: live events ask for it, late ones look further.
        self.spans.setdefault((account, event_type), []).insert(0, terms)
        return terms


def enrich(events: list[Event], view: TermsView) -> tuple[list[tuple[Event, RatingTerms]], list[Refused]]:
    """Pair each event with the terms valid at its time; what has none is refused, or parked until it may have."""
    known: list[tuple[Event, RatingTerms]] = []
    refused: list[Refused] = []
    find = view.find
    fastpath = compiled.fastpath
    at, end = 0, len(events)
    while True:
        if fastpath is not None:
            at = fastpath.enrich_plain(events, at, view.spans, known)
        if at == end:
            break
        event = events[at]
        at += 1
        terms = find(event.account, event.event_type, event.timestamp_us)
        if type(terms) is RatingTerms:
            known.append((event, terms))
        else:
            assert isinstance(terms, Rejection)
            refused.append(Refused(event.record, terms, event.account, event.key, event.event_type, event.timestamp_us))
    return known, refused
