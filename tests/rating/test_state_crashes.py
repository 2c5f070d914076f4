"""A partition's state killed at every write: whatever it finds afterwards is what some batch left.

``Disk`` stands in for the kernel's calls that change a directory: at the chosen one it does the half of it (of a write)
or nothing, and the process is no more. What was written before is on disk, as after a SIGKILL.
"""

import itertools
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from xxhash import xxh3_128_digest

from pipeline.rating import segments, state
from pipeline.rating.state import SPAN_DAYS, PartitionState, Positions

STAMP = {"cluster": "c1"}
FIRST_DAY = 20_496 // SPAN_DAYS * SPAN_DAYS
DAYS = 4 * SPAN_DAYS
COUNTERS = [b"counter-%d" % n for n in range(12)]


@pytest.fixture(scope="module", autouse=True)
def way() -> None:
    """Nothing here goes through the fast path: once is enough."""


class Killed(BaseException):
    """The process ended here."""


class Disk:
    """Counts writes, and ends the process at the ``kill_at``-th."""

    def __init__(self) -> None:
        self.writes = 0
        self.kill_at = 0

    def _dies(self) -> bool:
        self.writes += 1
        return self.writes == self.kill_at

    def _writing(self, call: Callable[..., int]) -> Callable[..., int]:
        def wrapped(fd: int, data: Any, *more: int) -> int:
            if self._dies():
                call(fd, bytes(data)[: len(data) // 2], *more)
                raise Killed
            return call(fd, data, *more)

        return wrapped

    def _changing(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            if self._dies():
                raise Killed
            return call(*args, **options)

        return wrapped

    @contextmanager
    def installed(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for name in ("write", "pwrite"):
                patch.setattr(os, name, self._writing(getattr(os, name)))
            for name in ("rename", "replace", "unlink", "mkdir"):
                patch.setattr(Path, name, self._changing(getattr(Path, name)))
            yield


@dataclass
class Model:
    """What has to be known after each batch; the newest last."""

    positions: Positions | None = None
    seen: dict[bytes, tuple[int, bytes]] = field(default_factory=dict)
    totals: dict[bytes, int] = field(default_factory=dict)

    def after(self, day: int, rows: dict[bytes, bytes], totals: dict[bytes, int]) -> "Model":
        number = 1 if self.positions is None else self.positions.seen + 1
        seen = self.seen | {identity: (day, payload) for identity, payload in rows.items()}
        return Model(Positions(number, 2 * number), seen, self.totals | totals)

    def without(self, day: int) -> "Model":
        alive = {key: seen for key, seen in self.seen.items() if (seen[0] // SPAN_DAYS + 1) * SPAN_DAYS > day}
        return Model(self.positions, alive, self.totals)

    def is_in(self, there: PartitionState) -> bool:
        keys = [xxh3_128_digest(b"%d" % number) for number in range(400)]
        known = [self.seen[key][1] if key in self.seen else None for key in keys]
        return (
            there.positions == self.positions
            and list(there.known(b"".join(keys))) == known
            and [there.quantity(counter) for counter in COUNTERS] == [self.totals.get(counter) for counter in COUNTERS]
        )


@dataclass(frozen=True)
class Step:
    """A batch of ``rows`` new identities on a day, or forgetting up to that day; the process ends at the n-th write."""

    forget: bool
    day: int
    rows: int
    counters: frozenset[int]
    kill_at: int


STEPS = st.lists(
    st.builds(
        Step,
        forget=st.sampled_from([False, False, False, True]),
        day=st.integers(0, DAYS),
        rows=st.sampled_from([0, 1, 2, 3, 4, 5, 12]),
        counters=st.frozensets(st.integers(0, len(COUNTERS) - 1), max_size=5),
        kill_at=st.sampled_from([0, 0, 0]) | st.integers(1, 40),
    ),
    min_size=1,
    max_size=30,
)


def run(steps: list[Step], path: Path) -> int:
    """Take the steps, and after every end of the process open what it left. Returns how often it was killed."""
    disk, model, kills, number = Disk(), Model(), 0, 0
    #: After each batch, as far as nothing was forgotten since.
    history = [model]
    there = PartitionState(path, STAMP)
    day = FIRST_DAY
    for step in steps:
        day = max(day, FIRST_DAY + step.day)
        disk.writes, disk.kill_at = 0, step.kill_at
        if step.forget:
            following = model.without(day)
        else:
            rows = {}
            for _ in range(min(step.rows, 399 - number)):
                number += 1
                rows[xxh3_128_digest(b"%d" % number)] = number.to_bytes(8, "big")
            following = model.after(day, rows, {COUNTERS[i]: (number + i) * (-1) ** i * 10**30 for i in step.counters})
        try:
            with disk.installed():
                if step.forget:
                    there.forget_before(day)
                else:
                    entries = [identity + payload for identity, payload in rows.items()]
                    assert following.positions is not None
                    moved = {counter: following.totals[counter] for counter in (COUNTERS[i] for i in step.counters)}
                    there.apply({day: entries}, moved, following.positions)
        except Killed:
            kills += 1
            there._lock.close()  # what the end of a process does
            os.close(there._log._fd)
            there = PartitionState(path, STAMP)
            assert model.is_in(there) or following.is_in(there)
            model = following if following.is_in(there) else model
        else:
            model = following
            assert model.is_in(there)
        forgot = len(model.seen) < len(history[-1].seen)
        history = [model] if forgot else [*history, model]
    there.close()
    there = PartitionState(path, STAMP)
    assert model.is_in(there)
    assert {left.name for left in path.iterdir()} == there._manifest.files
    there.close()
    # And after a power failure that took all of the log.
    os.truncate(there._log.path, 0)
    there = PartitionState(path, STAMP)
    assert any(model.is_in(there) for model in history)
    there.close()
    return kills


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes at which a few batches make segments of several sizes, and merges take several steps."""
    monkeypatch.setattr(state, "_FLUSH_ROWS", 8)
    monkeypatch.setattr(state, "_MERGED_PER_ROW", 1)
    monkeypatch.setattr(state, "_CACHED", 2)
    monkeypatch.setattr(segments, "_STEP_WORDS", 1)


@pytest.mark.usefixtures("small")
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(STEPS)
def test_a_state_killed_at_any_write_is_what_some_batch_left(steps: list[Step]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run(steps, Path(folder) / "p")


@pytest.mark.usefixtures("small")
def test_every_write_of_a_long_run_is_a_place_to_be_killed_at(tmp_path: Path) -> None:
    """The same batches, which flush, merge and forget, killed at the first write of each, the second, …"""
    batches = [Step(False, n // 8 * SPAN_DAYS, 4, frozenset({n % 3, 7}), 0) for n in range(11)]
    steps = [*batches, Step(True, 2 * SPAN_DAYS, 0, frozenset(), 0), *batches[-2:]]
    kills = 0
    for number, step in enumerate(steps):
        for kill_at in itertools.count(1):
            killed = [*steps[:number], replace(step, kill_at=kill_at), *steps[number + 1 : number + 3]]
            if not run(killed, tmp_path / f"{number}-{kill_at}"):
                break
            kills += 1
    assert kills > 80
