"""Corrections in the rater: taken back at the price of the counter, replaced in one step, each applied once."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.corrections import Correction
from pipeline.infra.avro import CORRECTIONS
from pipeline.rating.batch import Outcome, Source, any_due, process, process_one_by_one
from pipeline.rating.correct import CorrectionRecord
from pipeline.rating.enrich import TermsView
from pipeline.rating.partition import unpark
from pipeline.rating.retry_queue import RetryQueue
from tests.rating import world
from tests.rating.world import (
    DAY_US,
    EVERY_METER,
    EVERY_MODEL,
    HOME,
    NOW_MS,
    NOW_US,
    SCHEMAS,
    SHAPE,
    UNIT,
    Memory,
    Message,
    account,
    batch,
    contract,
    cost,
    message,
    meter,
    per_unit,
    plan,
    reasons,
    rows,
    run,
    usage,
    view,
)

Row = dict[str, Any]


def correction(of: Sequence[Row], new: Row | None = None, *, entry: int = 1, offset: int = 0) -> CorrectionRecord:
    """A correction of the event behind these rows, off the wire as the rater reads it."""
    said = world.correction(of, new, entry=entry)
    value = SCHEMAS.encode(CORRECTIONS, said.to_record())
    found = unpark(Message("usage.retry", HOME, offset, NOW_MS, b"acme", value), SCHEMAS)
    assert isinstance(found, CorrectionRecord) and found.said == said
    return found


def applied(record: CorrectionRecord, state: Memory, terms: TermsView | None = None) -> Outcome:
    outcome = run([record], terms, state, source=Source.RETRY)
    assert outcome.dead == [] and outcome.records == 1
    state.apply(outcome)
    return outcome


def rated(state: Memory, *events: Row, terms: TermsView | None = None) -> list[list[Row]]:
    """The rows of each event, rated one after another."""
    outcome = run([message(event, offset) for offset, event in enumerate(events)], terms, state)
    state.apply(outcome)
    by_key = defaultdict(list)
    for row in rows(outcome):
        by_key[row["event"]["idempotency_key"]].append(row)
    return [by_key[event["idempotency_key"]] for event in events]


TIERS = replace(EVERY_MODEL[1], id="c")  # volume: 120 at 0.3, then all at 0.1 and 1.5


def tokens(key: str, number: int, **fields: Any) -> Row:
    return usage(key, properties={"tokens": str(number)}, **fields)


def test_a_void_takes_the_quantity_back_at_what_the_counter_s_price_changes_by() -> None:
    terms = view(meter(), plan(TIERS), account(), contract())
    state = Memory()
    first, second = rated(state, tokens("k1", 100), tokens("k2", 50), terms=terms)
    assert [row["amount"] for row in (first[0], second[0])] == [Decimal(30), Decimal("16.5") - 30]

    outcome = applied(correction(first), state, terms)
    [row] = rows(outcome)
    # What is left, 50, costs 15 again: not the 30 that the first was billed at.
    assert (row["quantity"], row["amount"]) == (-100, Decimal(15) - Decimal("16.5"))
    assert (row["quantity_before"], row["quantity_after"]) == (150, 50)
    assert (row["entry"], row["kind"], row["catalog_offset"]) == (1, "void", 7)
    same = first[0].keys() - {"quantity", "amount", "quantity_before", "quantity_after", "entry", "kind"}
    assert {name: row[name] for name in same} == {name: first[0][name] for name in same}
    assert list(state.totals.values()) == [50 * UNIT]


def test_the_voided_event_sent_again_is_a_duplicate() -> None:
    state = Memory()
    [first] = rated(state, tokens("k1", 100))
    applied(correction(first), state)
    assert len(run([message(tokens("k1", 100), 5)], None, state).repeats) == 1
    assert reasons(run([message(tokens("k1", 99), 5)], None, state)) == ["conflicting_duplicate"]


def test_a_correction_is_applied_once_in_one_batch_and_in_many() -> None:
    state = Memory()
    [first] = rated(state, tokens("k1", 100))
    both = run([correction(first), correction(first, offset=1)], None, state, source=Source.RETRY)
    assert (len(both.rows), len(both.corrected), len(both.repeats)) == (1, 1, 1)
    state.apply(both)
    again = run([correction(first, offset=2)], None, state, source=Source.RETRY)
    assert (again.rows, again.totals, len(again.repeats), again.dead) == ([], {}, 1, [])


def test_another_correction_of_the_same_entry_number_is_refused() -> None:
    state = Memory()
    [first] = rated(state, tokens("k1", 100))
    applied(correction(first), state)
    other = run([correction(first, tokens("k1", 60))], None, state, source=Source.RETRY)
    assert (other.rows, other.totals, reasons(other)) == ([], {}, ["conflicting_duplicate"])


def test_a_replacement_is_taken_back_and_rated_in_one_step() -> None:
    terms = view(meter(), plan(TIERS), account(), contract())
    state = Memory()
    first, _ = rated(state, tokens("k1", 100), tokens("k2", 50), terms=terms)
    outcome = applied(correction(first, tokens("k1", 80)), state, terms)
    void, new = rows(outcome)
    assert [(row["entry"], row["kind"], row["quantity"]) for row in (void, new)] == [
        (1, "void", -100),
        (2, "correction", 80),
    ]
    assert new["event"]["properties"] == {"tokens": "80"} and new["identity"] == first[0]["identity"]
    assert new["amount"] == Decimal("0.1") * 130 + Decimal("1.5") - 15
    assert (new["origin_partition"], new["origin_offset"]) == (HOME, first[0]["origin_offset"])
    assert list(state.totals.values()) == [130 * UNIT]

    # And the replacement is taken back like any row, under the next number.
    [void] = rows(applied(correction([new], entry=3), state, terms))
    assert (void["quantity"], void["amount"], void["entry"]) == (-80, Decimal(15) - Decimal("14.5"), 3)


def test_a_replacement_that_cannot_be_rated_changes_nothing() -> None:
    state = Memory()
    [first] = rated(state, tokens("k1", 100))
    for new, reason in (
        (usage("k1", properties={"tokens": "many"}), "not_a_number"),
        (usage("k1", event_type="other"), "no_charge"),
        (tokens("k2", 80), "wrong_shape"),  # another event
        (tokens("k1", 80, timestamp=NOW_US - DAY_US), "wrong_shape"),
    ):
        outcome = run([correction(first, new)], None, state, source=Source.RETRY)
        assert (outcome.rows, outcome.totals, outcome.corrected, reasons(outcome)) == ([], {}, [], [reason])
    # What would be parked as usage is refused too: a person waits for the answer.
    nobody = view(meter(), plan(per_unit()))
    outcome = run([correction(first, tokens("k1", 80))], nobody, state, source=Source.RETRY)
    assert (outcome.parked, reasons(outcome)) == ([], ["unknown_account"])


def test_a_refused_correction_that_was_sent_twice_is_not_applied_when_prices_came() -> None:
    """Its person was told, and may have decided anew: both together would take the event back twice."""
    state = Memory()
    [first] = rated(state, tokens("k1", 100))
    once = correction(first, usage("k1", event_type="other", properties={"tokens": "80"}))
    for _ in range(2):  # in one batch, and in the next
        outcome = run([once, once], None, state, source=Source.RETRY)
        state.apply(outcome)
    assert (len(outcome.repeats), outcome.dead) == (2, [])
    priced = view(meter(), meter("other", event_type="other"), plan(per_unit()), account(), contract())
    again = run([once], priced, state, source=Source.RETRY)
    assert (again.rows, again.totals, len(again.repeats)) == ([], {}, 1)
    one_by_one, errors = process_one_by_one(batch([once, once], Source.RETRY), Memory(), view(), SHAPE)
    assert (len(one_by_one.dead), len(one_by_one.repeats), errors) == (1, 1, [])


def test_a_correction_on_another_partition_is_refused() -> None:
    state = Memory()
    [first] = rated(state, tokens("k1", 100))
    elsewhere = batch([correction(first)], Source.RETRY, partition=(HOME + 1) % SHAPE.partitions)
    outcome = process(elsewhere, state, view(), SHAPE)
    assert (outcome.rows, reasons(outcome)) == ([], ["wrong_partition"])


def test_it_waits_for_the_catalog_the_event_was_rated_with() -> None:
    state = Memory()
    [first] = rated(state, tokens("k1", 100), terms=view(offset=8))
    once = correction(first)
    outcome = run([once], view(offset=7), state, source=Source.RETRY)
    assert (outcome.rows, outcome.waiting, outcome.records) == ([], [once], 1)
    assert (once.letter, once.letter_key) == (once.value, b"acme")  # written back as it came
    assert len(run([once], view(offset=8), state, source=Source.RETRY).rows) == 1


@pytest.mark.parametrize("minutes", [-6, 11], ids=["decided later than it came", "decided long before it came"])
def test_it_does_not_wait_for_a_catalog_that_nobody_published(minutes: int) -> None:
    """Written back and read again for ever, it would keep the partition busy with nothing else."""
    state = Memory()
    [first] = rated(state, tokens("k1", 100), terms=view(offset=2**60))
    once = correction(first)
    never = once._replace(said=replace(once.said, decided_at_us=(NOW_MS - minutes * 60_000) * 1000))
    hand = batch([never], Source.RETRY)
    assert not any_due(hand, view(), SHAPE) and any_due(hand, view(offset=2**60), SHAPE)
    outcome = run([never], None, state, source=Source.RETRY)
    assert (outcome.waiting, outcome.rows, reasons(outcome)) == ([], [], ["wrong_shape"])


def test_numbers_that_no_row_or_counter_holds_are_refused() -> None:
    """Once in a counter, one of 39 digits would stop every worker that restores the partition."""
    state = Memory()
    [first] = rated(state, tokens("k1", 100))
    [counter] = state.totals
    state.totals[counter] = 10**37
    said = world.correction(first)
    forged = replace(said, rows=(replace(said.rows[0], quantity=-(10**38) + 1),))
    record = correction(first)._replace(said=forged)
    outcome = run([record], None, state, source=Source.RETRY)
    assert (outcome.rows, outcome.totals, reasons(outcome)) == ([], {}, ["quantity_too_large"])
    with pytest.raises(ValueError, match="38 digits"):
        Correction.from_record(replace(said, rows=(replace(said.rows[0], amount=10**38),)).to_record())


def test_a_row_that_stands_twice_in_a_correction_makes_it_none() -> None:
    """PostgreSQL would take one of the two, the counter would go back by both."""
    [first] = rated(Memory(), tokens("k1", 100))
    with pytest.raises(ValueError, match="got one twice"):
        Correction.from_record(world.correction(first + first).to_record())


def test_a_time_of_arrival_that_no_clock_shows_is_not_remembered() -> None:
    """The day its identity is forgotten would not fit into the changelog: the worker would end, and the next."""
    [first] = rated(Memory(), tokens("k1", 100))
    value = SCHEMAS.encode(CORRECTIONS, world.correction(first).to_record())
    for timestamp in (-1, 2**61):
        came = Message("usage.retry", HOME, 0, timestamp, b"acme", value)
        assert unpark(came, SCHEMAS) is came
        assert reasons(run([came], None, Memory(), source=Source.RETRY)) == ["undecodable"]


def test_while_it_waits_it_is_written_back_once_a_second() -> None:
    [first] = rated(Memory(), tokens("k1", 100), terms=view(offset=8))
    queue, waiting = RetryQueue(), batch([correction(first)], Source.RETRY)
    queue.add(waiting, behind=False)
    assert queue.due(NOW_MS + 999, 7, None, lambda hand: any_due(hand, view(offset=7), SHAPE)) is None
    assert queue.due(NOW_MS + 1_000, 7, None, lambda hand: any_due(hand, view(offset=7), SHAPE)) is not None
    queue.add(waiting, behind=False)
    assert queue.due(NOW_MS, 8, None, lambda hand: any_due(hand, view(offset=8), SHAPE)) is not None


def test_after_a_back_dated_price_the_row_is_taken_back_at_what_it_was_billed_at() -> None:
    state = Memory()
    [first] = rated(state, tokens("k1", 100))
    later = view(
        meter(), plan(per_unit()), plan(per_unit("9"), version=2, valid_from_us=NOW_US - DAY_US), account(), contract()
    )
    [row] = rows(applied(correction(first), state, later))
    assert (row["quantity"], row["amount"], row["price_version"]) == (-100, -first[0]["amount"], "basic@1")
    assert list(state.totals.values()) == [0]


def test_the_counter_of_the_event_s_cell_and_subject_goes_back() -> None:
    split = replace(TIERS, by=("model",), per_subject=True)
    terms = view(meter(), plan(split), account(), contract())
    state = Memory()
    events = [
        usage(f"k{n}", subject=subject, properties={"tokens": "100", "model": model})
        for n, (subject, model) in enumerate([("ada", "a,b"), ("ada", "a,b"), ("ada", "c"), ("bob", "a,b")])
    ]
    _, second, *_ = rated(state, *events, terms=terms)
    assert second[0]["amount"] == Decimal("21.5") - 30
    [void] = rows(applied(correction(second), state, terms))
    assert (void["quantity_before"], void["quantity_after"], void["amount"]) == (200, 100, 30 - Decimal("21.5"))
    assert list(state.totals.values()) == [100 * UNIT] * 3


@pytest.mark.parametrize(("aggregation", "after"), [("max", 100), ("unique", 0)])
def test_of_what_is_no_sum_the_quantity_stays_and_the_close_prices_anew(aggregation: Any, after: int) -> None:
    terms = view(meter(aggregation=aggregation), plan(per_unit()), account(), contract())
    state = Memory()
    first, _ = rated(state, tokens("k1", 100), tokens("k2", 50), terms=terms)
    before = dict(state.totals)
    [void] = rows(applied(correction(first), state, terms))
    assert (void["price_class"], void["quantity"]) == ("period", -first[0]["quantity"])
    assert (void["quantity_before"], void["quantity_after"], void["amount"]) == (after, after, -first[0]["amount"])
    assert state.totals == before


def test_an_event_priced_alone_is_taken_back_at_its_price() -> None:
    charge = replace(per_unit(), model="percentage", unit_price=None, rate=Decimal("1.5"), fixed=Decimal("0.3"))
    terms = view(meter(), plan(charge), account(), contract())
    state = Memory()
    first, _ = rated(state, tokens("k1", 100), tokens("k2", 50), terms=terms)
    [void] = rows(applied(correction(first), state, terms))
    assert (void["price_class"], void["amount"]) == ("per_event", Decimal("-1.8"))
    assert (void["quantity_before"], void["quantity_after"]) == (150, 50)


def test_one_by_one_gives_the_same() -> None:
    state = Memory()
    first, second = rated(state, tokens("k1", 100), tokens("k2", 50))
    corrections = [correction(first), correction(second, tokens("k2", 3), offset=1), correction(first, offset=2)]
    whole = process(batch(corrections, Source.RETRY), state, view(), SHAPE)
    one_by_one, errors = process_one_by_one(batch(corrections, Source.RETRY), state, view(), SHAPE)
    assert errors == [] and whole == one_by_one


def test_bytes_that_are_no_correction_are_refused() -> None:
    state = Memory()
    [first] = rated(state, tokens("k1", 100))
    good = correction(first)
    changes: list[Row] = [{"rows": []}, {"entry": 0}, {"entry": 2**31 - 1}, {"origin_partition": -1}]
    changed = [SCHEMAS.encode(CORRECTIONS, good.said.to_record() | change) for change in changes]
    for value in (good.value[:-1], good.value + b"x", *changed):
        record = unpark(Message("usage.retry", HOME, 0, NOW_MS, b"acme", value), SCHEMAS)
        assert reasons(run([record], None, state, source=Source.RETRY)) == ["undecodable"]


# -- the law: rows and corrections of a counter add up to the price of what is left


_EVENT = st.tuples(st.integers(0, 400), st.sampled_from(["small", "large"]), st.integers(0, 2))
_STEP = st.one_of(
    st.tuples(st.just("event"), _EVENT),
    st.tuples(st.just("void"), st.integers(0, 30)),
    st.tuples(st.just("replace"), st.integers(0, 30), _EVENT),
)


@settings(deadline=None)
@given(st.lists(_STEP, max_size=14))
def test_rows_add_up_to_the_price_of_what_was_not_taken_back(steps: list[tuple[Any, ...]]) -> None:
    """Over every running model: events, voids and replacements in any order, each correction read twice."""
    terms = view(*EVERY_METER, plan(*EVERY_MODEL), account(), contract())
    state, written = Memory(), list[Row]()
    now: dict[str, tuple[Row, int, list[Row]]] = {}  # by key: event, last entry, the rows it holds
    for number, (what, *arguments) in enumerate(steps):
        if what == "event":
            event = _event(f"k{number}", arguments[0])
            [made] = rated(state, event, terms=terms)
            written += made
            now[f"k{number}"] = event, 0, made
        elif now:
            key = sorted(now)[arguments[0] % len(now)]
            event, entry, holds = now.pop(key)
            new = None if what == "void" else event | {"properties": _event(key, arguments[1])["properties"]}
            once = correction(holds, new, entry=entry + 1)
            made = rows(applied(once, state, terms))
            assert run([once], terms, state, source=Source.RETRY).rows == []
            written += made
            if new is not None:
                now[key] = new, entry + 2, [row for row in made if row["kind"] == "correction"]

    for charge in EVERY_MODEL:
        of_charge = [row for row in written if row["charge"] == charge.id]
        left = [event for event, _, _ in now.values() if charge.id != "unit" or event["properties"]["model"] == "small"]
        quantity = sum(Fraction(1 if charge.id == "unit" else event["properties"]["tokens"]) for event in left)
        assert sum(Fraction(row["quantity"]) for row in of_charge) == quantity
        expected = cost(charge, Fraction(quantity)) if of_charge else 0
        assert sum(Fraction(row["amount"]) for row in of_charge) == expected
        assert of_charge == [] or of_charge[-1]["quantity_after"] == quantity


def _event(key: str, what: tuple[int, str, int]) -> Row:
    number, model, minutes = what
    # "other" is counted by no filter of the meter "calls".
    model = {"small": "small", "large": "other"}[model]
    return usage(key, timestamp=NOW_US - minutes * 60_000_000, properties={"tokens": str(number), "model": model})
