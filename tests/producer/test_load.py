"""Sending rows once over several runs: where a run goes on. No broker is needed to take rows."""

import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from pipeline.producer import BufferFull, Usage, UsageProducer
from pipeline.producer.files import BadRow
from pipeline.producer.load import Checkpoint, file_identity, load, read_checkpoint, write_checkpoint

NOWHERE = "127.0.0.1:1"


def rows(count: int) -> Iterator[Usage | BadRow]:
    """Good rows, every fifth bad."""
    for row in range(count):
        if row % 5 == 4:
            yield BadRow(row + 2, "bad", "")
        else:
            yield Usage("acct", "t", datetime.now(UTC), f"k-{row}", {"text": "x" * 100})


class Run:
    """One run over ten rows that stops after ``stop_after`` of them, as if killed: only what was saved stays."""

    def __init__(self, spool: Path, at: Checkpoint, count: int = 10, stop_after: int | None = None) -> None:
        self.saved: list[Checkpoint] = []
        self.bad: list[int] = []
        self.outside: list[str] = []
        seen = 0

        def on_row(at: Checkpoint) -> None:
            nonlocal seen
            seen += 1
            if seen == stop_after:
                raise KeyboardInterrupt

        producer = UsageProducer(bootstrap=NOWHERE, source="file", spool_dir=spool)
        try:
            load(
                producer,
                rows(count),
                at,
                save=self.saved.append,
                on_bad=lambda row: self.bad.append(row.line),
                on_outside=lambda usage: self.outside.append(usage.idempotency_key),
                on_row=on_row,
            )
        except KeyboardInterrupt:
            pass
        finally:
            self.emitted = producer.stats.emitted
            producer.close(0)


def test_a_run_that_was_killed_goes_on_at_exactly_the_next_row(tmp_path: Path) -> None:
    first = Run(tmp_path, Checkpoint(), stop_after=7)
    assert first.emitted == 6
    # Killed before the last save: only the one at the start is on disk, the numbers tell the rest.
    second = Run(tmp_path, first.saved[0])
    assert second.emitted == 2
    assert second.bad == [6, 11]
    assert second.saved[-1] == replace(second.saved[-1], rows=10, emitted=8, bad_rows=2, next_sequence=9)


def test_saved_on_the_way_out(tmp_path: Path) -> None:
    first = Run(tmp_path, Checkpoint(), stop_after=7)
    assert (first.saved[-1].rows, first.saved[-1].emitted, first.saved[-1].bad_rows) == (7, 6, 1)
    assert Run(tmp_path, first.saved[-1]).emitted == 2


def test_numbers_of_another_epoch_tell_nothing(tmp_path: Path) -> None:
    first = Run(tmp_path / "one", Checkpoint(), stop_after=7)
    second = Run(tmp_path / "two", replace(first.saved[-1], rows=5, emitted=4, next_sequence=5))
    assert second.emitted == 4


def test_a_full_spool_ends_the_run_and_the_next_goes_on(tmp_path: Path) -> None:
    producer = UsageProducer(
        bootstrap=NOWHERE, source="file", spool_dir=tmp_path, spool_bytes_max=1024 * 1024, block_seconds=0
    )
    saved: list[Checkpoint] = []
    with pytest.raises(BufferFull):
        load(
            producer,
            rows(100_000),
            Checkpoint(),
            save=saved.append,
            on_bad=lambda row: None,
            on_outside=lambda usage: None,
            on_row=lambda at: None,
        )
    assert saved[-1].emitted == producer.stats.emitted > 1000
    producer.close(0)


def test_rate_is_kept(tmp_path: Path) -> None:
    producer = UsageProducer(bootstrap=NOWHERE, source="file", spool_dir=tmp_path)
    started = time.monotonic()
    load(
        producer,
        (row for row in rows(250)),
        Checkpoint(),
        save=lambda at: None,
        on_bad=lambda row: None,
        on_outside=lambda usage: None,
        on_row=lambda at: None,
        rate=400,
    )
    assert 0.45 <= time.monotonic() - started < 1.5  # 200 good rows
    producer.close(0)


def test_usage_the_rater_will_refuse_for_its_age_is_told(tmp_path: Path) -> None:
    now = datetime.now(UTC)
    ages = [timedelta(days=36), timedelta(days=34), timedelta(minutes=-4), timedelta(minutes=-6)]
    producer = UsageProducer(bootstrap=NOWHERE, source="file", spool_dir=tmp_path)
    outside: list[Usage] = []
    usages = [Usage("a", "t", now - age, f"k-{row}") for row, age in enumerate(ages)]
    after = load(
        producer,
        iter(usages),
        Checkpoint(),
        save=lambda at: None,
        on_bad=lambda row: None,
        on_outside=outside.append,
        on_row=lambda at: None,
    )
    assert outside == [usages[0], usages[3]]
    assert after.outside_window == 2
    producer.close(0)


def test_checkpoints_are_read_back_and_rubbish_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.json"
    assert read_checkpoint(path) == Checkpoint()
    checkpoint = Checkpoint(rows=5, emitted=4, source="a/b", next_sequence=5)
    write_checkpoint(path, checkpoint)
    assert read_checkpoint(path) == checkpoint
    path.write_text("{")
    with pytest.raises(ValueError, match="no checkpoint"):
        read_checkpoint(path)


def test_a_file_is_another_when_path_content_or_settings_are(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text("a")
    two.write_text("a")
    names = {file_identity(one, "m"), file_identity(two, "m"), file_identity(one, "n")}
    one.write_text("b")
    names.add(file_identity(one, "m"))
    one.write_text("bb")
    names.add(file_identity(one, "m"))
    assert len(names) == 5
