# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""RatedUsage off the wire and into COPY's text, compiled: most of the time that the sink itself spends on a row.

It takes what is plain and answers None to all else, which the Python beside it then reads, writes or refuses: it knows
no rule of its own, and Tally runs without it. ``tests/billing/test_rated.py`` holds both ways against fastavro, and the
text of one against that of the other.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.dict cimport PyDict_GetItem, PyDict_SetItem
from cpython.object cimport PyObject
from cpython.tuple cimport PyTuple_GET_ITEM
from libc.stdint cimport int8_t, int64_t, uint8_t, uint64_t
from libc.string cimport memchr, memcmp, memcpy

cdef extern from "Python.h":
    object PyUnicode_DecodeUTF8(const char*, Py_ssize_t, const char*)
    const char* PyUnicode_AsUTF8AndSize(object, Py_ssize_t*) except NULL

cdef enum:
    FRAME_BYTES = 5
    IDENTITY_BYTES = 16
    DECIMAL_BYTES_MAX = 32
    #: bytes of an event's text besides its texts: two times, a month, an identity, numbers and tabs
    FIXED_BYTES_MAX = 256

cdef object _new_tuple = tuple.__new__
cdef int64_t _INT_MIN = -(1 << 31), _INT_MAX = (1 << 31) - 1


class NotPlain(Exception):
    """Left to the Python beside it."""


cdef struct Cursor:
    const uint8_t* data
    Py_ssize_t size
    Py_ssize_t at


cdef int64_t _long(Cursor* cursor) except? -1:
    """A zigzag varint of at most 63 bits."""
    cdef uint64_t raw = 0
    cdef int shift = 0
    cdef uint8_t byte
    while cursor.at < cursor.size and shift < 63:
        byte = cursor.data[cursor.at]
        cursor.at += 1
        raw |= <uint64_t>(byte & 127) << shift
        if byte < 128:
            return <int64_t>(raw >> 1) ^ -<int64_t>(raw & 1)
        shift += 7
    raise NotPlain


cdef int64_t _int(Cursor* cursor) except? -1:
    cdef int64_t value = _long(cursor)
    if value < _INT_MIN or value > _INT_MAX:
        raise NotPlain
    return value


cdef str _text(Cursor* cursor):
    """A string without NUL. Raises UnicodeDecodeError too."""
    cdef int64_t size = _long(cursor)
    cdef const char* start = <const char*>cursor.data + cursor.at
    if size < 0 or size > cursor.size - cursor.at or memchr(start, 0, size) is not NULL:
        raise NotPlain
    cursor.at += size
    return PyUnicode_DecodeUTF8(start, size, NULL)


cdef int _skip_text(Cursor* cursor) except -1:
    cdef int64_t size = _long(cursor)
    if size < 0 or size > cursor.size - cursor.at:
        raise NotPlain
    cursor.at += size
    return 0


cdef int _skip_terms(Cursor* cursor) except -1:
    """Go behind what all rows of a line share, contract to price class."""
    _skip_text(cursor)  # contract
    _skip_text(cursor)  # plan
    _long(cursor)
    _skip_text(cursor)  # meter
    _long(cursor)
    _skip_text(cursor)  # price version
    _skip_text(cursor)  # charge
    _long(cursor)  # start and end of the period, start of the segment
    _long(cursor)
    _long(cursor)
    _skip_text(cursor)  # cell
    _skip_text(cursor)  # currency
    _long(cursor)  # price class
    return 0


cdef object _decimal(Cursor* cursor):
    cdef Py_ssize_t size, i
    cdef int64_t value
    if cursor.at >= cursor.size:
        raise NotPlain
    size = cursor.data[cursor.at]
    if size & 1 or size > 2 * DECIMAL_BYTES_MAX:
        raise NotPlain
    size >>= 1
    cursor.at += 1
    if size > cursor.size - cursor.at:
        raise NotPlain
    cursor.at += size
    if size > 8 or size == 0:
        return int.from_bytes(
            PyBytes_FromStringAndSize(<const char*>cursor.data + cursor.at - size, size), "big", signed=True
        )
    value = <int8_t>cursor.data[cursor.at - size]
    for i in range(1, size):
        value = <int64_t>((<uint64_t>value << 8) | cursor.data[cursor.at - size + i])
    return value


