"""Real usage messages, damaged: what a broken producer, disk, network or a hostile hand may put on ``usage.events``.

Everything is drawn from one seed. About a fifth of the messages is left as it was written, so that the good ones among
the bad are seen to come through.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from itertools import islice
from random import Random
from typing import Any, NamedTuple

from pipeline.infra.avro import CATALOG, CONTROLS, DEAD_LETTER, EVENTS, RATED, RECEIPTS, frame, load_schemas
from pipeline.infra.resources import demo_dir
from pipeline.infra.topics import EVENT_BYTES_MAX, partition_of
from pipeline.producer.files import ColumnMapping, read_csv
from pipeline.producer.usage import Usage, encode, source_field, varint
from tests.billing.records import control_record, letter_record, rated_record, receipt_record

SCHEMAS = load_schemas()
FRAMES = tuple(frame(schema_id) for schema_id in SCHEMAS.ids(EVENTS))
FRAME_BYTES = 5
#: Who is billed in the demo, and somebody unheard of.
ACCOUNTS = tuple(f"acct-{number:02d}" for number in range(12))
STRANGER = "nobody"
EVENT_TYPE = "llm.request"
#: Stands in a template's key where the message's number goes.
_NUMBER = b"000000000000"
_TEMPLATES = 1500
#: Messages kept to be sent again.
_REMEMBERED = 2000
#: One message in so many is over the largest event; one in so many of these is larger than any letter can hold.
_HUGE_ONE_IN, _HUGEST_ONE_IN = 4000, 10
_HUGEST_BYTES = 1024 * 1024 + 300_000
_SECOND_US = 1_000_000
_DAY_US = 86_400 * _SECOND_US


class Sent(NamedTuple):
    """One message to be put on ``usage.events``."""

    value: bytes | None
    key: bytes | None
    partition: int
    #: What was done to it.
    how: str
    headers: tuple[tuple[str, bytes], ...] = ()


@dataclass(frozen=True, slots=True)
class Template:
    """A good event, framed, and where its parts stand."""

    value: bytes
    account: bytes
    partition: int
    number_at: int
    #: (start, end) of every length and of the count of properties, as varints.
    lengths: tuple[tuple[int, int], ...]
    #: (start, end) of every text that is not empty.
    texts: tuple[tuple[int, int], ...]
    #: From the count of properties to behind the 0 that ends them, and where each entry starts.
    map: tuple[int, int]
    entries: tuple[int, ...]
    #: (start, end) of the value that is measured, its length included.
    measure: tuple[int, int]
    #: (start, end) of the time.
    time: tuple[int, int]

    def numbered(self, number: int) -> bytes:
        return b"%b%012d%b" % (self.value[: self.number_at], number, self.value[self.number_at + len(_NUMBER) :])


class Mutator:
    """Messages without end; the same for the same arguments."""

    def __init__(self, seed: int, now_us: int, partitions: int) -> None:
        """``now_us``: events happened in the 20 days before, microseconds since 1970 UTC."""
        self._rng = Random(seed)
        self._partitions, self._now_us = partitions, now_us
        self._templates = list(_templates(self._rng, now_us, partitions))
        self._foreign = _foreign_bodies()
        self._remembered: list[Sent] = []
        self._originals: deque[tuple[int, Template]] = deque(maxlen=500)
        self._ways = list(_WAYS)
        self._weights = [weight for _, weight in _WAYS.values()]
        self._number = 0

    def messages(self, count: int) -> Iterator[Sent]:
        rng, remembered = self._rng, self._remembered
        remaining = count
        while remaining > 0:
            # Drawn many at a time: half the cost of drawing each by itself.
            for how in rng.choices(self._ways, self._weights, k=min(1000, remaining)):
                remaining -= 1
                sent = self._make(how)
                if len(remembered) < _REMEMBERED:
                    remembered.append(sent)
                elif rng.random() < 0.1:
                    remembered[int(rng.random() * _REMEMBERED)] = sent
                yield sent

    def _make(self, how: str) -> Sent:
        rng = self._rng
        self._number += 1
        if self._number % _HUGE_ONE_IN == _HUGE_ONE_IN // 4:
            return self._huge()
        if how == "again" and self._remembered:
            return rng.choice(self._remembered)._replace(how=how)
        template = self._templates[int(rng.random() * len(self._templates))]
        number = self._number
        if how == "untouched":
            self._originals.append((number, template))
        elif how == "contradicting" and self._originals:  # the key of an event not long ago, for other usage
            number, template = rng.choice(self._originals)
        value = template.numbered(number)
        way = _WAYS[how][0]
        if way is not None:
            return Sent(way(rng, value, template), template.account, template.partition, how)
        return self._transported(how, value, template)

    def _transported(self, how: str, value: bytes, template: Template) -> Sent:
        """What is no change of an event's bytes, but another body, key, partition or header, or none."""
        rng, account = self._rng, template.account
        sent = Sent(value, account, template.partition, how)
        match how:
            case "tombstone":
                return sent._replace(value=None)
            case "wrong key":
                return sent._replace(key=rng.choice((None, b"", b"acct-99", b"\0", account[:-1], b"k" * 300)))
            case "wrong partition":
                return sent._replace(partition=rng.randrange(self._partitions))
            case "headers":
                return sent._replace(headers=(("traceparent", b"00-\xff\0"), ("", rng.randbytes(20))))
            case "foreign body":
                return sent._replace(value=rng.choice(self._foreign))
            case "foreign frame":
                schema_id = rng.choice((0, 2, 3, 4, 5, 6, 7, 99, 2**31, 2**32 - 1))
                return sent._replace(value=bytes((0,)) + schema_id.to_bytes(4, "big") + value[FRAME_BYTES:])
            case "no frame":
                return sent._replace(
                    value=rng.choice((b"", b"\0", value[:FRAME_BYTES], value[FRAME_BYTES:], b"\1" + value[1:], b"{}"))
                )
            case "noise":
                return sent._replace(value=rng.choice((b"", *FRAMES)) + rng.randbytes(rng.randrange(200)))
        return sent

    def _huge(self) -> Sent:
        """Over the limit of an event, some of them over what a letter holds; the broker sees them compressed."""
        template = self._templates[0]
        hugest = self._number // _HUGE_ONE_IN % _HUGEST_ONE_IN == 0
        size = _HUGEST_BYTES if hugest else EVENT_BYTES_MAX
        body, at = template.numbered(self._number), template.map[0]
        big = body[:at] + varint(1) + varint(4) + b"blob" + varint(size) + b"x" * size + body[template.map[1] - 1 :]
        return Sent(big, template.account, template.partition, "huge")


