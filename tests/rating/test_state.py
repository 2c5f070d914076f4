"""What a partition remembers on disk, and the changelogs it is restored from."""

import os
import resource
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_64_hexdigest, xxh3_128_digest

from pipeline.rating import segments
from pipeline.rating import state as state_module
from pipeline.rating.batch import StateFailed
from pipeline.rating.changelog import (
    by_expiry,
    expiry_day,
    pack_quantity,
    pack_seen,
    unpack_quantity,
    unpack_seen,
)
from pipeline.rating.manifest import Manifest
from pipeline.rating.state import SPAN_DAYS, PartitionState, Positions, merge_from
from tests.rating.world import DAY_MS, DAY_US, NOW_MS, NOW_US, message, run, usage

STAMP = {"cluster": "c1", "events": "t1"}
DAY = 20_500


@pytest.fixture(scope="module", autouse=True)
def way() -> None:
    """Nothing here goes through the fast path: once is enough."""


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory that is held is given up at once."""
    monkeypatch.setattr(state_module, "_CLAIM_TRIES", 1)


def identity(n: int) -> bytes:
    return xxh3_128_digest(b"%d" % n)


def entry(n: int, payload: int = 1) -> bytes:
    return identity(n) + payload.to_bytes(8, "big")


def test_a_new_one_knows_nothing(tmp_path: Path) -> None:
    state = PartitionState(tmp_path / "0", STAMP)
    assert state.positions is None
    assert list(state.known(b"".join([identity(1), identity(2)]))) == [None, None]
    assert list(state.known(b"")) == []
    assert state.quantity(b"c") is None
    state.close()


def test_what_was_applied_is_known_also_after_reopening(tmp_path: Path) -> None:
    state = PartitionState(tmp_path / "0", STAMP)
    state.apply(
        {DAY: [entry(1), entry(2, 7)], DAY + SPAN_DAYS: [entry(3)]}, {b"a": 5, b"b": -(10**30)}, Positions(4, 9)
    )
    state.apply({DAY: [entry(4)]}, {b"a": 6}, Positions(5, 10))
    for _ in range(2):
        assert list(state.known(b"".join([identity(n) for n in (9, 4, 3, 2, 1)]))) == [
            None,
            *(payload.to_bytes(8, "big") for payload in (1, 1, 7, 1)),
        ]
        assert [state.quantity(c) for c in (b"a", b"b", b"c")] == [6, -(10**30), None]
        assert state.positions == Positions(5, 10)
        state.close()
        state = PartitionState(tmp_path / "0", STAMP)
    state.close()


def test_a_quantity_of_zero_is_not_an_absent_one(tmp_path: Path) -> None:
    state = PartitionState(tmp_path / "0", STAMP)
    state.apply({}, {b"a": 0}, Positions(0, 1))
    assert state.quantity(b"a") == 0
    state.close()
    again = PartitionState(tmp_path / "0", STAMP)
    assert again.quantity(b"a") == 0
    again.close()


@pytest.mark.parametrize("stamp", [{"cluster": "c2", "events": "t1"}, {"cluster": "c1", "events": "t2"}])
def test_another_clusters_or_topics_state_is_wiped(tmp_path: Path, stamp: dict[str, str]) -> None:
    state = PartitionState(tmp_path / "0", STAMP)
    state.apply({DAY: [entry(1)]}, {b"a": 5}, Positions(4, 9))
    state.close()
    other = PartitionState(tmp_path / "0", stamp)
    assert (other.positions, list(other.known(identity(1))), other.quantity(b"a")) == (None, [None], None)
    other.close()


def test_the_stamps_order_does_not_matter(tmp_path: Path) -> None:
    state = PartitionState(tmp_path / "0", STAMP)
    state.apply({}, {}, Positions(4, 9))
    state.close()
    again = PartitionState(tmp_path / "0", dict(reversed(STAMP.items())))
    assert again.positions == Positions(4, 9)
    again.close()


def test_identities_are_forgotten_when_all_of_a_span_have_expired(tmp_path: Path) -> None:
    start = DAY // SPAN_DAYS * SPAN_DAYS
    state = PartitionState(tmp_path / "0", STAMP)
    state.apply(
        {start: [entry(1)], start + SPAN_DAYS - 1: [entry(2)], start + SPAN_DAYS: [entry(3)]}, {}, Positions(1, 0)
    )

    def known() -> list[bool]:
        return [payload is not None for payload in state.known(b"".join([identity(n) for n in (1, 2, 3)]))]

    state.forget_before(start + SPAN_DAYS - 1)
    assert known() == [True, True, True]
    state.forget_before(start + SPAN_DAYS)
    assert known() == [False, False, True]
    state.apply({start + SPAN_DAYS: [entry(4)]}, {b"a": 1}, Positions(2, 1))  # and it goes on
    state.close()
    state = PartitionState(tmp_path / "0", STAMP)
    assert known() == [False, False, True]
    assert state.quantity(b"a") == 1
    state.close()


@pytest.mark.usefixtures("impatient")
def test_a_second_opener_gets_a_directory_of_its_own_and_leaves_the_first_alone(tmp_path: Path) -> None:
    """Two workers on one machine, or a thread that has not let go yet."""
    first = PartitionState(tmp_path / "0", STAMP)
    first.apply({DAY: [entry(1)]}, {b"a": 5}, Positions(4, 9))
    second = PartitionState(tmp_path / "0", STAMP)
    assert second.positions is None
    second.apply({}, {b"a": 77}, Positions(1, 1))
    assert first.quantity(b"a") == 5
    first.close()
    again = PartitionState(tmp_path / "0", STAMP)
    assert (again.positions, again.quantity(b"a")) == (Positions(4, 9), 5)
    again.close()
    second.close()


@pytest.mark.usefixtures("impatient")
def test_a_second_directory_of_another_stamp_is_wiped_too(tmp_path: Path) -> None:
    first, old = PartitionState(tmp_path / "0", STAMP), PartitionState(tmp_path / "0", STAMP)
    old.apply({DAY: [entry(1)]}, {b"a": 5}, Positions(4, 9))
    old.close()
    new = PartitionState(tmp_path / "0", STAMP | {"events": "t2"})
    assert (new.positions, new.quantity(b"a")) == (None, None)
    new.close()
    first.close()


@pytest.mark.parametrize(
    ("rows", "growing", "expected"),
    [
        ([], True, None),
        ([40_000] * 3, True, None),
        ([40_000] * 4, True, 0),
        ([140_000, *[40_000] * 4], True, 1),  # the larger one waits for three of its size
        ([140_000, 140_000, 140_000, *[40_000] * 4], True, 3),
        ([140_000] * 4, True, 0),
        ([600_000, *[140_000] * 3, 40_000], True, None),
        ([600_000, *[140_000] * 3, 40_000, 140_000], True, 1),  # a smaller one between them goes with them
        ([40_000, 600_000, 40_000, 40_000, 40_000], True, None),  # only those at the end, or their order would be lost
        ([40_000, 600_000], False, 0),  # nothing is added any more: one is searched faster than two
        ([600_000], False, None),
    ],
)
def test_segments_of_like_size_are_merged(rows: list[int], growing: bool, expected: int | None) -> None:
    assert merge_from(rows, growing=growing) == expected


def test_segments_stay_few_and_counters_are_kept_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long it runs: each size has fewer than four, and no batch merges more than its share."""
    monkeypatch.setattr(state_module, "_FLUSH_ROWS", 16)
    monkeypatch.setattr(state_module, "_CACHED", 3)
    monkeypatch.setattr(segments, "_STEP_WORDS", 4)
    state = PartitionState(tmp_path / "p", STAMP)
    for n in range(600):
        day = DAY + n // 400 * SPAN_DAYS
        state.apply({day: [entry(5 * n + i) for i in range(5)]}, {b"c%d" % (n % 20): n}, Positions(n, n))
        manifest = Manifest.read(tmp_path / "p")
        assert manifest is not None
        assert len(manifest.segments) <= 40
    assert [state.quantity(b"c%d" % n) for n in range(20)] == list(range(580, 600))
    assert all(state.known(b"".join([identity(n) for n in range(3000)])))
    assert state.seen_keys == 3000
    spans: dict[int, list[int]] = {}
    for span, segment in manifest.segments:
        spans.setdefault(span, []).append(segment.rows)
    counters, first, _ = (spans[span] for span in sorted(spans))
    assert first == [2000]
    assert sum(counters) < 200
    state.close()


