"""The whole way of a usage event through the rater, in one pure function: ``process``.

Nothing here reads a clock, a file or a socket: the same batch, state and catalog give the same bytes. What is computed
here becomes true only when ``pipeline.rating.commit`` has committed it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import NamedTuple, Protocol

from pipeline.core.reasons import Reason, Rejection, Stage
from pipeline.core.usage import Event, ParkedRecord, Record, Refused
from pipeline.infra.avro import Schemas
from pipeline.infra.wire import text, zigzag
from pipeline.rating import compiled
from pipeline.rating.accept import accept
from pipeline.rating.arrivals import new_arrivals
from pipeline.rating.changelog import entries
from pipeline.rating.correct import Corrected, CorrectionRecord, Declined, Repeated, Surroundings, correct, may_wait
from pipeline.rating.dedupe import dedupe, waves
from pipeline.rating.enrich import TermsView, enrich
from pipeline.rating.rate import RowContext, rate
from pipeline.rating.recent import new_recent


class StateFailed(Exception):
    """What a partition remembers could not be read or written: the disk's fault, never an event's."""


#: Raised on, whatever event was in hand: the worker stops and starts again.
NO_EVENTS_FAULT = (StateFailed, OSError, MemoryError)

#: Parked events are tried again for this long, then dead-lettered.
RETRY_FOR_MS = 7 * 24 * 60 * 60 * 1000
RETRY_FIRST_MS = 1_000
RETRY_LONGEST_MS = 60 * 60 * 1000
#: Records that go through all stages before the next do: what a stage made is still in the processor's cache when the
#: next one reads it. Measured: about a tenth less time than with 5,000 at once.
CHUNK = 1_000


class Source(StrEnum):
    """Which of its two topics a batch comes from."""

    EVENTS = "events"
    RETRY = "retry"


@dataclass(frozen=True, slots=True)
class Batch:
    """A run of offsets of one source partition: all its records, and the offsets around them."""

    source: Source
    partition: int
    first_offset: int
    next_offset: int
    records: list[Record]
    #: The worker's clock, for back-off only: age is judged by the broker's append time.
    now_ms: int


class State(Protocol):
    """What a partition remembers, read only. Raises StateFailed when it cannot be read."""

    def known(self, identities: bytes) -> Sequence[bytes | None]:
        """Payload each identity was rated with, None for those never rated; they stand one behind the other."""

    def quantity(self, counter: bytes) -> int | None:
        """Running quantity of a counter in units of 1e-9, None where no event counted yet."""


class Shape(NamedTuple):
    """What does not change from batch to batch: topic, partitions, framing bytes of event → rated row, all schemas."""

    origin_topic: str
    partitions: int
    frames: dict[bytes, bytes]
    schemas: Schemas


@dataclass(slots=True)
class Outcome:
    """Everything one batch leads to, to be committed whole or not at all."""

    rows: list[tuple[bytes, bytes]] = field(default_factory=list)
    rated: list[Event] = field(default_factory=list)
    repeats: list[Event] = field(default_factory=list)
    parked: list[Refused] = field(default_factory=list)
    #: Corrections that were applied, as events of an identity of their own.
    corrected: list[Event] = field(default_factory=list)
    #: Corrections that were judged and refused, as such events; their records are among the dead.
    declined: list[Event] = field(default_factory=list)
    dead: list[Refused] = field(default_factory=list)
    #: Parked records whose time has not come, and corrections the catalog is not read for: written back unchanged.
    waiting: list[ParkedRecord | CorrectionRecord] = field(default_factory=list)
    totals: dict[bytes, int] = field(default_factory=dict)
    sequences: dict[tuple[bytes, int], int] = field(default_factory=dict)
    latest_event_us: int | None = None

    @property
    def used_up(self) -> list[Event]:
        """Whose identities this batch used up."""
        return self.rated + self.corrected + self.declined

    @property
    def seen(self) -> dict[bytes, bytes]:
        """Identities that this batch used up, with their payloads."""
        return {event.identity: event.payload for event in self.used_up}

    @property
    def records(self) -> int:
        of_events = len(self.rated) + len(self.repeats) + len(self.parked) + len(self.dead) + len(self.waiting)
        return of_events + len(self.corrected)


class Overlay:
    """The state as it will be once the batch is committed: what the batch did, over what was there."""

    def __init__(self, state: State, totals: Mapping[bytes, int]) -> None:
        self._state, self._totals = state, totals
        self._seen = new_recent()

    def remember(self, rated: list[Event]) -> None:
        """These identities are used up from now on."""
        self._seen.add(entries(rated))

    def known(self, identities: bytes) -> Sequence[bytes | None]:
        below, newer = self._state.known(identities), self._seen.find(identities)
        return below if newer is None else [new or old for new, old in zip(newer, below, strict=True)]

    def quantity(self, counter: bytes) -> int | None:
        moved = self._totals.get(counter)
        return self._state.quantity(counter) if moved is None else moved


def process(batch: Batch, state: State, view: TermsView, shape: Shape) -> Outcome:
    """Take one partition batch to everything that must be committed. Pure: same arguments, same result."""
    outcome = Outcome()
    overlay = Overlay(state, outcome.totals)
    context = RowContext(shape.frames, text(shape.origin_topic), zigzag(batch.partition), zigzag(view.offset))

    records = batch.records
    corrections: list[CorrectionRecord] = []
    if batch.source is Source.RETRY:
        records, outcome.waiting, corrections, outcome.dead = _split_due(batch, view, shape)
    arrivals = new_arrivals()
    for start in range(0, len(records), CHUNK):
        events, refused = accept(
            records[start : start + CHUNK],
            partition=batch.partition,
            partitions=shape.partitions,
            frames=shape.frames,
            now_ms=batch.now_ms,
            arrivals=arrivals,
            own_only=batch.source is Source.RETRY,
        )
        _sort_out(refused, batch, outcome)
        if events:
            latest = _latest_us(events)
            outcome.latest_event_us = max(latest, outcome.latest_event_us or latest)
        split = waves(events)  # one, unless an identity stands twice among them
        more = start + CHUNK < len(records)
        for wave in split:
            fresh, repeats, conflicts = dedupe(wave.events, overlay.known(wave.identities))
            enriched = enrich(fresh, view)
            rows, rated, unpriced = rate(enriched, outcome.totals, overlay, context)
            outcome.rows += rows
            outcome.rated += rated
            outcome.repeats += repeats
            if more or wave is not split[-1]:
                overlay.remember(rated)
            _sort_out(conflicts + enriched.refused + unpriced, batch, outcome)
    if batch.source is Source.EVENTS:
        outcome.sequences = arrivals.blocks()
    if corrections:
        around = Surroundings(view, batch.partition, shape.partitions, batch.now_ms, context, shape.schemas)
        for record in corrections:
            _apply(record, overlay, around, outcome)
    return outcome


def process_one_by_one(batch: Batch, state: State, view: TermsView, shape: Shape) -> tuple[Outcome, list[Exception]]:
    """As ``process``, but a record that makes it raise becomes dead letter ``internal_error`` (law 2).

    Slow, for the batch in which ``process`` raised. Returns the exceptions too: each is a defect to be reported. What
    is no event's fault (the disk, memory) is raised: it must stop the worker, not fill the dead-letter topic.
    """
    whole = Outcome()
    overlay = Overlay(state, whole.totals)
    errors: list[Exception] = []
    for record in batch.records:
        one = replace(batch, records=[record])
        try:
            part = process(one, overlay, view, shape)
        except NO_EVENTS_FAULT:
            raise
        except Exception as error:  # noqa: BLE001  whatever it is, it must not stop the stream
            errors.append(error)
            rejection = Rejection(Stage.INTERNAL, Reason.INTERNAL_ERROR, f"the rater failed on it: {error!r}")
            whole.dead.append(Refused(record, rejection))
            continue
        whole.rows += part.rows
        whole.rated += part.rated
        whole.repeats += part.repeats
        whole.parked += part.parked
        whole.dead += part.dead
        whole.waiting += part.waiting
        whole.corrected += part.corrected
        whole.declined += part.declined
        whole.totals.update(part.totals)
        overlay.remember(part.used_up)
        for block, bits in part.sequences.items():
            whole.sequences[block] = whole.sequences.get(block, 0) | bits
        if part.latest_event_us is not None:
            whole.latest_event_us = max(part.latest_event_us, whole.latest_event_us or part.latest_event_us)
    return whole, errors


def _apply(record: CorrectionRecord, overlay: Overlay, around: Surroundings, outcome: Outcome) -> None:
    """Apply one correction over everything before it in the batch."""
    match correct(record, overlay, around):
        case Corrected(rows, totals, event):
            outcome.rows += rows
            outcome.totals.update(totals)
            outcome.corrected.append(event)
            overlay.remember([event])
        case Repeated(event):
            outcome.repeats.append(event)
        case Declined(refused, event):
            outcome.dead.append(refused)
            outcome.declined.append(event)
            overlay.remember([event])
        case Refused() as refused:
            outcome.dead.append(refused)


def any_due(batch: Batch, view: TermsView, shape: Shape) -> bool:
    """Is there a parked record in the batch whose time has come, or a correction the catalog is read for?"""
    for record in batch.records:
        if isinstance(record, CorrectionRecord):
            if record.said.catalog_offset <= view.offset:
                return True
        elif not isinstance(record, ParkedRecord) or _due(record, batch, view, shape):
            return True
    return False


def backoff_ms(attempts: int) -> int:
    """Wait after the n-th failed attempt: 1 s, doubled each time, at most an hour."""
    return min(RETRY_FIRST_MS << min(attempts - 1, 20), RETRY_LONGEST_MS)


def not_before_ms(attempts: int, now_ms: int) -> int:
    """When to try again after the n-th failed attempt: the wait, rounded up to quarters of it.

    Parked records are written back together when the first of them is due; on a grid they fall due together, so that a
    queue of thousands is written four times an hour, not without end.
    """
    wait_ms = backoff_ms(attempts)
    grid_ms = wait_ms // 4
    return -(-(now_ms + wait_ms) // grid_ms) * grid_ms


def _split_due(
    batch: Batch, view: TermsView, shape: Shape
) -> tuple[list[Record], list[ParkedRecord | CorrectionRecord], list[CorrectionRecord], list[Refused]]:
    """Parked records to try now, what has to wait, corrections to apply, and what is none of these."""
    ready: list[Record] = []
    waiting: list[ParkedRecord | CorrectionRecord] = []
    corrections: list[CorrectionRecord] = []
    foreign: list[Refused] = []
    for record in batch.records:
        if isinstance(record, CorrectionRecord):
            # A worker that has read less of the catalog would not price it as its event was.
            if record.said.catalog_offset <= view.offset:
                corrections.append(record)
            elif may_wait(record):
                waiting.append(record)
            else:
                foreign.append(Refused(record, _NO_SUCH_CATALOG))
        elif not isinstance(record, ParkedRecord) or record.topic != shape.origin_topic:
            foreign.append(Refused(record, _FOREIGN))
        elif _due(record, batch, view, shape):
            ready.append(record)
        else:
            waiting.append(record)
    return ready, waiting, corrections, foreign


def _due(record: ParkedRecord, batch: Batch, view: TermsView, shape: Shape) -> bool:
    """Is its back-off over, or does the catalog now have terms for it?"""
    if record.not_before_ms <= batch.now_ms:
        return True
    if record.catalog_offset == view.offset:
        return False
    events = accept(
        [record],
        partition=batch.partition,
        partitions=shape.partitions,
        frames=shape.frames,
        now_ms=batch.now_ms,
        arrivals=new_arrivals(),
        own_only=True,
    ).events
    return any(
        not isinstance(view.find(event.account, event.event_type, event.timestamp_us), Rejection) for event in events
    )


_NO_SUCH_CATALOG = Rejection(
    Stage.ACCEPT,
    Reason.WRONG_SHAPE,
    "expected a correction of an event that was rated by a catalog published before it was decided, got one of a "
    "catalog that nobody published since: no command decided it so",
)
_FOREIGN = Rejection(Stage.ACCEPT, Reason.UNDECODABLE, "expected a parked event or a correction, got other bytes")


def _sort_out(refused: Iterable[Refused], batch: Batch, outcome: Outcome) -> None:
    """Park what may pass by itself and has not been retried for too long; the rest needs a person."""
    for one in refused:
        parked_at_ms = one.record.parked_at_ms if isinstance(one.record, ParkedRecord) else batch.now_ms
        parks = one.rejection.parks and batch.now_ms - parked_at_ms <= RETRY_FOR_MS
        (outcome.parked if parks else outcome.dead).append(one)


def _latest_us(events: list[Event]) -> int:
    if compiled.fastpath is not None:
        return int(compiled.fastpath.latest_us(events))
    return max(event.timestamp_us for event in events)
