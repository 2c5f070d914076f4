"""What a partition remembers: one contract for every implementation of it, and the changelogs it is restored from."""

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.rating.batch import StateFailed
from pipeline.rating.changelog import (
    SEEN_DAYS,
    by_expiry,
    expiry_day,
    pack_quantity,
    pack_seen,
    unpack_quantity,
    unpack_seen,
)
from pipeline.rating.state import PartitionState, Positions
from tests.rating.world import DAY_MS, DAY_US, NOW_MS, NOW_US, message, run, usage

STAMP = {"cluster": "c1", "events": "t1"}
DAY = 20_500


class LocalState(Protocol):
    """What an implementation has to offer."""

    @property
    def positions(self) -> Positions | None: ...
    def known(self, identities: Sequence[bytes]) -> Sequence[bytes | None]: ...
    def quantity(self, counter: bytes) -> int | None: ...
    def apply(self, seen: Mapping[int, Sequence[bytes]], totals: Mapping[bytes, int], positions: Positions) -> None: ...
    def forget_before(self, day: int) -> None: ...
    def close(self) -> None: ...


IMPLEMENTATIONS: dict[str, Callable[[Path, Mapping[str, str]], LocalState]] = {"rocksdb": PartitionState}


@pytest.fixture(params=IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS.keys())
def opened(request: pytest.FixtureRequest) -> Callable[[Path, Mapping[str, str]], LocalState]:
    return request.param  # type: ignore[no-any-return]


def identity(n: int) -> bytes:
    return n.to_bytes(16, "big")


def entry(n: int, payload: int = 1) -> bytes:
    return identity(n) + payload.to_bytes(8, "big")


Open = Callable[[Path, Mapping[str, str]], LocalState]


def test_a_new_one_knows_nothing(opened: Open, tmp_path: Path) -> None:
    state = opened(tmp_path / "0", STAMP)
    assert state.positions is None
    assert list(state.known([identity(1), identity(2)])) == [None, None]
    assert list(state.known([])) == []
    assert state.quantity(b"c") is None
    state.close()


def test_what_was_applied_is_known_also_after_reopening(opened: Open, tmp_path: Path) -> None:
    state = opened(tmp_path / "0", STAMP)
    state.apply(
        {DAY: [entry(1), entry(2, 7)], DAY + SEEN_DAYS: [entry(3)]}, {b"a": 5, b"b": -(10**30)}, Positions(4, 9)
    )
    state.apply({DAY: [entry(4)]}, {b"a": 6}, Positions(5, 10))
    for _ in range(2):
        assert list(state.known([identity(n) for n in (9, 4, 3, 2, 1)])) == [
            None,
            *(payload.to_bytes(8, "big") for payload in (1, 1, 7, 1)),
        ]
        assert [state.quantity(c) for c in (b"a", b"b", b"c")] == [6, -(10**30), None]
        assert state.positions == Positions(5, 10)
        state.close()
        state = opened(tmp_path / "0", STAMP)
    state.close()


def test_a_quantity_of_zero_is_not_an_absent_one(opened: Open, tmp_path: Path) -> None:
    state = opened(tmp_path / "0", STAMP)
    state.apply({}, {b"a": 0}, Positions(0, 1))
    assert state.quantity(b"a") == 0
    state.close()
    again = opened(tmp_path / "0", STAMP)
    assert again.quantity(b"a") == 0
    again.close()


@pytest.mark.parametrize("stamp", [{"cluster": "c2", "events": "t1"}, {"cluster": "c1", "events": "t2"}])
def test_another_clusters_or_topics_state_is_wiped(opened: Open, tmp_path: Path, stamp: dict[str, str]) -> None:
    state = opened(tmp_path / "0", STAMP)
    state.apply({DAY: [entry(1)]}, {b"a": 5}, Positions(4, 9))
    state.close()
    other = opened(tmp_path / "0", stamp)
    assert (other.positions, list(other.known([identity(1)])), other.quantity(b"a")) == (None, [None], None)
    other.close()


