"""Fetched lists become runs without holes, however they overlap and are cut."""

from collections.abc import Sequence

import pytest
from faust.types import TP
from hypothesis import given
from hypothesis import strategies as st

from pipeline.rating.faust_batches import Fetched
from pipeline.rating.inbox import Hole, Inbox, Run
from tests.rating.world import message

PLACE = TP("usage.events", 0)
#: More than all the records here hold.
ROOM = 1 << 30


def fetched(start: int, end: int, offsets: Sequence[int] | None = None) -> Fetched:
    """A list of ``[start, end)``; every offset holds a record of 10 bytes unless said otherwise."""
    records = [message(b"0123456789", offset) for offset in (range(start, end) if offsets is None else offsets)]
    return Fetched(PLACE, start, end, records)  # type: ignore[arg-type]


def offsets(run: Run | Hole | None) -> list[int]:
    assert isinstance(run, Run)
    return [record.offset for record in run.records]


def test_lists_join_up_to_a_batch_and_the_rest_waits() -> None:
    inbox = Inbox(4)
    inbox.add(fetched(0, 3))
    inbox.add(fetched(3, 6))
    assert inbox.end == 6 and not inbox.full
    inbox.add(fetched(6, 8))
    assert inbox.full
    run = inbox.take(0, 4, ROOM)
    assert (offsets(run), run and run[:2], inbox.full) == ([0, 1, 2, 3], (0, 4), False)
    assert offsets(inbox.take(4, 4, ROOM)) == [4, 5, 6, 7]
    assert inbox.take(8, 4, ROOM) is None and not inbox and inbox.end is None


def test_what_was_processed_is_cut_and_markers_are_passed() -> None:
    inbox = Inbox(10)
    inbox.add(fetched(0, 5))
    inbox.add(fetched(5, 9, [6]))  # 5, 7 and 8 are markers, or aborted
    assert inbox.take(3, 10, ROOM) == Run(3, 9, [message(b"0123456789", offset) for offset in (3, 4, 6)])


def test_only_markers_still_move_the_position() -> None:
    inbox = Inbox(10)
    inbox.add(fetched(0, 2, []))
    assert inbox.take(0, 10, ROOM) == Run(0, 2, [])


def test_bytes_end_a_batch_too() -> None:
    inbox = Inbox(10)
    for start in range(0, 6, 2):
        inbox.add(fetched(start, start + 2))
    assert offsets(inbox.take(0, 10, 25)) == [0, 1, 2, 3]  # the list that passes the limit is taken whole
    assert inbox.take(4, 10, 0) is None


def test_a_run_ends_before_a_hole_and_the_hole_comes_next() -> None:
    inbox = Inbox(10)
    inbox.add(fetched(0, 2))
    inbox.add(fetched(5, 7))
    assert offsets(inbox.take(0, 10, ROOM)) == [0, 1]
    assert inbox.take(2, 10, ROOM) == Hole(2, 5)


def test_a_hole_is_final_only_when_met_long_and_often_enough() -> None:
    inbox, hole = Inbox(10), Hole(2, 5)
    inbox.add(fetched(5, 7))
    assert [inbox.drop_behind(hole, float(second)) for second in range(8)] == [False] * 6 + [True] * 2
    assert not inbox
    inbox = Inbox(10)
    assert not any(inbox.drop_behind(hole, 0.1 * look) for look in range(20))  # often, but within 2 seconds
    assert not inbox.drop_behind(Hole(3, 5), 100.0)  # another one begins anew


@given(data=st.data())
def test_every_record_comes_once_and_in_order(data: st.DataObject) -> None:
    """Lists that overlap, leave holes and repeat; after a hole they are sent again from there."""
    end = 30
    present = data.draw(st.sets(st.integers(0, end - 1)))
    inbox, at, came = Inbox(5), 0, list[int]()
    while at < end:
        for _ in range(data.draw(st.integers(0, 3))):
            start = data.draw(st.integers(0, end - 1))
            stop = data.draw(st.integers(start + 1, end))
            inbox.add(fetched(start, stop, [offset for offset in range(start, stop) if offset in present]))
        room = data.draw(st.integers(1, 5))
        run = inbox.take(at, room, ROOM)
        if isinstance(run, Hole):
            assert run.expected == at < run.found
            inbox.drop_behind(run, 0.0)
        if not isinstance(run, Run):
            inbox.add(fetched(at, end, [offset for offset in range(at, end) if offset in present]))
            continue
        assert run.first_offset == at < run.next_offset and len(run.records) <= room
        came += offsets(run)
        assert all(at <= offset < run.next_offset for offset in offsets(run))
        at = run.next_offset
    assert came == sorted(present)


@pytest.mark.parametrize("batch_records", [1, 7])
def test_full_is_two_batches(batch_records: int) -> None:
    inbox = Inbox(batch_records)
    inbox.add(fetched(0, 2 * batch_records - 1))
    assert not inbox.full
    inbox.add(fetched(2 * batch_records - 1, 2 * batch_records))
    assert inbox.full
