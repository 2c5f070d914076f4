"""What product services import: ``from pipeline.producer import UsageProducer``.

``UsageProducer`` takes events, keeps them in a spool on disk until Kafka has them, and numbers them without holes.
``pipeline.producer.files`` reads events from CSV and JSON lines.
"""

from pipeline.producer.client import Stats, UsageProducer
from pipeline.producer.errors import (
    BufferFull,
    InvalidUsage,
    ProducerClosed,
    ProducerError,
    SpoolError,
    SpoolInUse,
    SpoolMismatch,
)
from pipeline.producer.sender import Delivery, OnDelivery
from pipeline.producer.usage import PropertyValue, Usage

__all__ = [
    "BufferFull",
    "Delivery",
    "InvalidUsage",
    "OnDelivery",
    "ProducerClosed",
    "ProducerError",
    "PropertyValue",
    "SpoolError",
    "SpoolInUse",
    "SpoolMismatch",
    "Stats",
    "Usage",
    "UsageProducer",
]