# -- ways to damage an event -------------------------------------------------------------------------------------------


def _flip(rng: Random, value: bytes, _: Template) -> bytes:
    data = bytearray(value)
    for _flipped in range(1 + int(rng.random() * 3)):
        data[int(rng.random() * len(data))] ^= 1 << int(rng.random() * 8)
    return bytes(data)


def _cut(rng: Random, value: bytes, _: Template) -> bytes:
    return value[: int(rng.random() * len(value))]


def _insert(rng: Random, value: bytes, _: Template) -> bytes:
    at = int(rng.random() * (len(value) + 1))
    return value[:at] + rng.randbytes(1 + int(rng.random() * 8)) + value[at:]


def _delete(rng: Random, value: bytes, _: Template) -> bytes:
    at = int(rng.random() * len(value))
    return value[:at] + value[at + 1 + int(rng.random() * 8) :]


def _double(rng: Random, value: bytes, _: Template) -> bytes:
    start = int(rng.random() * len(value))
    end = start + 1 + int(rng.random() * 40)
    return value[:end] + value[start:end] + value[end:]


_BOMBS = tuple(
    varint(n) for n in (-1, -2, -64, -(2**31), -(2**63), 1000, 2**20, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1)
)
_DEEP = (b"\x80" * 9 + b"\x01", b"\x80" * 10 + b"\x01", b"\xff" * 9 + b"\x01", b"\xff" * 9 + b"\x7f", b"\xff" * 40)


