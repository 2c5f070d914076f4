"""Third stage: which account, contract, plan and price version hold at the event's own time?

Terms are looked up once per account, event type and span of time, and kept in the form the rater needs: compiled
functions, and the part of a rated row that never changes, already encoded. So are the cells of charges that are split.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from xxhash import xxh3_128_hexdigest

from pipeline.core.catalog import Catalog, Segment
from pipeline.core.cells import CELL_BYTES_MAX, cell_text
from pipeline.core.charges import Charge, ChargeClass, Price, charge_class
from pipeline.core.meters import Measure, Meter, compile_measure, plain_property
from pipeline.core.money import Micros
from pipeline.core.reasons import Reason, Rejection, Stage
from pipeline.core.usage import Event, Refused
from pipeline.infra.wire import subject_of, text, zigzag
from pipeline.rating import compiled
from pipeline.rating.rules import PoolCounter, Rule, compile_counter_price, compile_rule

#: Symbols of the row's enums.
_CLASSES: dict[ChargeClass, bytes] = {"running": zigzag(0), "per_event": zigzag(1), "period": zigzag(2)}
_USAGE = zigzag(0)
#: What cells of split charges may take of a view's memory; beyond it the view forgets all terms and begins anew.
_CELLS_BYTES_MAX = 100 * 1024 * 1024
#: A cell without the names it is found by, bytes.
_CELL_BYTES = 1024
#: Longer subjects stand in the names of counters by their hash.
_SUBJECT_BYTES_MAX = 128


class Priced:
    """A charge's counter in one segment, ready to rate: what to measure, what it costs, its rows' constant part.

    An event adds its quantity, and costs what that adds to the price of the running quantity. What costs otherwise is
    ``Ruled``.
    """

    __slots__ = ("constant", "counter", "measure", "memo", "price")

    def __init__(self, counter: bytes, constant: bytes, measure: Measure, price: Price) -> None:
        self.counter, self.constant = counter, constant
        self.measure, self.price = measure, price
        # The last running quantity, its price() and its encoding: the next event's "before". Pure memory; one tuple,
        # since a thread that lost the partition may still be at work on it.
        self.memo: tuple[int | None, int, bytes] = (None, 0, b"")


class Ruled:
    """As ``Priced``, for a counter that events move by a rule (``pipeline.rating.rules``)."""

    __slots__ = ("constant", "counter", "measure", "rule")

    def __init__(self, counter: bytes, constant: bytes, measure: Measure, rule: Rule) -> None:
        self.counter, self.constant = counter, constant
        self.measure, self.rule = measure, rule


class Split:
    """A charge split by dimensions or subjects: each cell has a counter of its own, made when first met."""

    __slots__ = ("keys", "make", "measure", "met", "per_subject")

    def __init__(
        self,
        charge: Charge,
        measure: Measure,
        make: Callable[[tuple[str, ...], bytes | None], "Priced | Ruled | Rejection"],
    ) -> None:
        self.measure, self.make = measure, make
        #: Properties that name the cell.
        self.keys = tuple(name.encode() for name in charge.by)
        self.per_subject = charge.per_subject
        #: By the values of the dimensions and, where it counts, the subject.
        self.met: dict[tuple[bytes, ...], Priced | Ruled] = {}

    def find(self, event: Event) -> "Priced | Ruled | Rejection":
        """The counter of an event's cell; a Rejection where the cell's name is too long to stand on a line."""
        properties = event.properties
        key = tuple([properties.get(name, b"") for name in self.keys])
        subject: bytes | None = None
        if self.per_subject:
            subject = subject_of(event.record.value or b"")
            key = (*key, subject)
        known = self.met.get(key)
        if known is not None:
            return known
        made = self.make(tuple(value.decode() for value in key[: len(self.keys)]), subject)
        if not isinstance(made, Rejection):
            self.met[key] = made
        return made


#: How one charge prices an event.
Pricing: TypeAlias = Priced | Ruled | Split


class RatingTerms(NamedTuple):
    """Terms that hold for ``start_us <= t < end_us``."""

    start_us: int
    end_us: int
    period_end_us: int
    priced: tuple[Pricing, ...]


def counter_of(
    account: str, contract: str, charge: str, segment_start_us: Micros, cell: str = "", subject: bytes | None = None
) -> bytes:
    """Names a running quantity in ``rater.totals``; ``subject`` only for a charge that counts per subject.

    Ids and cells hold no control character, so no two counters have one name.
    """
    parts = [account.encode(), contract.encode(), charge.encode(), b"%d" % segment_start_us, cell.encode()]
    if subject is not None:
        plain = len(subject) <= _SUBJECT_BYTES_MAX and not subject.startswith(b"#")
        parts.append(subject if plain else b"#" + xxh3_128_hexdigest(subject).encode())
    return b"\x1f".join(parts)


class TermsView:
    """A catalog snapshot as the rater reads it. Same answers as ``Catalog.terms``, remembered."""

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog
        self.offset = catalog.offset
        #: What was looked up so far, by account, by event type, newest span first.
        self.spans: dict[bytes, dict[bytes, list[RatingTerms]]] = {}
        # Accounts on one plan share what was compiled of it.
        self._measures: dict[Meter, Measure] = {}
        self._prices: dict[tuple[Charge, tuple[str, ...]], Price] = {}
        self._cells_bytes = 0

    def find(self, account: bytes, event_type: bytes, at_us: int) -> RatingTerms | Rejection:
        for terms in self.spans.get(account, {}).get(event_type, ()):
            if terms.start_us <= at_us < terms.end_us:
                return terms
        found = self.catalog.terms(account.decode(), event_type.decode(), at_us)
        if isinstance(found, Rejection):
            return found
        priced = tuple([self._pricing(found.segment, charge, meter) for charge, meter in found.priced])
        terms = RatingTerms(found.start_us, found.end_us, found.segment.period.end_us, priced)
        # Newest span first: live events ask for it, late ones look further.
        self.spans.setdefault(account, {}).setdefault(event_type, []).insert(0, terms)
        return terms

    def _pricing(self, segment: Segment, charge: Charge, meter: Meter) -> Pricing:
        measure = self._measure(meter)
        pool = segment.pool_of(charge.id)
        shared = None if pool is None else PoolCounter(_pool_counter(segment, pool.id), pool.included)
        price_class = charge_class(charge, meter, pooled=pool is not None)
        if price_class == "running" and segment.shortens(charge):
            price_class = "period"

        def make(values: tuple[str, ...], subject: bytes | None) -> Priced | Ruled | Rejection:
            cell = cell_text(values)
            if len(cell.encode()) > CELL_BYTES_MAX:
                return _too_long(charge)
            if charge.split:  # a subject may be as long as an event
                self._met_a_cell(_CELL_BYTES + len(cell) + len(subject or b""))
            contract = segment.contract
            counter = counter_of(contract.account, contract.id, charge.id, segment.start_us, cell, subject)
            constant = _constant(segment, charge, meter, price_class, cell)
            rule = compile_rule(charge, meter, counter, values, shared)
            if rule is None:
                return _priced(counter, constant, measure, self._price(charge, values))
            return Ruled(counter, constant, measure, rule)

        if charge.split:
            return Split(charge, measure, make)
        whole = make((), None)
        assert not isinstance(whole, Rejection), "a charge without dimensions has one cell, whose name is empty"
        return whole

    def _measure(self, meter: Meter) -> Measure:
        known = self._measures.get(meter)
        if known is None:
            known = compile_measure(meter)
            plain = plain_property(meter)
            if compiled.fastpath is not None and plain is not None:
                known = compiled.fastpath.PlainNumber(plain.encode(), known)
            self._measures[meter] = known
        return known

    def _price(self, charge: Charge, cell: tuple[str, ...]) -> Price:
        known = self._prices.get((charge, cell))
        if known is None:
            known = self._prices[charge, cell] = compile_counter_price(charge, cell)
        return known

    def _met_a_cell(self, size: int) -> None:
        self._cells_bytes += size
        if self._cells_bytes > _CELLS_BYTES_MAX:
            self._cells_bytes = 0
            self.spans.clear()
            self._prices.clear()


class Enriched(NamedTuple):
    """Events, the terms of each beside it, and what has none."""

    events: list[Event]
    terms: list[RatingTerms]
    refused: list[Refused]


def enrich(events: list[Event], view: TermsView) -> Enriched:
    """Find the terms valid at each event's time; what has none is refused, or parked until it may have."""
    known: list[Event] = []
    terms_of: list[RatingTerms] = []
    refused: list[Refused] = []
    find = view.find
    fastpath = compiled.fastpath
    at, end = 0, len(events)
    while True:
        if fastpath is not None:
            at = fastpath.enrich_plain(events, at, view.spans, known, terms_of)
        if at == end:
            break
        event = events[at]
        at += 1
        terms = find(event.account, event.event_type, event.timestamp_us)
        if type(terms) is RatingTerms:
            known.append(event)
            terms_of.append(terms)
        else:
            assert isinstance(terms, Rejection)
            refused.append(Refused(event.record, terms, event.account, event.key, event.event_type, event.timestamp_us))
    return Enriched(known, terms_of, refused)