def test_the_stamps_order_does_not_matter(opened: Open, tmp_path: Path) -> None:
    state = opened(tmp_path / "0", STAMP)
    state.apply({}, {}, Positions(4, 9))
    state.close()
    again = opened(tmp_path / "0", dict(reversed(STAMP.items())))
    assert again.positions == Positions(4, 9)
    again.close()


def test_identities_are_forgotten_when_all_of_a_span_have_expired(opened: Open, tmp_path: Path) -> None:
    start = DAY // SEEN_DAYS * SEEN_DAYS
    state = opened(tmp_path / "0", STAMP)
    state.apply(
        {start: [entry(1)], start + SEEN_DAYS - 1: [entry(2)], start + SEEN_DAYS: [entry(3)]}, {}, Positions(1, 0)
    )

    def known() -> list[bool]:
        return [payload is not None for payload in state.known([identity(n) for n in (1, 2, 3)])]

    state.forget_before(start + SEEN_DAYS - 1)
    assert known() == [True, True, True]
    state.forget_before(start + SEEN_DAYS)
    assert known() == [False, False, True]
    state.apply({start + SEEN_DAYS: [entry(4)]}, {b"a": 1}, Positions(2, 1))  # and it goes on
    state.close()
    state = opened(tmp_path / "0", STAMP)
    assert known() == [False, False, True]
    assert state.quantity(b"a") == 1
    state.close()


def test_a_second_opener_gets_a_directory_of_its_own_and_leaves_the_first_alone(opened: Open, tmp_path: Path) -> None:
    """Two workers on one machine, or a thread that has not let go yet."""
    first = opened(tmp_path / "0", STAMP)
    first.apply({DAY: [entry(1)]}, {b"a": 5}, Positions(4, 9))
    second = opened(tmp_path / "0", STAMP)
    assert second.positions is None
    second.apply({}, {b"a": 77}, Positions(1, 1))
    assert first.quantity(b"a") == 5
    first.close()
    again = opened(tmp_path / "0", STAMP)
    assert (again.positions, again.quantity(b"a")) == (Positions(4, 9), 5)
    again.close()
    second.close()


def test_a_second_directory_of_another_stamp_is_wiped_too(opened: Open, tmp_path: Path) -> None:
    first, old = opened(tmp_path / "0", STAMP), opened(tmp_path / "0", STAMP)
    old.apply({DAY: [entry(1)]}, {b"a": 5}, Positions(4, 9))
    old.close()
    new = opened(tmp_path / "0", STAMP | {"events": "t2"})
    assert (new.positions, new.quantity(b"a")) == (None, None)
    new.close()
    first.close()


