"""RatedUsage off the wire, for the sink's hot path: bytes in, one named tuple per row out.

The rater writes an event's rows one after another, all beginning with the same bytes (event, origin, identity, catalog
offset), and an account's rows repeat the same terms (contract to price class). Avro is prefix-free, so bytes that begin
with an already decoded run hold exactly that run: both are decoded once and recognised by ``bytes.startswith``.
``tests/billing/test_rated.py`` holds this reader against fastavro.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, TypeAlias

from pipeline.infra.avro import RATED, Schemas, frame
from pipeline.infra.wire import FRAME_BYTES

PlainRows: type[Any] | None
try:
    from pipeline.billing.fastpath import PlainRows
except ImportError:  # installed without a C compiler: slower, the same in all else
    PlainRows = None

KINDS = ("usage", "void", "correction")
PriceClass: TypeAlias = Literal["running", "per_event", "period"]
#: In the order of the schema's symbols.
PRICE_CLASSES: tuple[PriceClass, ...] = ("running", "per_event", "period")
_IDENTITY_BYTES = 16
#: An Avro long is at most ten groups of seven bits.
_VARINT_BYTES_MAX = 10
#: Terms remembered of all accounts together, about 1 KB each; beyond them it begins anew.
_ALL_TERMS_MAX = 200_000
#: Terms remembered per account: charges times cells and segments. More are decoded anew, at a few microseconds each.
_TERMS_MAX = 256
#: Longest charge and cell, in characters: both stand in the unique index of rows, whose entries are bounded.
_CHARGE_MAX, _CELL_MAX = 200, 400
#: Longest account, in characters, and most bytes of all terms of a row together: they stand in unique indexes too, of
#: invoices and lines. The rater takes accounts of at most 128 bytes; ids of the catalog have at most 128 characters.
_ACCOUNT_MAX, _TERMS_BYTES_MAX = 128, 2_400

#: Times outside are no calendar date to Python, or the month after them is none.
_YEAR_1_US, _YEAR_9999_US = -62_135_596_800_000_000, 253_370_764_800_000_000


_new = tuple.__new__
#: What the fast path takes: times of event and append, account.
_LIMITS = (_YEAR_1_US, _YEAR_9999_US, _ACCOUNT_MAX)


class Malformed(ValueError):
    """Bytes that are not one RatedUsage, or one that Postgres cannot hold."""


class Head(NamedTuple):
    """What all rows of one event share. Times: event in microseconds, append in milliseconds, since 1970 UTC."""

    idempotency_key: str
    account: str
    event_type: str
    timestamp_us: int
    subject: str
    properties: dict[str, str]
    source: str
    sequence: int
    origin_topic: str
    origin_partition: int
    origin_offset: int
    origin_appended_ms: int
    identity: bytes
    catalog_offset: int


@dataclass(frozen=True, slots=True, eq=False)
class Terms:
    """What all rows of an invoice line share; the same bytes, the same object. Times in microseconds since 1970 UTC."""

    contract: str
    plan: str
    plan_version: int
    meter: str
    meter_version: int
    price_version: str
    charge: str
    period_start_us: int
    period_end_us: int
    segment_start_us: int
    cell: str
    currency: str
    price_class: PriceClass = "running"


class Row(NamedTuple):
    """One event priced for one charge. Quantities count 1e-9 of a unit, the amount 1e-12 of the currency: exact.

    What an event adds to its counter's quantity is ``quantity_after - quantity_before``: of a meter that is no sum (a
    maximum, a latest value) that is not what it measured, its ``quantity``.
    """

    head: Head
    terms: Terms
    entry: int
    kind: str
    quantity: int
    quantity_before: int
    quantity_after: int
    amount: int
    late: bool


class Reader:
    """Reads framed RatedUsage. Holds what it decoded last, so one per consumer; not for several threads."""

    def __init__(self, frames: Iterable[bytes], unclassed: Iterable[bytes] = ()) -> None:
        """``unclassed``: frames of the versions from before rows had a price class; all of theirs are running."""
        self._frames = frozenset(frames)
        self._unclassed = frozenset(unclassed)
        self._head_bytes = b"\xff"  # no framed message begins so
        self._head: Head | None = None
        #: Per account, the bytes of terms met so far and what they say; the newest last.
        self._terms: dict[str, dict[bytes, Terms]] = {}
        self._terms_count = 0
        self._plain = PlainRows and PlainRows(Head, Row, KINDS, self._frames, self._terms, _LIMITS)

    def read(self, data: bytes) -> Row:
        """The row of one message. Raises Malformed, saying what was expected and what came."""
        if self._plain is not None:
            row: Row | None = self._plain.read(data)
            if row is not None:
                return row
        try:
            return self._read(data)
        except IndexError:
            raise Malformed(f"expected a RatedUsage, got {len(data)} bytes that end inside one") from None
        except UnicodeDecodeError as error:
            raise Malformed(f"expected UTF-8, got {error.object[:40]!r}") from None

    def _read(self, data: bytes) -> Row:
        if data.startswith(self._head_bytes) and self._head is not None:
            head, i = self._head, len(self._head_bytes)
        else:
            framing = data[:FRAME_BYTES]
            if framing not in self._frames and framing not in self._unclassed:
                raise Malformed(f"expected the frame of a RatedUsage, got {framing.hex() or 'nothing'}")
            head, i = _head(data, FRAME_BYTES)
            self._head, self._head_bytes = head, data[:i]
            if self._plain is not None and framing in self._frames:
                self._plain.met(head, data, i)

        if data[:FRAME_BYTES] in self._unclassed:
            terms, i = _terms(data, i)
        else:
            terms, i = self._classed_terms(head.account, data, i)
        entry, i = _int(data, i)
        kind = data[i]  # enum index, zigzag: 0, 2, 4
        if kind not in (0, 2, 4):
            raise Malformed(f"expected one of {', '.join(KINDS)}, got index byte {kind}")
        quantity, i = _decimal(data, i + 1)
        before, i = _decimal(data, i)
        after, i = _decimal(data, i)
        amount, i = _decimal(data, i)
        late = data[i]
        if late > 1:
            raise Malformed(f"expected a boolean as late, got byte {late}")
        if i + 1 != len(data):
            raise Malformed(f"{len(data) - i - 1} bytes left over after a RatedUsage")
        return _new(Row, (head, terms, entry, KINDS[kind >> 1], quantity, before, after, amount, late == 1))

    def _classed_terms(self, account: str, data: bytes, start: int) -> tuple[Terms, int]:
        known = self._terms.get(account, {})
        for run, terms in reversed(known.items()):  # the newest segment is asked for most
            if data.startswith(run, start):
                return terms, start + len(run)
        terms, i = _terms(data, start)
        price_class = data[i]  # enum index, zigzag: 0, 2, 4
        if price_class not in (0, 2, 4):
            raise Malformed(f"expected one of {', '.join(PRICE_CLASSES)}, got index byte {price_class}")
        terms = replace(terms, price_class=PRICE_CLASSES[price_class >> 1])
        self._remember(account, data[start : i + 1], terms)
        return terms, i + 1

    def _remember(self, account: str, run: bytes, terms: Terms) -> None:
        if self._terms_count >= _ALL_TERMS_MAX:
            self._terms.clear()
            self._terms_count = 0
        known = self._terms.setdefault(account, {})
        if len(known) >= _TERMS_MAX:
            del known[next(iter(known))]
            self._terms_count -= 1
        known[run] = terms
        self._terms_count += 1


def reader(schemas: Schemas) -> Reader:
    """A reader of every RatedUsage version known."""
    classed: dict[bool, list[bytes]] = {True: [], False: []}
    for version in schemas.versions:
        if version.subject == RATED:
            classed['"price_class"' in version.text()].append(frame(version.id))
    return Reader(classed[True], classed[False])


def _head(data: bytes, i: int) -> tuple[Head, int]:
    key, i = _text(data, i)
    account, i = _text(data, i)
    event_type, i = _text(data, i)
    timestamp_us, i = _long(data, i)
    subject, i = _text(data, i)
    properties, i = _map(data, i)
    source, i = _text(data, i)
    sequence, i = _long(data, i)
    topic, i = _text(data, i)
    partition, i = _int(data, i)
    offset, i = _long(data, i)
    appended_ms, i = _long(data, i)
    identity = data[i : i + _IDENTITY_BYTES]
    catalog_offset, i = _long(data, i + _IDENTITY_BYTES)
    _check_nul(key, account, event_type, subject, source, *properties, *properties.values())
    _check_time(timestamp_us)
    _check_time(appended_ms * 1000)
    if len(account) > _ACCOUNT_MAX:
        raise Malformed(f"expected an account of at most {_ACCOUNT_MAX} characters, got {len(account)}")
    # tuple.__new__ skips the keyword handling of a named tuple's own constructor: half the cost.
    head = _new(
        Head,
        (
            key,
            account,
            event_type,
            timestamp_us,
            subject,
            properties,
            source,
            sequence,
            topic,
            partition,
            offset,
            appended_ms,
            identity,
            catalog_offset,
        ),
    )
    return head, i


def _terms(data: bytes, i: int) -> tuple[Terms, int]:
    start = i
    contract, i = _text(data, i)
    plan, i = _text(data, i)
    plan_version, i = _int(data, i)
    meter, i = _text(data, i)
    meter_version, i = _int(data, i)
    price_version, i = _text(data, i)
    charge, i = _text(data, i)
    period_start_us, i = _long(data, i)
    period_end_us, i = _long(data, i)
    segment_start_us, i = _long(data, i)
    cell, i = _text(data, i)
    currency, i = _text(data, i)
    _check_nul(contract, plan, meter, price_version, charge, cell)
    for time_us in (period_start_us, period_end_us, segment_start_us):
        _check_time(time_us)
    if len(charge) > _CHARGE_MAX or len(cell) > _CELL_MAX:
        raise Malformed(
            f"expected a charge of at most {_CHARGE_MAX} and a cell of at most {_CELL_MAX} characters, "
            f"got {len(charge)} and {len(cell)}"
        )
    if i - start > _TERMS_BYTES_MAX:
        raise Malformed(f"expected terms of at most {_TERMS_BYTES_MAX} bytes, got {i - start}")
    if len(currency) != 3 or not (currency.isascii() and currency.isalpha() and currency.isupper()):
        raise Malformed(f"expected a currency code such as USD, got {currency!r}")
    if period_end_us <= period_start_us:
        raise Malformed(f"expected a period that ends after its start {period_start_us}, got end {period_end_us}")
    return (
        Terms(
            contract,
            plan,
            plan_version,
            meter,
            meter_version,
            price_version,
            charge,
            period_start_us,
            period_end_us,
            segment_start_us,
            cell,
            currency,
        ),
        i,
    )


def _long(data: bytes, i: int) -> tuple[int, int]:
    byte = data[i]
    i += 1
    if byte < 128:
        return (byte >> 1) ^ -(byte & 1), i
    value, shift, end = byte & 127, 7, i + _VARINT_BYTES_MAX - 1
    while byte > 127:
        if i >= end:
            raise Malformed("expected a long of at most 64 bits, got a longer one")
        byte = data[i]
        i += 1
        value |= (byte & 127) << shift
        shift += 7
    if value >> 64:
        raise Malformed("expected a long of at most 64 bits, got a longer one")
    return (value >> 1) ^ -(value & 1), i


def _int(data: bytes, i: int) -> tuple[int, int]:
    value, i = _long(data, i)
    if not -(2**31) <= value < 2**31:
        raise Malformed(f"expected an int of 32 bits, got {value}")
    return value, i


def _text(data: bytes, i: int) -> tuple[str, int]:
    size, i = _long(data, i)
    if size < 0:
        raise Malformed(f"expected a length of 0 or more, got {size}")
    end = i + size
    return data[i:end].decode(), end


def _map(data: bytes, i: int) -> tuple[dict[str, str], int]:
    """Blocks of entries until an empty block; a negative count is followed by the block's size in bytes."""
    entries: dict[str, str] = {}
    while True:
        count, i = _long(data, i)
        if count == 0:
            return entries, i
        if count < 0:
            _, i = _long(data, i)
            count = -count
        for _ in range(count):
            name, i = _text(data, i)
            entries[name], i = _text(data, i)


def _decimal(data: bytes, i: int) -> tuple[int, int]:
    size = data[i]
    if size & 1 or size > 64:  # 38 digits take 16 bytes
        raise Malformed(f"expected a decimal of at most 32 bytes, got length byte {size}")
    end = i + 1 + (size >> 1)
    return int.from_bytes(data[i + 1 : end], "big", signed=True), end


def _check_nul(*texts: str) -> None:
    if "\0" in "".join(texts):
        raise Malformed("expected text without the character NUL, which PostgreSQL cannot hold")


def _check_time(at_us: int) -> None:
    if not _YEAR_1_US <= at_us < _YEAR_9999_US:
        raise Malformed(f"expected a time in the years 1 to 9998, got {at_us} microseconds since 1970")