def _at_a_length(rng: Random, value: bytes, template: Template, instead: Callable[[bytes], bytes]) -> bytes:
    start, end = template.lengths[int(rng.random() * len(template.lengths))]
    return value[:start] + instead(value[start:end]) + value[end:]


def _length_bomb(rng: Random, value: bytes, template: Template) -> bytes:
    return _at_a_length(rng, value, template, lambda _: rng.choice(_BOMBS))


def _deep_varint(rng: Random, value: bytes, template: Template) -> bytes:
    return _at_a_length(rng, value, template, lambda _: rng.choice(_DEEP))


def _padded_varint(rng: Random, value: bytes, template: Template) -> bytes:
    def padded(length: bytes) -> bytes:
        return length[:-1] + bytes((length[-1] | 128,)) + b"\x80" * rng.randrange(9 - len(length)) + b"\0"

    return _at_a_length(rng, value, template, padded)


def _blocks(rng: Random, value: bytes, template: Template) -> bytes:
    """The properties in other blocks: counted or with their sizes, which may be wrong. Often still good."""
    first, end = template.map
    starts, size = (*template.entries, end - 1), len(template.entries)
    out, at = bytearray(), 0
    if rng.random() < 0.05:
        out += varint(-(2**63)) + varint(0)
    while at < size:
        upto = at + 1 + int(rng.random() * (size - at))
        entries = value[starts[at] : starts[upto]]
        if rng.random() < 0.7:
            told = len(entries) if rng.random() < 0.8 else rng.choice((0, -1, len(entries) + 1, 2**40, -(2**63)))
            out += varint(at - upto) + varint(told)
        else:
            out += varint(upto - at)
        out += entries
        at = upto
    return value[:first] + out + value[end - 1 :]


def _property_twice(rng: Random, value: bytes, template: Template) -> bytes:
    first, end = template.map
    starts = (*template.entries, end - 1)
    which = int(rng.random() * len(template.entries))
    entries = value[template.entries[0] : end - 1] + value[starts[which] : starts[which + 1]]
    return value[:first] + varint(len(starts)) + entries + value[end - 1 :]


