"""Fourth stage: running quantity to amount, and the bytes of the rated row.

Rating is a difference (law 3): an event's amount is ``price(after) - price(before)`` of its counter's running quantity,
but for charges that go by a rule of their own (``rules``). An event is rated for all its charges or for none.
"""

from typing import NamedTuple, Protocol

from pipeline.core.reasons import Reason, Rejection, Stage
from pipeline.core.usage import Event, ParkedRecord, Refused
from pipeline.infra.wire import FRAME_BYTES, decimal, zigzag
from pipeline.rating import compiled
from pipeline.rating.enrich import Enriched, Priced, Pricing, RatingTerms, Ruled, Split
from pipeline.rating.rules import BEYOND_LAST_TIER, Step

#: decimal(38, …) of the rated row: one digit more does not fit.
FITS = 10**38


class Quantities(Protocol):
    """Running quantities by counter, in units of 1e-9."""

    def quantity(self, counter: bytes) -> int | None: ...


class Rated(NamedTuple):
    #: (Kafka key, framed RatedUsage)
    rows: list[tuple[bytes, bytes]]
    events: list[Event]
    refused: list[Refused]


class RowContext(NamedTuple):
    """What all rows of a batch share."""

    #: framing bytes of the incoming event → those of the rated row that embeds it
    frames: dict[bytes, bytes]
    origin_topic: bytes  #: encoded
    partition: bytes  #: encoded: where a record arrived that was never parked
    catalog_offset: bytes  #: encoded


def rate(enriched: Enriched, totals: dict[bytes, int], state: Quantities, context: RowContext) -> Rated:
    """Price events in order. ``totals`` (the batch's running quantities) moves on, ``state`` is only read.

    ``fastpath`` takes what is plain where it was compiled; what it leaves is priced here, event by event.
    """
    rows: list[tuple[bytes, bytes]] = []
    events: list[Event] = []
    refused: list[Refused] = []
    add_row = rows.append
    running = totals.get
    frames, origin_topic, partition, catalog_offset = context
    origin, fastpath = origin_topic + partition, compiled.fastpath
    # Many rows of a batch share their append time: encoded once.
    last_ms, last_ms_bytes = -1, b""
    moved: dict[bytes, int] = {}  # by the event at hand

    def read(counter: bytes) -> int | None:
        """A counter as the event at hand has left it so far: several of its charges may share a pool."""
        now = moved.get(counter)
        if now is None:
            now = running(counter)
        return state.quantity(counter) if now is None else now

    known, terms_of, _ = enriched
    at, end = 0, len(known)
    while True:
        if fastpath is not None:
            at = fastpath.rate_plain(
                known, terms_of, at, totals, state.quantity, frames, origin, catalog_offset, FITS, _KINDS, rows, events
            )
        if at == end:
            break
        event, terms = known[at], terms_of[at]
        at += 1
        record, account, properties = event.record, event.account, event.properties
        measured = _measured(event, terms)
        rejection: Rejection | None = None
        if isinstance(measured, Rejection):
            rejection, measured = measured, []
        # Everything is computed before anything is kept: all charges or none.
        head = b""
        moved.clear()
        made: list[bytes] = []
        for priced, quantity in measured:
            if isinstance(priced, Ruled):
                step = priced.rule(quantity, properties, read)
                if isinstance(step, Rejection):
                    rejection = step
                    break
                if not (-FITS < step.after < FITS and -FITS < step.amount < FITS):
                    rejection = _overflow(step.after)
                    break
                moved.update(step.totals)
                before_bytes, after_bytes, amount = decimal(step.before), decimal(step.after), step.amount
            else:
                counter = priced.counter
                before = running(counter)
                if before is None:
                    before = state.quantity(counter)
                memo_quantity, memo_cost, memo_encoded = priced.memo
                cost: int | None
                if before is None:  # a counter without an event yet costs nothing
                    before, cost, before_bytes = 0, 0, _ZERO
                elif before == memo_quantity:
                    cost, before_bytes = memo_cost, memo_encoded
                else:
                    cost, before_bytes = priced.price(before), decimal(before)
                after = before + quantity
                after_cost = priced.price(after)
                if cost is None or after_cost is None:
                    rejection = BEYOND_LAST_TIER
                    break
                amount = after_cost - cost  # the cost before too may be a larger one now: of a price published since
                if not (-FITS < after < FITS and -FITS < after_cost < FITS and -FITS < amount < FITS):
                    rejection = _overflow(after)
                    break
                after_bytes = decimal(after)
                priced.memo = (after, after_cost, after_bytes)
                moved[counter] = after
            if not head:
                value = record.value
                assert value is not None
                appended_ms = record.timestamp
                if appended_ms != last_ms:
                    last_ms, last_ms_bytes = appended_ms, zigzag(appended_ms)
                came = origin_topic + zigzag(record.partition) if isinstance(record, ParkedRecord) else origin
                head = b"".join(
                    (
                        frames[value[:FRAME_BYTES]],
                        value[FRAME_BYTES:],
                        came,
                        zigzag(record.offset),
                        last_ms_bytes,
                        event.identity,
                        catalog_offset,
                    )
                )
                late = b"\x01" if appended_ms * 1000 >= terms.period_end_us else b"\x00"
            made.append(
                b"".join((head, priced.constant, decimal(quantity), before_bytes, after_bytes, decimal(amount), late))
            )
        if rejection is None:
            totals.update(moved)
            for row in made:
                add_row((account, row))
            events.append(event)
        else:
            refused.append(Refused(record, rejection, account, event.key, event.event_type, event.timestamp_us))
    return Rated(rows, events, refused)


#: What the fast path tells apart: charges whose cells it looks for, counters that go by a rule, and what that did.
_KINDS = (Split, Ruled, Step)


def _measured(event: Event, terms: RatingTerms) -> list[tuple[Priced | Ruled, int]] | Rejection:
    """The counters an event moves, each with its quantity of the event; at least one."""
    measured: list[tuple[Priced | Ruled, int]] = []
    properties = event.properties
    pricing: Pricing
    for pricing in terms.priced:
        quantity = pricing.measure(properties)
        if quantity is None:
            continue
        if isinstance(quantity, Rejection):
            return quantity
        counter = pricing.find(event) if type(pricing) is Split else pricing
        if isinstance(counter, Rejection):
            return counter
        assert not isinstance(counter, Split)
        measured.append((counter, quantity))
    return measured or _UNMETERED


_ZERO = decimal(0)

# Not passed over in silence: finance could not tell forgotten usage from free usage, which a charge of price 0 shows.
_UNMETERED = Rejection(
    Stage.RATE,
    Reason.NO_CHARGE,
    "no charge of the plan counts this event: the filters of all its meters leave it out; price it, at 0 if it is free",
)


def _overflow(after: int) -> Rejection:
    return Rejection(
        Stage.RATE,
        Reason.QUANTITY_TOO_LARGE,
        f"expected a running quantity and price of at most 38 digits, got {after}e-9",
    )