cdef class PlainRows:
    """Reads framed RatedUsage. Holds the event it decoded last; not for several threads."""

    cdef object head_type, row_type, frames
    cdef int64_t first_us, last_us
    cdef Py_ssize_t account_max
    cdef tuple kinds
    cdef dict terms
    cdef bytes last
    cdef Py_ssize_t last_size
    cdef object head

    def __init__(self, object head_type, object row_type, tuple kinds, object frames, dict terms, tuple limits):
        """``terms``: per account, the bytes of terms met so far and what they say; whoever reads others adds them.

        ``limits``: times from the first to before the second, in microseconds, and the longest account, in characters.
        """
        self.head_type, self.row_type, self.kinds = head_type, row_type, kinds
        self.frames, self.terms = frames, terms
        self.first_us, self.last_us, self.account_max = limits
        self.last, self.last_size, self.head = b"", 0, None

    def met(self, object head, bytes data, Py_ssize_t size):
        """An event that was decoded elsewhere, from this many bytes of a message: its next rows share it."""
        self.head, self.last, self.last_size = head, data, size

    def read(self, bytes data):
        """The row of one message, or None where it is not plain or its terms were not met before."""
        try:
            return self._read(data)
        except (NotPlain, UnicodeDecodeError):
            return None

    cdef object _read(self, bytes data):
        cdef Cursor cursor
        cdef bytes run
        cdef Py_ssize_t size
        cdef int64_t entry
        cdef uint8_t kind, late
        cdef PyObject* known
        cdef object terms
        cursor.data, cursor.size = <const uint8_t*>PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data)
        if (
            self.head is not None
            and cursor.size >= self.last_size
            and memcmp(cursor.data, PyBytes_AS_STRING(self.last), self.last_size) == 0
        ):
            cursor.at = self.last_size
        else:
            if data[:FRAME_BYTES] not in self.frames:
                return None
            cursor.at = FRAME_BYTES
            head = self._head(&cursor)
            self.head, self.last, self.last_size = head, data, cursor.at
        known = PyDict_GetItem(self.terms, <object>PyTuple_GET_ITEM(self.head, 1))
        if known is NULL:
            return None
        size = cursor.at
        _skip_terms(&cursor)
        run = PyBytes_FromStringAndSize(<const char*>cursor.data + size, cursor.at - size)
        known = PyDict_GetItem(<dict>known, run)
        if known is NULL:
            return None
        terms = <object>known

        entry = _int(&cursor)
        if cursor.at >= cursor.size:
            return None
        kind = cursor.data[cursor.at]
        cursor.at += 1
        if kind != 0 and kind != 2 and kind != 4:
            return None
        quantity = _decimal(&cursor)
        before = _decimal(&cursor)
        after = _decimal(&cursor)
        amount = _decimal(&cursor)
        if cursor.at + 1 != cursor.size:
            return None
        late = cursor.data[cursor.at]
        if late > 1:
            return None
        return _new_tuple(
            self.row_type,
            (self.head, terms, entry, self.kinds[kind >> 1], quantity, before, after, amount, late == 1),
        )

    cdef object _head(self, Cursor* cursor):
        cdef str key = _text(cursor), account = _text(cursor), event_type = _text(cursor)
        cdef int64_t timestamp_us = _long(cursor)
        cdef str subject = _text(cursor), name, source, topic
        cdef dict properties = {}
        cdef int64_t count = _long(cursor), sequence, partition, offset, appended_ms, catalog_offset
        cdef bytes identity
        if count < 0:
            raise NotPlain
        while count > 0:
            name = _text(cursor)
            PyDict_SetItem(properties, name, _text(cursor))
            count -= 1
            if count == 0 and _long(cursor) != 0:
                raise NotPlain
        source, sequence = _text(cursor), _long(cursor)
        topic, partition = _text(cursor), _int(cursor)
        offset, appended_ms = _long(cursor), _long(cursor)
        if cursor.size - cursor.at < IDENTITY_BYTES:
            raise NotPlain
        identity = PyBytes_FromStringAndSize(<const char*>cursor.data + cursor.at, IDENTITY_BYTES)
        cursor.at += IDENTITY_BYTES
        catalog_offset = _long(cursor)
        if not self.first_us <= timestamp_us < self.last_us or len(account) > self.account_max:
            raise NotPlain
        if not self.first_us // 1000 < appended_ms < self.last_us // 1000:
            raise NotPlain
        return _new_tuple(
            self.head_type,
            (
                key, account, event_type, timestamp_us, subject, properties, source, sequence,
                topic, partition, offset, appended_ms, identity, catalog_offset,
            ),
        )


cdef char* _put_number(char* out, int64_t value) noexcept nogil:
    cdef char[20] digits
    cdef int n = 0
    cdef uint64_t rest = <uint64_t>value if value >= 0 else -<uint64_t>value
    if value < 0:
        out[0] = 45
        out += 1
    while True:
        digits[n] = 48 + rest % 10
        rest //= 10
        n += 1
        if rest == 0:
            break
    while n > 0:
        n -= 1
        out[0] = digits[n]
        out += 1
    return out


cdef char* _put_padded(char* out, int64_t value, int width) noexcept nogil:
    cdef int i
    for i in range(width - 1, -1, -1):
        out[i] = 48 + value % 10
        value //= 10
    return out + width


