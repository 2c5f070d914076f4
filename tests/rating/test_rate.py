"""Enrich and rate: terms at the event's time, quantity to amount, and the bytes of the rows."""

import io
import json
from datetime import UTC, datetime
from decimal import Decimal

import fastavro
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.charges import Charge, Tier
from pipeline.core.meters import Filter
from pipeline.core.reasons import Reason
from pipeline.infra.avro import RATED
from pipeline.infra.resources import schemas_dir
from pipeline.infra.wire import FRAME_BYTES, read_event
from tests.rating.world import (
    DAY_US,
    NOW_MS,
    NOW_US,
    SCHEMAS,
    UNIT,
    Memory,
    account,
    contract,
    framed,
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


def us(text: str) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()) * 1_000_000


# -- the rows


def test_a_row_is_the_whole_story() -> None:
    event = usage("k-7", subject="ada", properties={"tokens": "2.5", "model": "small"}, source="gw", sequence=42)
    outcome = run([message(event, 17)], view(meter(), plan(per_unit("0.01")), account(), contract(), offset=99))
    (row,) = rows(outcome)
    at = datetime.fromtimestamp(NOW_MS / 1000, UTC)
    assert row == {
        "event": event | {"timestamp": at},
        "origin_topic": "usage.events",
        "origin_partition": outcome.rated[0].record.partition,
        "origin_offset": 17,
        "origin_appended_at": at,
        "identity": read_event(framed(event)).identity,
        "catalog_offset": 99,
        "contract": "acme-main",
        "plan": "basic",
        "plan_version": 1,
        "meter": "tokens",
        "meter_version": 1,
        "price_version": "basic@1",
        "charge": "c",
        "period_start": datetime(2026, 3, 1, tzinfo=UTC),
        "period_end": datetime(2026, 4, 1, tzinfo=UTC),
        "segment_start": datetime(2026, 3, 1, tzinfo=UTC),
        "cell": "",
        "currency": "USD",
        "price_class": "running",
        "entry": 0,
        "kind": "usage",
        "quantity": Decimal("2.5"),
        "quantity_before": Decimal(0),
        "quantity_after": Decimal("2.5"),
        "amount": Decimal("0.025"),
        "late": False,
    }


TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=80)


@given(TEXT.filter(bool), st.dictionaries(TEXT, TEXT, max_size=4), st.integers(0, 10**26))
def test_the_event_in_a_row_is_byte_for_byte_the_one_received(
    key: str, properties: dict[str, str], before: int
) -> None:
    """Spliced, never encoded again, and followed by exactly what fastavro would have written."""
    received = framed(usage(key[:60], properties=properties | {"tokens": "1"}))
    terms = view()
    (priced,) = terms.find(b"acme", b"completion", NOW_US).priced  # type: ignore[union-attr]
    outcome = run([message(received, 5)], terms, Memory(totals={priced.counter: before}))
    ((account_key, row),) = outcome.rows
    assert account_key == b"acme"
    size = len(received) - FRAME_BYTES
    assert row[FRAME_BYTES:][:size] == received[FRAME_BYTES:]

    schema = fastavro.parse_schema(json.loads((schemas_dir() / "avro" / "rated_usage.v2.avsc").read_text()))
    decoded = SCHEMAS.decode(row, RATED)
    # Map entries may be written in any order: compare what comes after the event.
    again, event_only = io.BytesIO(), io.BytesIO()
    fastavro.schemaless_writer(again, schema, decoded)
    fastavro.schemaless_writer(event_only, schema["fields"][0]["type"], decoded["event"])  # type: ignore[index,call-overload]
    tail = again.getvalue()[len(event_only.getvalue()) :]
    reread = fastavro.schemaless_reader(io.BytesIO(event_only.getvalue() + row[FRAME_BYTES + size :]), schema, None)
    assert reread == decoded
    assert len(row[FRAME_BYTES + size :]) <= len(tail)


def test_running_quantities_chain_from_event_to_event_and_batch_to_batch() -> None:
    state = Memory()
    chain = []
    for start in (0, 3):
        outcome = run([message(usage(f"k{i}"), i) for i in range(start, start + 3)], state=state)
        state.apply(outcome)
        chain += [(row["quantity_before"], row["quantity_after"], row["amount"]) for row in rows(outcome)]
    assert chain == [(10 * i, 10 * i + 10, Decimal("0.1")) for i in range(6)]


