"""The words of the way from an arrived record to a rated event: dumb data, no behaviour.

Texts are UTF-8 bytes as received; times end in ``_us`` (microseconds) or ``_ms`` (milliseconds), both since 1970 UTC.
"""

from typing import NamedTuple, Protocol

from pipeline.core.reasons import Rejection

#: Sequence numbers are kept as bit maps of this many: in receipts, and in PostgreSQL.
SEQUENCE_BLOCK = 1000


class Record(Protocol):
    """An event's bytes and where they stand in their partition. What Kafka clients hand out fits as it is."""

    @property
    def offset(self) -> int: ...
    @property
    def timestamp(self) -> int:
        """When the broker appended it, milliseconds since 1970 UTC."""

    @property
    def key(self) -> bytes | None: ...
    @property
    def value(self) -> bytes | None: ...


class ParkedRecord(NamedTuple):
    """A record that comes back through ``usage.retry``, with its origin and the story so far."""

    topic: str
    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    letter: bytes  #: the framed DeadLetter it came in, to be written again unchanged
    letter_key: bytes | None
    attempts: int
    replays: int
    parked_at_ms: int
    not_before_ms: int
    catalog_offset: int


class Event(Protocol):
    """An accepted usage event: well formed, in its own partition, inside the time window."""

    @property
    def record(self) -> Record: ...
    @property
    def identity(self) -> bytes:
        """128-bit hash of (account, idempotency key)."""

    @property
    def payload(self) -> bytes:
        """64-bit hash of what the event says, whatever the order of its properties."""

    @property
    def key(self) -> bytes: ...
    @property
    def account(self) -> bytes: ...
    @property
    def event_type(self) -> bytes: ...
    @property
    def timestamp_us(self) -> int: ...
    @property
    def properties(self) -> dict[bytes, bytes]: ...


class DecodedEvent(NamedTuple):
    """An ``Event`` with all of its texts at hand."""

    record: Record
    identity: bytes
    payload: bytes
    key: bytes
    account: bytes
    event_type: bytes
    timestamp_us: int
    properties: dict[bytes, bytes]


class Refused(NamedTuple):
    """A record that was not rated, why, and what of it could be read."""

    record: Record
    rejection: Rejection
    account: bytes | None = None
    key: bytes | None = None
    event_type: bytes | None = None
    timestamp_us: int | None = None