def _priced(counter: bytes, constant: bytes, measure: Measure, price: Price) -> Priced:
    """One that the fast path knows, where there is one."""
    if compiled.fastpath is not None:
        made: Priced = compiled.fastpath.Priced(counter, constant, measure, price)
        return made
    return Priced(counter, constant, measure, price)


def _pool_counter(segment: Segment, pool: str) -> bytes:
    """Names the units used of a pool. No counter of a charge begins so: account ids are not empty."""
    contract = segment.contract
    return "\x1f".join(("", "pool", contract.account, contract.id, pool, str(segment.start_us))).encode()


def _constant(segment: Segment, charge: Charge, meter: Meter, price_class: ChargeClass, cell: str) -> bytes:
    """A row from contract to kind: what the sink recognises as the terms of a line, and the entry of usage."""
    plan = segment.plan
    return b"".join(
        (
            text(segment.contract.id),
            text(plan.id),
            zigzag(plan.version),
            text(meter.id),
            zigzag(meter.version),
            text(segment.price_version),
            text(charge.id),
            zigzag(segment.period.start_us),
            zigzag(segment.period.end_us),
            zigzag(segment.start_us),
            text(cell),
            text(plan.currency),
            _CLASSES[price_class],
            zigzag(0),
            _USAGE,
        )
    )


def _too_long(charge: Charge) -> Rejection:
    dimensions = ", ".join(charge.by)
    return Rejection(
        Stage.RATE,
        Reason.DIMENSION_TOO_LONG,
        f"expected at most {CELL_BYTES_MAX} bytes of {dimensions} together, by which charge {charge.id} is split",
    )
