"""A lost disk is made good from the copy, exactly, or, when that is of no use, from the changelogs."""

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from confluent_kafka import Consumer, Producer, TopicPartition
from xxhash import xxh3_128_digest

from pipeline.infra.settings import Settings
from pipeline.infra.topics import Topics
from pipeline.rating import state as state_module
from pipeline.rating.changelog import pack_quantity, pack_seen
from pipeline.rating.commit import new_producer
from pipeline.rating.manifest import Manifest
from pipeline.rating.segments import Damaged
from pipeline.rating.snapshot import Snapshots
from pipeline.rating.state import PartitionState, Positions
from pipeline.rating.take import Taken, take

STAMP = {"cluster": "c1", "events": "t1"}
DAY = 20_500
PATIENCE_S = 30.0
#: Identities of a transaction that was aborted.
ABORTED = range(1_000_000, 1_000_009)


@pytest.fixture(scope="module", autouse=True)
def way() -> None:
    """Nothing here goes through the fast path: once is enough."""


def identity(n: int) -> bytes:
    return xxh3_128_digest(b"%d" % n)


def entries(numbers: range) -> list[bytes]:
    return [identity(n) + n.to_bytes(8, "big") for n in numbers]


def payloads(numbers: range) -> list[bytes | None]:
    return [n.to_bytes(8, "big") for n in numbers]


class World:
    """A worker's disk, and a volume that outlives it."""

    def __init__(self, folder: Path) -> None:
        self.disk, self.volume = folder / "disk" / "0", folder / "volume" / "0"

    def open(self, interval_s: float = 3600, **stamp: str) -> PartitionState:
        return PartitionState(self.disk, STAMP | stamp, snapshots=self.volume, snapshot_interval_s=interval_s)

    def lose_disk(self) -> None:
        shutil.rmtree(self.disk)

    def copied(self, positions: Positions) -> Manifest:
        """Wait for the copy at these positions."""
        manifest = None
        deadline = time.monotonic() + PATIENCE_S
        while True:
            with contextlib.suppress(Damaged):
                manifest = Manifest.read(self.volume)
            if manifest is not None and manifest.positions == positions:
                return manifest
            assert time.monotonic() < deadline, f"expected a copy at {positions}, got {manifest}"
            time.sleep(0.01)

    def with_copy(self) -> Manifest:
        """1,000 identities and two counters in a copy; then more, and the disk is lost."""
        state = self.open()
        state.apply({DAY: entries(range(1000))}, {b"a": 5, b"b": -(10**30)}, Positions(3, 4))
        manifest = self.copied(Positions(3, 4))
        state.apply({DAY: entries(range(1000, 1500))}, {b"a": 6}, Positions(7, 8))
        state.close()
        self.lose_disk()
        return manifest


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_lost_disk_begins_with_the_copy_and_goes_on_from_there(world: World) -> None:
    world.with_copy()
    state = world.open()
    assert state.positions == Positions(3, 4)
    assert list(state.known(b"".join([identity(n) for n in range(1500)]))) == [*payloads(range(1000)), *[None] * 500]
    assert [state.quantity(counter) for counter in (b"a", b"b", b"c")] == [5, -(10**30), None]
    state.apply({DAY: entries(range(1000, 1500))}, {b"a": 6}, Positions(7, 8))
    state.close()
    again = world.open()
    assert (again.positions, again.quantity(b"a"), again.seen_keys) == (Positions(7, 8), 6, 1500)
    again.close()


def test_what_the_disk_holds_counts_before_an_older_copy(world: World) -> None:
    state = world.open()
    state.apply({DAY: entries(range(9))}, {}, Positions(1, 1))
    world.copied(Positions(1, 1))
    state.apply({DAY: entries(range(9, 12))}, {}, Positions(2, 2))
    state.close()
    again = world.open()
    assert (again.positions, again.seen_keys) == (Positions(2, 2), 12)
    again.close()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
