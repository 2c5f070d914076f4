"""The first stage: each reason, at its edge, with a message that says what was expected and what came."""

from typing import Any

import pytest

from pipeline.core.reasons import Reason, Stage
from pipeline.infra.topics import EVENT_BYTES_MAX, partition_of
from pipeline.rating.accept import Accepted, accept
from pipeline.rating.arrivals import Arrivals, new_arrivals
from tests.rating.world import (
    DAY_US,
    EVENT_FRAME,
    HOME,
    NOW_MS,
    NOW_US,
    PARTITIONS,
    SHAPE,
    Message,
    body,
    framed,
    message,
    usage,
)

MINUTE_US = 60_000_000


def judged(
    *records: Message, own_only: bool = False, arrivals: Arrivals | None = None, now_ms: int = NOW_MS
) -> Accepted:
    return accept(
        list(records),
        partition=HOME,
        partitions=PARTITIONS,
        frames=SHAPE.frames,
        now_ms=now_ms,
        arrivals=arrivals or new_arrivals(),
        own_only=own_only,
    )


def padded(size: int) -> bytes:
    """A framed event of exactly this many bytes."""
    room = size - len(framed(usage(properties={"note": "x" * 100_000}))) + 100_000
    return framed(usage(properties={"note": "x" * room}))


ELSEWHERE = next(f"acct-{i}" for i in range(100) if partition_of(b"acct-%d" % i, PARTITIONS) != HOME)

