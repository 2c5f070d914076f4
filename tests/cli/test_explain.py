"""``tally explain`` as a user types it: from an event to its line and invoice, and back."""

from decimal import Decimal
from pathlib import Path

import pytest
from confluent_kafka import Producer

from pipeline.billing.explain import identity
from pipeline.core.charges import Charge, Tier
from pipeline.core.money import QUANTITY_ONE
from pipeline.core.plans import Plan
from pipeline.infra.avro import EVENTS
from pipeline.infra.resources import demo_dir
from pipeline.infra.settings import Settings
from pipeline.infra.wire import read_event
from tests.billing.rater import SCHEMAS, Rater
from tests.billing.records import NOON, letter_record, rated_record, receipt_record
from tests.billing.running import publish, query, running_sink, wait_until

from .running import Tally

#: Events on partition 2 of usage.events, by offset: key, input tokens.
EVENTS_SENT = [("code-0", 499_990), ("code-1", 20), ("code-1", 20), ("code-2", 5)]


@pytest.fixture
def tally(settings: Settings) -> Tally:
    """A deployment where code-0 and code-1 are rated, code-1 came twice, code-2 is dead, code-9 not rated yet."""
    tally, rater, prefix = Tally(settings), Rater(settings), settings.topic_prefix
    tally("plans", "publish", demo_dir() / "prices.yaml", "--wait", 0)
    producer = Producer(settings.kafka)
    sent = []
    for key, tokens in [*EVENTS_SENT, ("code-9", 1)]:
        event = rated_record(key=key, account="acct-02", properties={"input_tokens": str(tokens)})["event"]
        sent.append(SCHEMAS.encode(EVENTS, event))
        producer.produce(rater.topics.events, sent[-1], b"acct-02", 2)
    assert producer.flush(10) == 0
    plan = {
        "plan": "llm-standard",
        "price_version": "llm-standard@1",
        "meter": "llm-input-tokens",
        "charge": "input-tokens",
        "origin_partition": 2,
    }
    rows = [
        rated_record(
            key="code-0",
            account="acct-02",
            properties={"input_tokens": "499990"},
            quantity=499_990,
            amount="1.49997",
            origin_offset=0,
            **plan,
        ),
        rated_record(  # half in the first tier at 0.000003, half in the second at 0.0000025
            key="code-1",
            account="acct-02",
            properties={"input_tokens": "20"},
            quantity=20,
            before=499_990,
            amount="0.000055",
            origin_offset=1,
            **plan,
        ),
    ]
    with rater.transaction():
        rater.rated([*rows, rows[1]], partition=2)
        rater.receipt(receipt_record(prefix, partition=2, count=4, rated=2, duplicates=1, dead_lettered=1))
        dead = letter_record(
            prefix,
            partition=2,
            offset=3,
            account="acct-02",
            idempotency_key="code-2",
            reason="missing_property",
            value=sent[3],
        )
        rater.letter(dead, dead=True)
        rater.letter(letter_record(prefix, idempotency_key="code-1"), dead=False)
    with running_sink(settings) as thread:
        wait_until(lambda: query(settings, "SELECT count(*) FROM billing.unrated_event") == [(2,)], "letters", thread)
        wait_until(lambda: query(settings, "SELECT count(*) FROM billing.receipt") == [(1,)], "receipts", thread)
        wait_until(lambda: query(settings, "SELECT count(*) FROM billing.rated_usage") == [(2,)], "rows", thread)
    return tally


def test_from_an_event_to_its_invoice_and_back(tally: Tally, settings: Settings) -> None:
    event = tally.json("explain", "acct-02/code-1")
    assert (event["kind"], event["state"], event["account"]) == ("event", "rated", "acct-02")
    assert event["corrections"] == []
    assert event["origin"] == f"{settings.topic_prefix}usage.events/2/1"
    assert event["event"]["properties"] == {"input_tokens": "20"}
    assert (event["receipt"]["first_offset"], event["receipt"]["next_offset"]) == (0, 4)
    assert [one["reason"] for one in event["quarantined"]] == ["already_billed"]
    (row,) = event["rows"]
    arithmetic = row["arithmetic"]
    assert arithmetic["proved"]
    assert Decimal(arithmetic["difference"]) == Decimal(row["amount"]) == Decimal("0.000055")
    parts = [(part["quantity"], part["unit_price"], part["amount"]) for part in arithmetic["after"]["parts"]]
    assert [tuple(map(Decimal, part)) for part in parts] == [
        (500_000, Decimal("0.000003"), Decimal("1.5")),
        (10, Decimal("0.0000025"), Decimal("0.000025")),
    ]

    line = tally.json("explain", row["line"])
    assert line["arithmetic"]["proved"]
    assert (Decimal(line["exact_amount"]), Decimal(line["rounded_amount"])) == (Decimal("1.500025"), Decimal("1.50"))
    assert [one["event"] for one in line["first_events"]] == ["acct-02/code-0", "acct-02/code-1"]
    assert line["invoice"] == row["invoice"]

    invoice = tally.json("explain", row["invoice"])
    assert [one["line"] for one in invoice["lines"]] == [row["line"]]
    assert (invoice["account"], Decimal(invoice["exact_amount"])) == ("acct-02", Decimal("1.500025"))


def test_for_people(tally: Tally) -> None:
    shown = tally("explain", "acct-02/code-1").stdout
    for text in (
        "usage.events/2/1",
        "llm-standard version 1",
        "over 500000 up to 500010",
        "0.0000025",
        "line:1 of invoice:1",
    ):
        assert text in shown
    assert "1.500025 - 1.49997 = 0.000055: equals the stored amount" in shown
    assert "already_billed" in shown
    assert "price of 500010" in tally("explain", "line:1").stdout
    assert "line:1" in tally("explain", "invoice:1").stdout
    dead = tally("explain", "code-2").stdout
    assert "missing_property" in dead
    assert "dead lettered" in dead