@pytest.mark.parametrize("which", [0, 1, "manifest"])
def test_a_damaged_copy_is_passed_over(world: World, damage: Callable[[Path], None], which: int | str) -> None:
    manifest = world.with_copy()
    damage(world.volume / (which if isinstance(which, str) else manifest.segments[which].segment.name))
    state = world.open()
    assert (state.positions, state.quantity(b"a"), *state.known(identity(1))) == (None, None, None)
    # And it becomes a good one, although its files have the names and sizes they should have.
    state.apply({DAY: entries(range(1000))}, {b"a": 5, b"b": -(10**30)}, Positions(4, 4))
    assert world.copied(Positions(4, 4)).segments == manifest.segments
    state.close()
    world.lose_disk()
    state = world.open()
    assert (state.positions, state.quantity(b"a"), state.seen_keys) == (Positions(4, 4), 5, 1000)
    state.close()


def test_a_copy_of_other_topics_is_passed_over_and_replaced(world: World) -> None:
    world.with_copy()
    state = world.open(events="t2")
    assert (state.positions, *state.known(identity(1))) == (None, None)
    state.apply({DAY: entries(range(5))}, {}, Positions(1, 1))
    assert world.copied(Positions(1, 1)).stamp == STAMP | {"events": "t2"}
    state.close()


def test_a_state_that_has_to_be_restored_from_the_beginning_does_not_begin_with_the_copy(world: World) -> None:
    """The changelog lost its tail: the copy may know what is gone."""
    world.with_copy()
    state = world.open()
    state.reset()
    assert (state.positions, *state.known(identity(1))) == (None, None)
    state.close()


def test_a_copy_takes_only_what_is_new(world: World) -> None:
    state = world.open(interval_s=0)
    state.apply({DAY: entries(range(1000))}, {}, Positions(1, 1))
    first = world.copied(Positions(1, 1))
    for path in world.volume.iterdir():
        os.utime(path, (time.time() - 7200,) * 2)
    before = {path.name: path.stat().st_mtime_ns for path in world.volume.iterdir() if path.name != "manifest"}
    state.apply({DAY: entries(range(1000, 1100))}, {}, Positions(2, 2))
    second = world.copied(Positions(2, 2))
    state.close()
    assert first.segments == second.segments[:1] and len(second.segments) == 2
    assert before == {name: (world.volume / name).stat().st_mtime_ns for name in before}


def test_files_that_are_merged_away_meanwhile_are_copied_all_the_same(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state_module, "_FLUSH_ROWS", 10)
    go_on, copy = threading.Event(), Snapshots._copy
    monkeypatch.setattr(Snapshots, "_copy", lambda *args: go_on.wait(PATIENCE_S) and copy(*args))
    state = world.open()
    state.apply({DAY: entries(range(20))}, {}, Positions(1, 1))
    (copied,) = world.disk.glob("*-*")
    for n in range(1, 5):
        state.apply({DAY: entries(range(20 * n, 20 * n + 20))}, {}, Positions(n + 1, n + 1))
    assert not copied.exists()
    go_on.set()
    world.copied(Positions(1, 1))
    state.close()
    world.lose_disk()
    again = world.open()
    assert (again.positions, again.seen_keys) == (Positions(1, 1), 20)
    again.close()


