"""Corrections on ``usage.retry``: billed events taken back, or set right, in the stream and transactions of all usage.

Taking back is rating with a minus (law 3): the counter's quantity goes back by the row's, and the amount is
``price(after) - price(before)``, whatever was rated since. So a counter's rows still add up to the price of its
quantity, and taking back what was just added leaves what was. Where that difference does not mean the row, the row is
taken back at the amount it was billed at:

- per event, since its amount was its own;
- of class period, since it was an estimate: the close prices what is left;
- where another price, contract or meter was published back-dated since the row was rated: re-rating the open period
  (``tally rerate``) prices the others anew too.

Each correction is applied once: its identity (event and entry number) is remembered like an event's; behind that,
PostgreSQL takes a row of one entry number once.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

from xxhash import xxh3_64_digest, xxh3_128_digest

from pipeline.core.aggregation import is_additive
from pipeline.core.catalog import Terms
from pipeline.core.cells import cell_values
from pipeline.core.charges import Charge, Price, compile_price
from pipeline.core.corrections import Correction, HeldRow, priced_as, terms_record
from pipeline.core.money import amount_decimal, quantity_decimal
from pipeline.core.periods import to_datetime
from pipeline.core.reasons import Reason, Rejection, Stage
from pipeline.core.usage import DecodedEvent, Event, ParkedRecord, Refused
from pipeline.infra.avro import EVENTS, RATED, Schemas
from pipeline.infra.wire import subject_of, zigzag
from pipeline.rating.accept import accept
from pipeline.rating.arrivals import new_arrivals
from pipeline.rating.enrich import TermsView, counter_of, enrich
from pipeline.rating.rate import FITS, Quantities, RowContext, rate

#: How long a correction waits in hand for the catalog before it is written back.
_WRITE_BACK_MS = 1_000
#: Longest it waits in all, from its decision. A worker's catalog is half a minute old at most; clocks drift.
_WAIT_MS = 10 * 60 * 1000
#: How far the clock of who decided may be ahead of the broker's.
_AHEAD_MS = 5 * 60 * 1000
#: Bytes of all rows of one correction: each holds its event, so a small message could ask for any amount of memory.
_ROWS_BYTES_MAX = 8 * 1024 * 1024


class CorrectionRecord(NamedTuple):
    """A correction as it stood on the retry topic."""

    offset: int
    timestamp: int  #: when it was appended, milliseconds since 1970 UTC
    key: bytes | None
    value: bytes
    said: Correction

    @property
    def not_before_ms(self) -> int:
        """When it is written back, should the catalog not be read for it until then."""
        return self.timestamp + _WRITE_BACK_MS

    @property
    def letter(self) -> bytes:
        """What is written to the retry topic again while it waits."""
        return self.value

    @property
    def letter_key(self) -> bytes | None:
        return self.key


class State(Quantities, Protocol):
    """What is known before the correction, in the batch too."""

    def known(self, identities: bytes) -> Sequence[bytes | None]: ...


class Surroundings(NamedTuple):
    """What does not change from one correction of a batch to the next."""

    view: TermsView
    partition: int
    partitions: int
    now_ms: int
    context: RowContext
    schemas: Schemas


class Corrected(NamedTuple):
    """A correction applied: its rows, where its counters stand now, and its identity, to be remembered."""

    rows: list[tuple[bytes, bytes]]
    totals: dict[bytes, int]
    event: Event


class Repeated(NamedTuple):
    """The very correction was judged before."""

    event: Event


class Declined(NamedTuple):
    """A correction judged and refused, and its identity, to be remembered.

    A second copy of it may come after prices changed, and after the person decided anew: then both would be applied.
    """

    refused: Refused
    event: Event


def may_wait(record: CorrectionRecord) -> bool:
    """May the catalog it needs still be on its way to this worker? It was published before it was decided."""
    decided_ms = record.said.decided_at_us // 1000
    return -_AHEAD_MS <= record.timestamp - decided_ms <= _WAIT_MS


def correct(record: CorrectionRecord, state: State, around: Surroundings) -> Corrected | Repeated | Declined | Refused:
    """Apply one correction, all of it or nothing; ``state`` is only read.

    1. Read the event it is about: it must be whole, and of this partition.
    2. Was it judged before? Then nothing; another one of its entry number is refused.
    3. Take every row back that the event holds.
    4. Rate the replacement, at the terms that hold at its time now.

    Refused and declined mean dead-lettered: a correction does not park, a person decided it and is there to look.
    """
    said = record.said
    # Step 1.
    event = _read(said.event, record, around)
    if isinstance(event, Refused):
        return event
    # Step 2.
    as_event = DecodedEvent(
        record,
        correction_identity(event.identity, said.entry),
        xxh3_64_digest(record.value),
        event.key,
        event.account,
        event.event_type,
        event.timestamp_us,
        event.properties,
    )
    before = state.known(as_event.identity)[0]
    if before is not None:
        if before == as_event.payload:
            return Repeated(as_event)
        return _refused(record, _CONFLICT, event)
    # Step 3.
    if len(said.rows) * len(said.event) > _ROWS_BYTES_MAX:
        return Declined(_refused(record, _TOO_MANY_ROWS, event), as_event)
    totals: dict[bytes, int] = {}
    rows = []
    terms = around.view.catalog.terms(event.account.decode(), event.event_type.decode(), event.timestamp_us)
    shared = _head(event, said, around)
    for held in said.rows:
        row = _taken_back(held, event, None if isinstance(terms, Rejection) else terms, state, totals)
        if isinstance(row, Rejection):
            return Declined(_refused(record, row, event), as_event)
        rows.append(around.schemas.encode(RATED, shared | row))
    if said.replacement is not None:
        # Step 4.
        replaced = _replaced(said, event, record, _Moved(state, totals), totals, around)
        if isinstance(replaced, Refused):
            return Declined(replaced, as_event)
        rows += replaced
    return Corrected([(event.account, row) for row in rows], totals, as_event)


def correction_identity(event: bytes, entry: int) -> bytes:
    """What a correction is remembered by, given its event's identity.

    No event has it but by chance, 1 in 2^128: names of events hold no NUL and are not empty.
    """
    return xxh3_128_digest(b"\0correction\0" + event + zigzag(entry))


class _Moved:
    """The state with the counters where the correction has moved them so far."""

    def __init__(self, state: Quantities, totals: dict[bytes, int]) -> None:
        self._state, self._totals = state, totals

    def quantity(self, counter: bytes) -> int | None:
        moved = self._totals.get(counter)
        return self._state.quantity(counter) if moved is None else moved


# -- step 1


def _read(value: bytes, record: CorrectionRecord, around: Surroundings) -> Event | Refused:
    """A usage event of a correction, judged as when it first arrived."""
    said = record.said
    arrival = ParkedRecord(
        topic=said.origin_topic,
        partition=said.origin_partition,
        offset=said.origin_offset,
        timestamp=said.origin_appended_ms,
        key=None,
        value=value,
        letter=record.value,
        letter_key=record.key,
        attempts=0,
        replays=0,
        parked_at_ms=record.timestamp,
        not_before_ms=0,
        catalog_offset=around.view.offset,
    )
    accepted = accept(
        [arrival],
        partition=around.partition,
        partitions=around.partitions,
        frames=around.context.frames,
        now_ms=around.now_ms,
        arrivals=new_arrivals(),
        own_only=True,
    )
    if accepted.refused:
        [refused] = accepted.refused
        return refused._replace(record=record)
    return accepted.events[0]


def _refused(record: CorrectionRecord, rejection: Rejection, event: Event) -> Refused:
    return Refused(record, rejection, event.account, event.key, event.event_type, event.timestamp_us)


_CONFLICT = Rejection(
    Stage.DEDUPE,
    Reason.CONFLICTING_DUPLICATE,
    "another correction of this event has the same entry number: look at `tally usage list`, and decide anew",
)
_TOO_MANY_ROWS = Rejection(
    Stage.ACCEPT,
    Reason.MESSAGE_TOO_LARGE,
    f"expected rows that take at most {_ROWS_BYTES_MAX} bytes with the event in each",
)
_TOO_LARGE = Rejection(
    Stage.RATE, Reason.QUANTITY_TOO_LARGE, "expected a running quantity and a price of at most 38 digits after it"
)


# -- step 3


def _head(event: Event, said: Correction, around: Surroundings) -> dict[str, Any]:
    """What all rows of kind void of a correction share."""
    return {
        "event": around.schemas.decode(said.event, EVENTS),
        "origin_topic": said.origin_topic,
        "origin_partition": said.origin_partition,
        "origin_offset": said.origin_offset,
        "origin_appended_at": to_datetime(said.origin_appended_ms * 1000),
        "identity": event.identity,
        "catalog_offset": around.view.offset,
        "entry": said.entry,
        "kind": "void",
    }


def _taken_back(
    row: HeldRow, event: Event, terms: Terms | None, state: Quantities, totals: dict[bytes, int]
) -> dict[str, Any] | Rejection:
    """What the row of kind void for one held row has of its own; moves its counter in ``totals``.

    ``terms`` hold at the event's time now; None where none do.
    """
    moved = _Moved(state, totals)
    found = None if terms is None else priced_as(row, terms)
    counter = _counter(row, event, moved)
    before = after = 0 if counter is None else moved.quantity(counter) or 0
    amount = -row.amount
    if row.price_class != "period" if found is None else is_additive(found[1]):
        after = before - row.quantity  # of a maximum no one event can be taken
    if row.price_class == "running" and found is not None and counter is not None:
        price = _price(found[0], row.cell)
        now, then = price(after), price(before)
        if now is not None and then is not None:
            amount = now - then
    if not (-FITS < after < FITS and -FITS < amount < FITS):
        return _TOO_LARGE
    if counter is not None and after != before:
        totals[counter] = after
    return {
        **terms_record(row),
        "quantity": quantity_decimal(-row.quantity),
        "quantity_before": quantity_decimal(before),
        "quantity_after": quantity_decimal(after),
        "amount": amount_decimal(amount),
    }


def _counter(row: HeldRow, event: Event, state: Quantities) -> bytes | None:
    """The counter that the row was counted in: the account's own, or its subject's where the charge is per subject."""
    name = (event.account.decode(), row.contract, row.charge, row.segment_start_us, row.cell)
    for counter in (counter_of(*name), counter_of(*name, subject_of(event.record.value or b""))):
        if state.quantity(counter) is not None:
            return counter
    return None


@lru_cache(maxsize=10_000)
def _price(charge: Charge, cell: str) -> Price:
    return compile_price(charge, cell_values(cell, len(charge.by)))


# -- step 4


def _replaced(
    said: Correction,
    event: Event,
    record: CorrectionRecord,
    state: Quantities,
    totals: dict[bytes, int],
    around: Surroundings,
) -> list[bytes] | Refused:
    """The rows of kind correction; moves their counters in ``totals``."""
    assert said.replacement is not None
    new = _read(said.replacement, record, around)
    if isinstance(new, Refused):
        return new
    if (new.identity, new.timestamp_us) != (event.identity, event.timestamp_us):
        return _refused(record, _ANOTHER_EVENT, event)
    enriched = enrich([new], around.view)
    if enriched.refused:
        return _refused(record, enriched.refused[0].rejection, new)
    rows, _, unpriced = rate(enriched, totals, state, around.context)
    if unpriced:
        return _refused(record, unpriced[0].rejection, new)
    return [_as_correction(row, said.entry + 1, around.schemas) for _, row in rows]


_ANOTHER_EVENT = Rejection(
    Stage.ACCEPT,
    Reason.WRONG_SHAPE,
    "expected a replacement of the same account, key and time: void the event, and add usage under a new key",
)


def _as_correction(row: bytes, entry: int, schemas: Schemas) -> bytes:
    return schemas.encode(RATED, schemas.decode(row, RATED) | {"entry": entry, "kind": "correction"})
