"""The laws of ``process``: it is a function of its arguments, and neither order nor splitting moves money."""

import io
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise
from typing import Any, cast

import fastavro
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.catalog import Catalog
from pipeline.core.meters import compile_measure
from pipeline.core.reasons import Reason
from pipeline.infra.topics import partition_of
from pipeline.infra.wire import FRAME_BYTES
from pipeline.rating import enrich
from pipeline.rating.batch import (
    RETRY_FOR_MS,
    Outcome,
    Source,
    StateFailed,
    any_due,
    backoff_ms,
    not_before_ms,
    process,
    process_one_by_one,
)
from pipeline.rating.enrich import TermsView
from tests.rating.world import (
    DAY_MS,
    EVENT_FRAME,
    EVENT_SCHEMA,
    EVERY_METER,
    EVERY_MODEL,
    HOME,
    NOW_MS,
    SHAPE,
    UNIT,
    Memory,
    Message,
    account,
    batch,
    contract,
    cost,
    entries,
    message,
    meter,
    parked,
    per_unit,
    plan,
    reasons,
    rows,
    run,
    usage,
    view,
)

# -- a stream with everything in it

BAD = ["many", "-1", "1e40", "nan", ""]
QUANTITIES = st.one_of(
    st.integers(0, 120).map(str),
    st.decimals("0", "60", places=9).map(str),
    st.sampled_from(["0", "1e1", "100", "0.000000001", "999999999999999999"]),
    st.sampled_from(BAD),
)
MODELS = st.sampled_from(["small", "large", "tiny"])


@st.composite
def streams(draw: st.DrawFn) -> list[Message]:
    """Good events, repeats in another spelling, conflicts, bad quantities, strangers and junk."""
    messages: list[Message] = []
    sent: list[dict[str, Any]] = []
    for offset in range(draw(st.integers(1, 25))):
        what = draw(st.sampled_from(["new"] * 6 + ["repeat", "repeat", "conflict", "stranger", "junk"]))
        if what in ("repeat", "conflict") and sent:
            event = dict(draw(st.sampled_from(sent)))
            if what == "repeat":
                event |= {"sequence": 77, "properties": dict(reversed(event["properties"].items()))}
            else:
                event |= {"subject": "someone else"}
        elif what == "junk":
            messages.append(message(draw(st.binary(max_size=30)), offset))
            continue
        else:
            properties = {"tokens": draw(QUANTITIES), "model": draw(MODELS)}
            owner = "acme" if what != "stranger" else STRANGER
            event = usage(f"k{offset}", owner, properties=properties)
            sent.append(event)
        messages.append(message(event, offset))
    return messages


def _stranger() -> str:
    return next(f"nobody-{i}" for i in range(100) if partition_of(b"nobody-%d" % i, SHAPE.partitions) == HOME)


STRANGER = _stranger()
TERMS_OF = entries((*EVERY_METER, plan(*EVERY_MODEL), account(), contract()))


def terms() -> TermsView:
    return TermsView(Catalog.empty().extend(TERMS_OF, 7))


def in_batches(messages: list[Message], cuts: list[int]) -> tuple[list[Outcome], Memory]:
    state, outcomes = Memory(), []
    edges = sorted({0, len(messages), *(cut % (len(messages) + 1) for cut in cuts)})
    known = terms()
    for start, end in pairwise(edges):
        outcomes.append(process(batch(messages[start:end]), state, known, SHAPE))
        state.apply(outcomes[-1])
    return outcomes, state


def fates(outcomes: list[Outcome]) -> dict[int, str]:
    """State of every offset. Fails when one is in two."""
    states: dict[int, str] = {}
    for outcome in outcomes:
        for name, records in (
            ("rated", [event.record for event in outcome.rated]),
            ("duplicate", [event.record for event in outcome.repeats]),
            ("parked", [refused.record for refused in outcome.parked]),
            ("dead", [refused.record for refused in outcome.dead]),
        ):
            for record in records:
                assert record.offset not in states
                states[record.offset] = name
    return states


