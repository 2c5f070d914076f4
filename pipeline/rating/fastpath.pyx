# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
# cython: allow_none_for_extension_args=False
"""The plain way of a usage event through ``accept``, ``enrich`` and ``rate``, compiled: most of a rater's time goes here.

Takes what is plain and stops at the first record that is not: it refuses nothing, names no reason and knows no rule that
the Python beside it does not. Each stage goes on from ``start`` and returns where it stopped; the caller takes that
one record in Python and calls again. So whatever this file does not do is slow, never wrong, and Tally runs without it
(no C compiler at installation). ``tests/rating/test_fastpath.py`` holds both ways against each other.

The GIL is held throughout; Python runs only where a record, a price, a measure or a rule is asked. What a ``PyObject*``
or a ``char*`` points at is therefore borrowed over no such call, unless a variable here, or an argument, holds it.
"""

from cpython.bytearray cimport PyByteArray_AS_STRING
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.dict cimport PyDict_GetItem, PyDict_SetItem
from cpython.list cimport PyList_GET_ITEM, PyList_GET_SIZE
from cpython.object cimport PyObject
from cpython.ref cimport Py_INCREF
from cpython.tuple cimport PyTuple_GET_ITEM, PyTuple_GET_SIZE, PyTuple_New, PyTuple_SET_ITEM
from libc.stdint cimport int64_t, uint8_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp, memcpy

import os

import cython
from xxhash import xxh3_64_digest, xxh3_128_digest

from pipeline.core.usage import ParkedRecord
from pipeline.infra.wire import decimal

cdef extern from "Python.h":
    int64_t PyLong_AsLongLongAndOverflow(object, int*) except? -1
    ctypedef long long int128_t "__int128"
    int64_t INT64_MAX
    int64_t INT64_MIN
    Py_ssize_t PY_SSIZE_T_MAX
    object PyUnicode_DecodeUTF8(const char*, Py_ssize_t, const char*)

cdef enum:
    #: events with more properties go the Python way
    PROPERTIES_MAX = 32
    FRAME_BYTES = 5
    #: length byte and 16 bytes: any decimal of the row
    DECIMAL_BYTES_MAX = 17
    #: prices with more tiers are computed in Python
    TIERS_MAX = 16
    #: digits of a whole number that still fits into 64 bits as units of 1e-9
    DIGITS_MAX = 9
    #: two varints
    HEAD_BYTES_MAX = 20
    #: as in ``wire``
    IDENTITY_BYTES = 16
    PAYLOAD_BYTES = 8

cdef object _Parked = ParkedRecord


cdef struct Span:
    Py_ssize_t start
    Py_ssize_t end


cdef struct Entry:
    # A property: its name with its length, and its value with its own behind that.
    Py_ssize_t start
    Py_ssize_t name_end
    Py_ssize_t end


@cython.final
@cython.no_gc
@cython.freelist(4096)
cdef class PlainEvent:
    """An ``Event`` of ``core.usage`` that keeps its texts where they came: they are made into objects when asked for."""

    cdef readonly object record
    cdef readonly bytes account, event_type
    cdef readonly int64_t timestamp_us
    cdef bytes value
    cdef int64_t appended_ms
    cdef Span key_span, subject_span
    #: Where the entries of its properties begin, and how many there are.
    cdef Py_ssize_t properties_at, properties_count
    cdef uint8_t[IDENTITY_BYTES] identity_bytes
    cdef uint8_t[PAYLOAD_BYTES] payload_bytes
    cdef dict made_properties

    @property
    def identity(self):
        return PyBytes_FromStringAndSize(<const char*>self.identity_bytes, IDENTITY_BYTES)

    @property
    def payload(self):
        return PyBytes_FromStringAndSize(<const char*>self.payload_bytes, PAYLOAD_BYTES)

    @property
    def key(self):
        return _slice(self.data(), self.key_span)

    @property
    def properties(self):
        return self.all_properties()

    cdef inline const uint8_t* data(self) noexcept:
        return <const uint8_t*>PyBytes_AS_STRING(self.value)

    cdef dict all_properties(self):
        cdef const uint8_t* data = self.data()
        cdef Py_ssize_t i, at = self.properties_at
        cdef Span name, value
        if self.made_properties is None:
            made = {}
            for i in range(self.properties_count):
                _next_text(data, &at, &name)
                _next_text(data, &at, &value)
                made[_slice(data, name)] = _slice(data, value)
            self.made_properties = made
        return self.made_properties

    cdef bint find(self, bytes wanted, Span* value) noexcept:
        """Where the value of a property stands; False without one."""
        cdef const uint8_t* data = self.data()
        cdef const char* text = PyBytes_AS_STRING(wanted)
        cdef Py_ssize_t i, at = self.properties_at, size = PyBytes_GET_SIZE(wanted)
        cdef Span name
        for i in range(self.properties_count):
            _next_text(data, &at, &name)
            _next_text(data, &at, value)
            if name.end - name.start == size and memcmp(data + name.start, text, size) == 0:
                return True
        return False

    def __iter__(self):
        named = self.key, self.account, self.event_type, self.timestamp_us, self.properties
        return iter((self.record, self.identity, self.payload, *named))

    def __eq__(self, other):
        if not isinstance(other, (PlainEvent, tuple)):
            return NotImplemented
        return tuple(self) == tuple(other)