@pytest.mark.parametrize(
    ("what", "state", "key"),
    [
        ("usage.events/2/0", "rated", "code-0"),
        ("usage.events/2/1", "rated", "code-1"),
        ("usage.events/2/2", "duplicate", "code-1"),
        ("usage.events/2/3", "dead_lettered", "code-2"),
        ("usage.events/2/4", "not_rated_yet", "code-9"),
        ("usage.events/0/0", "parked", None),
        ("code-0", "rated", "code-0"),
        ("code-2", "dead_lettered", "code-2"),
        ("acct-99/code-1", "parked", "code-1"),
    ],
)
def test_every_state_an_event_may_be_in(tally: Tally, what: str, state: str, key: str | None) -> None:
    found = tally.json("explain", what)
    assert (found["state"], found["idempotency_key"]) == (state, key)
    tally("explain", what)


def test_a_duplicate_names_what_it_repeats(tally: Tally, settings: Settings) -> None:
    found = tally.json("explain", f"{settings.topic_prefix}usage.events/2/2")
    assert [row["origin"] for row in found["rows"]] == [f"{settings.topic_prefix}usage.events/2/1"]
    assert "repeats" in tally("explain", "usage.events/2/2").stdout


@pytest.mark.parametrize(
    "what", ["no-such-key", "line:77", "invoice:77", "usage.events/2/99", "usage.events/77/0", "a/b/c"]
)
def test_what_is_not_there_is_exit_code_3_with_a_hint(tally: Tally, what: str) -> None:
    done = tally("explain", what, code=3)
    assert what in done.stderr
    assert "ACCOUNT/KEY" in done.stderr
    assert done.stdout == ""


def test_a_key_of_two_accounts_must_be_made_clear(tally: Tally) -> None:
    assert "acct-02/code-1, acct-99/code-1" in tally("explain", "code-1", code=2).stderr


def test_a_flat_fee_of_the_first_tier_is_owed_once(settings: Settings, tmp_path: Path) -> None:
    """A counter without an event is absent and costs nothing; one at 0 may owe the fee already (law 3)."""
    prices = tmp_path / "prices.yaml"
    prices.write_text(
        """
meters:
  - {id: tokens, event_type: llm.request, aggregation: sum, value: input_tokens, unit: token}
plans:
  - id: basic
    name: Basic
    currency: USD
    charges:
      - {id: input, meter: tokens, model: graduated, tiers: [{unit_price: 1, flat: 10}]}
"""
    )
    tally = Tally(settings)
    tally("plans", "publish", prices, "--wait", 0)
    rater = Rater(settings)
    with rater.transaction():
        rater.rated(
            [
                rated_record(key="first", quantity=0, amount=10),
                rated_record(key="second", quantity=2, amount=2, timestamp=NOON + 1),
                rated_record(key="third", quantity=1, before=2, amount=7, timestamp=NOON + 2),
            ]
        )
    with running_sink(settings) as thread:
        wait_until(lambda: query(settings, "SELECT count(*) FROM billing.rated_usage") == [(3,)], "rows", thread)
    proved = {
        key: tally.json("explain", f"acct/{key}")["rows"][0]["arithmetic"]["proved"]
        for key in ("first", "second", "third")
    }
    assert proved == {"first": True, "second": True, "third": False}
    assert "NOT the stored amount 7" in tally("explain", "acct/third").stdout


def test_lines_of_one_counter_are_proved_together(settings: Settings) -> None:
    """A second meter version has a line of its own and counts on: its amount is price(Q1 + Q2) - price(Q1)."""
    tiers = (Tier(20 * QUANTITY_ONE, Decimal(1)), Tier(None, Decimal("0.5")))
    charge = Charge("input", "tokens", "graduated", tiers=tiers)
    publish(settings, Plan("basic", 1, "Basic", "USD", 0, (charge,)))
    rater, tally = Rater(settings), Tally(settings)
    with rater.transaction():
        rater.rated(
            [
                rated_record(key="a", quantity=15, amount=15),
                rated_record(key="b", quantity=10, before=15, amount="7.5", meter_version=2),
                rated_record(key="c", quantity=10, amount=10, cell="region=eu"),
            ]
        )
    with running_sink(settings) as thread:
        wait_until(lambda: query(settings, "SELECT count(*) FROM billing.rated_usage") == [(3,)], "rows", thread)
    for line in (1, 2):
        arithmetic = tally.json("explain", f"line:{line}")["arithmetic"]
        assert arithmetic["proved"]
        assert Decimal(arithmetic["cost"]) == Decimal(arithmetic["amount"]) == Decimal("22.5")
        assert [one["line"] for one in arithmetic["lines"]] == ["line:1", "line:2"]
    shown = tally("explain", "line:2").stdout
    assert "these lines count on" in shown
    assert "price of 25" in shown
    assert "equals the stored amount" in shown
    assert "these lines count on" not in tally("explain", "line:3").stdout  # another cell, another counter
    query(settings, "UPDATE billing.invoice_line SET amount = 7 WHERE id = 2 RETURNING id")
    assert "NOT the stored amount 22" in tally("explain", "line:1").stdout


def test_identity_is_the_raters() -> None:
    event = rated_record(key="ключ/1", account="acct ü")["event"]
    assert identity("acct ü", "ключ/1") == read_event(SCHEMAS.encode(EVENTS, event)).identity
