"""Damaged messages, in a short form: what is no event is refused with its reason, and what is one is not.

The long form is ``python -m tests.fuzz``.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import fields
from itertools import zip_longest

import pytest

from pipeline.core.charges import Charge
from pipeline.core.plans import Plan
from pipeline.infra.settings import Settings
from pipeline.rating.batch import Outcome, process
from pipeline.rating.enrich import TermsView
from tests.fuzz.judge import STRICTER, Verdict, judge
from tests.fuzz.mutate import ACCOUNTS, EVENT_TYPE, WAYS, Mutator
from tests.fuzz.run import run
from tests.rating.world import (
    NOW_MS,
    NOW_US,
    PARTITIONS,
    SHAPE,
    Memory,
    Message,
    account,
    batch,
    contract,
    meter,
    per_unit,
    plan,
    view,
    without_fastpath,
)

_SEED, _MESSAGES, _BATCH = 4, 20_000, 400
_SENT_TO_WORKERS = 3000


def _terms() -> TermsView:
    """The demo's meters and accounts."""
    charges = [per_unit("0.000003", id=name, meter=name) for name in ("input_tokens", "output_tokens")]
    meters = [meter(charge.id, EVENT_TYPE, value=charge.id) for charge in charges]
    people = (item for name in ACCOUNTS for item in (account(name), contract(name)))
    return view(*meters, _plan(charges), *people)


def _plan(charges: Sequence[Charge]) -> Plan:
    return plan(*charges)


def _arrivals() -> Iterator[tuple[int, list[Message]]]:
    """Batches of messages by partition, each of which has its own offsets."""
    waiting: defaultdict[int, list[Message]] = defaultdict(list)
    ends: Counter[int] = Counter()
    for sent in Mutator(_SEED, NOW_US, PARTITIONS).messages(_MESSAGES):
        offset = ends[sent.partition]
        ends[sent.partition] += 1
        arrived = Message(SHAPE.origin_topic, sent.partition, offset, NOW_MS, sent.key, sent.value)
        waiting[sent.partition].append(arrived)
        if len(waiting[sent.partition]) == _BATCH:
            yield sent.partition, waiting.pop(sent.partition)
    yield from waiting.items()


def _process(records: list[Message], partition: int, terms: TermsView, state: Memory) -> Outcome:
    outcome = process(batch(records, partition=partition), state, terms, SHAPE)
    state.apply(outcome)
    return outcome


def _difference(compiled: Outcome, python: Outcome) -> str:
    """The first thing in which two outcomes differ."""
    for part in fields(Outcome):
        one, other = getattr(compiled, part.name), getattr(python, part.name)
        if one != other and isinstance(one, list):
            pairs = zip_longest(one, other)
            return f"{part.name}: {next(f'{a} and {b}' for a, b in pairs if a != b)}"
        if one != other:
            return f"{part.name}: {set(one.items()) ^ set(other.items()) if isinstance(one, dict) else (one, other)}"
    return "nothing"


def _states(outcome: Outcome) -> dict[int, str]:
    """The state of each offset; an offset in two states is in neither."""
    states = [(event.record.offset, "rated") for event in outcome.rated]
    states += [(event.record.offset, "duplicate") for event in outcome.repeats]
    states += [(one.record.offset, f"dead {one.rejection.reason.value}") for one in outcome.dead]
    states += [(one.record.offset, f"parked {one.rejection.reason.value}") for one in outcome.parked]
    assert len(dict(states)) == len(states), "a message in two states"
    assert all(one.rejection.message for one in outcome.dead + outcome.parked)
    return dict(states)


def _expected(verdict: Verdict, seen: dict[tuple[str, str], object]) -> set[str]:
    """The states a message may be in, after those before it on its partition."""
    if verdict.event is None or verdict.refused_at_sight:
        return {f"dead {reason}" for reason in verdict.dead}
    if verdict.misplaced:
        return {"parked wrong_partition"}
    if verdict.early:
        return {"parked ahead_of_prices"}
    identity, payload = verdict.event.identity, verdict.event.payload
    if identity in seen:
        return {"duplicate" if seen[identity] == payload else "dead conflicting_duplicate"}
    if verdict.parked:
        return {f"parked {verdict.parked}"}
    if verdict.dead:
        return {f"dead {reason}" for reason in verdict.dead}
    seen[identity] = payload
    return {"rated"}


def test_whatever_the_bytes_both_ways_through_the_rater_agree_with_another_reader() -> None:
    """The compiled way and the Python way raise nothing, do the same, and accept what fastavro and the rules accept."""
    ways = _terms(), _terms()
    states = [(Memory(), Memory()) for _ in range(PARTITIONS)]
    seen: dict[tuple[str, str], object] = {}
    outcomes: Counter[str] = Counter()
    stricter: Counter[str] = Counter()
    for partition, records in _arrivals():
        compiled = _process(records, partition, ways[0], states[partition][0])
        with pytest.MonkeyPatch.context() as patch:
            without_fastpath(patch)
            python = _process(records, partition, ways[1], states[partition][1])
        if compiled != python:  # by hand: pytest would take minutes to show how whole batches differ
            raise AssertionError(_difference(compiled, python))
        found = _states(compiled)
        for record in records:
            verdict = judge(record.value, record.key, partition, NOW_MS, PARTITIONS)
            stricter.update(verdict.stricter)
            state = found.get(record.offset)
            expected = _expected(verdict, seen)
            assert state in expected, f"{record}: expected {expected}, is {state}"
            outcomes[state] += 1
    assert stricter.keys() == STRICTER.keys(), "a rule that nothing here breaks is not tested"
    refused_for = {state.split()[1] for state in outcomes if state.startswith("dead")}
    assert refused_for >= _OFTEN
    assert outcomes["rated"] > _MESSAGES / 5 and outcomes["duplicate"] > _MESSAGES / 100


#: What damage leads to; the other reasons tell of contracts and prices, which are in order here, or of a defect.
_OFTEN = {
    *("undecodable", "unknown_schema", "wrong_shape", "message_too_large", "key_empty", "key_too_long"),
    *("account_invalid", "event_type_invalid", "too_old", "in_the_future", "conflicting_duplicate", "no_charge"),
    *("missing_property", "not_a_number", "not_finite", "negative_quantity", "quantity_too_large"),
    "quantity_too_precise",
}


def test_rater_and_sink_put_each_message_into_one_state_and_keep_its_bytes(settings: Settings) -> None:
    summary, differences = run(settings, _SEED, _SENT_TO_WORKERS)
    assert differences == []
    assert summary.reconciled and summary.messages == _SENT_TO_WORKERS
    assert summary.ways.keys() == set(WAYS) | {"huge"}
    assert summary.outcomes["rated"] > _SENT_TO_WORKERS / 5
    assert summary.outcomes["dead_lettered message_too_large"] > 0
    assert "dead_lettered internal_error" not in summary.outcomes
