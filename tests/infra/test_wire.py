"""The hand-written Avro reader and writers against fastavro."""

import io
import time
from collections.abc import Callable
from decimal import Context, Decimal
from typing import Any

import fastavro
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.infra.wire import FRAME_BYTES, Malformed, UnstorableText, decimal, read_event, text, zigzag
from tests.rating.world import EVENT_FRAME, EVENT_SCHEMA, body, framed, usage

#: PostgreSQL's text holds no NUL: refused, see below.
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=200)
LONG = st.integers(-(2**63), 2**63 - 1)
USAGES = st.builds(
    usage,
    key=TEXT,
    account=TEXT,
    event_type=TEXT,
    timestamp=LONG,
    subject=TEXT,
    properties=st.dictionaries(TEXT, TEXT, max_size=6),
    source=TEXT,
    sequence=LONG,
)


def fastavro_reads(data: bytes) -> dict[str, Any] | None:
    """The event as fastavro reads it; None where it fails or leaves bytes over."""
    rest = io.BytesIO(data[FRAME_BYTES:])
    try:
        event = fastavro.schemaless_reader(rest, EVENT_SCHEMA, None)
    except Exception:  # noqa: BLE001  whatever it makes of broken bytes, it does not read them
        return None
    return event if rest.read() == b"" else None


def as_read(data: bytes) -> dict[str, Any]:
    """The event as Tally reads it, in fastavro's terms (all but the subject, which only the payload hash holds)."""
    event = read_event(data)
    return {
        "idempotency_key": event.key.decode(),
        "account": event.account.decode(),
        "event_type": event.event_type.decode(),
        "timestamp": event.timestamp_us,
        "properties": {name.decode(): value.decode() for name, value in event.properties.items()},
        "source": event.source.decode(),
        "sequence": event.sequence,
    }


# -- reading


@given(USAGES)
def test_reads_what_fastavro_wrote(event: dict[str, Any]) -> None:
    assert as_read(framed(event)) == {name: value for name, value in event.items() if name != "subject"}


@given(USAGES, st.data())
def test_accepts_only_what_fastavro_accepts_whole(event: dict[str, Any], data: st.DataObject) -> None:
    """Any byte changed, cut out or put in: what is accepted, fastavro reads to the same and to the last byte."""
    raw = bytearray(framed(event))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(FRAME_BYTES, len(raw)))
        cut = data.draw(st.integers(0, 3))
        raw[at : at + cut] = data.draw(st.binary(max_size=3))
    mutated = bytes(raw)
    try:
        read = as_read(mutated)
    except Malformed:
        return
    theirs = fastavro_reads(mutated)
    assert theirs is not None
    theirs.pop("subject")
    assert read == theirs


@given(st.binary(max_size=120))
def test_any_bytes_are_read_or_malformed(raw: bytes) -> None:
    try:
        read_event(EVENT_FRAME + raw)
    except Malformed:
        return
    assert fastavro_reads(EVENT_FRAME + raw) is not None


def _event_with_properties(properties: bytes) -> bytes:
    """A framed event whose properties are these bytes."""
    head = b"".join(map(text, ("k1", "acme", "completion"))) + zigzag(7) + text("")
    return EVENT_FRAME + head + properties + text("svc") + zigzag(1)


def _entry(name: str, value: str) -> bytes:
    return text(name) + text(value)


MAPS = {
    "no block at all": (b"\0", {}),
    "one block": (zigzag(2) + _entry("a", "1") + _entry("b", "2") + b"\0", {"a": "1", "b": "2"}),
    "a block each": (
        zigzag(1) + _entry("a", "1") + zigzag(1) + _entry("b", "2") + b"\0",
        {"a": "1", "b": "2"},
    ),
    "a negative count and the block's size": (
        zigzag(-2) + zigzag(8) + _entry("a", "1") + _entry("b", "2") + b"\0",
        {"a": "1", "b": "2"},
    ),
    "both kinds of block": (
        zigzag(-1) + zigzag(4) + _entry("a", "1") + zigzag(1) + _entry("b", "2") + b"\0",
        {"a": "1", "b": "2"},
    ),
    "a count of two bytes": (
        zigzag(70) + b"".join(_entry(f"n{i}", "v") for i in range(70)) + b"\0",
        {f"n{i}": "v" for i in range(70)},
    ),
}