cdef char* _put_month(char* out, int64_t days) noexcept nogil:
    """Year and month of a day since 1970, as 2026-03; the day of the month follows behind it, as -07."""
    # The calendar in eras of 400 years that begin on 1 March.
    cdef int64_t day = days + 719_468
    cdef int64_t era = day // 146_097
    cdef int64_t of_era = day - era * 146_097
    cdef int64_t year = (of_era - of_era // 1_460 + of_era // 36_524 - of_era // 146_096) // 365
    cdef int64_t of_year = of_era - (365 * year + year // 4 - year // 100)
    cdef int64_t shifted = (5 * of_year + 2) // 153
    cdef int64_t month = shifted + 3 if shifted < 10 else shifted - 9
    out = _put_padded(out, year + era * 400 + (1 if month <= 2 else 0), 4)
    out[0] = 45
    out = _put_padded(out + 1, month, 2)
    out[0] = 45
    return _put_padded(out + 1, of_year - (153 * shifted + 2) // 5 + 1, 2) - 3


cdef char* _put_time(char* out, int64_t at_us) noexcept nogil:
    """As ``datetime.isoformat`` has it: the fraction only where there is one."""
    cdef int64_t seconds = at_us // 1_000_000, fraction = at_us % 1_000_000
    cdef int64_t days = seconds // 86_400
    seconds -= days * 86_400
    out = _put_month(out, days) + 3
    out[0] = 84
    out = _put_padded(out + 1, seconds // 3_600, 2)
    out[0] = 58
    out = _put_padded(out + 1, seconds // 60 % 60, 2)
    out[0] = 58
    out = _put_padded(out + 1, seconds % 60, 2)
    if fraction:
        out[0] = 46
        out = _put_padded(out + 1, fraction, 6)
    memcpy(out, "+00:00", 6)
    return out + 6


cdef char* _put_text(char* out, str text) except NULL:
    """Text as COPY reads it: backslash, tab and the line ends stand escaped."""
    cdef Py_ssize_t size = 0, i
    cdef const char* data = PyUnicode_AsUTF8AndSize(text, &size)
    cdef char byte
    for i in range(size):
        byte = data[i]
        if byte == 92 or byte == 9 or byte == 10 or byte == 13:
            out[0] = 92
            out += 1
            byte = 92 if byte == 92 else 116 if byte == 9 else 110 if byte == 10 else 114
        out[0] = byte
        out += 1
    return out


cdef char* _put_json(char* out, str text) except NULL:
    """A JSON string that needs no escapes."""
    cdef Py_ssize_t size = 0, i
    cdef const char* data = PyUnicode_AsUTF8AndSize(text, &size)
    out[0] = 34
    for i in range(size):
        if data[i] == 34 or data[i] == 92 or 0 <= data[i] < 32:
            raise NotPlain
    memcpy(out + 1, data, size)
    out[size + 1] = 34
    return out + size + 2


cdef Py_ssize_t _utf8_bytes(str text) except -1:
    cdef Py_ssize_t size = 0
    PyUnicode_AsUTF8AndSize(text, &size)
    return size


def text_of_event(object head):
    """An event's part of its rows in COPY's text format, as ``commit._text_of_event`` has it; None: not plain."""
    try:
        return _text_of_event(<tuple>head)
    except NotPlain:
        return None


cdef str _text_of_event(tuple head):
    cdef str key = head[0], account = head[1], event_type = head[2], subject = head[4], source = head[6], name, value
    cdef int64_t timestamp_us = head[3], appended_us = <int64_t>head[11] * 1000
    cdef dict properties = head[5]
    cdef bytes identity = head[12]
    cdef const uint8_t* bits = <const uint8_t*>PyBytes_AS_STRING(identity)
    cdef const char* hexadecimal = "0123456789abcdef"
    cdef Py_ssize_t size, i
    cdef bint first = True
    cdef bytes text
    cdef char* out
    cdef char* start
    if timestamp_us < 0 or appended_us < 0 or PyBytes_GET_SIZE(identity) != IDENTITY_BYTES:
        raise NotPlain
    size = FIXED_BYTES_MAX + 2 * (
        _utf8_bytes(key) + _utf8_bytes(account) + _utf8_bytes(event_type) + _utf8_bytes(subject) + _utf8_bytes(source)
    )
    for name, value in properties.items():
        size += _utf8_bytes(name) + _utf8_bytes(value) + 6
    text = PyBytes_FromStringAndSize(NULL, size)
    start = out = PyBytes_AS_STRING(text)
    out = _put_month(out, timestamp_us // 86_400_000_000)
    memcpy(out, "-01\t", 4)
    out += 4
    for i in range(IDENTITY_BYTES):
        out[0] = hexadecimal[bits[i] >> 4]
        out[1] = hexadecimal[bits[i] & 15]
        out += 2
    out = _put_number(_tab(out), head[10])
    out = _put_number(_tab(out), head[7])
    out = _put_number(_tab(out), head[13])
    out = _put_time(_tab(out), timestamp_us)
    out = _put_time(_tab(out), appended_us)
    out = _put_number(_tab(out), head[9])
    out = _put_text(_tab(out), account)
    out = _put_text(_tab(out), key)
    out = _put_text(_tab(out), event_type)
    out = _put_text(_tab(out), subject)
    out = _put_text(_tab(out), source)
    out = _tab(out)
    out[0] = 123
    out += 1
    for name, value in properties.items():
        if not first:
            out[0] = 44
            out += 1
        first = False
        out = _put_json(out, name)
        out[0] = 58
        out = _put_json(out + 1, value)
    out[0] = 125
    return PyUnicode_DecodeUTF8(start, out + 1 - start, NULL)


cdef inline char* _tab(char* out) noexcept nogil:
    out[0] = 9
    return out + 1