_NOT_UTF8 = (b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf5\x80\x80\x80", b"\xe2\x82", b"\x80")


def _in_a_text(rng: Random, value: bytes, template: Template, what: bytes) -> bytes:
    """Over a text's bytes, so that all lengths stay right."""
    start, end = template.texts[int(rng.random() * len(template.texts))]
    at = start + int(rng.random() * (end - start))
    what = what[: end - at]
    return value[:at] + what + value[at + len(what) :]


def _not_utf8(rng: Random, value: bytes, template: Template) -> bytes:
    return _in_a_text(rng, value, template, rng.choice(_NOT_UTF8))


def _nul(rng: Random, value: bytes, template: Template) -> bytes:
    return _in_a_text(rng, value, template, b"\0")


_MEASURES = tuple(
    text.encode()
    for text in (
        *("", " ", "x", "1_000", "1,5", "0x10", "--1", "+", ".", "e", "1e", "1e+", "1 ", "٣", "１２", "²", "½", "一"),
        *("NaN", "nan", "-NaN", "inf", "-Infinity", "sNaN", "1e40", "1e-40", "1" + "0" * 40, "-1", "-0", "-1e-9"),
        *("0", "007", "1.", ".5", "+7", "1e3", "1E2", "2.5e1", "1.000000000", "0.0000000001", "999999999999999999"),
        *("1000000000000000000", "1e17", "1e18", "0e999999999999", "1e999999999999", "1e-999999999999", "9" * 5000),
        *("0." + "0" * 300 + "1", "1." + "0" * 300, "0" * 300 + "5", "12345678.123456789", "1e+0", "0.1e1"),
    )
)


def _number(rng: Random, value: bytes, template: Template) -> bytes:
    return _measuring(rng.choice(_MEASURES), value, template)


def _other_number(rng: Random, value: bytes, template: Template) -> bytes:
    return _measuring(b"%d.5" % rng.randrange(100), value, template)


def _measuring(text: bytes, value: bytes, template: Template) -> bytes:
    start, end = template.measure
    return value[:start] + varint(len(text)) + text + value[end:]


def _time(rng: Random, value: bytes, template: Template) -> bytes:
    start, end = template.time
    now = _read_varint(value, start)[0]
    wild = (0, -1, 2**63 - 1, -(2**63), 253_402_300_800_000_000, -62_135_596_800_000_001, now // 1000, now * 1000)
    day = rng.choice((-90, -36, -20, 25, 60)) * _DAY_US
    at = rng.choice(wild) if rng.random() < 0.5 else now + day
    return value[:start] + varint(max(-(2**63), min(at, 2**63 - 1))) + value[end:]


def _long_text(rng: Random, value: bytes, template: Template) -> bytes:
    """Key, account, type, subject or source empty, or longer than it may be."""
    which = rng.choice((0, 1, 2, 3, -1))
    start, end = template.lengths[which]
    length = _read_varint(value, start)[0]
    text = rng.choice((b"", b"a" * 127, b"a" * 129, b"a" * 256, "ü".encode() * 128, b"a" * 5000))
    return value[:start] + varint(len(text)) + text + value[end + length :]


def _sequence(rng: Random, value: bytes, template: Template) -> bytes:
    last = template.lengths[-1]
    end_of_source = last[1] + _read_varint(value, last[0])[0]
    number = rng.choice((-1, 0, 1, 999, 1000, 10**9, 10**18, 2**63 - 1, -(2**63)))
    return value[:end_of_source] + varint(number)


_Way = Callable[[Random, bytes, Template], bytes]
#: Every way by name, and how often. None: not the bytes, but what is around them (``_transported``).
_WAYS: dict[str, tuple[_Way | None, float]] = {
    "untouched": (None, 20),
    "again": (None, 6),
    "contradicting": (_other_number, 2),
    "headers": (None, 1),
    "wrong key": (None, 0.5),
    "wrong partition": (None, 0.5),
    "tombstone": (None, 1),
    "foreign body": (None, 3),
    "foreign frame": (None, 3),
    "no frame": (None, 2),
    "noise": (None, 3),
    "bits flipped": (_flip, 16),
    "cut off": (_cut, 7),
    "bytes put in": (_insert, 5),
    "bytes taken out": (_delete, 5),
    "slice doubled": (_double, 4),
    "length bomb": (_length_bomb, 4),
    "deep varint": (_deep_varint, 2),
    "padded varint": (_padded_varint, 2),
    "other blocks": (_blocks, 2),
    "property twice": (_property_twice, 2),
    "not UTF-8": (_not_utf8, 2),
    "NUL": (_nul, 2),
    "odd number": (_number, 3),
    "odd time": (_time, 1),
    "odd length of a text": (_long_text, 1),
    "odd sequence": (_sequence, 0.5),
}
WAYS = tuple(_WAYS)


# -- good events -------------------------------------------------------------------------------------------------------


def _templates(rng: Random, now_us: int, partitions: int) -> Iterator[Template]:
    """The demo's requests and some richer ones, as the product's own producer writes them."""
    mapping = ColumnMapping(
        account=ACCOUNTS[0],
        event_type=EVENT_TYPE,
        key=_NUMBER.decode(),
        timestamp="TIMESTAMP",
        properties={"input_tokens": "ContextTokens", "output_tokens": "GeneratedTokens"},
    )
    for usage in islice(read_csv(demo_dir() / "llm_requests_code.csv", mapping), _TEMPLATES):
        assert isinstance(usage, Usage), usage
        happened = _EPOCH + timedelta(microseconds=now_us - rng.randrange(60 * _SECOND_US, 20 * _DAY_US))
        account = STRANGER if rng.random() < 0.002 else rng.choice(ACCOUNTS)
        usage = replace(usage, account=account, timestamp=happened)
        yield _template(rng, _richer(rng, usage) if rng.random() < 0.4 else usage, partitions)


_EPOCH = datetime.fromisoformat("1970-01-01T00:00:00+00:00")
_WORDS = (
    "größe",
    "模型",
    "файл",
    "e\u0301tude",
    "🧾",
    "naïve",
    "report",
    "2026-03",
    "Ω",
    "line\nbreak",
    "tab\there",
    "\\",
)


def _richer(rng: Random, usage: Usage) -> Usage:
    """With long texts, other scripts and many properties."""
    words = [rng.choice(_WORDS) for _ in range(rng.randrange(1, 20))]
    count = rng.randrange(40) if rng.random() < 0.1 else rng.randrange(6)
    more = {f"{rng.choice(_WORDS)}-{number}": " ".join(words[: number + 1]) for number in range(count)}
    return replace(
        usage,
        idempotency_key=f"{rng.choice(_WORDS)}/{_NUMBER.decode()}/{'x' * rng.randrange(100)}",
        subject=" ".join(words) * rng.randrange(1, 4),
        properties={**more, **usage.properties, "file": f"/in/{'/'.join(words)}.pdf"},
    )


def _template(rng: Random, usage: Usage, partitions: int) -> Template:
    account, body, _ = encode(
        usage.account, usage.event_type, usage.properties, usage.timestamp, usage.idempotency_key, usage.subject
    )
    source = source_field(f"api-{rng.randrange(6)}/0123456789ab")
    value = rng.choice(FRAMES) + body + source + varint(rng.randrange(1, 100_000))
    lengths: list[tuple[int, int]] = []
    texts: list[tuple[int, int]] = []

    def text(at: int) -> int:
        size, start = _read_varint(value, at)
        lengths.append((at, start))
        if size:
            texts.append((start, start + size))
        return start + size

    time_at = text(text(text(FRAME_BYTES)))
    _, after_time = _read_varint(value, time_at)
    map_at = text(after_time)
    count, at = _read_varint(value, map_at)
    lengths.append((map_at, at))
    entries, measure = [], (0, 0)
    for _ in range(count):
        entries.append(at)
        value_at = text(at)
        at = text(value_at)
        if value[texts[-2][0] : texts[-2][1]] == b"input_tokens":
            measure = value_at, at
    text(at + 1)
    number_at = value.index(_NUMBER)
    home = partition_of(account, partitions)
    place = (map_at, at + 1)
    time = (time_at, after_time)
    return Template(value, account, home, number_at, tuple(lengths), tuple(texts), place, tuple(entries), measure, time)


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    """A good one, and where it ends."""
    raw = shift = 0
    while True:
        byte = data[at]
        at += 1
        raw |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return raw >> 1 ^ -(raw & 1), at


def _foreign_bodies() -> Sequence[bytes]:
    """Good records of the other topics: as they are, and under the frame of a usage event."""
    entry: dict[str, Any] = {
        "kind": "account",
        "id": "acct-00",
        "version": 1,
        "valid_from": _EPOCH,
        "document": "{}",
        "published_at": _EPOCH,
        "published_by": "fuzz",
    }
    whole = [
        SCHEMAS.encode(RATED, rated_record(account="acct-00")),
        SCHEMAS.encode(RECEIPTS, receipt_record(count=3)),
        SCHEMAS.encode(DEAD_LETTER, letter_record()),
        SCHEMAS.encode(CONTROLS, control_record()),
        SCHEMAS.encode(CATALOG, entry),
    ]
    return [*whole, *(frame + one[FRAME_BYTES:] for one in whole for frame in FRAMES)]