PASSES: dict[str, Message] = {
    "a plain event": message(usage()),
    "exactly 35 days old": message(usage(timestamp=NOW_US - 35 * DAY_US)),
    "exactly 30 seconds ahead": message(usage(timestamp=NOW_US + MINUTE_US // 2)),
    "a key of 255 bytes": message(usage(key="k" * 255)),
    "a key of 255 bytes in two-byte letters": message(usage(key="é" * 127 + "k")),
    "exactly 256 KiB": message(padded(EVENT_BYTES_MAX)),
    "an event type of 128 bytes": message(usage(event_type="t" * 128)),
    "sequence 0: unknown": message(usage(sequence=0)),
    "an empty subject and source": message(usage(subject="", source="")),
    "no properties": message(usage(properties={})),
}

REFUSED: dict[str, tuple[Message, Reason, str]] = {
    "no value": (message(None), Reason.UNDECODABLE, "expected a usage event, got a message without a value"),
    "no bytes": (message(b""), Reason.UNDECODABLE, "expected byte 0 and a 4-byte schema id, got nothing"),
    "fewer bytes than a frame": (message(b"\0\0\0"), Reason.UNDECODABLE, "got 000000"),
    "40 bytes that begin with 0xFF": (message(b"\xff" * 40), Reason.UNDECODABLE, "got ffffffffff"),
    "JSON": (message(b'{"account": "acme"}'), Reason.UNDECODABLE, "got 7b22616363"),
    "an unknown schema": (
        message(b"\0\0\0\x03\xe7" + body(usage())),
        Reason.UNKNOWN_SCHEMA,
        "expected a usage event schema id of 1, got 999",
    ),
    "another shape's schema": (message(b"\0\0\0\0\x02" + body(usage())), Reason.UNKNOWN_SCHEMA, "of 1, got 2"),
    "cut off": (message(framed(usage())[:-1]), Reason.UNDECODABLE, "got bytes that are truncated"),
    "a byte too many": (message(framed(usage()) + b"\0"), Reason.UNDECODABLE, "1 bytes left over"),
    "not UTF-8": (message(EVENT_FRAME + b"\x04\xff\xfe" + body(usage(key=""))[1:]), Reason.UNDECODABLE, "not UTF-8"),
    "a NUL": (message(usage(subject="a\0b")), Reason.WRONG_SHAPE, "expected texts without NUL"),
    "256 KiB and a byte": (
        message(padded(EVENT_BYTES_MAX + 1)),
        Reason.MESSAGE_TOO_LARGE,
        "expected at most 262144 bytes, got 262145",
    ),
    "an empty key": (message(usage(key="")), Reason.KEY_EMPTY, "expected an idempotency key, got an empty one"),
    "a key of 256 bytes": (message(usage(key="k" * 256)), Reason.KEY_TOO_LONG, "at most 255 bytes, got 256"),
    "a key of 255 letters but 256 bytes": (
        message(usage(key="é" + "k" * 254)),
        Reason.KEY_TOO_LONG,
        "at most 255 bytes, got 256",
    ),
    "an empty account": (message(usage(account="")), Reason.ACCOUNT_INVALID, "of 1 to 128 bytes, got 0"),
    "an account of 129 bytes": (message(usage(account="a" * 129)), Reason.ACCOUNT_INVALID, "1 to 128 bytes, got 129"),
    "an empty event type": (message(usage(event_type="")), Reason.EVENT_TYPE_INVALID, "of 1 to 128 bytes, got 0"),
    "an event type of 129 bytes": (message(usage(event_type="t" * 129)), Reason.EVENT_TYPE_INVALID, "bytes, got 129"),
    "a sequence below 0": (
        message(usage(sequence=-1)),
        Reason.WRONG_SHAPE,
        "expected a sequence number from 0, got -1",
    ),
    "a source of 256 bytes": (message(usage(source="s" * 256)), Reason.WRONG_SHAPE, "a source of at most 255 bytes"),
    "35 days and a microsecond old": (
        message(usage(timestamp=NOW_US - 35 * DAY_US - 1)),
        Reason.TOO_OLD,
        "expected an event at most 35 days old when it arrived",
    ),
    "the oldest time there is": (message(usage(timestamp=-(2**63))), Reason.TOO_OLD, "at most 35 days old"),
    "30 seconds and a microsecond ahead": (
        message(usage(timestamp=NOW_US + MINUTE_US // 2 + 1)),
        Reason.AHEAD_OF_PRICES,
        "expected a time at most 30 s after arrival",
    ),
    "exactly 5 minutes ahead": (message(usage(timestamp=NOW_US + 5 * MINUTE_US)), Reason.AHEAD_OF_PRICES, "waits"),
    "5 minutes and a microsecond ahead": (
        message(usage(timestamp=NOW_US + 5 * MINUTE_US + 1)),
        Reason.IN_THE_FUTURE,
        "expected a time at most 5 minutes after arrival, got 300 s after: check the clock",
    ),
    "the last time there is": (message(usage(timestamp=2**63 - 1)), Reason.IN_THE_FUTURE, "at most 5 minutes after"),
    "on another account's partition": (
        message(usage(account=ELSEWHERE)),
        Reason.WRONG_PARTITION,
        f"account belongs on partition {partition_of(ELSEWHERE.encode(), PARTITIONS)}, came on {HOME}",
    ),
    "keyed by something else": (
        message(usage(), key=b"order-7"),
        Reason.WRONG_PARTITION,
        "expected the message key to be the account, got b'order-7'",
    ),
    "without a key": (message(usage(), key=None), Reason.WRONG_PARTITION, "key to be the account, got b''"),
}


@pytest.mark.parametrize("record", PASSES.values(), ids=PASSES.keys())
def test_passes(record: Message) -> None:
    arrivals = new_arrivals()
    events, refused = judged(record, arrivals=arrivals)
    assert [event.record for event in events] == [record]
    assert refused == []
    assert len(arrivals.blocks()) == (record is not PASSES["sequence 0: unknown"])


@pytest.mark.parametrize(("record", "reason", "says"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(record: Message, reason: Reason, says: str) -> None:
    events, refused = judged(record)
    assert events == []
    (one,) = refused
    assert one.record == record
    assert (one.rejection.stage, one.rejection.reason) == (Stage.ACCEPT, reason)
    assert says in one.rejection.message


def test_every_reason_of_the_stage_is_in_the_table() -> None:
    after_accept = [*Reason][[*Reason].index(Reason.CONFLICTING_DUPLICATE) :]
    assert {reason for _, reason, _ in REFUSED.values()} == set(Reason) - set(after_accept)


def test_a_refused_event_keeps_what_could_be_read_of_it() -> None:
    (one,) = judged(message(usage(key="k" * 256, timestamp=5))).refused
    assert (one.account, one.key, one.event_type, one.timestamp_us) == (b"acme", b"k" * 256, b"completion", 5)


def test_a_refused_event_did_arrive() -> None:
    """Its sequence number is no hole: it is in the dead letters."""
    records = [message(usage(key="", sequence=3), 0), message(usage(sequence=4), 1), message(b"junk", 2)]
    arrivals = new_arrivals()
    judged(*records, arrivals=arrivals)
    assert arrivals.blocks() == {(b"svc", 0): 1 << 3 | 1 << 4}


def test_age_is_judged_by_the_brokers_append_time() -> None:
    old: dict[str, Any] = usage(timestamp=NOW_US - 40 * DAY_US)
    assert judged(message(old, timestamp=NOW_US // 1000 - 39 * 86_400_000)).events
    assert judged(message(old)).refused


def test_a_parked_record_need_not_carry_its_account_as_key() -> None:
    record = message(usage(), key=b"order-7")
    assert judged(record, own_only=True).events
    assert judged(message(usage(account=ELSEWHERE)), own_only=True).refused  # but it must be at home


def test_a_parked_event_ahead_of_its_prices_waits_for_the_workers_clock() -> None:
    """Its arrival stays early for good; the time until a price for it can no longer be published does not."""
    early = message(usage(timestamp=NOW_US + 2 * MINUTE_US))
    assert judged(early, own_only=True, now_ms=NOW_MS + 89_999).refused
    assert judged(early, own_only=True, now_ms=NOW_MS + 90_000).events


def test_an_arrival_time_no_clock_has_is_not_taken_for_now() -> None:
    """In 64 bits of microseconds, 2**61 ms from now is now again: an event that old must not be billed."""
    assert [one.rejection.reason for one in judged(message(usage(), timestamp=NOW_MS + 2**61)).refused] == [
        Reason.TOO_OLD
    ]


@pytest.mark.parametrize(("behind_s", "early"), [(0, False), (30, False), (31, True)])
def test_a_retried_event_is_early_by_the_workers_clock_even_if_it_arrived_on_time(behind_s: int, early: bool) -> None:
    """A worker whose clock is behind the broker's may not have read the prices of that time yet."""
    refused = judged(message(usage()), own_only=True, now_ms=NOW_MS - behind_s * 1000).refused
    assert [one.rejection.reason for one in refused] == [Reason.AHEAD_OF_PRICES] * early