def test_closing_does_not_wait_for_a_copy_and_leaves_the_one_before(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.with_copy()
    copying = threading.Event()

    def slow(self: Snapshots, *args: object) -> int:
        copying.set()
        assert self._stopping.wait(PATIENCE_S)
        return 0

    monkeypatch.setattr(Snapshots, "_copy", slow)
    state = world.open()
    state.apply({DAY: entries(range(1000, 1500))}, {}, Positions(9, 9))
    assert copying.wait(PATIENCE_S)
    state.close()
    manifest = Manifest.read(world.volume)
    assert manifest is not None and manifest.positions == Positions(3, 4)


def test_a_volume_that_fails_stops_no_worker(world: World) -> None:
    world.volume.parent.mkdir(parents=True)
    world.volume.write_text("not a directory")
    state = world.open(interval_s=0)
    for n in range(5):
        state.apply({DAY: entries(range(n, n + 1))}, {}, Positions(n, n))
    assert state.positions == Positions(4, 4)
    state.close()


def test_left_overs_are_deleted_when_nobody_can_need_them(world: World) -> None:
    world.volume.mkdir(parents=True)
    old, young = world.volume / "00000001-abc", world.volume / "00000002-def.new-1"
    for path in (old, young):
        path.write_text("left over")
    os.utime(old, (time.time() - 3700,) * 2)
    state = world.open()
    state.apply({DAY: entries(range(5))}, {}, Positions(1, 1))
    world.copied(Positions(1, 1))
    state.close()
    assert not old.exists()
    assert young.exists()


# -- with the changelogs on the broker


def _write(settings: Settings, numbers: range, totals: dict[bytes, int]) -> None:
    """What a rater's batches would have put on both changelogs of partition 0, in two transactions, one aborted."""
    topics = Topics(settings.topic_prefix)
    producer = Producer({**settings.kafka, "transactional.id": f"{settings.topic_prefix}writer"})
    producer.init_transactions(30)
    for aborted in (True, False):
        producer.begin_transaction()
        for block in pack_seen({DAY: entries(ABORTED) if aborted else entries(numbers)}):
            producer.produce(topics.seen, block, None, 0)
        for counter, quantity in totals.items():
            producer.produce(topics.totals, pack_quantity(-1 if aborted else quantity), counter, 0)
        if aborted:
            producer.flush(30)
            producer.abort_transaction(30)
        else:
            producer.commit_transaction(30)


def _take(settings: Settings, state: PartitionState) -> Taken:
    return take(
        new_producer(settings.kafka, f"{settings.topic_prefix}rater-0"),
        state,
        kafka=settings.kafka,
        group=f"{settings.topic_prefix}rater",
        topics=Topics(settings.topic_prefix),
        partition=0,
        stopped=lambda: False,
    )


@pytest.mark.parametrize("copy", ["good", "damaged", "none"])
def test_taking_a_partition_without_its_disk_is_exact(settings: Settings, world: World, copy: str) -> None:
    """From the copy only what came after it is read; without one, everything."""
    consumer = Consumer({**settings.kafka, "group.id": f"{settings.topic_prefix}rater"})
    consumer.commit(offsets=[TopicPartition(Topics(settings.topic_prefix).events, 0, 0)], asynchronous=False)
    consumer.close()
    _write(settings, range(30_000), {b"a": 1, b"b": 2})
    state = world.open(interval_s=0 if copy != "none" else 3600)
    assert _take(settings, state)[-2:] == (30_000, 2)
    assert state.positions is not None
    world.copied(state.positions)
    if copy == "none":
        shutil.rmtree(world.volume)
    state.close()
    _write(settings, range(30_000, 30_100), {b"b": 3, b"c": 4})
    world.lose_disk()
    if copy == "damaged":
        flip(max(world.volume.glob("*-*"), key=lambda path: path.stat().st_size))
    state = world.open()
    assert _take(settings, state)[-2:] == ((100, 2) if copy == "good" else (30_100, 4))
    numbers = [*range(30_101), *ABORTED]
    assert list(state.known(b"".join([identity(n) for n in numbers]))) == [
        n.to_bytes(8, "big") if n < 30_100 else None for n in numbers
    ]
    assert [state.quantity(counter) for counter in (b"a", b"b", b"c", b"d")] == [1, 3, 4, None]
    # The disk is whole again: nothing is read any more.
    state.close()
    state = world.open()
    assert _take(settings, state)[-2:] == (0, 0)
    state.close()
