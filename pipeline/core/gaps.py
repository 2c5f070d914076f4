"""Runs of sequence numbers that a source used or passed over and that did not arrive: usage that may be missing."""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum


class Cause(StrEnum):
    """Why numbers are missing, as far as data can tell; the first that fits."""

    #: Kafka refused them for good, or the producer's spool was damaged.
    REJECTED = "rejected"
    #: By its last control total the producer still has them on its disk.
    SPOOLED = "spooled"
    #: Offsets of the events topic were deleted, or passed over, before a rater read them.
    DELETED = "deleted"
    #: Kafka confirmed them to the producer, yet no rater met a readable event with these numbers.
    CONFIRMED = "confirmed"
    #: The same service began a new journal afterwards; what was left in the old one was not sent.
    RESTARTED = "restarted"
    #: No control total covers them.
    UNKNOWN = "unknown"


class Verdict(StrEnum):
    """What a person found about missing numbers."""

    #: They were used, and their events cannot be billed any more.
    LOST = "lost"
    #: No event ever had them.
    NEVER_EXISTED = "never_existed"
    #: Their events were sent under other numbers.
    SENT_AGAIN = "sent_again"


@dataclass(frozen=True, slots=True)
class Gap:
    """One run of missing numbers of a source, both ends inclusive, and what is known of it. Times are UTC."""

    source: str
    first_missing: int
    last_missing: int
    #: Commits of the rater between which the source passed them; None where nothing came before, or behind.
    passed_after: datetime | None = None
    passed_before: datetime | None = None
    #: Hours of the producer's clock in which it emitted them; None where no control total covers one of them.
    emitted_from: datetime | None = None
    emitted_until: datetime | None = None
    #: The reason of a rejection that meets them.
    rejected_because: str | None = None
    #: Events of these hours that waited on the producer's disk when it last said so.
    spooled: int | None = None
    said_at: datetime | None = None
    #: Whether control totals cover all of them.
    confirmed: bool | None = None
    #: The source that the same service began afterwards.
    newer_source: str | None = None
    newer_since: datetime | None = None
    likely_cause: Cause = Cause.UNKNOWN

    @property
    def missing(self) -> int:
        return self.last_missing - self.first_missing + 1

    @property
    def numbers(self) -> str:
        return numbers(self.first_missing, self.last_missing)


def numbers(first: int, last: int) -> str:
    """A run of sequence numbers, both ends inclusive: ``17``, or ``17-40``."""
    return str(first) if first == last else f"{first}-{last}"


def because(gap: Gap) -> str:
    """The likely cause in words, with what to do where there is something."""
    said = f"as of {_minute(gap.said_at)}" if gap.said_at else ""
    match gap.likely_cause:
        case Cause.REJECTED:
            return f"the producer could not deliver it: {gap.rejected_because}"
        case Cause.SPOOLED:
            text = f"its producer has {gap.spooled:,} events of that hour unsent {said}"
            if gap.newer_source is not None:
                text += f", and began anew as {gap.newer_source}: start a producer on the old spool folder"
            return text
        case Cause.DELETED:
            return "offsets of usage.events were deleted or passed over before they were rated"
        case Cause.CONFIRMED:
            return (
                f"Kafka confirmed it to the producer {said}, yet no rater met it: deleted or lost at the broker, "
                "or a dead letter that could not be read"
            )
        case Cause.RESTARTED:
            since = f" since {_minute(gap.newer_since)}" if gap.newer_since else ""
            return (
                f"the service runs with a new journal, {gap.newer_source}{since}; the old one was not sent to its end"
            )
        case Cause.UNKNOWN:
            return "unknown: its producer has sent no control total for it"


def when(gap: Gap) -> str:
    """When the numbers were emitted or passed, as exactly as it is known; empty where it is not."""
    parts = []
    if gap.emitted_from is not None and gap.emitted_until is not None:
        parts.append(f"emitted {_minute(gap.emitted_from)} to {_minute(gap.emitted_until)}")
    if gap.passed_before is not None:
        after = f"{_minute(gap.passed_after)} and " if gap.passed_after else ""
        parts.append(f"passed {'between ' if after else 'before '}{after}{_minute(gap.passed_before)}")
    elif gap.passed_after is not None:
        parts.append(f"nothing since {_minute(gap.passed_after)}")
    return ", ".join(parts)


def _minute(at: datetime | None) -> str:
    return "" if at is None else f"{at:%Y-%m-%d %H:%M}Z"


@dataclass(frozen=True, slots=True)
class HourTotal:
    """A producer's control total for one hour that what arrived falls short of."""

    source: str
    #: Start of the UTC hour in which the events were emitted.
    hour: datetime
    emitted: int
    missing: int


@dataclass(frozen=True, slots=True)
class Silence:
    """A source from which nothing has come for much longer than is usual for it."""

    source: str
    last_at: datetime
    #: The silence it usually keeps at most, seconds.
    usual_seconds: int
    #: How long it has been silent, seconds.
    silent_seconds: int
