"""The rater worker: a Faust app whose agent hands whole partition batches to the partitions' own threads.

Faust gives group membership, rebalancing and fetching. Offsets, acknowledgements, state and output are the rater's
own (``pipeline.rating.partition``), because they have to move in one transaction.
"""

import asyncio
import contextlib
import os
import signal
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import faust
from confluent_kafka import TopicCollection
from confluent_kafka.admin import AdminClient
from faust.types import TP
from faust.types.auth import SASLMechanism

from pipeline.core.catalog import STALE_S
from pipeline.core.limits import Limits
from pipeline.infra import metrics, runtime
from pipeline.infra.avro import EVENTS, Schemas, frame, load_schemas
from pipeline.infra.going_on import GoingOn
from pipeline.infra.logs import get_logger
from pipeline.infra.settings import Settings
from pipeline.infra.topics import Topics, check_topics
from pipeline.rating.batch import Batch, Outcome, Shape, Source
from pipeline.rating.catalog_feed import CatalogFeed
from pipeline.rating.commit import STUCK_S, Membership
from pipeline.rating.faust_batches import BatchTransport, Fetched, batch_consumer, co_owned
from pipeline.rating.pace import interval_s
from pipeline.rating.partition import PartitionListener, PartitionRater, RaterConfig
from pipeline.rating.watchdog import Watchdog

log = get_logger(__name__)

#: Largest answer of the broker for one partition.
_FETCH_BYTES = 2 * 1024 * 1024
#: A worker that cannot stop in this time leaves anyway: the next owner fences it.
_STOP_S = 20.0
#: One that has failed has nothing to finish.
_FAILED_STOP_S = 3.0
#: Whatever hangs on the way out (the event loop, a client's thread), the process of a failed worker ends after this.
_GONE_S = 45.0
_CATALOG_S = 60.0
#: How long one partition's thread may keep the interpreter: a tenth less CPU than with Python's 5 ms, measured.
_SWITCH_S = 0.02


class RaterFailed(Exception):
    """The worker had to exit: its state or its place in the group is unknown. Starting it again restores both."""


