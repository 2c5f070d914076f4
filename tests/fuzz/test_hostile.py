"""What a hostile or broken writer leaves on the topics behind the rater: read or quarantined, and nothing stops."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from random import Random
from typing import Any, cast

import pytest
from confluent_kafka import Consumer, Message, Producer, TopicPartition

from pipeline.billing import rated
from pipeline.billing.intake import Intake, Place, RatedMessage
from pipeline.core.reasons import Reason
from pipeline.core.usage import ParkedRecord
from pipeline.infra.avro import CORRECTIONS, DEAD_LETTER, RECEIPTS
from pipeline.infra.settings import Settings
from pipeline.infra.topics import RECORD_BYTES_MAX, Topics
from pipeline.rating.batch import Source, any_due, process
from pipeline.rating.changelog import by_expiry, pack_seen
from pipeline.rating.partition import unpark
from pipeline.rating.retry_queue import RetryQueue
from tests.billing.records import letter_record, receipt_record
from tests.billing.running import count, query, running_sink, wait_until
from tests.fuzz.hostile import CORRECTION_FRAME, Hostile, encode, fatal, forged, messages
from tests.fuzz.mutate import FRAME_BYTES, SCHEMAS
from tests.rating import world
from tests.rating.world import (
    HOME,
    NOW_MS,
    SHAPE,
    Memory,
    account,
    batch,
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
from tests.rating.world import Message as Came

_SEED, _SORTED, _SENT = 2, 8000, 700
#: Longest text of what is wrong with a message: it stands in a log line.
_PROBLEM_MAX = 1000


class _Read:
    """A message as the consumer hands it out."""

    def __init__(self, sent: Hostile, offset: int) -> None:
        self._sent, self._offset = sent, offset

    def topic(self) -> str:
        return self._sent.topic

    def partition(self) -> int:
        return self._sent.partition

    def offset(self) -> int:
        return self._offset

    def key(self) -> bytes | None:
        return self._sent.key

    def value(self) -> bytes | None:
        return self._sent.value

    def timestamp(self) -> tuple[int, int]:
        return 1, time.time_ns() // 1_000_000


def is_correction(topics: Topics, read: _Read) -> bool:
    """Framed as one, which is the rater's to judge: the sink passes it over."""
    return read.topic() == topics.retry and (read.value() or b"")[:FRAME_BYTES] == CORRECTION_FRAME


def _said(message: RatedMessage) -> tuple[object, ...]:
    return (*message[:2], message.row._replace(terms=None), asdict(message.row.terms))  # type: ignore[arg-type]


