"""Records as a hostile or broken writer would leave them on the topics that sink and rater trust each other on.

Half of the damage is done to bytes, half to fields: values that the schema allows and no rater would write.
"""

import io
import json
from collections.abc import Iterator
from random import Random
from typing import Any, NamedTuple

import fastavro

from pipeline.core.corrections import Correction
from pipeline.infra.avro import CONTROLS, CORRECTIONS, DEAD_LETTER, EVENTS, RATED, RECEIPTS, Record, frame
from pipeline.infra.topics import Topics
from tests.billing.records import (
    MAY,
    control_record,
    letter_record,
    rated_record,
    receipt_record,
    resolution,
    scaled_decimal,
    sequences,
)
from tests.fuzz.mutate import ACCOUNTS, EVENT_TYPE, FRAME_BYTES, SCHEMAS, Mutator

_US_PER_DAY = 86_400_000_000


class Hostile(NamedTuple):
    """One message to be put on a topic."""

    topic: str
    partition: int
    key: bytes | None
    value: bytes | None
    how: str


def messages(seed: int, count: int, topics: Topics, partitions: int, now_us: int) -> Iterator[Hostile]:
    """So many messages for ``usage.rated``, ``.receipts``, ``.dead-letter``, ``.retry`` and ``.controls``."""
    rng = Random(seed)
    events = Mutator(seed, now_us, partitions).messages(count)
    kinds = {
        topics.rated: (RATED, _rated),
        topics.receipts: (RECEIPTS, _receipt),
        topics.dead_letter: (DEAD_LETTER, _letter),
        topics.retry: (DEAD_LETTER, _letter),
        topics.controls: (CONTROLS, _control),
    }
    of_retry = (kinds[topics.retry], (CORRECTIONS, _correction))
    for number, event in enumerate(events):
        topic = rng.choice(list(kinds))
        subject, make = rng.choice(of_retry) if topic == topics.retry else kinds[topic]
        partition = 0 if topic == topics.controls else rng.randrange(partitions)
        record = make(rng, number, partition, topics, now_us)
        if make is _correction and event.value is not None and rng.random() < 0.5:
            record["event"] = event.value
        if make is _letter and event.value is not None and len(event.value) < 100_000:
            record["value"], record["key"] = event.value, event.key
        how = rng.choices(("untouched", "fields", "bytes", "foreign"), (20, 40, 35, 5))[0]
        if how == "fields":
            for name in rng.sample(list(record), rng.choice((1, 1, 2, 4))):
                record[name] = _wild(rng, _FIELDS[subject][name], record[name])
        whole = encode(subject, record)
        value: bytes | None = whole
        if how == "bytes":
            value = _damaged(rng, whole)
        elif how == "foreign":
            value = rng.choice((b"", None, whole[:5], b"{}", rng.randbytes(50), event.value))
        yield Hostile(topic, partition, rng.choice((event.key, None)), value, how)


#: Does not compress, as index entries do.
_LONG = "".join(map(chr, range(0x4E00, 0x4E00 + 6000)))
#: Fields of single records that once stopped the sink, or would: by subject.
FATAL: dict[str, tuple[Record, ...]] = {
    RATED: (
        {"account": _LONG, "contract": "c"},
        {"contract": _LONG},
        {"timestamp": 253_402_300_799_999_999},
        {"origin_appended_at": 2**61},
    ),
    RECEIPTS: (
        {"worker": "a\0b"},
        {"topic": _LONG},
        {"generation": 2**40},
        {"first_offset": 7, "next_offset": 6},
        {"resolutions": [resolution(2**40, 1, "rated")]},
        {"sequences": [{"source": _LONG, "block": 0, "bits": b"\2"}]},
        {"sequences": [{"source": "a\0b", "block": 0, "bits": b"\2"}]},
        {"sequences": [{"source": "api", "block": 2**62, "bits": b"\2"}]},
        {"sequences": [{"source": "api", "block": -1, "bits": b"\2"}]},
        {"sequences": [{"source": "api", "block": 0, "bits": b"\xff" * 126}]},
    ),
    DEAD_LETTER: (
        {"attempts": 2**40},
        {"replays": -(2**40)},
        {"origin_partition": 2**31},
        {"origin_topic": _LONG},
        {"reason": _LONG},
        {"stage": "a\0b"},
    ),
    CONTROLS: ({"source": _LONG}, {"source": "a\0b"}, {"hour": 2**62}),
}


def fatal(topics: Topics) -> Iterator[Hostile]:
    """A message for each of ``FATAL``; none of them may be written."""
    by_subject = {RATED: topics.rated, RECEIPTS: topics.receipts, DEAD_LETTER: topics.dead_letter}
    make: dict[str, Any] = {
        RATED: rated_record,
        RECEIPTS: receipt_record,
        DEAD_LETTER: letter_record,
        CONTROLS: control_record,
    }
    for subject, all_fields in FATAL.items():
        for fields in all_fields:
            value = encode(subject, make[subject](**fields))
            yield Hostile(by_subject.get(subject, topics.controls), 0, None, value, "fatal")


