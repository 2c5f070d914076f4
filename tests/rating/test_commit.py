"""What the commit makes of its parts before Kafka sees them."""

import hashlib

from confluent_kafka import Producer

from pipeline.core.usage import Record
from pipeline.infra.avro import DEAD_LETTER
from pipeline.infra.topics import RECORD_BYTES_MAX, Topics
from pipeline.rating.batch import process
from pipeline.rating.commit import Committer
from tests.rating.world import PARTITIONS, SCHEMAS, SHAPE, Memory, batch, message, view


def letters(record: Record) -> list[bytes]:
    """The dead letters of one record, as the commit encodes them."""
    arrived = batch([record])
    outcome = process(arrived, Memory(), view(), SHAPE)
    committer = Committer(
        Producer({"bootstrap.servers": "127.0.0.1:1", "log_level": 0}),  # never asked for anything
        topics=Topics(),
        schemas=SCHEMAS,
        partition=0,
        partitions=PARTITIONS,
        worker="test",
    )
    return [committer._letter(refused, arrived, 7, not_before_ms=0) for refused in outcome.dead]


def test_a_record_larger_than_any_letter_is_cut_and_says_so() -> None:
    """The broker limits the compressed size: 6 MB of zeros pass it, and no letter could hold them."""
    value, key = bytes(6_000_000), b"k" * 900_000
    (letter,) = letters(message(value, 3, key=key))
    assert len(letter) < RECORD_BYTES_MAX
    decoded = SCHEMAS.decode(letter, DEAD_LETTER)
    assert (decoded["reason"], decoded["origin_offset"]) == ("message_too_large", 3)
    assert value.startswith(decoded["value"]) and key.startswith(decoded["key"])
    for whole in (value, key):
        assert (
            f"of {len(whole)} bytes are kept, SHA-256 of all {hashlib.sha256(whole).hexdigest()}" in decoded["message"]
        )


def test_a_record_that_fits_is_kept_byte_for_byte() -> None:
    value = b"\xff" * 300_000
    decoded = SCHEMAS.decode(letters(message(value, 3))[0], DEAD_LETTER)
    assert (decoded["value"], decoded["key"]) == (value, b"acme")
    assert "kept" not in decoded["message"]
    assert SHAPE.origin_topic == decoded["origin_topic"]
