"""The limits see what they are meant to see, however records are cut into batches, and across owners."""

from itertools import groupby

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.limits import Limits, Refusals, stopped_by

LIMITS = Limits(run_max=10, percent_max=50, window=100)


def one_more(refusals: Refusals, batch: list[bool], window: int) -> Refusals:
    return refusals.then(len(batch), [index for index, dead in enumerate(batch) if dead], window)


def after(*batches: list[bool], limits: Limits = LIMITS) -> Refusals:
    refusals = Refusals()
    for batch in batches:
        refusals = one_more(refusals, batch, limits.window)
    return refusals


def test_a_row_longer_than_the_limit_breaks_it_across_batches_too() -> None:
    assert after([True] * 10).broken(LIMITS) is None
    assert after([True] * 6, [True] * 5).broken(LIMITS) == "11 dead letters in a row (limit 10)"
    assert after([True] * 6, [False], [True] * 5).broken(LIMITS) is None
    assert after([False] + [True] * 11 + [False]).broken(LIMITS) is not None  # also when the row is over


def test_a_share_counts_once_there_is_a_whole_window() -> None:
    bad = [True, True, False]
    assert after(*[bad] * 33).broken(LIMITS) is None  # 99 records
    assert after(*[bad] * 34).broken(LIMITS) == "68 dead letters among the last 102 records (limit 50 %)"
    assert after(*[[True, False]] * 500).broken(LIMITS) is None  # half is not more than half
    assert after(*[[False] * 100], *[bad] * 34).broken(LIMITS) is not None  # what is long ago does not help


@pytest.mark.parametrize(
    ("limits", "broken"),
    [
        (Limits(0, 100, 100), False),
        (Limits(0, 50, 100), True),
        (Limits(10, 100, 100), True),
        (Limits(200, 100, 100), False),
    ],
)
def test_each_limit_can_be_turned_off(limits: Limits, broken: bool) -> None:
    assert (after([True] * 200, limits=limits).broken(limits) is not None) == broken


def test_the_demos_three_bad_records_are_far_from_any_limit() -> None:
    assert after([False] * 4998 + [True] * 2, [True] + [False] * 3998).broken(Limits(1000, 50, 10_000)) is None


BATCHES = st.lists(st.lists(st.booleans(), min_size=1, max_size=15), max_size=30)


@given(BATCHES, st.integers(1, 12))
def test_a_row_is_found_as_by_looking_at_all_records(batches: list[list[bool]], run_max: int) -> None:
    limits = Limits(run_max, 100, 20)
    found = any(after(*batches[:n]).broken(limits) for n in range(1, len(batches) + 1))
    rows = [len(list(row)) for dead, row in groupby(dead for batch in batches for dead in batch) if dead]
    assert found == (max(rows, default=0) > run_max)


@given(BATCHES, st.integers(1, 99), st.integers(1, 60))
def test_a_share_is_that_of_the_last_whole_batches_that_hold_a_window(
    batches: list[list[bool]], percent: int, window: int
) -> None:
    limits = Limits(0, percent, window)
    last: list[bool] = []
    for batch in reversed(batches):
        if len(last) < window:
            last = batch + last
    expected = len(last) >= window and 100 * sum(last) > percent * len(last)
    assert (after(*batches, limits=limits).broken(limits) is not None) == expected


@given(BATCHES, BATCHES)
def test_the_next_owner_counts_on_from_the_note(before: list[list[bool]], then: list[list[bool]]) -> None:
    one, other = after(*before), Refusals.from_note(after(*before).note(None))
    assert one.broken(LIMITS) == other.broken(LIMITS)
    for batch in then:
        one, other = one_more(one, batch, LIMITS.window), one_more(other, batch, LIMITS.window)
        assert (one.run, one.longest) == (other.run, other.longest)


def test_the_note_says_why_and_fits_an_offset() -> None:
    note = after([True] * 11).note("11 dead letters in a row (limit 10)")
    assert stopped_by(note) == "11 dead letters in a row (limit 10)"
    assert Refusals.from_note(note).broken(LIMITS) is not None
    assert len(note) < 4096  # the broker's offset.metadata.max.bytes


@pytest.mark.parametrize("note", [None, "", "{", "[]", "7", '{"run": "x"}', '{"stopped": null}', "by hand"])
def test_what_is_no_note_begins_anew(note: str | None) -> None:
    assert Refusals.from_note(note) == Refusals()
    assert stopped_by(note) is None