# -- good records


def _rated(rng: Random, number: int, partition: int, topics: Topics, now_us: int) -> Record:
    return rated_record(
        key=f"hostile-{number}",
        account=rng.choice(ACCOUNTS),
        event_type=EVENT_TYPE,
        properties={"input_tokens": "1", "file": "größe\t\\N\n.pdf"},
        timestamp=MAY + rng.randrange(20 * _US_PER_DAY),
        origin_offset=number,
        origin_partition=partition,
        quantity=rng.randrange(1000),
        identity=rng.randbytes(16),
    )


def _receipt(rng: Random, number: int, partition: int, topics: Topics, now_us: int) -> Record:
    first = number * 10
    return receipt_record(
        topics.prefix,
        partition=partition,
        first=first,
        count=10,
        sequences=[sequences(f"api-{rng.randrange(9)}/x", block := rng.randrange(50), block * 1000 + 1)],
        resolutions=[resolution(partition, first, rng.choice(("rated", "duplicate", "parked", "dead_lettered")))],
    )


def _letter(rng: Random, number: int, partition: int, topics: Topics, now_us: int) -> Record:
    now_ms = now_us // 1000
    return letter_record(
        topics.prefix,
        partition=partition,
        offset=number,
        origin_appended_at=now_ms,
        parked_at=now_ms,
        not_before=now_ms + rng.choice((-1000, 1000, 10**9)),
        account=rng.choice((None, *ACCOUNTS)),
    )


def _correction(rng: Random, number: int, partition: int, topics: Topics, now_us: int) -> Record:
    event = {
        "idempotency_key": f"billed-{number % 20}",
        "account": rng.choice(ACCOUNTS),
        "event_type": EVENT_TYPE,
        "timestamp": now_us - 60_000_000,
        "subject": "",
        "properties": {"input_tokens": "7"},
        "source": "",
        "sequence": 0,
    }
    terms = rated_record()
    row = {name: terms[name] for name in _HELD_FIELDS if name not in ("price_class", "late", "quantity", "amount")}
    quantity = rng.choice((7, 7, -(10**29) + 1, 10**28))
    numbers = {"quantity": _scaled(quantity * 10**9), "amount": _scaled(rng.choice((21, 10**37)) * 10**6)}
    row |= {"price_class": rng.choice(("running", "per_event", "period")), "late": False} | numbers
    return {
        "number": number,
        "entry": rng.choice((1, 1, 2, 3)),
        "reason_code": "other",
        "actor": "mallory",
        "decided_at": now_us,
        "catalog_offset": rng.choice((0, 0, 0, 2**62)),
        "origin_topic": topics.events,
        "origin_partition": partition,
        "origin_offset": number,
        "origin_appended_at": now_us // 1000,
        "event": SCHEMAS.encode(EVENTS, event),
        "rows": [row] * rng.choice((1, 1, 2, 400)),
        "replacement": SCHEMAS.encode(EVENTS, event | {"properties": {"input_tokens": "8"}}) if number % 2 else None,
    }