@pytest.mark.parametrize(("encoded", "properties"), MAPS.values(), ids=MAPS.keys())
def test_every_way_to_write_a_map_reads_the_same(encoded: bytes, properties: dict[str, str]) -> None:
    written = _event_with_properties(encoded)
    assert as_read(written)["properties"] == properties
    theirs = fastavro_reads(written)
    assert theirs is not None and theirs["properties"] == properties
    plainest = read_event(framed(usage(timestamp=7, properties=properties)))
    assert read_event(written)[:2] == plainest[:2]  # the same identity and payload


REFUSED = {
    "nothing": b"",
    "cut off in the key": b"\x06ab",
    "a negative length": b"\x01" + body(usage())[1:],
    "a length beyond the end": zigzag(2**40) + body(usage())[1:],
    "bytes left over": body(usage()) + b"\0",
    "two events": body(usage()) * 2,
    "a key that is not UTF-8": b"\x04\xff\xfe" + body(usage(key=""))[1:],
    "a lone surrogate": b"\x06\xed\xa0\x80" + body(usage(key=""))[1:],
    "a varint of eleven bytes": b"\x80" * 10 + b"\x01",
    "a varint beyond 64 bits": b"\xff" * 9 + b"\x7f",
    "a padded length: one key must not have two spellings": b"\x84\x00" + body(usage())[1:],
    "a padded time": _event_with_properties(b"\0")[FRAME_BYTES:].replace(zigzag(7) + b"\0\0", b"\x8e\x00\0\0"),
    "a padded end of the map": _event_with_properties(b"\x80\x00")[FRAME_BYTES:],
    "a negative block size": _event_with_properties(zigzag(-1) + zigzag(-4) + _entry("a", "1") + b"\0")[FRAME_BYTES:],
    "a map of 2^62 entries": _event_with_properties(zigzag(2**62))[FRAME_BYTES:],
    "a map of 2^62 entries, negative": _event_with_properties(zigzag(-(2**62)) + zigzag(8))[FRAME_BYTES:],
    "a property twice": _event_with_properties(zigzag(2) + _entry("a", "1") + _entry("a", "2") + b"\0")[FRAME_BYTES:],
    "a property twice, in two blocks": _event_with_properties(
        zigzag(1) + _entry("a", "1") + zigzag(1) + _entry("a", "1") + b"\0"
    )[FRAME_BYTES:],
    "a property twice, the first of them not UTF-8": _event_with_properties(
        zigzag(2) + text("a") + b"\x04\xff\xfe" + _entry("a", "2") + b"\0"
    )[FRAME_BYTES:],
    "a property value that is not UTF-8": _event_with_properties(zigzag(1) + text("a") + b"\x02\xff\0")[FRAME_BYTES:],
    "a source that is not UTF-8": body(usage(source="s"))[:-3] + b"\x02\xff\x02",
}


@pytest.mark.parametrize("raw", REFUSED.values(), ids=REFUSED.keys())
def test_malformed(raw: bytes) -> None:
    with pytest.raises(Malformed):
        read_event(EVENT_FRAME + raw)


def test_a_length_bomb_costs_no_time() -> None:
    bombs = [
        EVENT_FRAME + zigzag(2**62),
        _event_with_properties(zigzag(2**62) + b"\0" * 200_000),
        EVENT_FRAME + b"\xff" * 200_000,
        _event_with_properties(zigzag(-1) + zigzag(2**62) + _entry("a", "1")),
    ]
    started = time.perf_counter()
    for bomb in bombs:
        with pytest.raises(Malformed):
            read_event(bomb)
    assert time.perf_counter() - started < 2.0


NUL_IN: list[Callable[[str], dict[str, Any]]] = [
    lambda nul: usage(key=nul),
    lambda nul: usage(account=nul),
    lambda nul: usage(event_type=nul),
    lambda nul: usage(subject=nul),
    lambda nul: usage(source=nul),
    lambda nul: usage(properties={nul: "1"}),
    lambda nul: usage(properties={"a": nul}),
]