class Rater(PartitionListener):
    """One worker: the Faust app, the catalog feed, and the owners of the partitions assigned to it."""

    def __init__(self, settings: Settings, *, on_step: Callable[[str], None] = lambda step: None) -> None:
        self._settings = settings
        self._on_step = on_step
        self._topics = Topics(settings.topic_prefix)
        self._sources = {self._topics.events: Source.EVENTS, self._topics.retry: Source.RETRY}
        self._config = _config(settings, self._topics)
        self._owners: dict[int, PartitionRater] = {}
        self._failure: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._done = asyncio.Event()
        self._feed = CatalogFeed(
            settings.kafka, self._topics, self._config.schemas, lambda error: self.failed(-1, error)
        )
        self._watchdog = Watchdog(
            settings.kafka,
            self._config.schemas,
            group=self._config.group,
            retry_topic=self._topics.retry,
            patience_s=settings.progress_timeout,
            places=self._watched,
            in_group=lambda: batch_consumer(self.app).in_group,
            on_stall=lambda error: self.failed(-1, error),
        )
        self.app = _faust_app(settings, self._config.group)
        # The value is a fetched list, not bytes: no serializer, no acknowledgement.
        channel = self.app.topic(
            *self._sources, key_serializer="raw", value_serializer="raw", value_type=None, acks=False
        )
        self.app.agent(channel, name="rater")(self._rate)
        signals: Any = self.app  # typed for handlers of one exact signature
        signals.on_partitions_assigned.connect(self._on_assigned)
        signals.on_partitions_revoked.connect(self._on_revoked)

    async def run(self) -> None:
        """Work until SIGTERM or SIGINT. Raises RaterFailed when the worker must be started anew."""
        self._loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._done.set)
        metrics.serve(self._settings)
        runtime.collect_seldom()
        sys.setswitchinterval(_SWITCH_S)
        self._feed.start()
        if not await self._catalog_read():
            return
        log.info("rater_started", group=self._config.group, worker=self._config.worker)
        await self.app.start()
        self._watchdog.start()
        watches = [asyncio.create_task(watch()) for watch in (self._show_lag, self._watch_faust, self._watch_owners)]
        try:
            await self._done.wait()
        finally:
            for watch in watches:
                watch.cancel()
            await self._stop()
        if self._failure is not None:
            raise RaterFailed(f"{type(self._failure).__name__}: {self._failure}") from self._failure
        log.info("rater_stopped")

    async def _catalog_read(self) -> bool:
        """Wait until the catalog was read once; False when told to stop before. Raises RaterFailed if it cannot be."""
        deadline = time.monotonic() + _CATALOG_S
        while not await asyncio.to_thread(self._feed.wait_ready, 0.2):
            if self._failure is not None:
                raise RaterFailed(f"the catalog cannot be read: {self._failure}") from self._failure
            if self._done.is_set():
                self._feed.stop()
                return False
            if time.monotonic() > deadline:
                raise RaterFailed(f"the catalog could not be read in {_CATALOG_S:.0f} s: is Kafka reachable?")
        return True

    async def _stop(self) -> None:
        self._feed.stop()
        self._watchdog.stop()
        await self._release(self._owners)
        self._config.going_on.close()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.app.stop(), _STOP_S)

    # -- Faust

    async def _rate(self, stream: Any) -> None:
        try:
            async for event in stream.events():
                fetched: Fetched = event.message.value
                owner = self._owners.get(fetched.tp.partition)
                if owner is not None:
                    owner.offer(self._sources[fetched.tp.topic], fetched)
        except Exception as error:
            # Faust would drop the list, start the agent again and wait for the next one, which may be long in coming.
            self.failed(-1, error)
            raise

    async def _on_assigned(self, app: Any, assigned: set[TP], **kwargs: Any) -> None:
        try:
            partitions = co_owned(assigned, (self._topics.events, self._topics.retry))
        except RuntimeError as error:
            self.failed(-1, error)
            return
        # Before any wait: a heartbeat may lose the membership meanwhile, and that of nobody would fence nothing.
        generation, member = batch_consumer(self.app).member()
        if generation < 0 or not member:
            self.failed(-1, RaterFailed("the group forgot this worker while it assigned partitions"))
            return
        await self._release(self._owners)
        membership = Membership(self._config.group, generation, member)
        log.info("partitions_assigned", partitions=partitions, generation=generation)
        interval = interval_s(len(partitions), self._settings.transactions_per_second)
        for partition in partitions:
            owner = PartitionRater(
                partition, membership, self._config, self._feed, self, interval_s=interval, on_step=self._on_step
            )
            self._owners[partition] = owner
            owner.start()

    async def _on_revoked(self, app: Any, revoked: set[TP], **kwargs: Any) -> None:
        gone = {tp.partition for tp in revoked}
        if gone & self._owners.keys():
            log.info("partitions_revoked", partitions=sorted(gone))
        await self._release(gone)

    async def _release(self, partitions: Any) -> None:
        """End the owners of partitions; each finishes or drops the batch in hand."""
        owners = [self._owners.pop(partition) for partition in list(partitions) if partition in self._owners]
        for owner in owners:
            owner.stop()
            for source in Source:
                metrics.forget(*self._tp(owner.partition, source), metrics.RATER_POSITION, metrics.RATER_LAG)
            metrics.RATER_STOPPED.remove(str(owner.partition))
            metrics.RATER_SEEN.remove(str(owner.partition))
        deadline = time.monotonic() + (_STOP_S if self._failure is None else _FAILED_STOP_S)
        for owner in owners:
            while owner.is_alive() and not owner.stuck and time.monotonic() < deadline:
                await asyncio.to_thread(owner.join, 0.5)
            if owner.is_alive():
                self.failed(
                    owner.partition, RaterFailed(f"partition {owner.partition} did not stop, or hangs in a Kafka call")
                )

    # -- what partitions tell (from their threads)

    def full(self, partition: int, source: Source, is_full: bool) -> None:
        self._in_loop(self._pause, self._tp(partition, source), is_full)

    def seek(self, partition: int, source: Source, offset: int) -> None:
        tp = self._tp(partition, source)
        log.info("fetching_again", topic=tp.topic, partition=partition, offset=offset)
        self._in_loop(self._seek, tp, offset)

    def _seek(self, tp: TP, offset: int) -> None:
        def sought(done: "asyncio.Future[None]") -> None:
            # What was queued behind the hole is forgotten: without the seek nothing would come again.
            if not done.cancelled() and (error := done.exception()) is not None:
                self.failed(tp.partition, error)

        asyncio.ensure_future(self.app.consumer.seek_wait({tp: offset})).add_done_callback(sought)

    def failed(self, partition: int, error: BaseException) -> None:
        if self._failure is None:
            self._failure = error
            log.error("rater_failed", partition=partition, error=f"{type(error).__name__}: {error}")
            # In case nothing below works any more. A daemon: when the process ends in time, it goes with it.
            last_resort = threading.Timer(_GONE_S, _leave)
            last_resort.daemon = True
            last_resort.start()
        self._in_loop(self._done.set)

    def committed(self, partition: int, batch: Batch, outcome: Outcome, seconds: float) -> None:
        metrics.RATER_EVENTS.labels("rated").inc(len(outcome.rated))
        metrics.RATER_EVENTS.labels("duplicate").inc(len(outcome.repeats))
        metrics.RATER_EVENTS.labels("parked").inc(len(outcome.parked) + len(outcome.waiting))
        metrics.RATER_EVENTS.labels("dead_lettered").inc(len(outcome.dead))
        metrics.RATER_ROWS.inc(len(outcome.rows))
        metrics.RATER_BATCHES.inc()
        metrics.RATER_BATCH.observe(outcome.records)
        metrics.RATER_COMMIT.observe(seconds)

    def aborted(self, partition: int) -> None:
        metrics.RATER_ABORTED.inc()

    def stopped(self, partition: int, why: str | None) -> None:
        metrics.RATER_STOPPED.labels(partition).set(0 if why is None else 1)

    def _tp(self, partition: int, source: Source) -> TP:
        return TP(self._topics.events if source is Source.EVENTS else self._topics.retry, partition)

    def _pause(self, tp: TP, is_full: bool) -> None:
        consumer = batch_consumer(self.app)
        if tp not in consumer.assignment():
            return
        if is_full:
            consumer.pause_partitions({tp})
        else:
            consumer.resume_partitions({tp})

    def _in_loop(self, call: Callable[..., object], *args: Any) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(partial(call, *args))

    async def _watch_faust(self) -> None:
        """Faust logs a crash of its own and stays: leave with it."""
        await self.app._crashed.wait()
        self.failed(-1, self.app.crash_reason or RuntimeError("Faust crashed"))

    async def _watch_owners(self) -> None:
        """A thread that hangs in the Kafka client cannot be helped; another process can go on in its place."""
        while not any(owner.stuck for owner in self._owners.values()):
            await asyncio.sleep(1.0)
        self.failed(-1, RaterFailed(f"the Kafka client has not come back from a call for {STUCK_S:.0f} s"))

    def _watched(self) -> dict[TP, int]:
        """Where the partitions stand that have no reason to: called from the watchdog's thread."""
        if self._feed.age_s > STALE_S:
            return {}
        return {
            self._tp(partition, source): offset
            for partition, owner in list(self._owners.items())
            for source, offset in list(owner.next_offsets.items())  # none while it is being taken and restored
            if source is Source.RETRY or owner.stopped_by is None
        }

    async def _show_lag(self) -> None:
        while True:
            await asyncio.sleep(2.0)
            metrics.RATER_CATALOG_POSITION.set(self._feed.view.offset)
            metrics.RATER_CATALOG_AGE.set(self._feed.age_s)
            for partition, owner in self._owners.items():
                metrics.RATER_SEEN.labels(partition).set(owner.seen_keys)
                for source, offset in owner.next_offsets.items():
                    tp = self._tp(partition, source)
                    metrics.RATER_POSITION.labels(tp.topic, partition).set(offset)
                    end = self.app.consumer.highwater(tp)
                    if end is not None:
                        metrics.RATER_LAG.labels(tp.topic, partition).set(max(0, end - offset))