def test_whatever_stands_on_a_topic_of_the_sink_is_read_or_named_poison() -> None:
    """And the compiled reader of rows and the Python one agree on it."""
    topics = Topics("fuzz-")
    ends: Counter[Place] = Counter()
    read = []
    not_text = encode(RECEIPTS, receipt_record(worker="x" * 5000)).replace(b"x", b"\xff")
    last = Hostile(topics.receipts, 0, None, not_text, "a long text that is none")
    for sent in (*messages(_SEED, _SORTED, topics, 4, time.time_ns() // 1000), last):
        place = sent.topic, sent.partition
        read.append(_Read(sent, ends[place]))
        ends[place] += 1
    batch = Intake(topics, SCHEMAS).sort(cast(list[Message], read), dict.fromkeys(ends, 0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rated, "PlainRows", None)
        python = Intake(topics, SCHEMAS).sort(cast(list[Message], read), dict.fromkeys(ends, 0))
    assert [one[:4] for one in batch.poison] == [one[:4] for one in python.poison]
    assert [_said(one) for one in batch.rated] == [_said(one) for one in python.rated]
    parts: list[list[Any]] = [batch.rated, batch.receipts, batch.controls, batch.letters, batch.poison]
    passed_over = sum(is_correction(topics, one) for one in read)
    assert passed_over > _SORTED / 50
    assert sum(map(len, parts)) + passed_over == _SORTED + 1 and min(map(len, parts)) > _SORTED / 50
    assert max(len(poison.problem) for poison in batch.poison) < _PROBLEM_MAX
    assert {place: following for place, (_, following) in batch.moves.items()} == ends


def test_sink_and_rater_go_on_whatever_stands_on_their_topics(settings: Settings) -> None:
    """Each row and receipt is in its table or quarantined, and the retry topic is read by the rater to its end."""
    topics = Topics(settings.topic_prefix)
    sent = Counter(_send(settings, topics))
    ends = _ends(settings, sent)
    rater = _start_rater(settings)
    try:
        with running_sink(settings) as sink:

            def gone_through() -> bool:
                assert rater.poll() is None, f"the rater ended: {_log(settings)}"
                stored = query(settings, "SELECT topic, partition, next_offset FROM billing.sink_position")
                at = {(topic, partition): offset for topic, partition, offset in stored}
                return all(at.get(place, 0) >= end for place, end in ends.items()) and _retried(settings, ends)

            wait_until(gone_through, "sink and rater to go through all that stands there", sink)
    finally:
        rater.send_signal(signal.SIGTERM)
        code = rater.wait(60)
    assert code == 0, _log(settings)
    aside = {bytes(value) for (value,) in query(settings, "SELECT value FROM billing.quarantine")}
    assert all(one.value in aside for one in fatal(topics)), "written, and not quarantined"
    quarantined = dict(query(settings, "SELECT rated_topic, count(*) FROM billing.quarantine GROUP BY 1"))
    theirs = "SELECT count(*), coalesce(sum(rated_rows), 0) FROM billing.receipt WHERE worker LIKE %s"
    [(own_receipts, own_rows)] = query(settings, theirs, f"%:{rater.pid}")
    assert count(settings, "billing.rated_usage") + quarantined[topics.rated] == sent[topics.rated] + own_rows
    receipts = count(settings, "billing.receipt") - own_receipts
    assert receipts + quarantined[topics.receipts] == sent[topics.receipts]
    assert all(0 < quarantined[topic] < sent[topic] for topic in sent)


#: Fields of letters that no rater writes, and what each would do to the one that tries it.
_UNWRITABLE = {
    "attempts below 0: a back-off of less than nothing": {"attempts": -5},
    "attempts to which none can be added": {"attempts": 2**31 - 1},
    "a year in which billing periods have no end": {"origin_appended_at": 253_402_300_000_000},
    "a year before all usage": {"origin_appended_at": -(10**12)},
    "a partition beyond an int": {"origin_partition": 2**31},
    "a partition below 0": {"origin_partition": -1},
    "an offset below 0": {"origin_offset": -1},
    "replays beyond an int": {"replays": 2**31},
}


@pytest.mark.parametrize("fields", _UNWRITABLE.values(), ids=_UNWRITABLE.keys())
def test_a_letter_that_no_rater_writes_is_not_tried_but_dead_lettered(fields: dict[str, int]) -> None:
    at_us = fields.get("origin_appended_at", NOW_MS) * 1000
    for record in ({"value": framed(usage(timestamp=at_us)), "key": b"acme"}, {"value": b"no event", "key": None}):
        good = letter_record(origin_appended_at=NOW_MS, parked_at=NOW_MS, not_before=NOW_MS + 60_000, **record)
        came = Came("usage.retry", HOME, 0, NOW_MS, b"acme", encode(DEAD_LETTER, good | fields))
        assert isinstance(unpark(came._replace(value=encode(DEAD_LETTER, good)), SCHEMAS), ParkedRecord)
        unparked = batch([unpark(came, SCHEMAS)], source=Source.RETRY)
        assert any_due(unparked, view(), SHAPE)
        outcome = process(unparked, Memory(), view(), SHAPE)
        assert [one.rejection.reason for one in outcome.dead] == [Reason.UNDECODABLE]


def test_a_forged_correction_is_applied_or_dead_lettered_and_leaves_only_what_can_be_written() -> None:
    """And none makes the rater raise: the whole hand would be taken again one by one."""
    priced = view(meter(), plan(per_unit(), replace(per_unit("3", id="d"), by=("model",))), account(), contract())
    state = Memory()
    event = run([message(usage(properties={"tokens": "100", "model": "m"}))], priced, state)
    state.apply(event)
    rng, read, became = Random(_SEED), rated.reader(SCHEMAS).read, Counter[str]()
    for value in forged(rng, world.correction(rows(event)), 4000):
        came = Came("usage.retry", HOME, 0, NOW_MS, b"acme", value)
        hand = batch([unpark(came, SCHEMAS)], source=Source.RETRY)
        RetryQueue().add(hand, behind=False)
        any_due(hand, priced, SHAPE)
        outcome = process(hand, state, priced, SHAPE)
        assert outcome.records == 1
        became[outcome.dead[0].rejection.reason if outcome.dead else "waiting" if outcome.waiting else "applied"] += 1
        for _, row in outcome.rows:
            read(row)
        assert all(abs(quantity) < 10**38 for quantity in outcome.totals.values())
        assert list(pack_seen(by_expiry(outcome.used_up, NOW_MS))) or not outcome.used_up
    assert Reason.INTERNAL_ERROR not in became
    assert min(became[one] for one in ("applied", "waiting", Reason.UNDECODABLE, Reason.IN_THE_FUTURE)) > 10, became


def test_a_small_correction_does_not_ask_for_any_amount_of_memory() -> None:
    """Each row it asks for holds the event: 15,000 rows of 256 KiB are 4 GB."""
    event = run([message(usage(properties={"tokens": "100", "text": "x" * 250_000}))])
    said = world.correction(rows(event))
    many = replace(said, rows=tuple(replace(said.rows[0], cell=str(number)) for number in range(10_000)))
    value = SCHEMAS.encode(CORRECTIONS, many.to_record())
    assert len(value) < RECORD_BYTES_MAX
    hand = batch([unpark(Came("usage.retry", HOME, 0, NOW_MS, b"acme", value), SCHEMAS)], source=Source.RETRY)
    outcome = process(hand, Memory(), view(), SHAPE)
    assert (outcome.rows, reasons(outcome)) == ([], [Reason.MESSAGE_TOO_LARGE])


def _send(settings: Settings, topics: Topics) -> Iterator[str]:
    producer = Producer(settings.kafka | {"enable.idempotence": True, "message.max.bytes": 2_000_000})
    random = messages(_SEED, _SENT, topics, settings.partitions, time.time_ns() // 1000)
    for one in (*fatal(topics), *random):
        producer.produce(one.topic, one.value, one.key, one.partition)
        yield one.topic
    assert producer.flush(30) == 0


def _ends(settings: Settings, topics: Counter[str]) -> dict[Place, int]:
    consumer = Consumer(settings.kafka | {"group.id": "ends"})
    try:
        places = [
            (name, partition) for name in topics for partition in consumer.list_topics(name, 15).topics[name].partitions
        ]
        return {place: consumer.get_watermark_offsets(TopicPartition(*place), 15)[1] for place in places}
    finally:
        consumer.close()


def _retried(settings: Settings, ends: dict[Place, int]) -> bool:
    """Has the rater committed the retry topic up to these offsets?"""
    wanted = {place: end for place, end in ends.items() if place[0].endswith("usage.retry") and end > 0}
    consumer = Consumer(settings.kafka | {"group.id": f"{settings.topic_prefix}rater"})
    try:
        at = consumer.committed([TopicPartition(*place) for place in wanted], 15)
    finally:
        consumer.close()
    return all(one.offset >= wanted[one.topic, one.partition] for one in at)


def _start_rater(settings: Settings) -> "subprocess.Popen[bytes]":
    environment = {
        "TALLY_KAFKA_BOOTSTRAP": settings.kafka_bootstrap or "",
        "TALLY_DATA_DIR": str(settings.data_dir),
        "TALLY_TOPIC_PREFIX": settings.topic_prefix,
        "TALLY_PARTITIONS": str(settings.partitions),
    }
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    with (settings.data_dir / "rater.log").open("wb") as log:
        argv = (sys.executable, "-m", "pipeline.cli", "rater")
        return subprocess.Popen(argv, env=os.environ | environment, stdout=log, stderr=log)


def _log(settings: Settings) -> str:
    return (settings.data_dir / "rater.log").read_text(errors="replace")[-3000:]
