"""Parked records are tried when their time comes or the catalog has news, and written back seldom."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.usage import ParkedRecord
from pipeline.rating.batch import Batch, Source
from pipeline.rating.retry_queue import RetryQueue
from tests.rating.world import NOW_MS, message, parked, usage

SECOND, HOUR = 1_000, 3_600_000


def letters(first: int, *waits_ms: int) -> Batch:
    """Parked records at these offsets of the retry topic, due so long after NOW."""
    records = [parked(usage(), first + at, not_before_ms=NOW_MS + wait) for at, wait in enumerate(waits_ms)]
    return Batch(Source.RETRY, 0, first, first + len(records), records, NOW_MS)


def no_answer(_: Batch) -> bool:
    return False


def asked(found: list[int], answer: bool = False) -> Callable[[Batch], bool]:
    """Notes the first offset of each batch it is asked about."""

    def answered(batch: Batch) -> bool:
        found.append(batch.first_offset)
        return answer

    return answered


def test_handed_out_when_the_first_is_due_and_all_at_once() -> None:
    queue = RetryQueue()
    queue.add(letters(0, HOUR, SECOND), behind=False)
    queue.add(letters(2, 2 * HOUR), behind=False)
    assert queue.due(NOW_MS + SECOND - 1, 7, None, no_answer) is None
    batch = queue.due(NOW_MS + SECOND, 7, None, no_answer)
    assert batch is not None
    assert (batch.first_offset, batch.next_offset, len(batch.records)) == (0, 3, 3)
    assert batch.now_ms == NOW_MS + SECOND
    assert queue.held is None and queue.due(NOW_MS + HOUR, 7, None, no_answer) is None


def test_what_is_no_letter_is_due_at_once() -> None:
    queue = RetryQueue()
    queue.add(replace(letters(0, HOUR), records=[message(b"junk")]), behind=False)
    assert queue.due(NOW_MS, 7, None, no_answer) is not None


def test_the_catalog_is_asked_once_for_each_of_its_states_and_each_hand() -> None:
    queue, found = RetryQueue(), list[int]()
    queue.add(letters(0, HOUR), behind=False)
    for catalog in (7, 7, 8, 8):
        assert queue.due(NOW_MS, catalog, None, asked(found)) is None
    assert found == [0, 0]
    queue.add(letters(1, HOUR), behind=False)
    assert queue.due(NOW_MS, 8, None, asked(found, answer=True)) is not None
    assert found == [0, 0, 0]


def test_news_of_the_catalog_reaches_what_waits_behind() -> None:
    """The hand is written back, and those behind it looked at, up to where the topic ended when the news came."""
    queue = RetryQueue()
    queue.add(letters(0, HOUR), behind=True)
    assert queue.due(NOW_MS, 8, 3, no_answer) is not None
    queue.add(letters(1, HOUR), behind=True)
    assert queue.due(NOW_MS, 8, 4, no_answer) is not None
    queue.add(letters(2, HOUR), behind=True)
    assert queue.due(NOW_MS, 8, 5, no_answer) is not None
    queue.add(letters(3, HOUR), behind=True)
    assert queue.due(NOW_MS, 8, 6, no_answer) is None  # came after the news


def test_written_back_at_a_pace_but_never_kept_for_long_when_more_waits() -> None:
    queue = RetryQueue()
    queue.add(letters(0, *[0] * 1000), behind=False)
    assert queue.due(NOW_MS, 7, None, no_answer) is not None
    queue.add(letters(1000, *[0] * 1000), behind=False)
    assert queue.due(NOW_MS + 4_999, 7, None, no_answer) is None
    assert queue.due(NOW_MS + 5_000, 7, None, no_answer) is not None
    queue.add(letters(2000, HOUR), behind=True)
    assert queue.due(NOW_MS + 5_000, 7, None, no_answer) is None
    assert queue.due(NOW_MS + 60_000, 7, None, no_answer) is not None


#: What can happen: records arrive (their waits), time passes (ms), the catalog changes (with an answer or not).
_HAPPENINGS = st.lists(
    st.one_of(
        st.tuples(st.just("arrive"), st.lists(st.integers(0, 2 * HOUR), min_size=1, max_size=8)),
        st.tuples(st.just("pass"), st.integers(1, HOUR)),
        st.tuples(st.just("publish"), st.booleans()),
    ),
    max_size=40,
)


@given(happenings=_HAPPENINGS, hand=st.integers(1, 5))
def test_each_record_comes_once_in_order_and_never_without_a_reason(
    happenings: list[tuple[str, object]], hand: int
) -> None:
    """Driven as the partition drives it, against what a reader of the topic would expect."""
    queue, topic = RetryQueue(), list[ParkedRecord]()
    at, now, catalog = 0, NOW_MS, 7
    handed_out_ms, published = -HOUR, 0

    def step(answer: bool) -> None:
        nonlocal at, handed_out_ms, published
        while True:
            start = at if queue.held is None else queue.held.next_offset
            room = hand - (0 if queue.held is None else len(queue.held.records))
            if came := topic[start : start + room]:
                more = Batch(Source.RETRY, 0, start, start + len(came), came, now)
                queue.add(more, behind=start + len(came) < len(topic))
            end = at if queue.held is None else queue.held.next_offset
            batch = queue.due(now, catalog, len(topic) if end < len(topic) else None, lambda _: answer)
            if batch is None:
                return
            # Nothing is lost, repeated, or handed out of turn.
            assert (batch.first_offset, batch.records) == (at, topic[at : batch.next_offset])
            assert 0 < len(batch.records) <= hand
            one_due = min(record.not_before_ms for record in topic[at : batch.next_offset]) <= now
            rotated = batch.next_offset < len(topic)
            assert one_due or published or rotated
            if not published and not rotated:
                assert now - handed_out_ms >= 5 * len(batch.records)
            at, handed_out_ms = batch.next_offset, now

    for what, value in happenings:
        if what == "arrive":
            assert isinstance(value, list)
            topic += [parked(usage(), len(topic) + n, not_before_ms=now + wait) for n, wait in enumerate(value)]
        elif what == "pass":
            assert isinstance(value, int)
            now += value
        else:
            catalog += 1
            published = 1
        step(answer=what == "publish" and value is True)
        if what == "publish":
            published = 0
    for _ in topic:  # in the end all are tried, one hand at a time
        now += 3 * HOUR
        step(answer=False)
    assert at == len(topic)


@pytest.mark.parametrize("answer", [True, False])
def test_an_empty_queue_has_nothing(answer: bool) -> None:
    assert RetryQueue().due(NOW_MS, 7, 9, lambda _: answer) is None