def _leave() -> None:
    log.error("rater_hangs", then="leaves as it is", after_s=_GONE_S)
    os._exit(1)


def run(settings: Settings, *, on_step: Callable[[str], None] = lambda step: None) -> None:
    """Run one rater in the foreground until it is told to stop. Raises RaterFailed when it had to give up."""
    check_topics(settings)

    async def work() -> None:
        await Rater(settings, on_step=on_step).run()

    asyncio.run(work())


def _config(settings: Settings, topics: Topics) -> RaterConfig:
    schemas = load_schemas(settings.registry_url)
    admin = AdminClient(settings.kafka)
    names = [topics.events, topics.retry, topics.seen, topics.totals]
    cluster = admin.describe_cluster().result(15).cluster_id
    described = admin.describe_topics(TopicCollection(names))
    folder = settings.topic_prefix or "default"
    stamp = {"cluster": str(cluster)} | {name: str(described[name].result(15).topic_id) for name in names}
    return RaterConfig(
        kafka=settings.kafka,
        group=f"{settings.topic_prefix}rater",
        topics=topics,
        schemas=schemas,
        shape=Shape(topics.events, settings.partitions, _frames(schemas), schemas),
        batch_records=settings.batch_records,
        limits=Limits(settings.dead_letter_run_max, settings.dead_letter_percent_max, settings.dead_letter_window),
        going_on=GoingOn(settings.kafka, topics),
        state_dir=settings.data_dir / "rater" / folder,
        snapshot_dir=None if settings.snapshot_dir is None else settings.snapshot_dir / folder,
        snapshot_interval_s=settings.snapshot_interval,
        stamp=stamp,
        worker=f"{socket.gethostname()}:{os.getpid()}",
    )