def test_a_batch_is_applied_whole_or_not_at_all(tmp_path: Path) -> None:
    """Killed in the middle of writing: what is found afterwards is one batch's end, never the middle of one."""
    script = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from xxhash import xxh3_128_digest
        from pipeline.rating.state import PartitionState, Positions
        state = PartitionState(Path(sys.argv[1]), {"cluster": "c1", "events": "t1"})
        print("ready", flush=True)
        for n in range(1, 1_000_000):
            seen = [xxh3_128_digest(b"%d" % (n * 1000 + i)) + b"p" * 8 for i in range(200)]
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
        state = PartitionState(tmp_path / "0", STAMP)
        positions = state.positions
        n = positions.seen if positions else 0
        assert {state.quantity(b"t%d" % i) for i in range(50)} == ({n} if n else {None})
        last = [identity(n * 1000 + i) for i in range(200)]
        following = [identity((n + 1) * 1000 + i) for i in range(200)]
        assert n == 0 or all(state.known(b"".join(last)))
        assert wait == "0.2" or not any(state.known(b"".join(following)))  # the second run writes over the first's
        state.close()


# -- changelogs


@given(
    st.dictionaries(
        st.integers(0, 2**32 - 1), st.lists(st.binary(min_size=24, max_size=24), min_size=1, max_size=9), max_size=4
    )
)
def test_seen_records_unpack_to_what_was_packed(days: dict[int, list[bytes]]) -> None:
    assert [unpack_seen(record) for record in pack_seen(days)] == [
        (day, b"".join(entries)) for day, entries in sorted(days.items())
    ]


