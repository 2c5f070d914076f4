"""Fourth stage: running quantity to amount, and the bytes of the rated row.

Rating is a difference (law 3): an event's amount is ``price(after) - price(before)`` of its counter's running quantity.
An event is rated for all its charges or for none.
"""

from typing import NamedTuple, Protocol

from pipeline.core.reasons import Reason, Rejection, Stage
from pipeline.core.usage import Event, ParkedRecord, Refused
from pipeline.infra.wire import FRAME_BYTES, decimal, zigzag
from pipeline.rating import compiled
from pipeline.rating.enrich import Priced, RatingTerms

#: decimal(38, …) of the rated row: one digit more does not fit.
_FITS = 10**38


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


def rate(
    known: list[tuple[Event, RatingTerms]], totals: dict[bytes, int], state: Quantities, context: RowContext
) -> Rated:
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
    at, end = 0, len(known)
    while True:
        if fastpath is not None:
            at = fastpath.rate_plain(
                known, at, totals, state.quantity, frames, origin, catalog_offset, _FITS, rows, events
            )
        if at == end:
            break
        event, terms = known[at]
        at += 1
        record, identity, _, _, account, _, _, properties = event
        measured: list[tuple[Priced, int]] = []
        rejection: Rejection | None = None
        for priced in terms.priced:
            quantity = priced.measure(properties)
            if type(quantity) is int:
                measured.append((priced, quantity))
            elif quantity is not None:
                assert isinstance(quantity, Rejection)
                rejection = quantity
                break
        if rejection is None and not measured:
            rejection = _UNMETERED
        if rejection is None:
            # Everything is computed before anything is kept: all charges or none.
            head = b""
            moved: list[tuple[bytes, int]] = []
            made: list[bytes] = []
            for priced, quantity in measured:
                counter = priced.counter
                before = running(counter)
                if before is None:
                    before = state.quantity(counter)
                memo_quantity, memo_cost, memo_encoded = priced.memo
                if before is None:  # a counter without an event yet costs nothing
                    before, cost, before_bytes = 0, 0, _ZERO
                elif before == memo_quantity:
                    cost, before_bytes = memo_cost, memo_encoded
                else:
                    cost, before_bytes = priced.price(before), decimal(before)
                after = before + quantity
                after_cost = priced.price(after)
                if not (-_FITS < after < _FITS and -_FITS < after_cost < _FITS):
                    rejection = _overflow(after)
                    break
                after_bytes = decimal(after)
                priced.memo = (after, after_cost, after_bytes)
                moved.append((counter, after))
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
                            identity,
                            catalog_offset,
                        )
                    )
                    late = b"\x01" if appended_ms * 1000 >= terms.period_end_us else b"\x00"
                made.append(
                    b"".join(
                        (
                            head,
                            priced.constant,
                            decimal(quantity),
                            before_bytes,
                            after_bytes,
                            decimal(after_cost - cost),
                            late,
                        )
                    )
                )
            if rejection is None:
                totals.update(moved)
                for row in made:
                    add_row((account, row))
        if rejection is None:
            events.append(event)
        else:
            refused.append(Refused(record, rejection, account, event.key, event.event_type, event.timestamp_us))
    return Rated(rows, events, refused)


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