def _frames(schemas: Schemas) -> dict[bytes, bytes]:
    """Framing bytes of each usage-event schema → those of the rated row that embeds it."""
    return {frame(event_id): frame(schemas.rated_for(event_id)) for event_id in schemas.ids(EVENTS)}


def _faust_app(settings: Settings, group: str) -> faust.App:
    datadir = settings.data_dir / "faust"
    datadir.mkdir(parents=True, exist_ok=True)
    app = faust.App(
        group,
        broker_client_id=f"tally-rater-{os.getpid()}",  # `tally status` names the group's members by it
        broker=[f"kafka://{address.strip()}" for address in (settings.kafka_bootstrap or "").split(",")],
        broker_credentials=_credentials(settings),
        datadir=datadir,
        store="memory://",
        autodiscover=False,
        # Faust's web server listens on all interfaces and serves table data: off. Metrics have their own, on loopback.
        web_enabled=False,
        topic_allow_declare=False,
        topic_disable_leader=True,
        topic_partitions=settings.partitions,
        consumer_auto_offset_reset="earliest",  # a hint: the rater checks every start against its own position
        consumer_max_fetch_size=_FETCH_BYTES,
        broker_max_poll_records=4 * settings.batch_records,
        stream_buffer_maxsize=16,
        stream_wait_empty=False,
        # After a SIGKILL the group waits this long before it moves the partitions on.
        broker_session_timeout=settings.session_timeout,
        broker_heartbeat_interval=settings.session_timeout / 4,
        broker_request_timeout=max(40.0, settings.session_timeout * 2),
        # A broker that just restarted may say that it has no such topics, and a group's leader that believes it gives
        # nobody anything until it asks again: every 5 minutes by default.
        consumer_metadata_max_age_ms=5_000,
        broker_rebalance_timeout=max(30.0, settings.session_timeout),
    )
    app.transport = BatchTransport(app.conf.broker, app, loop=app.loop)
    return app


def _credentials(settings: Settings) -> Any:
    protocol = settings.kafka_security_protocol
    if protocol == "PLAINTEXT":
        return None
    context = None
    if protocol.endswith("SSL"):
        context = ssl.create_default_context(cafile=str(settings.kafka_ssl_ca) if settings.kafka_ssl_ca else None)
        if settings.kafka_ssl_certificate is not None:
            context.load_cert_chain(settings.kafka_ssl_certificate, settings.kafka_ssl_key)
    if protocol == "SSL":
        return faust.SSLCredentials(context)
    password = settings.kafka_sasl_password
    return faust.SASLCredentials(
        username=settings.kafka_sasl_username,
        password=password.get_secret_value() if password else None,
        mechanism=SASLMechanism(settings.kafka_sasl_mechanism),
        ssl_context=context,
    )
