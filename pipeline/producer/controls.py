"""Control totals: per hour of emission, how many events the producer took and what became of them.

They go to a topic of their own, ``usage.controls``, rather than among the events as reserved records: events are keyed
and partitioned by account, and rated; a total is about a source, must never be billed, and has to be found without
reading millions of events. The same idempotent client sends it, and it is never in the events' way: a total that Kafka
does not take is said again later.

Numbers are given without holes, so an hour is a range of numbers: a boundary when it begins, and a count of what is
done. Boundaries and rejections stand in ``controls.json`` of the spool folder and outlive the process; what waits is
counted in the journal itself. A process killed before a boundary was written (half a second at most) counts the events
behind it to the hour before; none is counted twice, or not at all.
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.producer.journal import Left
from pipeline.producer.spool import write_atomically

log = logging.getLogger("tally.producer")

HOUR = 3600
#: Seconds between two totals of an hour that goes on, or is not delivered yet.
SAY_EVERY = 300.0
#: Seconds before a total that Kafka did not take is said again, and before the file is written again after an error.
_RETRY_AFTER = 30.0
#: Runs of rejected numbers named in a total, the first ones.
_REJECTIONS_SAID_MAX = 100


class Rejection(NamedTuple):
    """Numbers, both inclusive, whose events will never be delivered."""

    first: int
    last: int
    reason: str


class Said(NamedTuple):
    """What changes from one total of an hour to the next."""

    last: int
    done: int
    rejected: int
    closed: bool


@dataclass(slots=True)
class Hour:
    """Events from number ``first`` to the next hour that has any, emitted from ``start`` (seconds since 1970) on."""

    start: int
    first: int
    #: Delivered or rejected.
    done: int = 0
    #: The total that Kafka confirmed last, and the one on its way.
    said: Said | None = None
    saying: Said | None = None
    #: Said before only once it is over and done, or when asked for; monotonic seconds.
    next_at: float = 0.0
    #: Not said before in any case: Kafka did not take it.
    retry_at: float = 0.0


@dataclass(slots=True)
class Account:
    """The hours of one epoch, oldest first, but for those that are over, done and said."""

    source: str
    hours: list[Hour] = field(default_factory=list)
    rejections: list[Rejection] = field(default_factory=list)
    #: The number behind the last event; None for the epoch that goes on.
    end: int | None = None


class Total(NamedTuple):
    """A control total to be sent."""

    source: str
    record: dict[str, Any]
    hour: Hour
    said: Said


class Controls:
    """The control totals of one spool folder, earlier epochs included.

    ``begin_hour`` is called by who emits, under the journal's lock; everything else by one thread at a time.
    """

    def __init__(self, folder: Path, name: str, epoch: str, left: Sequence[Left], next_sequence: int) -> None:
        """``left`` is what the journal held when it was opened, ``next_sequence`` the next number of this epoch."""
        self._path = folder / "controls.json"
        self._accounts = _read(self._path)
        self._changed = threading.Event()
        self._write_at = 0.0
        for one in left:
            self._recover(one, f"{name}/{one.epoch}", goes_on=one.epoch == epoch)
        self._current = self._accounts.setdefault(epoch, Account(f"{name}/{epoch}"))
        self._current.end = None
        for key, account in self._accounts.items():
            if key != epoch and account.end is None:  # its segments were taken away: where it ended is not known
                account.end = account.hours[-1].first if account.hours else 1
            waiting = [run for one in left if one.epoch == key for run in one.waiting]
            for hour, last in _ranges(account, next_sequence):
                hour.done = last - hour.first + 1 - sum(_overlap(run, (hour.first, last)) for run in waiting)
        #: When the hour being counted is over, seconds since 1970: who emits then calls ``begin_hour``.
        self.hour_ends = float(self._current.hours[-1].start + HOUR) if self._current.hours else 0.0
        self._changed.set()
        self.save()

    def _recover(self, left: Left, source: str, *, goes_on: bool) -> None:
        """Take in what an earlier run left in a segment; segments come oldest first."""
        account = self._accounts.setdefault(left.epoch, Account(source))
        if not account.hours:  # a folder of before there were control totals: what it sent is not known
            first = left.waiting[0][0] if left.waiting else left.following
            account.hours.append(Hour(int(time.time()) // HOUR * HOUR, first))
        account.end = None if goes_on else left.following
        if left.readable < left.following:
            lost = Rejection(left.readable, left.following - 1, "the spool was damaged")
            if lost not in account.rejections:  # it is found again at every start
                account.rejections.append(lost)

    # -- counting

    def begin_hour(self, now: float, sequence: int) -> None:
        """Count from number ``sequence`` on to the hour of ``now``, seconds since 1970.

        Called before the sender can see that event. Where the clock went back the hour goes on.
        """
        start, hours = int(now) // HOUR * HOUR, self._current.hours
        if not hours or start > hours[-1].start:
            if hours and hours[-1].first == sequence:
                hours[-1].start = start  # nothing was emitted in it
            else:
                hours.append(Hour(start, sequence, next_at=time.monotonic() + SAY_EVERY))
            self._changed.set()
        self.hour_ends = float(hours[-1].start + HOUR)

    def settle(self, epoch: str, sequence: int) -> None:
        """Kafka confirmed the event, or refused it for good."""
        for hour in reversed(self._accounts[epoch].hours):  # as a rule the last one
            if sequence >= hour.first:
                hour.done += 1
                return

    def reject(self, epoch: str, sequence: int, reason: str) -> None:
        """It will never be delivered: ``settle`` is called for it as well."""
        self._accounts[epoch].rejections.append(Rejection(sequence, sequence, reason))
        self._changed.set()

    # -- saying

    def due(
        self, next_sequence: int, first_waiting: Callable[[str], int | None], *, asked: bool, closing: bool
    ) -> list[Total]:
        """Totals to be sent now: of hours that changed, when they are over and done or it is time again; all of them
        when asked for, or closing.

        ``first_waiting`` tells an epoch's lowest number not delivered, as the journal has it.
        """
        now, clock = time.monotonic(), time.time()
        totals: list[Total] = []
        for epoch, account in self._accounts.items():
            ranges = list(_ranges(account, next_sequence))
            spooled = sum(last - hour.first + 1 - hour.done for hour, last in ranges)
            over = account.end is not None or closing  # nothing more will come of it
            for hour, last in ranges:
                waits = last - hour.first + 1 - hour.done
                named = [one for one in account.rejections if one.first <= last and one.last >= hour.first]
                newest = hour is ranges[-1][0]
                closed = over and newest and not spooled
                said = Said(last, hour.done, sum(_overlap(one[:2], (hour.first, last)) for one in named), closed)
                final = not waits and (over or not newest or clock >= hour.start + HOUR)
                if said == hour.said or hour.saying is not None or now < hour.retry_at:
                    continue
                if asked or final or now >= hour.next_at:
                    lowest = (first_waiting(epoch) or hour.first) if waits else 0
                    hour.saying = said
                    record = {
                        "source": account.source,
                        "hour": hour.start * 1_000_000,
                        "first_sequence": hour.first,
                        "last_sequence": last,
                        "delivered": hour.done - said.rejected,
                        "rejected": said.rejected,
                        "spooled": waits,
                        "first_spooled": max(lowest, hour.first) if waits else 0,
                        "rejections": [one._asdict() for one in named[:_REJECTIONS_SAID_MAX]],
                        "closed": closed,
                        "said_at": int(clock * 1_000_000),
                    }
                    totals.append(Total(account.source, record, hour, said))
        return totals

    @property
    def on_the_way(self) -> bool:
        """Whether a total was sent and Kafka has not answered."""
        return any(hour.saying is not None for account in self._accounts.values() for hour in account.hours)

    def heard(self, total: Total, *, taken: bool) -> None:
        """Kafka took the total, or did not; forget hours that are over, done and said."""
        total.hour.saying = None
        now = time.monotonic()
        if not taken:
            total.hour.retry_at = now + _RETRY_AFTER
            return
        total.hour.said, total.hour.next_at = total.said, now + SAY_EVERY
        for epoch, account in list(self._accounts.items()):
            self._forget(epoch, account)

    def _forget(self, epoch: str, account: Account) -> None:
        hours = account.hours
        while hours:
            first = hours[0]
            following = hours[1].first if len(hours) > 1 else account.end
            if following is None or first.said is None or first.saying is not None:
                return
            if first.said.last < following - 1 or first.done < following - first.first or first.said.done < first.done:
                return
            del hours[0]
            account.rejections = [one for one in account.rejections if one.last >= following]
            self._changed.set()
        if account is not self._current:
            del self._accounts[epoch]

    # -- the file

    def save(self) -> None:
        """Write what must outlive the process, if it changed; an error is logged and the file written later."""
        if not self._changed.is_set() or time.monotonic() < self._write_at:
            return
        self._changed.clear()
        accounts = {
            epoch: {
                "source": account.source,
                "end": account.end,
                "hours": [[hour.start, hour.first] for hour in tuple(account.hours)],
                "rejections": account.rejections,
            }
            for epoch, account in self._accounts.items()
        }
        try:
            write_atomically(self._path, json.dumps(accounts, indent=2) + "\n")
        except OSError as error:
            log.warning("%s cannot be written (%s): control totals may be by the wrong hour", self._path, error)
            self._changed.set()
            self._write_at = time.monotonic() + _RETRY_AFTER


def _ranges(account: Account, next_sequence: int) -> Iterator[tuple[Hour, int]]:
    """Hours with events, and the number of the last one of each so far."""
    hours = tuple(account.hours)
    if not hours:
        return iter(())
    ends = [hour.first for hour in hours[1:]] + [next_sequence if account.end is None else account.end]
    return ((hour, end - 1) for hour, end in zip(hours, ends, strict=True) if end > hour.first)


def _overlap(one: tuple[int, int], other: tuple[int, int]) -> int:
    """How many numbers are in both ranges, ends inclusive."""
    return max(min(one[1], other[1]) - max(one[0], other[0]) + 1, 0)


def _read(path: Path) -> dict[str, Account]:
    """The accounts an earlier run left. What cannot be read is forgotten: the numbers themselves show holes, too."""
    try:
        return {
            epoch: Account(
                account["source"],
                [Hour(start, first) for start, first in account["hours"]],
                [Rejection(*one) for one in account["rejections"]],
                account["end"],
            )
            for epoch, account in json.loads(path.read_text()).items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        log.warning("%s cannot be read (%s): control totals begin anew", path, error)
        return {}
