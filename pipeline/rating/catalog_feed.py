"""The catalog as the rater sees it: ``billing.catalog`` read to its end before the first batch, then followed.

A snapshot is only swapped when the topic's end is reached, so that a publication, one transaction, is seen whole.
"""

import json
import threading
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, TopicPartition

from pipeline.core.catalog import Catalog, Entry
from pipeline.core.periods import to_micros
from pipeline.infra.avro import CATALOG, Schemas
from pipeline.infra.kafka import passes
from pipeline.infra.logs import get_logger
from pipeline.infra.topics import Topics
from pipeline.rating.enrich import TermsView

log = get_logger(__name__)

_POLL_S = 0.2
#: How often an idle catalog is asked where it ends, and how long the answer may take.
_LOOK_EVERY_S, _ANSWER_S = 5.0, 5.0


class CatalogFeed(threading.Thread):
    """Keeps ``view`` current in a thread of its own. A broken entry ends it: rating without it could bill wrongly."""

    def __init__(
        self, kafka: dict[str, Any], topics: Topics, schemas: Schemas, on_failure: Callable[[BaseException], None]
    ) -> None:
        super().__init__(name="catalog-feed", daemon=True)
        self._kafka = kafka
        self._topics = topics
        self._schemas = schemas
        self._on_failure = on_failure
        self._stopping = threading.Event()
        self._ready = threading.Event()
        self._view = TermsView(Catalog.empty())
        self._whole_at = time.monotonic()
        self._away = False

    @property
    def view(self) -> TermsView:
        """The newest snapshot. Valid once ``wait_ready`` has returned True."""
        return self._view

    def wait_ready(self, timeout: float) -> bool:
        """Wait until the catalog was read to its end once; seconds."""
        return self._ready.wait(timeout)

    @property
    def age_s(self) -> float:
        """Seconds since the snapshot was last known to be the whole catalog."""
        return time.monotonic() - self._whole_at

    def stop(self) -> None:
        self._stopping.set()

    def run(self) -> None:
        try:
            self._follow()
        except BaseException as error:  # noqa: BLE001  handed on: the worker must exit
            self._on_failure(error)

    def _follow(self) -> None:
        consumer = Consumer(
            {
                **self._kafka,
                "group.id": f"{self._topics.prefix}catalog-feed",  # the client wants one; never joined
                "enable.auto.commit": False,
                "isolation.level": "read_committed",
                "enable.partition.eof": True,
                "auto.offset.reset": "error",
                "fetch.wait.max.ms": 100,
            }
        )
        consumer.assign([TopicPartition(self._topics.catalog, 0, OFFSET_BEGINNING)])
        pending: list[Entry] = []
        offset = 0
        try:
            while not self._stopping.is_set():
                if self.age_s > _LOOK_EVERY_S and not pending:
                    self._look(consumer)
                for message in consumer.consume(1000, _POLL_S):
                    error = message.error()
                    if error is None:
                        pending.append(self._entry(message.key(), message.value(), message.offset()))
                        offset = (message.offset() or 0) + 1
                    elif error.code() == KafkaError._PARTITION_EOF:
                        self._swap(pending, max(offset, message.offset() or 0))
                        pending = []
                    elif not passes(error):
                        raise KafkaException(error)
        finally:
            consumer.close()

    def _look(self, consumer: Consumer) -> None:
        """Ask where the catalog ends: an idle topic and one that cannot be reached look alike to who only polls."""
        try:
            _, end = consumer.get_watermark_offsets(TopicPartition(self._topics.catalog, 0), _ANSWER_S)
        except KafkaException as error:
            # Whatever keeps it from answering: the snapshot grows old, and in the end the partitions wait.
            if not self._away:
                self._away = True
                log.warning("broker_away", error=str(error.args[0]))
            return
        if self._away:
            self._away = False
            log.info("broker_back")
        if end <= self._view.offset:
            self._whole_at = time.monotonic()

    def _swap(self, entries: list[Entry], offset: int) -> None:
        current = self._view.catalog
        if entries or offset != current.offset:
            self._view = TermsView(current.extend(entries, offset))
        if entries or not self._ready.is_set():
            log.info("catalog_read", entries=len(entries), offset=offset)
        self._whole_at = time.monotonic()
        self._ready.set()

    def _entry(self, key: bytes | None, value: bytes | None, offset: int | None) -> Entry:
        try:
            record = self._schemas.decode(value, CATALOG)
            valid_from: datetime = record["valid_from"]
            return Entry(
                record.get("document_kind") or record["kind"],
                record["id"],
                record["version"],
                to_micros(valid_from),
                json.loads(record["document"]),
            )
        except Exception as error:
            raise ValueError(f"catalog entry {key!r} at offset {offset} cannot be read: {error}") from error