def test_a_batch_is_applied_whole_or_not_at_all(opened: Open, tmp_path: Path) -> None:
    """Killed in the middle of writing: what is found afterwards is one batch's end, never the middle of one."""
    if opened is not PartitionState:
        pytest.skip("the helper process opens RocksDB")
    script = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from pipeline.rating.state import PartitionState, Positions
        state = PartitionState(Path(sys.argv[1]), {"cluster": "c1", "events": "t1"})
        print("ready", flush=True)
        for n in range(1, 1_000_000):
            seen = [(n * 1000 + i).to_bytes(16, "big") + b"p" * 8 for i in range(200)]
            state.apply({20500: seen}, {b"t%d" % i: n for i in range(50)}, Positions(n, n))
        """
    )
    for wait in ("0.05", "0.2"):
        process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "0")], stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        try:
            process.wait(float(wait))
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        state = opened(tmp_path / "0", STAMP)
        positions = state.positions
        n = positions.seen if positions else 0
        assert {state.quantity(b"t%d" % i) for i in range(50)} == ({n} if n else {None})
        last = [(n * 1000 + i).to_bytes(16, "big") for i in range(200)]
        following = [((n + 1) * 1000 + i).to_bytes(16, "big") for i in range(200)]
        assert n == 0 or all(state.known(last))
        assert wait == "0.2" or not any(state.known(following))  # the second run writes over the first's
        state.close()


# -- changelogs


@given(
    st.dictionaries(
        st.integers(0, 2**32 - 1), st.lists(st.binary(min_size=24, max_size=24), min_size=1, max_size=9), max_size=4
    )
)
def test_seen_records_unpack_to_what_was_packed(days: dict[int, list[bytes]]) -> None:
    unpacked: dict[int, list[bytes]] = {}
    for record in pack_seen(days):
        day, entries = unpack_seen(record)
        unpacked.setdefault(day, []).extend(entries)
    assert unpacked == days


def test_a_seen_record_holds_at_most_512_kib() -> None:
    entries = [entry(n) for n in range(50_000)]
    records = list(pack_seen({DAY: entries}))
    assert len(records) == 3
    assert max(len(record) for record in records) <= 512 * 1024
    assert [one for record in records for one in unpack_seen(record)[1]] == entries


@pytest.mark.parametrize(
    ("record", "says"),
    [
        (b"", "got 0 bytes"),
        (b"\x01\0\0\0", "got 4 bytes"),
        (b"\x01\0\0\0\0" + b"x" * 23, "entries of 24 bytes, got 28 bytes"),
        (b"\x02\0\0\0\0" + b"x" * 24, "expected version 1 of a seen record, got 2"),
    ],
)
def test_a_broken_seen_record_is_named(record: bytes, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        unpack_seen(record)


@given(st.integers(-(10**38), 10**38))
def test_quantities_unpack_to_what_was_packed(quantity: int) -> None:
    assert unpack_quantity(pack_quantity(quantity)) == quantity


@given(st.integers(0, DAY_MS - 1), st.integers(-35 * DAY_MS, 5 * 60_000))
def test_seen_keys_outlive_37_days_after_the_later_of_event_and_append_time(in_day: int, ahead_ms: int) -> None:
    appended = NOW_MS // DAY_MS * DAY_MS + in_day
    later = max(appended, appended + ahead_ms)
    assert expiry_day(appended, appended) * DAY_MS >= later + 37 * DAY_MS


@given(st.integers(0, 90 * DAY_MS))
def test_a_replayed_event_is_remembered_as_long_as_a_new_one(waited_ms: int) -> None:
    assert expiry_day(NOW_MS, NOW_MS + waited_ms) * DAY_MS >= NOW_MS + waited_ms + 37 * DAY_MS


def test_entries_are_grouped_by_the_day_they_expire() -> None:
    records = [
        message(usage("a"), 0),
        message(usage("b", timestamp=NOW_US - 5 * DAY_US), 1, timestamp=NOW_MS - 5 * DAY_MS),
    ]
    rated = run(records).rated
    grouped = by_expiry(rated, NOW_MS - 5 * DAY_MS)
    days = [expiry_day(event.record.timestamp, NOW_MS - 5 * DAY_MS) for event in rated]
    assert grouped == {day: [event.identity + event.payload] for day, event in zip(days, rated, strict=True)}
    assert len(grouped) == 2


# -- a disk that fails


def test_a_damaged_state_is_thrown_away_and_restored(tmp_path: Path) -> None:
    state = PartitionState(tmp_path / "p", {"cluster": "a"})
    state.apply({20_000: [b"i" * 16 + b"p" * 8]}, {b"counter": 5}, Positions(1, 1))
    state.close()
    (tmp_path / "p" / "CURRENT").write_text("MANIFEST-999999\n")
    state = PartitionState(tmp_path / "p", {"cluster": "a"})
    assert (state.positions, state.quantity(b"counter")) == (None, None)
    state.close()


def test_a_failing_disk_is_named_and_no_events_fault(tmp_path: Path) -> None:
    state = PartitionState(tmp_path / "p", {})
    state.apply({20_000: [b"i" * 16 + b"p" * 8]}, {}, Positions(1, 1))
    state.close()
    for call in (
        lambda: state.known([b"i" * 16]),
        lambda: state.quantity(b"counter"),
        lambda: state.apply({}, {b"counter": 1}, Positions(2, 2)),
    ):
        with pytest.raises(StateFailed):
            call()
