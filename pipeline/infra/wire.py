"""Avro bytes by hand, for the hot path: usage events are read in place and rated rows are spliced, never re-encoded.

Everything here is stricter than the Avro specification where money wants it so: a length may be written in one way
only. A varint padded with zero groups would let one idempotency key appear as two identities, and be billed twice.
``tests/infra/test_wire.py`` holds this reader against fastavro.
"""

from typing import NamedTuple

from xxhash import xxh3_64_digest, xxh3_128_digest

FRAME_BYTES = 5
IDENTITY_BYTES = 16
PAYLOAD_BYTES = 8
_VARINT_BYTES_MAX = 10
_NUL = b"\0"
#: Set in the first byte of a length that is not one byte long, or negative.
_NOT_SHORT = 0x81
#: Last four bytes of an eight-byte varint → its value from bit 28 on. 100,000 distinct ones are 150 days of time.
_HIGH: dict[bytes, int] = {}
_HIGH_MAX = 100_000


class Malformed(Exception):
    """Bytes that are not a usage event: truncated, padded, a property twice, not UTF-8, or with bytes left over."""


class UnstorableText(Malformed):
    """Well formed, but a text holds a NUL, which no invoice table can."""


class WireEvent(NamedTuple):
    """A usage event read in place. Texts are UTF-8 bytes; time is microseconds since 1970 UTC."""

    identity: bytes  #: 128-bit hash of (account, idempotency key)
    payload: bytes  #: 64-bit hash of event type, timestamp, subject and properties in any order
    key: bytes
    account: bytes
    event_type: bytes
    timestamp_us: int
    properties: dict[bytes, bytes]
    source: bytes
    sequence: int


def read_event(data: bytes) -> WireEvent:
    """Read the framed bytes of a UsageEvent (any schema version so far). Raises Malformed.

    Identity and payload are hashes of canonical bytes: of length-prefixed key and account, and of type, time, subject
    and the sorted property entries, so that map order, source and sequence make no difference (law 1).
    """
    try:
        i = FRAME_BYTES
        n = data[i]
        i += 1
        if n & _NOT_SHORT:
            n, i = _length(data, i, n)
        j = i + (n >> 1)
        key = data[i:j]

        n = data[j]
        i = j + 1
        if n & _NOT_SHORT:
            n, i = _length(data, i, n)
        type_start = i + (n >> 1)
        account = data[i:type_start]

        n = data[type_start]
        i = type_start + 1
        if n & _NOT_SHORT:
            n, i = _length(data, i, n)
        j = i + (n >> 1)
        event_type = data[i:j]

        # A time of today takes eight bytes; the last four change every two minutes and are remembered.
        i = j + 8
        high = _HIGH.get(data[j + 4 : i])
        if high is None or not data[j] & data[j + 1] & data[j + 2] & data[j + 3] & 128:
            n, i = _rest(data, j + 1, data[j])
            _remember_high(data[j + 4 : i])
        else:
            n = data[j] & 127 | (data[j + 1] & 127) << 7 | (data[j + 2] & 127) << 14 | (data[j + 3] & 127) << 21 | high
        timestamp_us = (n >> 1) ^ -(n & 1)

        n = data[i]
        i += 1
        if n & _NOT_SHORT:
            n, i = _length(data, i, n)
        subject_start, map_start = i, i + (n >> 1)

        # Properties: blocks of entries until an empty block; a negative count is followed by the block's size.
        properties: dict[bytes, bytes] = {}
        entries: list[bytes] = []
        n = data[map_start]
        i = map_start + 1
        while n:
            if n > 127:
                n, i = _rest(data, i, n)
            if n & 1:
                size, i = _rest(data, i + 1, data[i])
                if size & 1:
                    raise Malformed("negative size")
                n += 1
            for _ in range(n >> 1):
                start = i
                n = data[i]
                i += 1
                if n & _NOT_SHORT:
                    n, i = _length(data, i, n)
                j = i + (n >> 1)
                name = data[i:j]
                n = data[j]
                i = j + 1
                if n & _NOT_SHORT:
                    n, i = _length(data, i, n)
                j = i + (n >> 1)
                properties[name] = data[i:j]
                entries.append(data[start:j])
                i = j
            n = data[i]
            i += 1

        n = data[i]
        i += 1
        if n & _NOT_SHORT:
            n, i = _length(data, i, n)
        j = i + (n >> 1)
        source = data[i:j]
        n = data[j]
        i = j + 1
        if n > 127:
            n, i = _rest(data, i, n)
        sequence = (n >> 1) ^ -(n & 1)
    except IndexError:
        raise Malformed("truncated") from None
    if i != len(data):
        raise Malformed(f"{len(data) - i} bytes left over")

    if len(properties) != len(entries):  # no writer of maps does that, and readers differ in which one counts
        raise Malformed("with a property name that stands twice")
    entries.sort()
    measures = b"".join(entries)
    named = data[FRAME_BYTES:type_start]
    subject = data[subject_start:map_start]
    plain = (
        named.isascii() and measures.isascii() and event_type.isascii() and subject.isascii() and source.isascii()
    ) and not (_NUL in named or _NUL in measures or _NUL in event_type or _NUL in subject or _NUL in source)
    if not plain:  # a text beyond ASCII, of 64 bytes or more, or empty (their lengths), or a bad one: look closely
        _check_texts(key, account, event_type, subject, source, *properties, *properties.values())
    # tuple.__new__ skips the keyword handling of a named tuple's own constructor: half the cost.
    return _new(
        WireEvent,
        (
            xxh3_128_digest(named),
            xxh3_64_digest(data[type_start:map_start] + measures),
            key,
            account,
            event_type,
            timestamp_us,
            properties,
            source,
            sequence,
        ),
    )


