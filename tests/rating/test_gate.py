"""Who stops at a limit stays stopped, whoever owns the partition, until a person says go on."""

from dataclasses import dataclass
from typing import Any, cast

import pytest

from pipeline.core.limits import Limits
from pipeline.infra.going_on import GoingOn
from pipeline.rating.gate import Gate, Verdict
from tests.rating.world import batch, message, run, usage

LIMITS = Limits(run_max=2, percent_max=100, window=10)
WHY = "3 dead letters in a row (limit 2)"


@dataclass
class Word:
    """What a person said."""

    until_offset: int = 0

    def until(self, partition: int) -> int:
        return self.until_offset


def gate(word: Word, limits: Limits = LIMITS, told: list[str | None] | None = None) -> Gate:
    said: Any = [] if told is None else told
    return Gate(3, limits, cast(GoingOn, word), lambda partition, why: said.append(why))


def judged(gate: Gate, first: int, count: int) -> Verdict:
    """The verdict on a batch of dead letters from an offset on."""
    records = [message(b"\xff", offset) for offset in range(first, first + count)]
    return gate.judge(batch(records), run(records))


def test_it_stops_once_the_batch_that_breaks_the_limit_is_committed() -> None:
    told: list[str | None] = []
    owned = gate(Word(), told=told)
    owned.begin(None, 0)
    owned.committed(judged(owned, 0, 2), 2)
    verdict = judged(owned, 2, 1)
    assert (verdict.why, owned.stopped_by, told) == (WHY, None, [])  # aborted and run again, it counts once
    assert judged(owned, 2, 1) == verdict
    owned.committed(verdict, 3)
    assert (owned.stopped_by, told) == (WHY, [WHY])


def test_a_good_event_ends_the_row() -> None:
    records = [message(b"\xff", 0), message(b"\xff", 1), message(usage(), 2), message(b"\xff", 3)]
    assert gate(Word()).judge(batch(records), run(records)).why is None


@pytest.mark.parametrize(
    ("word", "limits", "stopped"),
    [
        (0, LIMITS, WHY),
        (2, LIMITS, WHY),
        (3, LIMITS, None),
        (0, Limits(0, 100, 10), None),
        (0, Limits(9, 100, 10), None),
    ],
    ids=["nobody spoke", "of an earlier stop", "go on", "no limit any more", "a higher limit"],
)
def test_the_next_owner(word: int, limits: Limits, stopped: str | None) -> None:
    note = judged(gate(Word()), 0, 3).note
    heir = gate(Word(word), limits)
    heir.begin(note, 3)
    assert heir.stopped_by == stopped


def test_the_next_owner_counts_on() -> None:
    note = judged(gate(Word()), 0, 2).note
    heir = gate(Word())
    heir.begin(note, 2)
    assert heir.stopped_by is None
    assert judged(heir, 2, 1).why == WHY


def test_going_on_counts_anew_and_only_behind_the_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.rating.gate._LOOK_S", 0.0)
    word, told = Word(), list[str | None]()
    owned = gate(word, told=told)
    owned.committed(judged(owned, 0, 3), 3)
    owned.look(3)
    assert owned.stopped_by == WHY
    word.until_offset = 10
    owned.look(3)
    assert (owned.stopped_by, told) == (None, [WHY, None])
    for first in (3, 6):
        verdict = judged(owned, first, 3)
        assert verdict.why is None
        owned.committed(verdict, first + 3)
    assert judged(owned, 9, 3).why == WHY