@pytest.mark.parametrize("make", NUL_IN, ids=["key", "account", "type", "subject", "source", "name", "value"])
@pytest.mark.parametrize("nul", ["\0", "a\0b", "é\0", "x" * 100 + "\0"])
def test_no_text_holds_a_nul(make: Callable[[str], dict[str, Any]], nul: str) -> None:
    with pytest.raises(UnstorableText):
        read_event(framed(make(nul)))


# -- identity and payload


@given(USAGES, st.randoms(use_true_random=False))
def test_map_order_source_and_sequence_make_no_difference(event: dict[str, Any], random: Any) -> None:
    names = list(event["properties"])
    random.shuffle(names)
    other = event | {"properties": {n: event["properties"][n] for n in names}, "source": "other", "sequence": 99}
    assert read_event(framed(event))[:2] == read_event(framed(other))[:2]


def _identity_fields(event: dict[str, Any]) -> tuple[Any, ...]:
    return event["account"], event["idempotency_key"]


def _payload_fields(event: dict[str, Any]) -> tuple[Any, ...]:
    return event["event_type"], event["timestamp"], event["subject"], tuple(sorted(event["properties"].items()))


#: Few and short texts, so that two events are often equal in part, and parts could be taken for one another.
CLOSE = st.sampled_from(["", "a", "b", "ab", "ba", "\x02a", "\x02", "é"])
NEIGHBOURS = st.builds(
    usage,
    key=CLOSE,
    account=CLOSE,
    event_type=CLOSE,
    timestamp=st.integers(-1, 1),
    subject=CLOSE,
    properties=st.dictionaries(CLOSE, CLOSE, max_size=3),
)


@given(NEIGHBOURS, NEIGHBOURS)
@example(usage(key="a", account="b"), usage(key="b", account="a"))
@example(usage(properties={"a": "b"}), usage(properties={"a": "", "b": ""}))
@example(usage(event_type="ab", subject=""), usage(event_type="a", subject="b"))
def test_anything_else_does(one: dict[str, Any], other: dict[str, Any]) -> None:
    first, second = read_event(framed(one)), read_event(framed(other))
    assert (first.identity == second.identity) == (_identity_fields(one) == _identity_fields(other))
    assert (first.payload == second.payload) == (_payload_fields(one) == _payload_fields(other))


# -- writing


_WIDE = Context(prec=60)


def _fastavro_writes(schema: Any, value: Any) -> bytes:
    out = io.BytesIO()
    fastavro.schemaless_writer(out, fastavro.parse_schema(schema), value)
    return out.getvalue()


@given(LONG)
def test_zigzag_is_fastavros_long(n: int) -> None:
    assert zigzag(n) == _fastavro_writes("long", n)


@given(TEXT)
def test_text_is_fastavros_string(value: str) -> None:
    assert text(value) == _fastavro_writes("string", value)


@given(st.integers(-(10**38) + 1, 10**38 - 1))
@example(0)
@example(-1)
@example(127)
@example(128)
@example(-128)
@example(-129)
@example(10**38 - 1)
def test_decimal_reads_as_the_same_number(n: int) -> None:
    schema = {"type": "bytes", "logicalType": "decimal", "precision": 38, "scale": 9}
    read = fastavro.schemaless_reader(io.BytesIO(decimal(n)), fastavro.parse_schema(schema), None)
    assert read == Decimal(n).scaleb(-9, _WIDE)
    # The shortest form: one byte less would not hold the number and its sign.
    size = decimal(n)[0] >> 1
    assert len(decimal(n)) == 1 + size
    if size > 1:
        with pytest.raises(OverflowError):
            n.to_bytes(size - 1, "big", signed=True)


def test_mutations_are_not_all_refused() -> None:
    """The mutation test above must meet accepted bytes too, or it would prove nothing."""
    raw = bytearray(framed(usage(key="abc")))
    raw[FRAME_BYTES + 1] ^= 3
    assert read_event(bytes(raw)).key != b"abc"
