"""Faust with whole partition batches as messages.

Faust hands an agent one record at a time, at about 150 µs each; the fetch underneath already comes in batches. Three
subclasses of its aiokafka driver keep a fetched list whole: the consumer's thread notes which offsets the list covers,
the consumer wraps it into one message, the transport puts both in place. What they also guard against:

- Faust assigns by round robin when an app has no tables: events and retry of one partition could land on two workers.
  The thread always uses Faust's own co-partitioning assignor.
- Faust reads uncommitted records outside its own transactions: the thread reads committed ones only.
- Faust commits what an agent acknowledged, even by an exception: ``_commit`` does nothing, offsets go with the rater's
  transaction.
- What was fetched of a partition that is paused a moment later is dropped: the consumer hands all of it on.
- A message without the group's generation is dropped without a word: ``_to_message`` sets it.
"""

import asyncio
import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, NamedTuple, cast

import aiokafka
from aiokafka.consumer.fetcher import FetchResult
from aiokafka.errors import CorruptRecordException
from faust.transport.drivers import aiokafka as driver
from faust.types import TP, ConsumerMessage

from pipeline.core.usage import Record

#: The broker holds a fetch back until so many bytes came, or for so long. Answered at once, each fetch brings a few
#: records of a few partitions, and fetching is most of a worker's work: with 16 partitions and 12,300 events/s a worker
#: took 53 % of a core, and takes 32 %. A worker without events takes 4 % instead of 2 %.
_FETCH_BYTES_MIN, _FETCH_WAIT_MS = 64 * 1024, 25
#: Kafka's number for it; ``check_topics`` insists that the topics have it.
_APPEND_TIME = 1
#: Pause of the fetch loop while every partition is full.
_ALL_FULL_S = 0.01


class Fetched(NamedTuple):
    """What one fetch brought of a partition: all records in ``[from_offset, next_offset)``.

    Offsets without a record in between are transaction markers, aborted or compacted records.
    """

    tp: TP
    from_offset: int
    next_offset: int
    records: list[Record]


class BatchThread(driver.AIOKafkaConsumerThread):
    """The thread that owns aiokafka's consumer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        # Per partition: where the next fetched list begins, and where the last call left the position.
        self._starts: dict[TP, int] = {}
        self._left: dict[TP, int] = {}

    def _create_worker_consumer(self, transport: driver.Transport) -> aiokafka.AIOKafkaConsumer:
        conf = self.consumer.app.conf
        self._assignor = self.consumer.app.assignor
        return aiokafka.AIOKafkaConsumer(
            client_id=conf.broker_client_id,
            group_id=conf.id,
            bootstrap_servers=driver.server_list(transport.url, transport.default_port),
            partition_assignment_strategy=[self._assignor],
            isolation_level="read_committed",
            enable_auto_commit=False,
            auto_offset_reset=conf.consumer_auto_offset_reset,
            max_poll_records=conf.broker_max_poll_records,
            max_poll_interval_ms=int(conf.broker_max_poll_interval * 1000),
            max_partition_fetch_bytes=conf.consumer_max_fetch_size,
            fetch_min_bytes=_FETCH_BYTES_MIN,
            fetch_max_wait_ms=_FETCH_WAIT_MS,
            request_timeout_ms=int(conf.broker_request_timeout * 1000),
            check_crcs=conf.broker_check_crcs,
            session_timeout_ms=int(conf.broker_session_timeout * 1000),
            rebalance_timeout_ms=int(conf.broker_rebalance_timeout * 1000),
            heartbeat_interval_ms=int(conf.broker_heartbeat_interval * 1000),
            metadata_max_age_ms=conf.consumer_metadata_max_age_ms,
            connections_max_idle_ms=conf.consumer_connections_max_idle_ms,
            **driver.credentials_to_aiokafka_auth(conf.broker_credentials, conf.ssl_context),
        )

    async def _fetch_records(
        self, consumer: Any, active_partitions: set[TP], timeout: float | None = None, max_records: int | None = None
    ) -> dict[TP, list[Any]]:
        """Fetch, and note which offsets each list covers: markers before, between and after its records included."""
        fetcher = consumer._fetcher
        deadline = time.monotonic() + (timeout or 0.0)
        while self.consumer.flow_active:
            if fetcher._subscriptions.reassignment_in_progress:
                await fetcher._subscriptions.wait_for_assignment()
            # A position that is not where the last list ended was assigned, sought or reset. With a timeout of 0 the
            # call below returns without giving way, so that none can move between here and there: a list said to begin
            # before a jump would hide the records in between.
            for tp, position in self._positions(consumer).items():
                if position != self._left.get(tp):
                    self._starts[tp] = position
            for result in fetcher._records.values():
                if type(result) is FetchResult and result.has_more():
                    result._partition_records._records_iterator = _whole_batches(result._partition_records)
            batches = await super()._fetch_records(consumer, active_partitions, timeout=0)
            self._left = positions = self._positions(consumer)
            if batches:
                fetched: dict[TP, list[Any]] = {}
                for tp, some in batches.items():
                    records = list(chain.from_iterable(some))
                    fetched[tp] = [Fetched(tp, self._starts[tp], positions[tp], records)]
                    self._starts[tp] = positions[tp]
                return fetched
            waiter = fetcher._create_fetch_waiter()
            done, _ = await asyncio.wait([waiter], timeout=max(0.0, deadline - time.monotonic()))
            if not done:
                waiter.cancel()
                break
            waiter.result()  # raises what ended the fetcher
        return {}

    @staticmethod
    def _positions(consumer: Any) -> dict[TP, int]:
        subscription = consumer._subscription.subscription
        assignment = subscription.assignment if subscription is not None else None
        if assignment is None:
            return {}
        states = ((tp, assignment.state_value(tp)) for tp in assignment.tps)
        return {tp: state.position for tp, state in states if state is not None and state.has_valid_position}

    def member(self) -> tuple[int, str]:
        """Generation and member id in the consumer group right now."""
        coordinator = self._ensure_consumer()._coordinator
        return coordinator.generation, coordinator.member_id

    @property
    def in_group(self) -> bool:
        """Has it a generation, and a task that sends heartbeats? Not so for a moment in every rebalance."""
        coordinator = self._ensure_consumer()._coordinator
        heartbeats = coordinator._heartbeat_task
        return coordinator.generation >= 0 and heartbeats is not None and not heartbeats.done()


class BatchConsumer(driver.Consumer):
    """Faust's consumer, with a fetched list as one message."""

    _thread: BatchThread

    def _new_consumer_thread(self) -> BatchThread:
        return BatchThread(self, loop=self.loop, beacon=self.beacon)

    async def _wait_next_records(self, timeout: float) -> tuple[Any, Any]:
        if self.flow_active and not self._get_active_partitions():
            # Every partition is full: Faust would sleep a whole second here.
            await self.sleep(_ALL_FULL_S)
            return {}, None
        records, _ = await super()._wait_next_records(timeout)
        # None instead of the active partitions: Faust drops what it fetched of a partition that was paused meanwhile,
        # without a word and without seeking back.
        return records, None

    def _to_message(self, tp: TP, record: Any) -> ConsumerMessage:
        fetched: Fetched = record
        last = fetched.records[-1]
        return ConsumerMessage(
            tp.topic,
            tp.partition,
            last.offset,
            last.timestamp / 1000.0,
            _APPEND_TIME,
            [],
            None,
            cast(bytes, fetched),
            None,
            0,
            0,
            tp,
            generation_id=self.app.consumer_generation_id,
        )

    async def _commit(self, offsets: Mapping[TP, int]) -> bool:
        return True

    def member(self) -> tuple[int, str]:
        return self._thread.member()

    @property
    def in_group(self) -> bool:
        return self._thread.in_group


