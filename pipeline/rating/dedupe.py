"""Second stage: has this identity been rated before?

Comes before enrich, since repeats are cheap to drop. Only a rated event uses up its key: of several events with one
identity in a batch the first goes on, the others wait in ``again`` until it is known what became of it.
"""

from collections.abc import Sequence
from typing import NamedTuple

from pipeline.core.reasons import Reason, Rejection, Stage
from pipeline.core.usage import Event, Refused


class Deduped(NamedTuple):
    fresh: list[Event]
    repeats: list[Event]
    conflicts: list[Refused]
    again: list[Event]


def dedupe(events: list[Event], known: Sequence[bytes | None]) -> Deduped:
    """Split events by what is known of them: ``known`` holds, per event, the payload it was rated with, if it was."""
    identities = {event.identity for event in events}
    if len(identities) == len(events) and not any(known):
        return Deduped(events, [], [], [])
    fresh: list[Event] = []
    repeats: list[Event] = []
    conflicts: list[Refused] = []
    again: list[Event] = []
    for event, payload in zip(events, known, strict=True):
        if payload is None:
            if event.identity in identities:
                identities.remove(event.identity)
                fresh.append(event)
            else:
                again.append(event)
        elif payload == event.payload:
            repeats.append(event)
        else:
            conflicts.append(
                Refused(event.record, _CONFLICT, event.account, event.key, event.event_type, event.timestamp_us)
            )
    return Deduped(fresh, repeats, conflicts, again)


_CONFLICT = Rejection(
    Stage.DEDUPE,
    Reason.CONFLICTING_DUPLICATE,
    "this idempotency key was billed already with another type, time, subject or properties: "
    "expected a repeat to be equal, or a new key for new usage",
)
