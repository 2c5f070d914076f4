"""How a partition's thread comes to its next batch: what waits for more, and what does not. Without Kafka."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from faust.types import TP

from pipeline.core.limits import Limits
from pipeline.infra.topics import Topics
from pipeline.rating.batch import Batch, Source
from pipeline.rating.commit import Membership
from pipeline.rating.faust_batches import Fetched
from pipeline.rating.partition import PartitionListener, PartitionRater, RaterConfig
from tests.rating.world import SCHEMAS, SHAPE, message

FULL = 4
#: No test takes so long, so that whatever does not wait for the interval was not made to.
LONG_S = 600.0
ANSWER_S = 10.0
NOBODY: Any = SimpleNamespace(until=lambda partition: 0)
FEED: Any = SimpleNamespace(view=SimpleNamespace(offset=0))


def fetched(start: int, end: int) -> Fetched:
    records = [message(b"0123456789", offset) for offset in range(start, end)]
    return Fetched(TP("usage.events", 0), start, end, records)  # type: ignore[arg-type]


def partition(interval_s: float) -> PartitionRater:
    config = RaterConfig(
        kafka={},
        group="rater",
        topics=Topics(),
        schemas=SCHEMAS,
        shape=SHAPE,
        batch_records=FULL,
        limits=Limits(run_max=0, percent_max=100, window=1),
        going_on=NOBODY,
        state_dir=Path("nowhere"),
        stamp={},
        worker="here",
    )
    rater = PartitionRater(0, Membership("rater", 1, "me"), config, FEED, PartitionListener(), interval_s=interval_s)
    rater.next_offsets = {Source.EVENTS: 0, Source.RETRY: 0}
    return rater


@contextmanager
def asked(rater: PartitionRater) -> Iterator["Future[Batch | None]"]:
    """The answer to what the partition's thread asks; ended with the block, answered or not."""
    with ThreadPoolExecutor(1) as thread:
        answer = thread.submit(rater._next_batch)
        try:
            yield answer
        finally:
            rater.stop()


def next_offset(answer: "Future[Batch | None]") -> int:
    batch = answer.result(ANSWER_S)
    assert batch is not None
    return batch.next_offset


def began(rater: PartitionRater) -> None:
    """Have it begin a transaction: two records that find it idle."""
    rater.offer(Source.EVENTS, fetched(0, 2))
    batch = rater._next_batch()
    assert batch is not None
    rater.next_offsets[Source.EVENTS] = batch.next_offset


def test_what_comes_to_an_idle_partition_is_rated_at_once() -> None:
    rater = partition(LONG_S)
    with asked(rater) as answer:
        rater.offer(Source.EVENTS, fetched(0, 1))
        assert next_offset(answer) == 1


def test_events_gather_for_the_interval_and_a_full_batch_ends_it() -> None:
    rater = partition(LONG_S)
    began(rater)
    with asked(rater) as answer:
        rater.offer(Source.EVENTS, fetched(2, 4))
        with pytest.raises(FutureTimeout):
            answer.result(0.2)
        rater.offer(Source.EVENTS, fetched(4, 2 + FULL))
        assert next_offset(answer) == 2 + FULL


def test_the_interval_ends_without_another_event() -> None:
    rater = partition(0.2)
    began(rater)
    with asked(rater) as answer:
        rater.offer(Source.EVENTS, fetched(2, 3))
        assert next_offset(answer) == 3


def test_one_that_stops_waits_for_no_interval() -> None:
    rater = partition(LONG_S)
    began(rater)
    rater.offer(Source.EVENTS, fetched(2, 3))
    with asked(rater) as answer:
        rater.stop()
        assert answer.result(ANSWER_S) is None