class BatchTransport(driver.Transport):
    """Faust's aiokafka transport with the consumer above."""

    Consumer = BatchConsumer


def _whole_batches(fetched: Any) -> Iterator[list[Record]]:
    """The record batches of one fetch of a partition, in place of aiokafka's iterator over single records.

    That one copies each record into a ``ConsumerRecord``, which costs more than reading the record did. Like it, this
    leaves out control batches and aborted transactions, and keeps ``next_fetch_offset`` behind what was handed out. All
    that it knows stands in ``fetched``: it may be made anew between two batches.
    """
    while fetched._records.has_next():
        batch = fetched._records.next_batch()
        if fetched._check_crcs and not batch.validate_crc():
            raise CorruptRecordException(f"a batch of {fetched._tp} does not match its checksum")
        if _counts(fetched, batch):
            at = fetched.next_fetch_offset
            records = list(batch)
            if records and records[0].offset < at:  # the broker answers with the whole batch that holds the offset
                records = [record for record in records if record.offset >= at]
            fetched.next_fetch_offset = batch.next_offset
            if records:
                yield records
        else:
            fetched.next_fetch_offset = batch.next_offset


def _counts(fetched: Any, batch: Any) -> bool:
    """Does a batch hold records for us: neither the end marker of a transaction, nor part of an aborted one?"""
    if batch.producer_id is not None:
        fetched._consume_aborted_up_to(batch.base_offset)
        if batch.is_control_batch and fetched._contains_abort_marker(batch):
            fetched._aborted_producers.discard(batch.producer_id)
    if batch.is_control_batch:
        return False
    return not (batch.is_transactional and batch.producer_id in fetched._aborted_producers)


def co_owned(assigned: Iterable[TP], topics: tuple[str, str]) -> list[int]:
    """Partitions assigned of both topics. Raises RuntimeError when one came without its twin."""
    owned = {topic: {tp.partition for tp in assigned if tp.topic == topic} for topic in topics}
    first, second = (owned[topic] for topic in topics)
    if first != second:
        raise RuntimeError(
            f"expected the same partitions of {topics[0]} and {topics[1]}, got {sorted(first)} and {sorted(second)}: "
            "all raters of a group must use the co-partitioning assignor"
        )
    return sorted(first)


def batch_consumer(app: Any) -> BatchConsumer:
    """The app's consumer as what it is."""
    return cast(BatchConsumer, app.consumer)