cdef inline void _next_text(const uint8_t* data, Py_ssize_t* at, Span* span) noexcept nogil:
    """The next text of a message that was found well formed."""
    cdef int64_t length = 0
    _varint(data, PY_SSIZE_T_MAX, at, &length)
    span.start = at[0]
    span.end = at[0] + length
    at[0] = span.end


cdef class PlainNumber:
    """Measures by a property as it stands: plain digits here, all else by ``exact``, the meter's own function."""

    cdef bytes key
    cdef object exact

    def __init__(self, bytes key, object exact):
        self.key = key
        self.exact = exact

    cdef object of(self, PlainEvent event):
        cdef Span found
        cdef Py_ssize_t i
        cdef int64_t value = 0
        cdef const uint8_t* data = event.data()
        if not event.find(self.key, &found) or not 0 < found.end - found.start <= DIGITS_MAX:
            return self.exact(event.all_properties())
        for i in range(found.start, found.end):
            if not 48 <= data[i] <= 57:
                return self.exact(event.all_properties())
            value = value * 10 + data[i] - 48
        return value * 1_000_000_000

    def __call__(self, dict properties):
        return self.exact(properties)


cdef class PlainLines:
    """Prices by ``charges.Lines`` in 128 bits; what does not fit by ``exact``, the charge's own function."""

    cdef object exact, at_zero
    cdef int64_t included, divisor
    cdef int tiers
    cdef int64_t[TIERS_MAX] bounds
    cdef int64_t[TIERS_MAX] factors
    cdef int128_t[TIERS_MAX] offsets

    def __init__(self, object lines, object exact):
        """Raises OverflowError for lines that 64 bits, or 127 for the offsets, do not hold."""
        included, self.at_zero, bounds, factors, offsets, divisor = lines
        self.exact = exact
        self.included, self.divisor, self.tiers = included, divisor, len(factors)
        if self.tiers > TIERS_MAX:
            raise OverflowError
        for i in range(self.tiers):
            # A quantity that fits lies below any bound that does not.
            self.bounds[i] = min(bounds[i], INT64_MAX) if i < self.tiers - 1 else INT64_MAX
            self.factors[i] = factors[i]
            if not -(1 << 126) < offsets[i] < 1 << 126:
                raise OverflowError
            # In two halves, as Cython knows no int of 128 bits. Not shifted: the upper one may be negative.
            self.offsets[i] = (
                <int128_t><int64_t>(offsets[i] >> 63) * (<int128_t>1 << 63) + <int64_t>(offsets[i] & INT64_MAX)
            )

    cdef object of(self, object quantity):
        cdef int overflow = 0
        cdef int64_t n = PyLong_AsLongLongAndOverflow(quantity, &overflow)
        cdef int tier = 0
        cdef int128_t cost
        if overflow:
            return self.exact(quantity)
        if n <= self.included:
            return self.at_zero
        while n > self.bounds[tier]:
            tier += 1
        # At most 2**126 each, so the sum fits. Costs are never negative: C, which cuts off, divides as Python does.
        cost = (<int128_t>n * self.factors[tier] + self.offsets[tier]) // self.divisor
        if cost > INT64_MAX:
            return self.exact(quantity)
        return <int64_t>cost

    def __call__(self, quantity):
        return self.of(quantity)


cdef inline bint _varint(const uint8_t* data, Py_ssize_t size, Py_ssize_t* at, int64_t* value) noexcept nogil:
    """A zigzag varint in its one right form. False: padded, too long, or cut off."""
    cdef uint64_t raw = 0
    cdef int shift = 0
    cdef Py_ssize_t i = at[0]
    cdef uint8_t byte
    while i < size and shift < 63:
        byte = data[i]
        i += 1
        raw |= <uint64_t>(byte & 127) << shift
        if byte < 128:
            if byte == 0 and shift > 0:
                return False
            at[0] = i
            value[0] = <int64_t>(raw >> 1) ^ -<int64_t>(raw & 1)
            return True
        shift += 7
    return False


cdef inline bint _text(const uint8_t* data, Py_ssize_t size, Py_ssize_t* at, Span* span, bint* ascii) noexcept nogil:
    """A string without NUL. False: malformed, or not plain. Clears ``ascii`` where a byte is beyond it."""
    cdef int64_t length
    cdef Py_ssize_t i
    if not _varint(data, size, at, &length) or length < 0 or length > size - at[0]:
        return False
    span.start = at[0]
    span.end = at[0] + length
    at[0] = span.end
    for i in range(span.start, span.end):
        if data[i] == 0:
            return False
        if data[i] > 127:
            ascii[0] = False
    return True