def test_a_seen_record_holds_at_most_512_kib() -> None:
    entries = [entry(n) for n in range(50_000)]
    records = list(pack_seen({DAY: entries}))
    assert len(records) == 3
    assert max(len(record) for record in records) <= 512 * 1024
    assert b"".join(unpack_seen(record)[1] for record in records) == b"".join(entries)


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
    assert by_expiry(rated, NOW_MS).keys() == {expiry_day(NOW_MS, NOW_MS)}
    days = [expiry_day(event.record.timestamp, NOW_MS - 5 * DAY_MS) for event in rated]
    assert grouped == {day: [event.identity + event.payload] for day, event in zip(days, rated, strict=True)}
    assert len(grouped) == 2


# -- a disk that fails


def full(path: Path) -> PartitionState:
    """A state with segments of both kinds and a log."""
    state = PartitionState(path, STAMP)
    state.apply({DAY: [entry(n) for n in range(40_000)]}, {b"a": 5}, Positions(1, 1))
    state.apply({DAY: [entry(-1)]}, {b"b": 7}, Positions(2, 2))
    return state


@pytest.mark.parametrize("broken", ["manifest", "00000001-*", "00000002-*"])
@pytest.mark.parametrize("how", ["a wrong bit", "cut short", "missing"])
def test_a_damaged_state_is_thrown_away_and_restored(tmp_path: Path, broken: str, how: str) -> None:
    full(tmp_path / "p").close()
    (file,) = (tmp_path / "p").glob(broken)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    if how == "missing":
        file.unlink()
    else:
        file.write_bytes(content if how == "a wrong bit" else content[:-5])
    state = PartitionState(tmp_path / "p", STAMP)
    assert (state.positions, state.quantity(b"a"), *state.known(identity(1))) == (None, None, None)
    state.apply({DAY: [entry(1)]}, {}, Positions(1, 1))
    state.close()


