"""How long the watchdog holds that something stands still."""

from hypothesis import given
from hypothesis import strategies as st

from pipeline.rating.watchdog import Stopwatch


def test_time_adds_up_while_it_stays_and_begins_anew_when_it_moved() -> None:
    watch = Stopwatch[str](step_max_s=20)
    assert watch.look({"a"}, 100.0) == {"a": 0}
    assert watch.look({"a", "b"}, 110.0) == {"a": 10, "b": 0}
    assert watch.look({"b"}, 120.0) == {"b": 10}
    assert watch.look({"a", "b"}, 130.0) == {"a": 0, "b": 20}


def test_time_in_which_the_process_did_not_run_hardly_counts() -> None:
    """A worker that was frozen for an hour gets the chance to move before it is judged."""
    watch = Stopwatch[str](step_max_s=20)
    watch.look({"a"}, 0.0)
    assert watch.look({"a"}, 3600.0) == {"a": 20}


@given(st.lists(st.tuples(st.sets(st.integers(0, 3)), st.floats(0.01, 100.0)), max_size=30))
def test_nothing_is_said_to_stand_longer_than_it_was_seen(looks: list[tuple[set[int], float]]) -> None:
    watch, now, seen = Stopwatch[int](step_max_s=10), 0.0, dict[int, float]()
    for same, passed in looks:
        now += passed
        seen = {one: seen.get(one, now) for one in same}
        stood = watch.look(same, now)
        assert stood.keys() == same
        assert all(0 <= seconds <= now - seen[one] + 1e-9 for one, seconds in stood.items())