cdef inline bytes _slice(const uint8_t* data, Span span):
    return PyBytes_FromStringAndSize(<const char*>data + span.start, span.end - span.start)


cdef inline bytes _again(const uint8_t* data, Span span, object last):
    """The text as bytes: the object made of the same text before, if ``last`` is that, which saves making another."""
    cdef Py_ssize_t size = span.end - span.start
    if (
        type(last) is bytes
        and PyBytes_GET_SIZE(last) == size
        and memcmp(PyBytes_AS_STRING(last), data + span.start, size) == 0
    ):
        return <bytes>last
    return PyBytes_FromStringAndSize(<const char*>data + span.start, size)


cdef inline bint _is_utf8(const uint8_t* data, Span span):
    try:
        PyUnicode_DecodeUTF8(<const char*>data + span.start, span.end - span.start, NULL)
    except UnicodeDecodeError:
        return False
    return True


cdef inline bint _before(const uint8_t* data, Entry one, Entry other) noexcept nogil:
    """Do the bytes of one sort before those of the other?"""
    cdef Py_ssize_t n = one.end - one.start, m = other.end - other.start
    cdef int order = memcmp(data + one.start, data + other.start, n if n < m else m)
    return order < 0 or (order == 0 and n < m)


cdef inline bint _one_name(const uint8_t* data, Entry one, Entry other) noexcept nogil:
    cdef Py_ssize_t n = one.name_end - one.start
    return n == other.name_end - other.start and memcmp(data + one.start, data + other.start, n) == 0


def accept_plain(
    list records,
    Py_ssize_t start,
    dict frames,
    dict homes,
    long partition,
    bint own_only,
    int64_t latest_us,
    tuple limits,
    list events,
    Arrivals arrivals,
):
    """Decode and check records from ``start`` on, as ``accept`` does; returns the index of the first it did not take.

    ``homes``: the partition of each account met so far. ``latest_us``: no event's time is later. ``limits``: age and
    lead in microseconds, then most bytes of an event, key, account, event type and source.
    """
    cdef int64_t age_max_us = limits[0], ahead_max_us = limits[1]
    cdef Py_ssize_t event_max = limits[2], key_max = limits[3], account_max = limits[4]
    cdef Py_ssize_t type_max = limits[5], source_max = limits[6]
    cdef Py_ssize_t index, count = PyList_GET_SIZE(records), size, at, properties_count, i, k, joined
    cdef int64_t timestamp_us, sequence, block, appended_ms
    cdef const uint8_t* data
    cdef Py_ssize_t properties_at
    cdef Span key, account, event_type, subject, source, named, text
    cdef Entry moved
    cdef Entry[PROPERTIES_MAX] entries
    cdef bint plain, ascii
    cdef object record
    cdef bytes value, account_bytes, measures, digest, frame = None
    cdef bytes type_bytes = b"", source_bytes = b""
    cdef PlainEvent event
    cdef char* out
    cdef PyObject* home

    for index in range(start, count):
        record = <object>PyList_GET_ITEM(records, index)
        given = record.value
        if type(given) is not bytes:
            return index
        value = <bytes>given
        size = PyBytes_GET_SIZE(value)
        data = <const uint8_t*>PyBytes_AS_STRING(value)
        if size <= FRAME_BYTES or size > event_max:
            return index
        if frame is None or memcmp(data, PyBytes_AS_STRING(frame), FRAME_BYTES) != 0:
            frame = value[:FRAME_BYTES]
            if PyDict_GetItem(frames, frame) is NULL:
                return index

        at = FRAME_BYTES
        ascii = True
        if not (
            _text(data, size, &at, &key, &ascii)
            and _text(data, size, &at, &account, &ascii)
            and _text(data, size, &at, &event_type, &ascii)
            and _varint(data, size, &at, &timestamp_us)
            and _text(data, size, &at, &subject, &ascii)
        ):
            return index
        # Properties: one block of entries and the empty block behind it; none at all is the empty block alone.
        if not _varint(data, size, &at, &block) or block < 0 or block > PROPERTIES_MAX:
            return index
        properties_count, properties_at = block, at
        for i in range(properties_count):
            entries[i].start = at
            if not _text(data, size, &at, &text, &ascii):
                return index
            entries[i].name_end = at
            if not _text(data, size, &at, &text, &ascii):
                return index
            entries[i].end = at
        if properties_count:
            if at >= size or data[at] != 0:
                return index
            at += 1
        if not _text(data, size, &at, &source, &ascii) or not _varint(data, size, &at, &sequence) or at != size:
            return index
        if not ascii:
            plain = (
                _is_utf8(data, key)
                and _is_utf8(data, account)
                and _is_utf8(data, event_type)
                and _is_utf8(data, subject)
                and _is_utf8(data, source)
            )
            at = properties_at
            for i in range(2 * properties_count):
                _next_text(data, &at, &text)
                plain = plain and _is_utf8(data, text)
            if not plain:
                return index

        appended_ms = record.timestamp
        # Within a quarter of what 64 bits hold; a varint of nine bytes, within half: their difference fits.
        if not -INT64_MAX // 4000 < appended_ms < INT64_MAX // 4000:
            return index
        if not (
            -age_max_us <= timestamp_us - appended_ms * 1000 <= ahead_max_us
            and timestamp_us <= latest_us
            and 0 < key.end - key.start <= key_max
            and 0 < account.end - account.start <= account_max
            and 0 < event_type.end - event_type.start <= type_max
            and source.end - source.start <= source_max
            and sequence >= 0
        ):
            return index
        message_key = record.key
        account_bytes = _again(data, account, message_key)
        home = PyDict_GetItem(homes, account_bytes)
        if home is NULL or <long>(<object>home) != partition:
            return index
        if not own_only and account_bytes is not message_key:
            return index

        # Canonical bytes of the payload: type, time and subject as they stand, the entries sorted.
        for i in range(1, properties_count):
            moved = entries[i]
            k = i
            while k > 0 and _before(data, moved, entries[k - 1]):
                entries[k] = entries[k - 1]
                k -= 1
            entries[k] = moved
        joined = subject.end - account.end
        for i in range(properties_count):
            # Sorted, those of one name are neighbours.
            if i > 0 and _one_name(data, entries[i - 1], entries[i]):
                return index
            joined += entries[i].end - entries[i].start
        measures = PyBytes_FromStringAndSize(NULL, joined)
        out = PyBytes_AS_STRING(measures)
        out = _put(out, <const char*>data + account.end, subject.end - account.end)
        for i in range(properties_count):
            out = _put(out, <const char*>data + entries[i].start, entries[i].end - entries[i].start)

        named.start, named.end = FRAME_BYTES, account.end
        type_bytes = _again(data, event_type, type_bytes)
        source_bytes = _again(data, source, source_bytes)
        arrivals.note(source_bytes, sequence)
        event = PlainEvent.__new__(PlainEvent)
        event.record, event.value = record, value
        event.account, event.event_type = account_bytes, type_bytes
        event.timestamp_us, event.appended_ms = timestamp_us, appended_ms
        event.key_span, event.subject_span = key, subject
        event.properties_at, event.properties_count = properties_at, properties_count
        digest = xxh3_128_digest(_slice(data, named))
        memcpy(event.identity_bytes, PyBytes_AS_STRING(digest), IDENTITY_BYTES)
        digest = xxh3_64_digest(measures)
        memcpy(event.payload_bytes, PyBytes_AS_STRING(digest), PAYLOAD_BYTES)
        events.append(event)
    return count