def original(one: Message) -> dict[str, Any] | None:
    """The event as fastavro reads it, None where a message holds none."""
    if one.value is None or one.value[:FRAME_BYTES] != EVENT_FRAME:
        return None
    try:
        return cast(dict[str, Any], fastavro.schemaless_reader(io.BytesIO(one.value[FRAME_BYTES:]), EVENT_SCHEMA, None))
    except (EOFError, IndexError, UnicodeDecodeError):
        return None


CUTS = st.lists(st.integers(0, 30), max_size=6)


@given(streams(), CUTS)
def test_every_record_is_in_exactly_one_state(messages: list[Message], cuts: list[int]) -> None:
    outcomes, _ = in_batches(messages, cuts)
    assert fates(outcomes).keys() == {one.offset for one in messages}
    assert sum(outcome.records for outcome in outcomes) == len(messages)


@given(streams(), CUTS)
def test_where_batches_are_cut_makes_no_difference(messages: list[Message], cuts: list[int]) -> None:
    whole, whole_state = in_batches(messages, [])
    parts, parts_state = in_batches(messages, cuts)
    assert fates(parts) == fates(whole)
    assert [row for outcome in parts for row in outcome.rows] == whole[0].rows
    assert (parts_state.totals, parts_state.seen) == (whole_state.totals, whole_state.seen)


@given(streams(), CUTS)
def test_rows_add_up_to_the_price_of_the_total(messages: list[Message], cuts: list[int]) -> None:
    """For every counter: sum of quantities and amounts = Q and price(Q), worked out apart, in exact fractions."""
    outcomes, state = in_batches(messages, cuts)
    quantities: defaultdict[str, Fraction] = defaultdict(Fraction)
    amounts: defaultdict[str, Fraction] = defaultdict(Fraction)
    after: dict[str, Decimal] = {}
    for outcome in outcomes:
        for row in rows(outcome):
            charge = row["charge"]
            assert row["quantity_before"] == after.get(charge, 0)
            after[charge] = row["quantity_after"]
            quantities[charge] += Fraction(row["quantity"])
            amounts[charge] += Fraction(row["amount"])
    # What ought to have been rated, by the rules alone: the first good event of every key.
    expected: defaultdict[str, Fraction] = defaultdict(Fraction)
    good: set[str] = set()
    for one in messages:
        event = original(one)
        if event is None or event["account"] != "acme" or event["idempotency_key"] in good:
            continue
        if event["properties"]["tokens"] in BAD:
            continue
        good.add(event["idempotency_key"])
        for name in ("graduated", "volume", "package"):
            expected[name] += Fraction(event["properties"]["tokens"])
        if event["properties"]["model"] in ("small", "large"):
            expected["unit"] += 1
    assert quantities == expected
    for charge in EVERY_MODEL:
        if charge.id in quantities:
            assert amounts[charge.id] == cost(charge, quantities[charge.id])
    counted = {counter.split(b"\x1f")[2].decode(): Fraction(total, UNIT) for counter, total in state.totals.items()}
    assert counted == quantities


@given(streams().filter(lambda messages: len(messages) > 1), st.randoms(use_true_random=False))
def test_order_makes_no_difference_to_totals(messages: list[Message], random: Any) -> None:
    """Without conflicts: of two payloads under one key it is the first that counts."""
    free = [one for one in messages if b"someone else" not in (one.value or b"")]
    shuffled = list(free)
    random.shuffle(shuffled)
    shuffled = [one._replace(offset=offset) for offset, one in enumerate(shuffled)]
    (_, first), (_, second) = in_batches(free, []), in_batches(shuffled, [3, 9])
    assert first.totals == second.totals
    assert first.seen == second.seen


@given(streams())
def test_the_same_arguments_give_the_same_bytes(messages: list[Message]) -> None:
    state, known = Memory(), terms()
    first = process(batch(messages), state, known, SHAPE)
    assert process(batch(messages), state, known, SHAPE) == first  # the view remembered prices in between
    assert process(batch(messages), state, terms(), SHAPE) == first
    assert state == Memory()