def _scaled(number: int) -> bytes:
    return number.to_bytes(number.bit_length() // 8 + 1, "big", signed=True)


def _control(rng: Random, number: int, partition: int, topics: Topics, now_us: int) -> Record:
    runs = [{"first": 2, "last": 2, "reason": "too large"}] if rng.random() < 0.5 else []
    return control_record(
        source=f"api-{rng.randrange(9)}/x",
        hour=MAY + number * 3_600_000_000,
        rejected=len(runs),
        rejections=runs,
        closed=rng.random() < 0.1,
    )


def forged(rng: Random, said: Correction, count: int) -> Iterator[bytes]:
    """So many corrections like a good one, each with one to three values that no command writes."""
    whole = SCHEMAS.encode(CORRECTIONS, said.to_record())
    for _ in range(count):
        record: Any = fastavro.schemaless_reader(io.BytesIO(whole[FRAME_BYTES:]), _PARSED[CORRECTIONS], None)
        record["entry"] = rng.randrange(1, 10**6)
        for name in rng.choices(list(record), [9 if name == "rows" else 1 for name in record], k=rng.choice((1, 1, 3))):
            record[name] = _wild(rng, _FIELDS[CORRECTIONS][name], record[name])
        yield encode(CORRECTIONS, record)


# -- damage


def _damaged(rng: Random, value: bytes) -> bytes:
    data = bytearray(value)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(6):
            case 0 | 1:
                data[at : at + 1] = bytes(byte ^ 1 << rng.randrange(8) for byte in data[at : at + 1])
            case 2:
                del data[at:]
            case 3:
                data[at:at] = rng.randbytes(rng.randrange(1, 9))
            case 4:
                del data[at : at + rng.randrange(1, 9)]
            case _:
                data[at : at + 1] = rng.choice((b"\xff" * 9 + b"\x01", b"\x80" * 12, b"\x80\x00", b"\x00", b"\x01"))
    return bytes(data)


_WILD: dict[str, tuple[Any, ...]] = {
    "string": (
        *("", "\0", "a\0b", "a" * 300, "ü" * 200, "a" * 100_000, "\\", "\\.", "\t\n\r\v\x7f\x85", "%s {}"),
        *("\U0010ffff", "usd", "rated", "usage.events", "'; --"),
    ),
    "int": (-1, 0, 1, 40, 2**31 - 1, -(2**31), 2**31, 2**40, -(2**63), 2**63 - 1),
    "long": (
        *(-1, 0, 1, 10**6, 10**15, 10**18, 10**18 + 1, 2**53, 2**63 - 1, -(2**63), 2**63 // 1000, 2**61),
        # The ends of the calendar in microseconds and in milliseconds, and the month before the last.
        *(253_402_300_799_999_999, 253_402_300_800_000_000, -62_135_596_800_000_000, -62_135_596_800_000_001),
        *(253_402_300_799_999, 253_402_300_800_000, 253_399_622_399_999_999, -62_135_596_800_000),
    ),
    "bytes": (b"", b"\0", b"\xff" * 32, b"\x7f" + b"\xff" * 31, b"\xff" * 33, b"\x80" + b"\0" * 124, b"\xff" * 126),
    "fixed": (b"\0" * 16, b"\xff" * 16),
    "boolean": (True, False),
}


def _wild(rng: Random, schema: Any, was: Any) -> Any:
    """Another value the schema allows; long texts also such as do not compress, as index entries do."""
    match schema:
        case list():
            return None if rng.random() < 0.2 else _wild(rng, schema[1], was)
        case {"type": "array", "items": items}:
            return [_wild(rng, items, one) for one in (*(was or ()), *[None] * rng.randrange(3))]
        case {"type": "map"}:
            return {_wild(rng, "string", ""): _wild(rng, "string", "") for _ in range(rng.randrange(4))}
        case {"type": "record", "fields": fields}:
            some = rng.randrange(len(fields))
            return {
                field["name"]: _wild(rng, field["type"], None) if was is None or number == some else was[field["name"]]
                for number, field in enumerate(fields)
            }
        case {"type": "enum", "symbols": symbols}:
            return rng.choice(symbols)
        case {"type": str(name)} | str(name):
            if name == "string" and rng.random() < 0.15:
                return "".join(chr(rng.randrange(0x4E00, 0x9FFF)) for _ in range(3000))
            return rng.choice(_WILD[name])
    raise AssertionError(schema)


def _plain(schema: Any) -> Any:
    """Without logical types: any integer is a time, any bytes a decimal."""
    if isinstance(schema, dict):
        return {name: _plain(part) for name, part in schema.items() if name not in ("logicalType", "doc", "default")}
    return [_plain(part) for part in schema] if isinstance(schema, list) else schema


_SUBJECTS = (RATED, RECEIPTS, DEAD_LETTER, CONTROLS, CORRECTIONS)
_PLAIN = {subject: _plain(json.loads(SCHEMAS.newest(subject).text())) for subject in _SUBJECTS}
_PARSED = {subject: fastavro.parse_schema(schema) for subject, schema in _PLAIN.items()}
_FIELDS = {subject: {field["name"]: field["type"] for field in schema["fields"]} for subject, schema in _PLAIN.items()}
_HELD_FIELDS = [
    field["name"]
    for part in _PLAIN[CORRECTIONS]["fields"]
    if part["name"] == "rows"
    for field in part["type"]["items"]["fields"]
]
_DECIMALS = {"quantity": 9, "quantity_before": 9, "quantity_after": 9, "amount": 12}


CORRECTION_FRAME = frame(SCHEMAS.newest(CORRECTIONS).id)


def encode(subject: str, record: Record) -> bytes:
    """Framed bytes, whatever the numbers: times are integers, decimals integers or bytes."""
    plain = dict(record)
    for name, decimals in _DECIMALS.items():
        if subject == RATED and not isinstance(plain[name], bytes):
            scaled = int(plain[name] / scaled_decimal(1, decimals))
            plain[name] = scaled.to_bytes(scaled.bit_length() // 8 + 1, "big", signed=True)
    out = io.BytesIO()
    fastavro.schemaless_writer(out, _PARSED[subject], plain)
    return frame(SCHEMAS.newest(subject).id) + out.getvalue()