cdef inline Py_ssize_t _put_varint(int64_t value, uint8_t* out) noexcept nogil:
    cdef uint64_t raw = (<uint64_t>value << 1) ^ <uint64_t>(value >> 63)
    cdef Py_ssize_t n = 0
    while raw > 127:
        out[n] = <uint8_t>(raw & 127 | 128)
        raw >>= 7
        n += 1
    out[n] = <uint8_t>raw
    return n + 1


cdef inline Py_ssize_t _put_decimal(object value, uint8_t* out) except -1:
    """An Avro decimal, as ``wire.decimal``: length, then the shortest big-endian two's complement."""
    cdef int overflow = 0
    cdef int64_t n = PyLong_AsLongLongAndOverflow(value, &overflow)
    cdef Py_ssize_t size, i
    cdef uint64_t bits
    cdef bytes big
    if overflow:
        big = decimal(value)
        if PyBytes_GET_SIZE(big) > DECIMAL_BYTES_MAX:
            raise OverflowError("a number of the rated row has more digits than it holds")
        memcpy(out, PyBytes_AS_STRING(big), PyBytes_GET_SIZE(big))
        return PyBytes_GET_SIZE(big)
    bits = <uint64_t>(n if n >= 0 else ~n)
    size = 1
    while size < 8 and bits >> (8 * size - 1):
        size += 1
    out[0] = <uint8_t>(size << 1)
    for i in range(size):
        out[size - i] = <uint8_t>(<uint64_t>n >> (8 * i))
    return size + 1


def enrich_plain(list events, Py_ssize_t start, dict spans, list known, list terms_of):
    """Add events and their terms already looked up, as ``enrich`` does; returns the index of the first without."""
    cdef Py_ssize_t index, count = PyList_GET_SIZE(events)
    cdef PlainEvent event
    cdef object terms
    cdef PyObject* found
    cdef bint paired

    for index in range(start, count):
        if type(<object>PyList_GET_ITEM(events, index)) is not PlainEvent:
            return index
        event = <PlainEvent>PyList_GET_ITEM(events, index)
        found = PyDict_GetItem(spans, event.account)
        if found is not NULL:
            found = PyDict_GetItem(<dict>found, event.event_type)
        if found is NULL:
            return index
        paired = False
        for terms in <list>found:
            if (
                <int64_t>(<object>PyTuple_GET_ITEM(terms, 0))
                <= event.timestamp_us
                < <int64_t>(<object>PyTuple_GET_ITEM(terms, 1))
            ):
                known.append(event)
                terms_of.append(terms)
                paired = True
                break
        if not paired:
            return index
    return count