@given(streams())
def test_one_by_one_is_the_same_where_nothing_raises(messages: list[Message]) -> None:
    whole = process(batch(messages), Memory(), terms(), SHAPE)
    apart, errors = process_one_by_one(batch(messages), Memory(), terms(), SHAPE)
    assert errors == []
    assert fates([apart]) == fates([whole])
    assert (apart.totals, apart.seen, apart.sequences) == (whole.totals, whole.seen, whole.sequences)
    assert sorted(apart.rows) == sorted(whole.rows)
    assert apart.latest_event_us == whole.latest_event_us


# -- poison


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> TermsView:
    """Terms whose meter has a bug: it raises on one value."""

    def buggy(one: Any) -> Any:
        measure = compile_measure(one)

        def measured(properties: Any) -> Any:
            if properties[b"tokens"] == b"66.6":
                raise ZeroDivisionError("a bug")
            return measure(properties)

        return measured

    monkeypatch.setattr(enrich, "compile_measure", buggy)
    return view()


def test_poison_becomes_a_dead_letter_and_the_rest_is_rated(poisoned: TermsView) -> None:
    poison = usage("poison", properties={"tokens": "66.6"})
    messages = [message(usage("a"), 0), message(poison, 1), message(usage("b"), 2), message(usage("a"), 3)]
    with pytest.raises(ZeroDivisionError):
        process(batch(messages), Memory(), poisoned, SHAPE)
    outcome, errors = process_one_by_one(batch(messages), Memory(), poisoned, SHAPE)
    assert fates([outcome]) == {0: "rated", 1: "dead", 2: "rated", 3: "duplicate"}
    assert reasons(outcome) == [Reason.INTERNAL_ERROR]
    assert "ZeroDivisionError('a bug')" in outcome.dead[0].rejection.message
    assert [type(error) for error in errors] == [ZeroDivisionError]
    assert [(row["quantity_before"], row["quantity_after"]) for row in rows(outcome)] == [(0, 10), (10, 20)]


def test_a_batch_of_nothing_but_poison(poisoned: TermsView) -> None:
    messages = [message(usage(f"p{i}", properties={"tokens": "66.6"}), i) for i in range(3)]
    outcome, errors = process_one_by_one(batch(messages), Memory(), poisoned, SHAPE)
    assert reasons(outcome) == [Reason.INTERNAL_ERROR] * 3
    assert len(errors) == 3 and not outcome.rows and not outcome.seen


# -- sequence numbers


def test_arrived_sequence_numbers_are_bits_by_source_and_block() -> None:
    numbers = [("a", 1), ("a", 999), ("a", 1000), ("b", 1), ("a", 0), ("a", 1)]
    messages = [message(usage(f"k{i}", source=s, sequence=n), i) for i, (s, n) in enumerate(numbers)]
    assert run(messages).sequences == {(b"a", 0): 1 << 1 | 1 << 999, (b"a", 1): 1, (b"b", 0): 2}


# -- retry


def retry(*records: Any, terms: TermsView | None = None, now_ms: int = NOW_MS, state: Memory | None = None) -> Outcome:
    one = replace(batch([], Source.RETRY, now_ms), records=records)
    return process(one, state or Memory(), terms or view(), SHAPE)


STRANGERS = (meter(), plan(per_unit()))  # a catalog in which acme is not known


def test_a_parked_event_is_rated_with_its_origin_once_it_can_be() -> None:
    outcome = retry(parked(usage(), 41))
    (row,) = rows(outcome)
    assert (row["origin_topic"], row["origin_offset"]) == ("usage.events", 41)
    assert outcome.sequences == {}  # it was counted when it arrived


def test_what_is_not_due_is_written_back_unchanged() -> None:
    wait = parked(usage(), 1, not_before_ms=NOW_MS + 1, catalog_offset=7)
    outcome = retry(wait, terms=view(*STRANGERS))
    assert outcome.waiting == [wait]
    assert (outcome.rated, outcome.parked, outcome.records) == ([], [], 1)


def test_what_is_due_is_tried_and_parked_again() -> None:
    outcome = retry(parked(usage(), 1, not_before_ms=NOW_MS, catalog_offset=7), terms=view(*STRANGERS))
    assert [refused.rejection.reason for refused in outcome.parked] == [Reason.UNKNOWN_ACCOUNT]


