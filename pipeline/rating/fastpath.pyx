# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""The plain way of a usage event through ``accept``, ``enrich`` and ``rate``, compiled: most of a rater's time goes here.

Takes what is plain and stops at the first record that is not: it refuses nothing, names no reason and knows no rule that
the Python beside it does not. Each stage goes on from ``start`` and returns where it stopped; the caller takes that
one record in Python and calls again. So whatever this file does not do is slow, never wrong, and Tally runs without it
(no C compiler at installation). ``tests/rating/test_fastpath.py`` holds both ways against each other.
"""

from cpython.bytearray cimport PyByteArray_AS_STRING
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.dict cimport PyDict_GetItem, PyDict_SetItem, PyDict_Size
from cpython.list cimport PyList_GET_ITEM, PyList_GET_SIZE
from cpython.object cimport PyObject
from cpython.ref cimport Py_INCREF
from cpython.tuple cimport PyTuple_GET_ITEM, PyTuple_GET_SIZE, PyTuple_New, PyTuple_SET_ITEM
from libc.stdint cimport int64_t, uint8_t, uint64_t
from libc.string cimport memcmp, memcpy

from xxhash import xxh3_64_digest, xxh3_128_digest

from pipeline.core.usage import Event, ParkedRecord
from pipeline.infra.wire import decimal

cdef extern from "Python.h":
    int64_t PyLong_AsLongLongAndOverflow(object, int*) except? -1
    ctypedef long long int128_t "__int128"
    int64_t INT64_MAX
    int64_t INT64_MIN
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

cdef object _new_tuple = tuple.__new__
cdef object _Event = Event
cdef object _Parked = ParkedRecord


cdef class PlainNumber:
    """Measures by a property as it stands: plain digits here, all else by ``exact``, the meter's own function."""

    cdef bytes key
    cdef object exact

    def __init__(self, bytes key, object exact):
        self.key = key
        self.exact = exact

    cdef object of(self, dict properties):
        cdef PyObject* found = PyDict_GetItem(properties, self.key)
        cdef Py_ssize_t i, size
        cdef int64_t value = 0
        cdef const char* digits
        if found is NULL:
            return self.exact(properties)
        size = PyBytes_GET_SIZE(<object>found)
        digits = PyBytes_AS_STRING(<object>found)
        if size == 0 or size > DIGITS_MAX:
            return self.exact(properties)
        for i in range(size):
            if not 48 <= digits[i] <= 57:
                return self.exact(properties)
            value = value * 10 + digits[i] - 48
        return value * 1_000_000_000

    def __call__(self, dict properties):
        return self.of(properties)


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
            self.offsets[i] = (<int128_t><int64_t>(offsets[i] >> 64) << 64) + <uint64_t>(offsets[i] & 0xFFFFFFFFFFFFFFFF)

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
        cost = (<int128_t>n * self.factors[tier] + self.offsets[tier]) / self.divisor
        if cost > INT64_MAX:
            return self.exact(quantity)
        return <int64_t>cost

    def __call__(self, quantity):
        return self.of(quantity)


cdef struct Span:
    Py_ssize_t start
    Py_ssize_t end


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


cdef inline bint _before(const uint8_t* data, Span one, Span other) noexcept nogil:
    """Do the bytes of one sort before those of the other?"""
    cdef Py_ssize_t n = one.end - one.start, m = other.end - other.start
    cdef int order = memcmp(data + one.start, data + other.start, n if n < m else m)
    return order < 0 or (order == 0 and n < m)


