"""The spool on disk: nothing lost, no number twice, room comes back."""

import logging
import shutil
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.producer import BufferFull, ProducerClosed, SpoolError, SpoolInUse, SpoolMismatch
from pipeline.producer.journal import DELIVERED, SEGMENT_BYTES_MIN, SPOOL_BYTES_MIN, Journal
from pipeline.producer.spool import Spool
from pipeline.producer.usage import varint

EPOCH = "e" * 12
BIG = b"x" * (SEGMENT_BYTES_MIN // 8)


def opened(folder: Path, epoch: str = EPOCH, bytes_max: int = SPOOL_BYTES_MIN) -> Journal:
    return Journal(folder, epoch, bytes_max)


def waiting(journal: Journal) -> list[tuple[int, bytes, bytes]]:
    return [(entry.sequence, entry.key, entry.value) for entry in journal.read(journal.start(), 1_000_000)]


@settings(max_examples=40, deadline=None)
@given(
    runs=st.lists(
        st.lists(st.tuples(st.binary(min_size=1, max_size=128), st.binary(max_size=3000), st.booleans()), max_size=30),
        min_size=1,
        max_size=4,
    ),
    closes=st.lists(st.booleans(), min_size=4, max_size=4),
)
def test_what_is_not_delivered_comes_back_in_order_with_its_number(
    tmp_path_factory: pytest.TempPathFactory,
    runs: list[list[tuple[bytes, bytes, bool]]],
    closes: list[bool],
) -> None:
    folder = tmp_path_factory.mktemp("spool")
    expected: list[tuple[int, bytes, bytes]] = []
    number = 0
    for events, close in zip(runs, closes, strict=False):
        journal = opened(folder, bytes_max=64 * SEGMENT_BYTES_MIN)
        assert waiting(journal) == expected
        assert journal.recovered == len(expected)
        for key, head, delivered in events:
            number += 1
            assert journal.append(key, head, 0) == number
            if not delivered:
                expected.append((number, key, head + varint(number)))
        kept = {sequence for sequence, _, _ in expected}
        for entry in journal.read(journal.start(), 1_000_000):
            if entry.sequence not in kept:
                journal.mark(entry.segment, entry.at, DELIVERED)
        journal.retire()
        journal.close() if close else journal.abandon()  # abandon: as a killed process leaves it
    shutil.rmtree(folder)


def test_a_record_cut_short_anywhere_is_dropped_and_its_number_used_again(tmp_path: Path) -> None:
    folder = tmp_path / "whole"
    folder.mkdir()
    journal = opened(folder)
    journal.append(b"acct", b"first", 0)
    start = journal.start().segment.tail[0]
    journal.append(b"acct", b"second", 0)
    end = journal.start().segment.tail[0]
    journal.abandon()
    whole = (folder / "00000001.journal").read_bytes()
    for cut in range(start, end):
        torn = tmp_path / f"cut-{cut}"
        torn.mkdir()
        (torn / "00000001.journal").write_bytes(whole[:cut] + bytes(len(whole) - cut))
        recovered = opened(torn)
        assert waiting(recovered) == [(1, b"acct", b"first" + varint(1))]
        assert recovered.append(b"acct", b"other", 0) == 2
        recovered.abandon()


def test_killed_while_a_segment_is_made(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    journal.append(b"a", b"first", 0)
    journal.abandon()
    (tmp_path / "00000002.journal").write_bytes(bytes(SEGMENT_BYTES_MIN))
    again = opened(tmp_path)
    assert again.append(b"a", b"second", 0) == 2
    assert [sequence for sequence, _, _ in waiting(again)] == [1, 2]


def test_full_spool_blocks_for_the_time_given_then_says_so_and_uses_no_number(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    with pytest.raises(BufferFull, match="is Kafka reachable"):
        while True:
            last = journal.append(b"a", BIG, 0)
    started = time.monotonic()
    with pytest.raises(BufferFull):
        journal.append(b"a", BIG, 0.2)
    assert 0.2 <= time.monotonic() - started < 1
    assert journal.next_sequence == last + 1
    assert journal.size <= SPOOL_BYTES_MIN


def test_a_blocked_append_goes_on_when_room_comes_back(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    with pytest.raises(BufferFull):
        while True:
            journal.append(b"a", BIG, 0)
    number = journal.next_sequence
    taken: list[int] = []
    blocked = threading.Thread(target=lambda: taken.append(journal.append(b"a", BIG, 30)))
    blocked.start()
    for entry in journal.read(journal.start(), 8):
        journal.mark(entry.segment, entry.at, DELIVERED)
    journal.retire()
    blocked.join(10)
    assert taken == [number]


def test_append_after_close_is_refused(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    journal.append(b"a", b"first", 0)
    journal.close()
    with pytest.raises(ProducerClosed):
        journal.append(b"a", b"second", 0)
    assert journal.next_sequence == 2


def test_a_closed_journal_with_everything_delivered_takes_hardly_any_disk(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    journal.append(b"a", b"first", 0)
    (entry,) = journal.read(journal.start(), 10)
    journal.mark(entry.segment, entry.at, DELIVERED)
    journal.close()
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 100
    assert opened(tmp_path).next_sequence == 2


def test_damage_is_reported_with_the_numbers_and_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal = opened(tmp_path)
    for _ in range(3):
        journal.append(b"a", b"payload", 0)
    first, second, third = journal.read(journal.start(), 3)
    journal.close()
    path = tmp_path / "00000001.journal"
    data = bytearray(path.read_bytes())
    data[second.at + 14] ^= 0xFF
    path.write_bytes(data)
    with caplog.at_level(logging.ERROR, "tally.producer"):
        recovered = opened(tmp_path)
    assert waiting(recovered) == [(first.sequence, first.key, first.value)]
    assert "events 2 to 3 cannot be read" in caplog.text
    assert path.with_suffix(".damaged").read_bytes() == data
    assert recovered.next_sequence == third.sequence + 1


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "00000001.journal").write_bytes(b"something else entirely, and long enough to be one")
    with pytest.raises(SpoolError, match="not a journal"):
        opened(tmp_path)


# -- whose folder it is


def test_a_folder_has_one_owner_one_source_and_one_topic(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "s", "svc", "usage.events")
    with pytest.raises(SpoolInUse, match="in use by process"):
        Spool(tmp_path / "s", "svc", "usage.events")
    spool.close()
    with pytest.raises(SpoolMismatch, match="expected other for"):
        Spool(tmp_path / "s", "other", "usage.events")
    with pytest.raises(SpoolMismatch):
        Spool(tmp_path / "s", "svc", "x-usage.events")
    Spool(tmp_path / "s", "svc", "usage.events").close()


def test_the_epoch_stays_across_a_close_and_a_kill(tmp_path: Path) -> None:
    first = Spool(tmp_path / "s", "svc", "t")
    first.close()
    second = Spool(tmp_path / "s", "svc", "t")
    second.abandon()
    third = Spool(tmp_path / "s", "svc", "t")
    assert first.identity.epoch == second.identity.epoch == third.identity.epoch
    assert third.identity.source == f"svc/{first.identity.epoch}"
    third.close()


def test_a_machine_that_went_down_uncleanly_starts_a_new_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Spool(tmp_path / "s", "svc", "t")
    first.abandon()
    boot = tmp_path / "boot_id"
    boot.write_text("another boot")
    monkeypatch.setattr("pipeline.producer.spool._BOOT_ID", boot)
    second = Spool(tmp_path / "s", "svc", "t")
    second.close()
    assert second.identity.epoch != first.identity.epoch
    boot.write_text("a third boot, after a clean close")
    third = Spool(tmp_path / "s", "svc", "t")
    third.close()
    assert third.identity.epoch == second.identity.epoch


def test_a_copied_folder_starts_a_new_epoch_and_a_new_epoch_starts_at_one(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "s", "svc", "t")
    journal = opened(spool.folder, spool.identity.epoch)
    journal.append(b"a", b"first", 0)
    journal.abandon()
    spool.abandon()
    shutil.copytree(tmp_path / "s", tmp_path / "copy")
    copy = Spool(tmp_path / "copy", "svc", "t")
    assert copy.identity.epoch != spool.identity.epoch
    copied = opened(copy.folder, copy.identity.epoch)
    assert copied.recovered == 1
    assert copied.next_sequence == 1
    copied.abandon()
    copy.close()