def test_the_first_event_of_a_counter_pays_the_first_tiers_flat_fee_the_second_does_not() -> None:
    """A counter with no event yet is absent and costs 0; from the first event on it costs price(Q)."""
    charge = Charge("c", "tokens", "graduated", tiers=(Tier(None, Decimal(1), Decimal(5)),))
    terms = view(meter(), plan(charge), account(), contract())
    outcome = run([message(usage("a"), 0), message(usage("b"), 1)], terms)
    assert [row["amount"] for row in rows(outcome)] == [15, 10]


def test_a_first_event_of_quantity_zero_pays_the_flat_fee_too() -> None:
    charge = Charge("c", "tokens", "graduated", tiers=(Tier(None, Decimal(1), Decimal(5)),))
    terms = view(meter(), plan(charge), account(), contract())
    zero = usage("a", properties={"tokens": "0"})
    outcome = run([message(zero, 0), message(usage("b"), 1)], terms)
    assert [row["amount"] for row in rows(outcome)] == [5, 10]


def test_late_is_judged_at_arrival_against_the_periods_end() -> None:
    end = us("2026-04-01")
    day_before = usage(timestamp=end - DAY_US)
    for arrived_us, late in ((end - 1000, False), (end, True)):
        (row,) = rows(run([message(day_before, timestamp=arrived_us // 1000)]))
        assert row["late"] is late


# -- all charges or none

IN_AND_OUT = (
    meter("in", value="input"),
    meter("out", value="output", filters=(Filter("model", ("small",)),)),
    plan(per_unit("1", "in", "in"), per_unit("2", "out", "out")),
    account(),
    contract(),
)


@pytest.mark.parametrize(
    ("properties", "reason"),
    [
        ({"input": "1", "model": "small"}, Reason.MISSING_PROPERTY),
        ({"input": "1", "output": "many", "model": "small"}, Reason.NOT_A_NUMBER),
        ({"input": "1", "output": "nan", "model": "small"}, Reason.NOT_FINITE),
        ({"input": "1", "output": "-1", "model": "small"}, Reason.NEGATIVE_QUANTITY),
        ({"input": "1", "output": "1e40", "model": "small"}, Reason.QUANTITY_TOO_LARGE),
        ({"input": "1", "output": "0.0000000001", "model": "small"}, Reason.QUANTITY_TOO_PRECISE),
    ],
    ids=str,
)
def test_an_event_is_rated_for_all_its_charges_or_for_none(properties: dict[str, str], reason: Reason) -> None:
    fine = usage("fine", properties={"input": "1", "output": "1", "model": "small"})
    outcome = run([message(usage("bad", properties=properties), 0), message(fine, 1)], view(*IN_AND_OUT))
    assert reasons(outcome) == [reason]
    assert [(row["charge"], row["quantity_before"]) for row in rows(outcome)] == [("in", 0), ("out", 0)]
    assert set(outcome.totals.values()) == {UNIT}


def test_a_second_charge_that_overflows_takes_the_first_one_back() -> None:
    terms = view(*IN_AND_OUT)
    found = terms.find(b"acme", b"completion", NOW_US)
    full = {priced.counter: 10**38 - 1 for priced in found.priced[1:]}  # type: ignore[union-attr]
    event = usage(properties={"input": "1", "output": "1", "model": "small"})
    other = usage("k2", properties={"input": "1", "model": "large"})
    outcome = run([message(event, 0), message(other, 1)], terms, Memory(totals=full))
    assert reasons(outcome) == [Reason.QUANTITY_TOO_LARGE]
    (row,) = rows(outcome)
    assert (row["charge"], row["quantity_before"], row["amount"]) == ("in", 0, 1)


def test_an_event_that_every_filter_leaves_out_is_a_dead_letter_and_keeps_its_key() -> None:
    terms = view(meter(filters=(Filter("model", ("small",)),)), plan(per_unit()), account(), contract())
    outcome = run([message(usage(properties={"model": "large"}), 0)], terms)
    assert (outcome.rated, outcome.rows, outcome.seen) == ([], [], {})
    assert [refused.rejection.reason for refused in outcome.dead] == [Reason.NO_CHARGE]


# -- enrich: which terms hold at the event's time


def test_unknown_account_and_contract_not_yet_known_are_parked() -> None:
    for items, reason in (
        ((meter(), plan(per_unit())), Reason.UNKNOWN_ACCOUNT),
        ((meter(), plan(per_unit()), account()), Reason.NO_CONTRACT),
        ((meter(), account(), contract()), Reason.NO_PRICE),
    ):
        outcome = run([message(usage(), 0)], view(*items))
        assert [refused.rejection.reason for refused in outcome.parked] == [reason]
        assert outcome.records == 1


def test_contract_ended_and_unpriced_event_types_are_dead_letters() -> None:
    ended = view(meter(), plan(per_unit()), account(), contract(end_us=NOW_US))
    assert reasons(run([message(usage(), 0)], ended)) == [Reason.CONTRACT_ENDED]
    assert rows(run([message(usage(timestamp=NOW_US - 1), 0)], ended))
    assert reasons(run([message(usage(event_type="embedding"), 0)])) == [Reason.NO_CHARGE]


def test_each_event_is_in_the_month_of_its_own_time_in_the_accounts_zone() -> None:
    """In Tokyo March begins at 15:00 UTC of February 28: one microsecond before is February, whatever the order."""
    start = us("2026-02-28T15:00:00")
    terms = view(meter(), plan(per_unit()), account(time_zone="Asia/Tokyo"), contract())
    times = [start, start - 1, start + 1, start - 2]
    outcome = run([message(usage(f"k{i}", timestamp=at), i) for i, at in enumerate(times)], terms)
    march, february = us("2026-02-28T15:00:00"), us("2026-01-31T15:00:00")
    starts = [int(row["period_start"].timestamp()) * 1_000_000 for row in rows(outcome)]
    assert starts == [march, february, march, february]
    assert [row["quantity_before"] for row in rows(outcome)] == [0, 0, 10, 10]


def test_a_new_plan_version_begins_a_segment_and_a_counter() -> None:
    change = us("2026-03-05")
    terms = view(
        meter(), plan(per_unit("1")), plan(per_unit("2"), version=2, valid_from_us=change), account(), contract()
    )
    times = [change - 1, change, change - 2, change + 1]
    outcome = run([message(usage(f"k{i}", timestamp=at), i) for i, at in enumerate(times)], terms)
    assert [(row["price_version"], row["quantity_before"], row["amount"]) for row in rows(outcome)] == [
        ("basic@1", 0, 10),
        ("basic@2", 0, 20),
        ("basic@1", 10, 10),
        ("basic@2", 10, 20),
    ]
    assert {row["segment_start"].day for row in rows(outcome)} == {1, 5}


def test_a_contract_that_follows_another_has_counters_of_its_own() -> None:
    change = us("2026-03-05")
    first, second = contract(id="c1", end_us=change), contract(id="c2", start_us=change)
    terms = view(meter(), plan(per_unit()), account(), first, second)
    times = [change - 1, change, change + 1]
    outcome = run([message(usage(f"k{i}", timestamp=at), i) for i, at in enumerate(times)], terms)
    assert [(row["contract"], row["quantity_before"]) for row in rows(outcome)] == [("c1", 0), ("c2", 0), ("c2", 10)]


def test_a_new_meter_version_changes_what_is_measured_within_one_counter() -> None:
    change = us("2026-03-05")
    terms = view(
        meter(), meter(version=2, value="units", valid_from_us=change), plan(per_unit()), account(), contract()
    )
    properties = {"tokens": "1", "units": "100"}
    times = [change - 1, change, change - 2]
    outcome = run(
        [message(usage(f"k{i}", timestamp=at, properties=properties), i) for i, at in enumerate(times)], terms
    )
    assert [(row["meter_version"], row["quantity_before"], row["quantity_after"]) for row in rows(outcome)] == [
        (1, 0, 1),
        (2, 1, 101),
        (1, 101, 102),
    ]


@pytest.mark.parametrize("price", ["100000000000", "0.01"])
def test_an_amount_that_no_row_holds_is_refused(price: str) -> None:
    """A counter may have grown at a price that was low then, and a price of today make more of it than 38 digits."""
    terms = view(meter(allow_negative=True), plan(per_unit(price)), account(), contract())
    [counter] = run([message(usage())], terms).totals
    back = message(usage(properties={"tokens": "-" + "9" * 18}))
    outcome = run([back], terms, Memory(totals={counter: 10**27}))
    refused = price != "0.01"
    assert reasons(outcome) == ([Reason.QUANTITY_TOO_LARGE] if refused else [])
    assert outcome.totals == ({} if refused else {counter: 10**9})