cdef class Priced:
    """As ``enrich.Priced``."""

    cdef readonly bytes counter, constant
    cdef readonly object measure, price
    cdef object memo_quantity
    cdef object memo_cost
    cdef bytes memo_encoded

    def __init__(self, bytes counter, bytes constant, object measure, object price):
        self.counter, self.constant = counter, constant
        self.measure, self.price = measure, price
        self.memo_quantity, self.memo_cost, self.memo_encoded = None, 0, b""

    @property
    def memo(self):
        return self.memo_quantity, self.memo_cost, self.memo_encoded

    @memo.setter
    def memo(self, tuple memo):
        # Without giving way in between: a thread that lost the partition may still be at work on it.
        self.memo_quantity, self.memo_cost, self.memo_encoded = memo


cdef class Running:
    """Running quantities as the event at hand has left them so far: what rules read."""

    cdef list moved
    cdef dict totals
    cdef object quantity_of

    def __call__(self, bytes counter):
        cdef tuple change
        cdef PyObject* found
        for change in reversed(self.moved):
            if change[0] == counter:
                return change[1]
        found = PyDict_GetItem(self.totals, counter)
        return self.quantity_of(counter) if found is NULL else <object>found


cdef inline object _counter_met(object split, PlainEvent event):
    """The counter of an event's cell, as ``Split.find`` has it; None for a cell not met before."""
    cdef tuple keys = split.keys, cell
    cdef Py_ssize_t i, count = PyTuple_GET_SIZE(keys)
    cdef bint per_subject = split.per_subject
    cdef Span part
    cdef PyObject* found
    cell = PyTuple_New(count + per_subject)
    for i in range(count):
        if not event.find(<bytes>PyTuple_GET_ITEM(keys, i), &part):
            part.start = part.end = 0
        _set_text(cell, i, event, part)
    if per_subject:
        _set_text(cell, count, event, event.subject_span)
    found = PyDict_GetItem(<dict>split.met, cell)
    return None if found is NULL else <object>found


cdef inline int _set_text(tuple cell, Py_ssize_t at, PlainEvent event, Span span) except -1:
    cdef bytes text = _slice(event.data(), span)
    Py_INCREF(text)  # PyTuple_SET_ITEM takes one reference over
    PyTuple_SET_ITEM(cell, at, text)
    return 0


cdef struct Row:
    # What all rows of an event share, and those of all events of a call.
    const char* frame
    const char* origin
    Py_ssize_t origin_size
    const char* catalog_offset
    Py_ssize_t catalog_offset_size
    uint8_t[HEAD_BYTES_MAX] head
    Py_ssize_t head_size
    bint late


cdef inline tuple _row(
    const Row* row, PlainEvent event, bytes constant, object quantity, bytes before, bytes after, object amount
):
    """The Kafka key and the bytes of a rated row."""
    cdef uint8_t[DECIMAL_BYTES_MAX] quantity_out
    cdef uint8_t[DECIMAL_BYTES_MAX] amount_out
    cdef Py_ssize_t value_size = PyBytes_GET_SIZE(event.value) - FRAME_BYTES
    cdef Py_ssize_t quantity_size = _put_decimal(quantity, quantity_out)
    cdef Py_ssize_t amount_size = _put_decimal(amount, amount_out)
    cdef Py_ssize_t size = (
        FRAME_BYTES + value_size + row.origin_size + row.head_size + IDENTITY_BYTES + row.catalog_offset_size
        + PyBytes_GET_SIZE(constant) + quantity_size + PyBytes_GET_SIZE(before) + PyBytes_GET_SIZE(after)
        + amount_size + 1
    )
    cdef bytes made = PyBytes_FromStringAndSize(NULL, size)
    cdef char* out = PyBytes_AS_STRING(made)
    out = _put(out, row.frame, FRAME_BYTES)
    out = _put(out, PyBytes_AS_STRING(event.value) + FRAME_BYTES, value_size)
    out = _put(out, row.origin, row.origin_size)
    out = _put(out, <const char*>row.head, row.head_size)
    out = _put(out, <const char*>event.identity_bytes, IDENTITY_BYTES)
    out = _put(out, row.catalog_offset, row.catalog_offset_size)
    out = _put(out, PyBytes_AS_STRING(constant), PyBytes_GET_SIZE(constant))
    out = _put(out, <const char*>quantity_out, quantity_size)
    out = _put(out, PyBytes_AS_STRING(before), PyBytes_GET_SIZE(before))
    out = _put(out, PyBytes_AS_STRING(after), PyBytes_GET_SIZE(after))
    out = _put(out, <const char*>amount_out, amount_size)
    out[0] = row.late
    return event.account, made


