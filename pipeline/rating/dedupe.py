"""Second stage: has this identity been rated before?

Comes before enrich, since repeats are cheap to drop. Only a rated event uses up its key: of several events with one
identity in a batch the next may only be judged when it is known what became of the one before. So a batch is taken in
``waves``, each of which holds an identity once.
"""

from collections.abc import Sequence
from typing import NamedTuple

from pipeline.core.reasons import Reason, Rejection, Stage
from pipeline.core.usage import Event, Refused
from pipeline.infra.wire import IDENTITY_BYTES
from pipeline.rating import compiled
from pipeline.rating.recent import each_identity


class Deduped(NamedTuple):
    fresh: list[Event]
    repeats: list[Event]
    conflicts: list[Refused]


class Wave(NamedTuple):
    """Events of different identities."""

    events: list[Event]
    identities: bytes  #: of each event, one behind the other


def waves(events: list[Event]) -> list[Wave]:
    """The events in order, split by how often their identity stood before: one wave unless one stands twice."""
    if not events:
        return []
    whole = Wave(events, _identities(events))
    if not _has_repeats(whole.identities):
        return [whole]
    times: dict[bytes, int] = {}
    split: list[list[Event]] = []
    for event in events:
        identity = event.identity
        number = times[identity] = times.get(identity, -1) + 1
        if number == len(split):
            split.append([])
        split[number].append(event)
    return [Wave(some, _identities(some)) for some in split]


def _identities(events: list[Event]) -> bytes:
    if compiled.fastpath is not None:
        found: bytes = compiled.fastpath.identities(events)
        return found
    return b"".join([event.identity for event in events])


def _has_repeats(identities: bytes) -> bool:
    if compiled.fastpath is not None:
        return bool(compiled.fastpath.has_repeats(identities))
    return len(set(each_identity(identities))) < len(identities) // IDENTITY_BYTES


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
