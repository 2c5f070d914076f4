"""A partition's pace: how long events gather, and what does not wait."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.rating.pace import Pace, interval_s

FULL = 5_000


@pytest.mark.parametrize(
    ("partitions", "expected_s"), [(1, 0.01), (4, 0.04), (16, 0.16), pytest.param(512, 0.5, id="at most half a second")]
)
def test_partitions_share_what_a_worker_may_begin_in_a_second(partitions: int, expected_s: float) -> None:
    assert interval_s(partitions, 100.0) == pytest.approx(expected_s)


def test_what_comes_to_an_idle_partition_waits_for_nothing() -> None:
    pace = Pace(0.16, FULL)
    assert pace.wait_s(1, 0.0) == 0.0
    pace.begun(0.0)
    assert pace.wait_s(1, 0.16) == 0.0


def test_what_comes_behind_a_transaction_gathers_until_its_interval_is_over() -> None:
    pace = Pace(0.16, FULL)
    pace.begun(10.0)
    assert pace.wait_s(1, 10.04) == pytest.approx(0.12)


def test_a_full_batch_waits_for_nothing() -> None:
    pace = Pace(0.16, FULL)
    pace.begun(10.0)
    assert pace.wait_s(FULL - 1, 10.0) > 0.0
    assert pace.wait_s(FULL, 10.0) == 0.0


def test_a_transaction_that_took_longer_than_the_interval_is_followed_at_once() -> None:
    pace = Pace(0.16, FULL)
    pace.begun(10.0)
    assert pace.wait_s(1, 11.0) == 0.0


@given(st.floats(0.01, 2.0), st.lists(st.tuples(st.floats(0.0, 0.5), st.integers(1, FULL - 1)), max_size=50))
def test_transactions_that_are_not_full_keep_their_distance(
    interval_s: float, arrivals: list[tuple[float, int]]
) -> None:
    pace, now_s, begun_s = Pace(interval_s, FULL), 0.0, float("-inf")
    for pause_s, records in arrivals:
        now_s += pause_s
        now_s += pace.wait_s(records, now_s)
        assert pace.wait_s(records, now_s) <= 1e-9
        assert now_s - begun_s >= interval_s - 1e-9
        pace.begun(now_s)
        begun_s = now_s