cdef bint _rate_counter(
    Priced priced,
    PlainEvent event,
    object quantity,
    dict totals,
    object quantity_of,
    object fits,
    const Row* row,
    list rows,
    list moved,
) except -1:
    """Add the row of a counter, and where it moved: to ``moved``, or to ``totals`` at once. False: not plain."""
    cdef PyObject* found = PyDict_GetItem(totals, priced.counter)
    cdef object before = quantity_of(priced.counter) if found is NULL else <object>found
    cdef object after, cost, after_cost, price = priced.price
    cdef bytes before_encoded, after_encoded
    cdef uint8_t[DECIMAL_BYTES_MAX] after_out
    if before is None:
        before, cost, before_encoded = 0, 0, b"\x02\x00"
    elif before is priced.memo_quantity or before == priced.memo_quantity:
        cost, before_encoded = priced.memo_cost, priced.memo_encoded
    else:
        cost, before_encoded = price(before), decimal(before)
        if cost is not None and not -fits < cost < fits:
            return False
    after = before + quantity
    after_cost = (<PlainLines>price).of(after) if type(price) is PlainLines else price(after)
    if cost is None or after_cost is None:
        return False
    if not (-fits < after < fits and -fits < after_cost < fits):
        return False
    # Their difference fits too: no cost is negative.
    after_encoded = PyBytes_FromStringAndSize(<const char*>after_out, _put_decimal(after, after_out))
    rows.append(_row(row, event, priced.constant, quantity, before_encoded, after_encoded, after_cost - cost))
    priced.memo_quantity, priced.memo_cost, priced.memo_encoded = after, after_cost, after_encoded
    if moved is None:
        PyDict_SetItem(totals, priced.counter, after)
    else:
        moved.append((priced.counter, after))
    return True


cdef bint _rate_by_rule(
    object priced, PlainEvent event, object quantity, Running running, object step_type, object fits, const Row* row, list rows
) except -1:
    """As ``_rate_counter``, for a counter that events move by a rule."""
    step = priced.rule(quantity, event.all_properties(), running)
    if type(step) is not step_type:
        return False
    before, after, amount, changes = step
    if not (-fits < after < fits and -fits < amount < fits):
        return False
    rows.append(_row(row, event, priced.constant, quantity, decimal(before), decimal(after), amount))
    running.moved.extend(changes)
    return True


def rate_plain(
    list known,
    list terms_of,
    Py_ssize_t start,
    dict totals,
    object quantity_of,
    dict frames,
    bytes origin,
    bytes catalog_offset,
    object fits,
    tuple kinds,
    list rows,
    list events,
):
    """Price events from ``start`` on, as ``rate`` does; returns the index of the first it did not take.

    ``origin`` is the encoded topic and partition of records that come from ``usage.events``. ``kinds`` are the types
    ``Split``, ``Ruled`` and ``Step``.
    """
    cdef Py_ssize_t index, count = PyList_GET_SIZE(known), charges, rows_before, i
    cdef PlainEvent event
    cdef tuple terms, charged
    cdef object split_type = kinds[0], ruled_type = kinds[1], step_type = kinds[2]
    cdef object priced, measure, quantity
    cdef bytes frame = None, row_frame
    cdef Running running = None
    cdef Row row
    cdef list moved = []
    cdef bint plain
    cdef PyObject* found

    row.origin, row.origin_size = PyBytes_AS_STRING(origin), PyBytes_GET_SIZE(origin)
    row.catalog_offset, row.catalog_offset_size = PyBytes_AS_STRING(catalog_offset), PyBytes_GET_SIZE(catalog_offset)
    for index in range(start, count):
        if type(<object>PyList_GET_ITEM(known, index)) is not PlainEvent:
            return index
        event = <PlainEvent>PyList_GET_ITEM(known, index)
        if type(event.record) is _Parked:
            return index
        terms = <tuple>PyList_GET_ITEM(terms_of, index)
        charged = <tuple>PyTuple_GET_ITEM(terms, 3)
        charges = PyTuple_GET_SIZE(charged)
        rows_before = PyList_GET_SIZE(rows)
        if frame is None or memcmp(PyBytes_AS_STRING(event.value), PyBytes_AS_STRING(frame), FRAME_BYTES) != 0:
            frame = event.value[:FRAME_BYTES]
            found = PyDict_GetItem(frames, frame)
            if found is NULL:
                return index
            row_frame = <bytes>found
            row.frame = PyBytes_AS_STRING(row_frame)
        row.head_size = _put_varint(event.record.offset, row.head)
        row.head_size += _put_varint(event.appended_ms, row.head + row.head_size)
        row.late = event.appended_ms * 1000 >= <int64_t>(<object>PyTuple_GET_ITEM(terms, 2))
        plain = True
        for i in range(charges):
            priced = <object>PyTuple_GET_ITEM(charged, i)
            measure = (<Priced>priced).measure if type(priced) is Priced else priced.measure
            if type(measure) is PlainNumber:
                quantity = (<PlainNumber>measure).of(event)
            else:
                quantity = measure(event.all_properties())
            if quantity is None:
                continue
            if type(quantity) is not int:
                plain = False
                break
            if type(priced) is split_type:
                priced = _counter_met(priced, event)
            if type(priced) is Priced:
                plain = _rate_counter(
                    <Priced>priced, event, quantity, totals, quantity_of, fits, &row, rows, None if charges == 1 else moved
                )
            elif type(priced) is ruled_type:
                if running is None:
                    running = Running()
                    running.moved, running.totals, running.quantity_of = moved, totals, quantity_of
                plain = _rate_by_rule(priced, event, quantity, running, step_type, fits, &row, rows)
            else:
                plain = False
            if not plain:
                break
        if not plain or PyList_GET_SIZE(rows) == rows_before:
            # All charges or none: the Python way begins anew.
            del rows[rows_before:]
            return index
        for change in moved:
            PyDict_SetItem(totals, change[0], change[1])
        moved.clear()
        events.append(event)
    return count