def test_a_catalog_that_has_an_answer_ends_the_wait() -> None:
    early = parked(usage(), 1, not_before_ms=NOW_MS + DAY_MS, catalog_offset=3)
    assert len(retry(early, terms=view(offset=7)).rated) == 1
    # It has grown, but still knows nothing of acme.
    assert retry(early, terms=view(*STRANGERS, offset=7)).waiting == [early]


def test_any_due_looks_at_time_catalog_and_foreign_records() -> None:
    later = parked(usage(), 1, not_before_ms=NOW_MS + 1, catalog_offset=7)
    one = replace(batch([], Source.RETRY), records=[later])
    assert not any_due(one, view(offset=7), SHAPE)
    assert any_due(replace(one, now_ms=NOW_MS + 1), view(offset=7), SHAPE)
    assert any_due(one, view(offset=8), SHAPE)
    assert not any_due(one, view(*STRANGERS, offset=8), SHAPE)
    assert any_due(replace(one, records=[message(b"junk")]), view(offset=7), SHAPE)


@pytest.mark.parametrize(
    ("attempts", "seconds"), [(1, 1), (2, 2), (3, 4), (4, 8), (12, 2048), (13, 3600), (14, 3600), (1000, 3600)]
)
def test_back_off_doubles_from_a_second_to_an_hour(attempts: int, seconds: int) -> None:
    assert backoff_ms(attempts) == seconds * 1000


@pytest.mark.parametrize(("age_ms", "dead"), [(RETRY_FOR_MS, False), (RETRY_FOR_MS + 1, True)])
def test_retries_end_after_seven_days(age_ms: int, dead: bool) -> None:
    outcome = retry(parked(usage()), terms=view(*STRANGERS), now_ms=NOW_MS + age_ms)
    assert (len(outcome.parked), reasons(outcome)) == ((0, [Reason.UNKNOWN_ACCOUNT]) if dead else (1, []))
    assert RETRY_FOR_MS == 7 * DAY_MS


def test_the_window_is_judged_at_first_arrival_however_long_it_was_parked() -> None:
    old = usage(timestamp=(NOW_MS - 34 * DAY_MS) * 1000)
    assert len(retry(parked(old), now_ms=NOW_MS + 6 * DAY_MS).rated) == 1


def test_foreign_bytes_on_the_retry_topic_are_dead_letters() -> None:
    outcome = retry(message(b"junk", 3, topic="usage.retry"), parked(usage(), 4))
    assert reasons(outcome) == [Reason.UNDECODABLE]
    assert "expected a parked event or a correction" in outcome.dead[0].rejection.message
    assert len(outcome.rated) == 1


def test_a_parked_repeat_of_a_rated_event_is_a_duplicate() -> None:
    state = Memory()
    state.apply(run([message(usage(), 0)], state=state))
    assert [event.record.offset for event in retry(parked(usage(), 1), state=state).repeats] == [1]


def test_a_letter_of_another_origin_is_not_taken_for_an_event_that_arrived() -> None:
    """Replayed garbage of the retry topic would else decide what became of the event at the same offset of events."""
    outcome = retry(parked(usage(), 3, topic="usage.retry"))
    assert (outcome.rated, outcome.rows) == ([], [])
    assert [refused.record.topic for refused in outcome.dead] == ["usage.retry"]


@given(st.lists(st.integers(0, 3_600_000), min_size=200, max_size=200))
def test_parked_events_fall_due_together(spread_ms: list[int]) -> None:
    due = {not_before_ms(20, NOW_MS + at_ms) for at_ms in spread_ms}
    assert len(due) <= 5
    for at_ms in spread_ms:
        wait_ms = not_before_ms(20, NOW_MS + at_ms) - (NOW_MS + at_ms)
        assert backoff_ms(20) <= wait_ms < backoff_ms(20) * 5 // 4


class _BrokenDisk(Memory):
    def known(self, identities: Sequence[bytes]) -> Sequence[bytes | None]:
        raise StateFailed("the disk is gone")


def test_a_failing_disk_stops_the_worker_and_fills_no_dead_letter_topic() -> None:
    for way in (process, process_one_by_one):
        with pytest.raises(StateFailed):
            way(batch([message(usage(), 0)]), _BrokenDisk(), view(), SHAPE)
