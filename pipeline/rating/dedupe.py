"""Second stage: has this identity been rated before?

Comes before enrich, since repeats are cheap to drop. Only a rated event uses up its key: of several events with one
identity in a batch the next may only be judged when it is known what became of the one before. So a batch is taken in
``waves``, each of which holds an identity once.
"""

from collections.abc import Sequence
from typing import NamedTuple

from pipeline.core.reasons import Reason, Rejection, Stage
from pipeline.core.usage import Event, Refused
from pipeline.rating import compiled


class Deduped(NamedTuple):
    fresh: list[Event]
    repeats: list[Event]
    conflicts: list[Refused]


def identities(events: list[Event]) -> list[bytes]:
    """The identity of each event."""
    if compiled.fastpath is not None:
        found: list[bytes] = compiled.fastpath.identities(events)
        return found
    return [event.identity for event in events]


def waves(events: list[Event]) -> list[list[Event]]:
    """The events in order, split by how often their identity stood before: one wave unless one stands twice."""
    if len(set(identities(events))) == len(events):
        return [events] if events else []
    first = dict(zip([event.identity for event in reversed(events)], reversed(events), strict=True))
    split = [[event for event in events if first[event.identity] is event]]
    times: dict[bytes, int] = {}
    for event in events:
        if first[event.identity] is not event:
            number = times[event.identity] = times.get(event.identity, 0) + 1
            if number == len(split):
                split.append([])
            split[number].append(event)
    return split


def dedupe(wave: list[Event], known: Sequence[bytes | None]) -> Deduped:
    """Split events by what is known of them: ``known`` holds, per event, the payload it was rated with, if it was."""
    if not any(known):
        return Deduped(wave, [], [])
    fresh: list[Event] = []
    repeats: list[Event] = []
    conflicts: list[Refused] = []
    for event, payload in zip(wave, known, strict=True):
        if payload is None:
            fresh.append(event)
        elif payload == event.payload:
            repeats.append(event)
        else:
            conflicts.append(
                Refused(event.record, _CONFLICT, event.account, event.key, event.event_type, event.timestamp_us)
            )
    return Deduped(fresh, repeats, conflicts)


_CONFLICT = Rejection(
    Stage.DEDUPE,
    Reason.CONFLICTING_DUPLICATE,
    "this idempotency key was billed already with another type, time, subject or properties: "
    "expected a repeat to be equal, or a new key for new usage",
)