cdef inline char* _put(char* out, const char* data, Py_ssize_t size) noexcept nogil:
    memcpy(out, data, size)
    return out + size


cdef class Arrivals:
    """As ``arrivals.Arrivals``."""

    cdef dict blocks_of
    cdef int64_t block_size, last_block
    cdef bytes last_source
    #: Into a bytearray of ``blocks_of``, none of which ever changes its size.
    cdef char* last_bits

    def __init__(self, int64_t block_size):
        self.blocks_of, self.block_size, self.last_block = {}, block_size, -1

    cdef int note(self, bytes source, int64_t sequence) except -1:
        cdef int64_t block
        cdef PyObject* found
        cdef bytearray bits
        if sequence <= 0:
            return 0
        block = sequence // self.block_size
        if block != self.last_block or self.last_source is None or source != self.last_source:
            name = (source, block)
            found = PyDict_GetItem(self.blocks_of, name)
            if found is NULL:
                bits = bytearray((self.block_size + 7) // 8)
                PyDict_SetItem(self.blocks_of, name, bits)
            else:
                bits = <bytearray>found
            self.last_block, self.last_source, self.last_bits = block, source, PyByteArray_AS_STRING(bits)
        sequence -= block * self.block_size
        self.last_bits[sequence >> 3] |= <char>(1 << (sequence & 7))
        return 0

    def add(self, bytes source, int64_t sequence):
        self.note(source, sequence)

    def blocks(self):
        return {name: int.from_bytes(bits, "little") for name, bits in self.blocks_of.items()}


def identities(list events):
    """The identity of each event, one behind the other."""
    cdef Py_ssize_t index, count = PyList_GET_SIZE(events)
    cdef bytes block = PyBytes_FromStringAndSize(NULL, count * IDENTITY_BYTES)
    cdef char* out = PyBytes_AS_STRING(block)
    for index in range(count):
        out = _put_identity(out, <object>PyList_GET_ITEM(events, index))
    return block


def entries(list events):
    """Identity and payload of each event, one behind the other."""
    cdef Py_ssize_t index, count = PyList_GET_SIZE(events)
    cdef bytes block = PyBytes_FromStringAndSize(NULL, count * (IDENTITY_BYTES + PAYLOAD_BYTES))
    cdef char* out = PyBytes_AS_STRING(block)
    for index in range(count):
        event = <object>PyList_GET_ITEM(events, index)
        out = _put_identity(out, event)
        if type(event) is PlainEvent:
            out = _put(out, <const char*>(<PlainEvent>event).payload_bytes, PAYLOAD_BYTES)
        else:
            out = _put(out, PyBytes_AS_STRING(event.payload), PAYLOAD_BYTES)
    return block


cdef inline char* _put_identity(char* out, object event) except NULL:
    if type(event) is PlainEvent:
        return _put(out, <const char*>(<PlainEvent>event).identity_bytes, IDENTITY_BYTES)
    return _put(out, PyBytes_AS_STRING(event.identity), IDENTITY_BYTES)


def latest_us(list events):
    """The latest time of any of the events, of which there is one at least."""
    cdef Py_ssize_t index
    cdef int64_t at_us, latest = INT64_MIN
    for index in range(PyList_GET_SIZE(events)):
        event = <object>PyList_GET_ITEM(events, index)
        at_us = (<PlainEvent>event).timestamp_us if type(event) is PlainEvent else event.timestamp_us
        if at_us > latest:
            latest = at_us
    return latest


def latest_arrival_ms(list events):
    """The latest append time of any of the events; 0 without events."""
    cdef Py_ssize_t index
    cdef int64_t at_ms, latest = 0
    for index in range(PyList_GET_SIZE(events)):
        event = <object>PyList_GET_ITEM(events, index)
        at_ms = (<PlainEvent>event).appended_ms if type(event) is PlainEvent else event.record.timestamp
        if at_ms > latest:
            latest = at_ms
    return latest


cdef struct Seen:
    uint64_t head
    uint64_t low
    uint64_t payload


cdef class Recent:
    """As ``recent.Recent``: a table of rows without an object for each, half empty at least."""

    cdef Seen* rows_at
    cdef uint8_t* used
    cdef Py_ssize_t size, slots
    cdef int bits
    #: Secret, so that nobody can choose keys that all go to one place: both halves of a key count, since the hash it
    #: is has no secret, and keys with one half in common can be made.
    cdef uint64_t head_factor, low_factor

    def __cinit__(self):
        cdef bytes secret = os.urandom(16)
        memcpy(&self.head_factor, PyBytes_AS_STRING(secret), 8)
        memcpy(&self.low_factor, PyBytes_AS_STRING(secret) + 8, 8)
        self.head_factor |= 1
        self.low_factor |= 1
        self._room(10)

    def __dealloc__(self):
        free(self.rows_at)
        free(self.used)

    def __len__(self):
        return self.size

    cdef int _room(self, int bits) except -1:
        cdef Seen* old_rows = self.rows_at
        cdef uint8_t* old_used = self.used
        cdef Py_ssize_t i, at, old_slots = self.slots
        cdef Seen* new_rows = <Seen*>calloc(<size_t>1 << bits, sizeof(Seen))
        cdef uint8_t* new_used = <uint8_t*>calloc(<size_t>1 << bits, 1)
        if new_rows is NULL or new_used is NULL:
            free(new_rows)
            free(new_used)
            raise MemoryError
        self.rows_at, self.used, self.bits, self.slots = new_rows, new_used, bits, <Py_ssize_t>1 << bits
        for i in range(old_slots):
            if old_used[i]:
                at = self._find(old_rows[i].head, old_rows[i].low)
                self.rows_at[at], self.used[at] = old_rows[i], 1
        free(old_rows)
        free(old_used)
        return 0

    cdef inline Py_ssize_t _find(self, uint64_t head, uint64_t low) noexcept nogil:
        """The slot where a key stands, or would; ends, since half of the slots are free."""
        cdef Py_ssize_t at = <Py_ssize_t>((head * self.head_factor + low * self.low_factor) >> (64 - self.bits))
        while self.used[at] and (self.rows_at[at].head != head or self.rows_at[at].low != low):
            at = (at + 1) & (self.slots - 1)
        return at

    def add(self, bytes entries):
        cdef Py_ssize_t i, at, count = PyBytes_GET_SIZE(entries) // sizeof(Seen)
        cdef const char* data = PyBytes_AS_STRING(entries)
        cdef Seen row
        while 2 * (self.size + count) > self.slots:
            self._room(self.bits + 1)
        for i in range(count):
            memcpy(&row, data + i * sizeof(Seen), sizeof(Seen))
            at = self._find(row.head, row.low)
            self.size += not self.used[at]
            self.rows_at[at], self.used[at] = row, 1

    def find(self, bytes identities):
        cdef Py_ssize_t i, at, count = PyBytes_GET_SIZE(identities) // IDENTITY_BYTES
        cdef const char* data = PyBytes_AS_STRING(identities)
        cdef uint64_t[2] key
        cdef list found = None
        for i in range(count):
            memcpy(key, data + i * IDENTITY_BYTES, IDENTITY_BYTES)
            at = self._find(key[0], key[1])
            if self.used[at]:
                if found is None:
                    found = [None] * count
                found[i] = PyBytes_FromStringAndSize(<const char*>&self.rows_at[at].payload, PAYLOAD_BYTES)
        return found

    def entries(self):
        cdef Py_ssize_t i
        cdef bytes block = PyBytes_FromStringAndSize(NULL, self.size * sizeof(Seen))
        cdef char* out = PyBytes_AS_STRING(block)
        for i in range(self.slots):
            if self.used[i]:
                out = _put(out, <const char*>&self.rows_at[i], sizeof(Seen))
        return block


def has_repeats(bytes identities):
    """Does one of the identities stand twice?"""
    cdef Py_ssize_t i, at, count = PyBytes_GET_SIZE(identities) // IDENTITY_BYTES
    cdef const char* data = PyBytes_AS_STRING(identities)
    cdef uint64_t[2] key
    cdef Seen row
    cdef Recent met = Recent()
    while 2 * count > met.slots:
        met._room(met.bits + 1)
    for i in range(count):
        memcpy(key, data + i * IDENTITY_BYTES, IDENTITY_BYTES)
        at = met._find(key[0], key[1])
        if met.used[at]:
            return True
        row.head, row.low, row.payload = key[0], key[1], 0
        met.rows_at[at], met.used[at] = row, 1
    return False