def test_a_log_whose_end_was_lost_counts_up_to_there(tmp_path: Path) -> None:
    """After a power failure: whatever was lost of the last records, what is left is where some batch ended."""
    state = PartitionState(tmp_path / "p", STAMP)
    (log,) = (tmp_path / "p").glob("*.log")
    ends = [0]
    for n in range(1, 4):
        state.apply({DAY: [entry(n), entry(-n)]}, {b"a": n}, Positions(n, n))
        ends.append(log.stat().st_size)
    state.close()
    whole = log.read_bytes()
    for size in range(0, len(whole) + 1, 3):
        for content in (whole[:size], whole[:size] + bytes(len(whole) - size)):
            log.write_bytes(content)
            state = PartitionState(tmp_path / "p", STAMP)
            n = max(number for number, end in enumerate(ends) if whole[:end] == content[:end])
            assert state.positions == (Positions(n, n) if n else None)
            assert state.quantity(b"a") == (n or None)
            numbers = (1, -1, 2, -2, 3, -3)
            known = state.known(b"".join([identity(i) for i in numbers]))
            assert [payload is not None for payload in known] == [abs(i) <= n for i in numbers]
            state.apply({}, {b"z": 1}, Positions(9, 9))
            state.close()
            state = PartitionState(tmp_path / "p", STAMP)
            assert (state.positions, state.quantity(b"z")) == (Positions(9, 9), 1)
            state.close()


def test_the_state_of_a_newer_tally_is_not_read(tmp_path: Path) -> None:
    full(tmp_path / "p").close()
    manifest = tmp_path / "p" / "manifest"
    text = manifest.read_bytes().splitlines()[0].replace(b'"format": 1', b'"format": 2')
    manifest.write_bytes(text + b"\n" + xxh3_64_hexdigest(text).encode() + b"\n")
    state = PartitionState(tmp_path / "p", STAMP)
    assert state.positions is None
    state.close()


def test_what_an_older_version_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "p" / "deep").mkdir(parents=True)
    (tmp_path / "p" / "CURRENT").write_text("MANIFEST-000004\n")
    state = PartitionState(tmp_path / "p", STAMP)
    assert state.positions is None
    assert sorted(path.name for path in (tmp_path / "p").iterdir()) == ["00000000.log", "manifest"]
    state.close()


@pytest.fixture
def no_room() -> Iterator[Callable[[int], None]]:
    """Let files of this process grow to so many bytes only: the kernel refuses the rest."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(("room", "rows"), [(10, 5), (500, 50), (10_000, 40_000)], ids=["none", "half", "segment"])
def test_a_full_disk_is_named_and_leaves_what_was_there(
    tmp_path: Path, no_room: Callable[[int], None], room: int, rows: int
) -> None:
    state = PartitionState(tmp_path / "p", STAMP)
    state.apply({DAY: [entry(1)]}, {}, Positions(1, 1))
    no_room(room)
    with pytest.raises(StateFailed, match=r"File too large|the disk took"):
        state.apply({DAY: [entry(n) for n in range(rows)]}, {b"a": 1}, Positions(2, 2))
    no_room(2**40)
    # Not behind half a record, and not as if nothing had been.
    with pytest.raises(StateFailed, match="failed before"):
        state.apply({DAY: [entry(3)]}, {}, Positions(3, 3))
    state.close()
    again = PartitionState(tmp_path / "p", STAMP)
    assert (again.positions, again.seen_keys, again.quantity(b"a")) == (Positions(1, 1), 1, None)
    again.close()


def test_a_closed_one_says_so(tmp_path: Path) -> None:
    state = full(tmp_path / "p")
    state.close()
    for call in (
        lambda: state.known(b"i" * 16),
        lambda: state.quantity(b"counter"),
        lambda: state.apply({}, {b"counter": 1}, Positions(2, 2)),
        lambda: state.forget_before(10**6),
        state.reset,
    ):
        with pytest.raises(StateFailed, match="closed"):
            call()


def test_a_directory_that_cannot_be_made_is_the_disks_fault(tmp_path: Path) -> None:
    (tmp_path / "p").write_text("a file")
    with pytest.raises(StateFailed, match="cannot be read or written"):
        PartitionState(tmp_path / "p", STAMP)