def accept_plain(
    list records,
    Py_ssize_t start,
    dict frames,
    dict homes,
    long partition,
    bint own_only,
    tuple limits,
    list events,
    list arrived,
):
    """Decode and check records from ``start`` on, as ``accept`` does; returns the index of the first it did not take.

    ``homes``: the partition of each account met so far. ``limits``: age and lead in microseconds, then most bytes of an
    event, key, account, event type and source.
    """
    cdef int64_t age_max_us = limits[0], ahead_max_us = limits[1]
    cdef Py_ssize_t event_max = limits[2], key_max = limits[3], account_max = limits[4]
    cdef Py_ssize_t type_max = limits[5], source_max = limits[6]
    cdef Py_ssize_t index, count = PyList_GET_SIZE(records), size, at, properties_count, i, k, joined
    cdef int64_t timestamp_us, sequence, block, appended_ms
    cdef const uint8_t* data
    cdef Span key, account, event_type, subject, source, moved, named, subject_part
    cdef Span[PROPERTIES_MAX] names
    cdef Span[PROPERTIES_MAX] values
    cdef Span[PROPERTIES_MAX] entries
    cdef bint plain, ascii
    cdef object record
    cdef bytes value, frame, account_bytes, name, measures
    cdef bytes type_bytes = b"", source_bytes = b""
    cdef list last_names = []
    cdef dict properties
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
        plain = False
        for frame in frames:
            if memcmp(data, PyBytes_AS_STRING(frame), FRAME_BYTES) == 0:
                plain = True
                break
        if not plain:
            return index

        at = FRAME_BYTES
        ascii = True
        if not (
            _text(data, size, &at, &key, &ascii)
            and _text(data, size, &at, &account, &ascii)
            and _text(data, size, &at, &event_type, &ascii)
            and _varint(data, size, &at, &timestamp_us)
        ):
            return index
        if not _text(data, size, &at, &subject, &ascii):
            return index
        subject_part.start, subject_part.end = event_type.end, at

        # Properties: one block of entries and the empty block behind it; none at all is the empty block alone.
        if not _varint(data, size, &at, &block) or block < 0 or block > PROPERTIES_MAX:
            return index
        properties_count = block
        for i in range(properties_count):
            entries[i].start = at
            if not (_text(data, size, &at, &names[i], &ascii) and _text(data, size, &at, &values[i], &ascii)):
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
            for i in range(properties_count):
                plain = plain and _is_utf8(data, names[i]) and _is_utf8(data, values[i])
            if not plain:
                return index

        appended_ms = record.timestamp
        if not (
            -age_max_us <= timestamp_us - appended_ms * 1000 <= ahead_max_us
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

        properties = {}
        for i in range(properties_count):
            if i == PyList_GET_SIZE(last_names):
                last_names.append(None)
            name = _again(data, names[i], last_names[i])
            last_names[i] = name
            PyDict_SetItem(properties, name, _slice(data, values[i]))
        if PyDict_Size(properties) != properties_count:
            return index

        # Canonical bytes of the payload: type, time and subject as they stand, the entries sorted.
        for i in range(1, properties_count):
            moved = entries[i]
            k = i
            while k > 0 and _before(data, moved, entries[k - 1]):
                entries[k] = entries[k - 1]
                k -= 1
            entries[k] = moved
        joined = subject_part.end - account.end
        for i in range(properties_count):
            joined += entries[i].end - entries[i].start
        measures = PyBytes_FromStringAndSize(NULL, joined)
        out = PyBytes_AS_STRING(measures)
        memcpy(out, data + account.end, subject_part.end - account.end)
        out += subject_part.end - account.end
        for i in range(properties_count):
            memcpy(out, data + entries[i].start, entries[i].end - entries[i].start)
            out += entries[i].end - entries[i].start

        named.start, named.end = FRAME_BYTES, account.end
        type_bytes = _again(data, event_type, type_bytes)
        source_bytes = _again(data, source, source_bytes)
        arrived.append((source_bytes, sequence))
        events.append(
            _new_tuple(
                _Event,
                (
                    record,
                    xxh3_128_digest(_slice(data, named)),
                    xxh3_64_digest(measures),
                    _slice(data, key),
                    account_bytes,
                    type_bytes,
                    timestamp_us,
                    properties,
                ),
            )
        )
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


def enrich_plain(list events, Py_ssize_t start, dict spans, list known):
    """Pair events with terms already looked up, as ``enrich`` does; returns the index of the first without."""
    cdef Py_ssize_t index, count = PyList_GET_SIZE(events)
    cdef tuple event
    cdef object terms
    cdef PyObject* found
    cdef int64_t at_us
    cdef bint paired

    for index in range(start, count):
        event = <tuple>PyList_GET_ITEM(events, index)
        found = PyDict_GetItem(spans, (<object>PyTuple_GET_ITEM(event, 4), <object>PyTuple_GET_ITEM(event, 5)))
        if found is NULL:
            return index
        at_us = <object>PyTuple_GET_ITEM(event, 6)
        paired = False
        for terms in <list>found:
            if <int64_t>(<object>PyTuple_GET_ITEM(terms, 0)) <= at_us < <int64_t>(<object>PyTuple_GET_ITEM(terms, 1)):
                known.append((event, terms))
                paired = True
                break
        if not paired:
            return index
    return count


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


cdef inline bytes _subject(bytes value):
    """The subject of an accepted event."""
    cdef const uint8_t* data = <const uint8_t*>PyBytes_AS_STRING(value)
    cdef Py_ssize_t size = PyBytes_GET_SIZE(value), at = FRAME_BYTES
    cdef int64_t length = 0, timestamp_us
    for _ in range(3):
        _varint(data, size, &at, &length)
        at += length
    _varint(data, size, &at, &timestamp_us)
    _varint(data, size, &at, &length)
    return PyBytes_FromStringAndSize(<const char*>data + at, length)


cdef inline object _counter_met(object split, dict properties, bytes value):
    """The counter of an event's cell, as ``Split.find`` has it; None for a cell not met before."""
    cdef tuple keys = split.keys, cell
    cdef Py_ssize_t i, count = PyTuple_GET_SIZE(keys)
    cdef bint per_subject = split.per_subject
    cdef PyObject* found
    cell = PyTuple_New(count + per_subject)
    for i in range(count):
        found = PyDict_GetItem(properties, <object>PyTuple_GET_ITEM(keys, i))
        part = b"" if found is NULL else <object>found
        Py_INCREF(part)
        PyTuple_SET_ITEM(cell, i, part)
    if per_subject:
        part = _subject(value)
        Py_INCREF(part)
        PyTuple_SET_ITEM(cell, count, part)
    found = PyDict_GetItem(<dict>split.met, cell)
    return None if found is NULL else <object>found


def rate_plain(
    list known,
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
    ``Priced``, ``Split`` and ``Step``: what is no ``Priced`` goes by a rule.
    """
    cdef Py_ssize_t index, count = PyList_GET_SIZE(known), charges, measured, i, size
    cdef tuple pair, event, terms, charged, memo
    cdef object priced_type = kinds[0], split_type = kinds[1], step_type = kinds[2]
    cdef object record, priced, quantity, before, after, cost, after_cost, amount
    cdef Running running = None
    cdef bytes value, row_frame, constant, before_bytes, after_bytes, row, account, identity
    cdef list taken, amounts, moved, made
    cdef dict properties
    cdef PyObject* found
    cdef uint8_t[HEAD_BYTES_MAX] head
    cdef uint8_t[DECIMAL_BYTES_MAX] quantity_out
    cdef uint8_t[DECIMAL_BYTES_MAX] after_out
    cdef uint8_t[DECIMAL_BYTES_MAX] amount_out
    cdef Py_ssize_t head_size, quantity_size, amount_size, after_size, value_size
    cdef int64_t appended_ms, period_end_us
    cdef char* out
    cdef bint plain

    for index in range(start, count):
        pair = <tuple>PyList_GET_ITEM(known, index)
        event = <tuple>PyTuple_GET_ITEM(pair, 0)
        terms = <tuple>PyTuple_GET_ITEM(pair, 1)
        record = <object>PyTuple_GET_ITEM(event, 0)
        charged = <tuple>PyTuple_GET_ITEM(terms, 3)
        charges = PyTuple_GET_SIZE(charged)
        if type(record) is _Parked:
            return index
        properties = <dict>PyTuple_GET_ITEM(event, 7)
        taken = []
        amounts = []
        plain = True
        for i in range(charges):
            priced = <object>PyTuple_GET_ITEM(charged, i)
            measure = priced.measure
            quantity = (<PlainNumber>measure).of(properties) if type(measure) is PlainNumber else measure(properties)
            if quantity is None:
                continue
            if type(quantity) is not int:
                plain = False
                break
            if type(priced) is split_type:
                priced = _counter_met(priced, properties, <bytes>record.value)
                if priced is None:
                    plain = False
                    break
            taken.append(priced)
            amounts.append(quantity)
        measured = PyList_GET_SIZE(taken)
        if not plain or measured == 0:
            return index

        identity = <bytes>PyTuple_GET_ITEM(event, 1)
        account = <bytes>PyTuple_GET_ITEM(event, 4)
        value = record.value
        value_size = PyBytes_GET_SIZE(value) - FRAME_BYTES
        row_frame = <bytes>frames[value[:FRAME_BYTES]]
        appended_ms = record.timestamp
        period_end_us = terms[2]
        head_size = _put_varint(record.offset, head)
        head_size += _put_varint(appended_ms, head + head_size)
        moved = []
        made = []
        for i in range(measured):
            priced = taken[i]
            quantity = amounts[i]
            if type(priced) is priced_type:
                counter = priced.counter
                found = PyDict_GetItem(totals, counter)
                before = quantity_of(counter) if found is NULL else <object>found
                memo = priced.memo
                price = priced.price
                if before is None:
                    before, cost, before_bytes = 0, 0, b"\x02\x00"
                elif before == memo[0]:
                    cost, before_bytes = memo[1], memo[2]
                else:
                    cost, before_bytes = price(before), decimal(before)
                    if cost is not None and not -fits < cost < fits:
                        plain = False
                        break
                after = before + quantity
                after_cost = (<PlainLines>price).of(after) if type(price) is PlainLines else price(after)
                if cost is None or after_cost is None:
                    plain = False
                    break
                if not (-fits < after < fits and -fits < after_cost < fits):
                    plain = False
                    break
                after_size = _put_decimal(after, after_out)
                after_bytes = PyBytes_FromStringAndSize(<const char*>after_out, after_size)
                priced.memo = (after, after_cost, after_bytes)
                moved.append((counter, after))
                amount = after_cost - cost
            else:
                if running is None:
                    running = Running()
                    running.totals, running.quantity_of = totals, quantity_of
                running.moved = moved
                step = priced.rule(quantity, properties, running)
                if type(step) is not step_type:
                    plain = False
                    break
                before, after, amount, changes = step
                if not (-fits < after < fits and -fits < amount < fits):
                    plain = False
                    break
                before_bytes = decimal(before)
                after_size = _put_decimal(after, after_out)
                moved.extend(changes)

            constant = priced.constant
            quantity_size = _put_decimal(quantity, quantity_out)
            amount_size = _put_decimal(amount, amount_out)
            size = (
                FRAME_BYTES + value_size + PyBytes_GET_SIZE(origin) + head_size + PyBytes_GET_SIZE(identity)
                + PyBytes_GET_SIZE(catalog_offset) + PyBytes_GET_SIZE(constant) + quantity_size
                + PyBytes_GET_SIZE(before_bytes) + after_size + amount_size + 1
            )
            row = PyBytes_FromStringAndSize(NULL, size)
            out = PyBytes_AS_STRING(row)
            out = _put(out, PyBytes_AS_STRING(row_frame), FRAME_BYTES)
            out = _put(out, PyBytes_AS_STRING(value) + FRAME_BYTES, value_size)
            out = _put(out, PyBytes_AS_STRING(origin), PyBytes_GET_SIZE(origin))
            out = _put(out, <const char*>head, head_size)
            out = _put(out, PyBytes_AS_STRING(identity), PyBytes_GET_SIZE(identity))
            out = _put(out, PyBytes_AS_STRING(catalog_offset), PyBytes_GET_SIZE(catalog_offset))
            out = _put(out, PyBytes_AS_STRING(constant), PyBytes_GET_SIZE(constant))
            out = _put(out, <const char*>quantity_out, quantity_size)
            out = _put(out, PyBytes_AS_STRING(before_bytes), PyBytes_GET_SIZE(before_bytes))
            out = _put(out, <const char*>after_out, after_size)
            out = _put(out, <const char*>amount_out, amount_size)
            out[0] = 1 if appended_ms * 1000 >= period_end_us else 0
            made.append((account, row))
        if not plain:
            return index
        for change in moved:
            PyDict_SetItem(totals, change[0], change[1])
        rows.extend(made)
        events.append(event)
    return count


cdef inline char* _put(char* out, const char* data, Py_ssize_t size) noexcept nogil:
    memcpy(out, data, size)
    return out + size


def sequence_blocks(list arrived, int64_t block_size):
    """Bit maps of the sequence numbers that arrived, as ``batch._sequence_blocks`` makes them."""
    cdef dict blocks = {}
    cdef bytes source, last_source = None
    cdef bytearray bits = None
    cdef int64_t sequence, block, last_block = -1
    cdef PyObject* found
    cdef char* data = NULL
    cdef tuple one
    for one in arrived:
        source = <bytes>PyTuple_GET_ITEM(one, 0)
        sequence = <object>PyTuple_GET_ITEM(one, 1)
        if sequence <= 0:
            continue
        block = sequence // block_size
        if block != last_block or last_source is None or source != last_source:
            name = (source, block)
            found = PyDict_GetItem(blocks, name)
            if found is NULL:
                bits = bytearray((block_size + 7) // 8)
                PyDict_SetItem(blocks, name, bits)
            else:
                bits = <bytearray>found
            data = PyByteArray_AS_STRING(bits)
            last_block, last_source = block, source
        sequence -= block * block_size
        data[sequence >> 3] |= <char>(1 << (sequence & 7))
    return {name: int.from_bytes(bits, "little") for name, bits in blocks.items()}


def identities(list events):
    """The identity of each event."""
    cdef Py_ssize_t index
    return [<object>PyTuple_GET_ITEM(<tuple>PyList_GET_ITEM(events, index), 1) for index in range(PyList_GET_SIZE(events))]


def latest_us(list events):
    """The latest time of any of the events, of which there is one at least."""
    cdef Py_ssize_t index
    cdef int64_t at_us, latest = INT64_MIN
    for index in range(PyList_GET_SIZE(events)):
        at_us = <object>PyTuple_GET_ITEM(<tuple>PyList_GET_ITEM(events, index), 6)
        if at_us > latest:
            latest = at_us
    return latest


def remember(dict seen, list events):
    """Put each event's identity and payload into ``seen``."""
    cdef Py_ssize_t index
    cdef tuple event
    for index in range(PyList_GET_SIZE(events)):
        event = <tuple>PyList_GET_ITEM(events, index)
        PyDict_SetItem(seen, <object>PyTuple_GET_ITEM(event, 1), <object>PyTuple_GET_ITEM(event, 2))


def seen_block(list events, int64_t rated_ms):
    """Identity and payload of each event, one behind the other; None if one arrived after ``rated_ms``."""
    cdef Py_ssize_t index, count = PyList_GET_SIZE(events)
    cdef tuple event
    cdef bytes block = PyBytes_FromStringAndSize(NULL, count * (IDENTITY_BYTES + PAYLOAD_BYTES))
    cdef char* out = PyBytes_AS_STRING(block)
    for index in range(count):
        event = <tuple>PyList_GET_ITEM(events, index)
        if <int64_t>(<object>PyTuple_GET_ITEM(event, 0)).timestamp > rated_ms:
            return None
        out = _put(out, PyBytes_AS_STRING(<object>PyTuple_GET_ITEM(event, 1)), IDENTITY_BYTES)
        out = _put(out, PyBytes_AS_STRING(<object>PyTuple_GET_ITEM(event, 2)), PAYLOAD_BYTES)
    return block
