"""What the producer raises.

::

    ProducerError
    ├── InvalidUsage      the caller's mistake, also a ValueError: nothing was written, no sequence number was used
    ├── BufferFull        the spool stayed full for ``block_seconds``: nothing was written, keep the event
    ├── ProducerClosed    emit after close, or in a child of fork
    └── SpoolError        the spool folder cannot be used (constructor only)
        ├── SpoolInUse        another producer, here or in another process, holds it
        └── SpoolMismatch     it holds events of another source or topic

The broker's trouble is never raised: events wait in the spool until they are delivered.
"""


class ProducerError(Exception):
    """Base of everything the producer raises on purpose."""


class InvalidUsage(ProducerError, ValueError):
    """A usage event that breaks the contract. ``field`` names the argument at fault."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


class BufferFull(ProducerError):
    """No room in the spool within ``block_seconds``: Kafka has been away for long, or the disk is full."""


class ProducerClosed(ProducerError):
    """The producer takes no more events."""


class SpoolError(ProducerError):
    """The spool folder cannot be used."""


class SpoolInUse(SpoolError):
    """Another producer holds the spool folder."""


class SpoolMismatch(SpoolError):
    """The spool folder belongs to another source or topic."""