_new = tuple.__new__


def subject_of(data: bytes) -> bytes:
    """The subject in the framed bytes of a UsageEvent that ``read_event`` takes."""
    i = FRAME_BYTES
    for _ in range(3):  # key, account, event type
        n, i = _length(data, i + 1, data[i])
        i += n >> 1
    while data[i] > 127:  # the time
        i += 1
    n, i = _length(data, i + 2, data[i + 1])
    return data[i : i + (n >> 1)]


def _rest(data: bytes, i: int, first: int) -> tuple[int, int]:
    """The varint whose first byte stands before ``i``: its raw (zigzag) value and the position after it."""
    value, shift = first & 127, 7
    byte = first
    end = i + _VARINT_BYTES_MAX - 1
    while byte > 127:
        if i >= end:
            raise Malformed("varint of more than 64 bits")
        byte = data[i]
        i += 1
        value |= (byte & 127) << shift
        shift += 7
    if byte == 0 and shift > 7:
        raise Malformed("padded varint")
    if value >> 64:
        raise Malformed("varint of more than 64 bits")
    return value, i


def _length(data: bytes, i: int, first: int) -> tuple[int, int]:
    """A length whose first byte stands before ``i``, still doubled (zigzag): for those of 64 or more, and bad ones."""
    n = first
    if n > 127:
        n, i = _rest(data, i, first)
    if n & 1:
        raise Malformed("negative length")
    return n, i


def _remember_high(tail: bytes) -> None:
    """Remember what the last four bytes of an eight-byte varint stand for."""
    if len(tail) == 4 and tail[3] < 128 and min(tail[:3]) > 127:
        if len(_HIGH) > _HIGH_MAX:
            _HIGH.clear()
        _HIGH[tail] = _rest(tail, 1, tail[0])[0] << 28


def _check_texts(*texts: bytes) -> None:
    for text in texts:
        try:
            text.decode()
        except UnicodeDecodeError:
            raise Malformed(f"not UTF-8: {text[:40]!r}") from None
        if _NUL in text:
            raise UnstorableText(f"text with a NUL: {text[:40]!r}")


def zigzag(n: int) -> bytes:
    """An Avro int or long."""
    n = n << 1 if n >= 0 else (-n << 1) - 1
    if n < 128:
        return _ONE_BYTE[n]
    if 1 << 14 <= n < 1 << 21:  # most offsets
        return bytes((n & 127 | 128, n >> 7 & 127 | 128, n >> 14))
    out = bytearray()
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    out.append(n)
    return bytes(out)


_ONE_BYTE = [bytes((n,)) for n in range(128)]


def _prefixed(text: bytes) -> bytes:
    return zigzag(len(text)) + text


def text(value: str) -> bytes:
    """An Avro string."""
    return _prefixed(value.encode())


def decimal(n: int) -> bytes:
    """An Avro decimal of an already scaled integer: length, then the shortest big-endian two's complement."""
    size = ((n if n >= 0 else ~n).bit_length() >> 3) + 1
    return _ONE_BYTE[size << 1] + n.to_bytes(size, "big", signed=True)
