"""The second stage, and how ``process`` treats one identity that stands several times in a batch."""

from pipeline.core.catalog import Catalog
from pipeline.core.reasons import Reason
from pipeline.core.usage import Event
from pipeline.infra.topics import partition_of
from pipeline.infra.wire import IDENTITY_BYTES
from pipeline.rating.enrich import TermsView
from tests.rating.world import (
    HOME,
    PARTITIONS,
    Memory,
    account,
    contract,
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


def offsets(events: list[Event]) -> list[int]:
    return [event.record.offset for event in events]


def test_a_repeat_in_the_batch_is_dropped_whatever_its_source_sequence_and_order() -> None:
    first = usage(properties={"tokens": "10", "model": "small"}, sequence=1)
    again = usage(properties={"model": "small", "tokens": "10"}, sequence=2, source="other")
    outcome = run([message(first, 0), message(again, 1)])
    assert (offsets(outcome.rated), offsets(outcome.repeats), outcome.dead) == ([0], [1], [])
    assert len(outcome.rows) == 1


def test_a_repeat_of_an_earlier_batch_is_dropped() -> None:
    state = Memory()
    state.apply(run([message(usage(), 0)], state=state))
    outcome = run([message(usage(), 1), message(usage("k2"), 2)], state=state)
    assert (offsets(outcome.rated), offsets(outcome.repeats)) == ([2], [1])
    assert rows(outcome)[0]["quantity_before"] == 10


def test_another_payload_under_a_rated_key_is_a_conflict() -> None:
    state = Memory()
    state.apply(run([message(usage(), 0)], state=state))
    outcome = run([message(usage(properties={"tokens": "11"}), 1), message(usage(), 2)], state=state)
    assert reasons(outcome) == [Reason.CONFLICTING_DUPLICATE]
    assert offsets(outcome.repeats) == [2]
    assert "expected a repeat to be equal" in outcome.dead[0].rejection.message


def test_a_conflict_within_one_batch() -> None:
    outcome = run([message(usage(), 0), message(usage(subject="bob"), 1), message(usage(), 2)])
    assert (offsets(outcome.rated), offsets(outcome.repeats)) == ([0], [2])
    assert reasons(outcome) == [Reason.CONFLICTING_DUPLICATE]


def test_the_same_key_of_another_account_is_another_event() -> None:
    twin = next(f"acme-{i}" for i in range(100) if partition_of(b"acme-%d" % i, PARTITIONS) == HOME)
    terms = view(meter(), plan(per_unit()), account(), contract(), account(twin), contract(twin))
    outcome = run([message(usage(), 0), message(usage(account=twin), 1)], terms)
    assert offsets(outcome.rated) == [0, 1]


def test_only_a_rated_event_uses_up_its_key() -> None:
    """The first is refused; mended under the same key it is rated, and only then are repeats repeats."""
    bad = usage(properties={"tokens": "many"})
    outcome = run([message(bad, 0), message(usage(), 1), message(usage(), 2), message(bad, 3)])
    assert offsets(outcome.rated) == [1]
    assert offsets(outcome.repeats) == [2]
    assert reasons(outcome) == [Reason.NOT_A_NUMBER, Reason.CONFLICTING_DUPLICATE]
    assert len(outcome.seen) == 1


def test_a_key_of_an_earlier_batch_that_was_not_rated_is_free() -> None:
    state = Memory()
    state.apply(run([message(usage(properties={}), 0)], state=state))
    assert state.seen == {}
    assert offsets(run([message(usage(), 1)], state=state).rated) == [1]


def test_a_parked_event_does_not_use_up_its_key() -> None:
    nobody = TermsView(Catalog.empty())
    outcome = run([message(usage(), 0), message(usage(), 1)], nobody)
    assert [refused.record.offset for refused in outcome.parked] == [0, 1]
    assert outcome.seen == {}
    assert offsets(run([message(usage(), 2)], view()).rated) == [2]


def test_an_unratable_event_sent_thousands_of_times_costs_no_square() -> None:
    """A service that retries a bad event in a loop fills whole batches with one identity."""
    bad = usage(properties={"tokens": "many"})
    asked: list[int] = []

    class Counting(Memory):
        def known(self, identities: bytes) -> list[bytes | None]:
            asked.append(len(identities) // IDENTITY_BYTES)
            return super().known(identities)

    outcome = run([message(bad, i) for i in range(5000)], state=Counting())
    assert len(outcome.dead) == 5000
    assert sum(asked) == 5000  # each is looked up once, in whichever wave it is
