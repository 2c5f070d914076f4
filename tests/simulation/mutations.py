"""Defects that were made, or could be: each a patch of the product that the simulation has to find, or to bear."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from itertools import count
from typing import Any
from unittest.mock import patch

from pipeline.billing import commit as billing_commit
from pipeline.billing import sink
from pipeline.rating import correct, partition, take
from pipeline.rating.changelog import by_expiry
from pipeline.rating.commit import BatchAborted, Committer, Membership
from pipeline.rating.state import Positions
from tests.simulation import kafka, world
from tests.simulation.store import Session
from tests.simulation.tasks import current
from tests.simulation.world import GROUP

#: Entered, the defect is in the product; it has to be entered inside of ``world.simulated``.
Mutation = Callable[[], AbstractContextManager[Any]]

_commit = Committer.commit


def _remember(batch: Any, outcome: Any, state: Any) -> None:
    state.apply(by_expiry(outcome.rated, batch.now_ms), outcome.totals, state.positions or Positions(0, 0))


def _apply_first(self: Any, batch: Any, outcome: Any, catalog: int, member: Any, state: Any, *rest: Any) -> None:
    _remember(batch, outcome, state)
    _commit(self, batch, outcome, catalog, member, state, *rest)


def _apply_after_abort(self: Any, batch: Any, outcome: Any, catalog: int, member: Any, state: Any, *rest: Any) -> None:
    try:
        _commit(self, batch, outcome, catalog, member, state, *rest)
    except BatchAborted:
        _remember(batch, outcome, state)
        raise


def overlay_before_commit() -> AbstractContextManager[Any]:
    """What a batch did is remembered before it is true."""
    return patch.object(Committer, "commit", _apply_first)


def overlay_after_abort() -> AbstractContextManager[Any]:
    """What an aborted batch did is remembered."""
    return patch.object(Committer, "commit", _apply_after_abort)


def own_transactional_ids() -> AbstractContextManager[Any]:
    """Every worker has its own: taking a partition fences nobody and ends no transaction."""

    def named(_: Any, name: str) -> kafka.Producer:
        task = current()
        assert task is not None
        return kafka.Producer(world.current().broker, f"{name}-{task.name}")

    return patch.object(partition, "new_producer", named)


def no_generation() -> AbstractContextManager[Any]:
    """Offsets are sent as if by whoever is the owner now, as metadata of an idle consumer does."""

    def newest(self: Membership) -> bytes:
        group = world.current().broker.groups[GROUP]
        return _metadata(Membership(GROUP, group.generation, min(group.members)))

    return patch.object(Membership, "metadata", newest)


_metadata = Membership.metadata


def unstable_offsets() -> AbstractContextManager[Any]:
    """Committed offsets are read while a transaction that moves them is pending."""

    def committed(self: kafka.Consumer, partitions: list[Any], timeout: float = -1) -> list[Any]:
        return [
            kafka.TopicPartition(p.topic, p.partition, self._group.offset((p.topic, p.partition))) for p in partitions
        ]

    return patch.object(kafka.Consumer, "committed", committed)


def no_restore() -> AbstractContextManager[Any]:
    """The disk is believed, whatever the changelogs say."""
    return patch.object(take, "_restore", lambda *args: (0, 0))


def offsets_believed() -> AbstractContextManager[Any]:
    """The group's offset is believed, whatever the changelogs say."""
    return patch.object(take, "_believed", lambda source, committed, *rest: committed)


def corrections_forgotten() -> AbstractContextManager[Any]:
    """What corrects an event is not known again when it is read again."""
    times = count()
    return patch.object(correct, "correction_identity", lambda event, entry: b"%016d" % next(times))


def positions_without_compare() -> AbstractContextManager[Any]:
    """The sink moves positions wherever they stand."""

    def moved(self: Session, parameters: Any) -> list[Any]:
        for topic, number, _, following in zip(*parameters, strict=True):
            self._put("position", (topic, number), following)
        return list(zip(*parameters[:2], strict=True))

    return patch.object(Session, "_move_positions", moved)


def closed_unseen() -> AbstractContextManager[Any]:
    """The sink writes to the invoices it knows, without a look whether they are open."""

    def every(self: Session, parameters: Any) -> list[Any]:
        _lock_invoices(self, parameters)
        return [(number,) for number in parameters[0]]

    return patch.object(Session, "_lock_invoices", every)


_lock_invoices = Session._lock_invoices


def not_unique() -> AbstractContextManager[Any]:
    """The table of rated usage takes the same row again."""

    def insert(self: Session, table: str, key: Any, value: Any) -> bool:
        if table == "rated" and self._read(table, key) is not None:
            key = (*key, value["rated_partition"], value["rated_offset"], id(value))
        return _insert(self, table, key, value)

    return patch.object(Session, "_insert", insert)


_insert = Session._insert


def positions_after_rows() -> AbstractContextManager[Any]:
    """Positions move in a transaction of their own, after the rows."""
    pending: dict[int, Any] = {}

    def later(connection: Any, moves: Any) -> None:
        pending[id(connection)] = moves

    def commit(connection: Any, *args: Any, **options: Any) -> Any:
        written = _sink_commit(connection, *args, **options)
        _move_positions(connection, pending[id(connection)])
        return written

    stack = ExitStack()
    stack.enter_context(patch.object(billing_commit, "_move_positions", later))
    stack.enter_context(patch.object(sink, "commit", commit))
    return stack


_sink_commit, _move_positions = billing_commit.commit, billing_commit._move_positions
