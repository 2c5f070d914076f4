"""Owners of a partition made by hand: members of the raters' group, producers and committers, as a worker has them."""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

from aiokafka import AIOKafkaConsumer
from confluent_kafka import Producer

from pipeline.rating.batch import Batch, Outcome
from pipeline.rating.commit import Committer, Membership, new_producer
from tests.integration.deployment import Deployment
from tests.rating.world import SCHEMAS, batch, message, run, usage


@contextlib.contextmanager
def members(deployment: Deployment) -> Iterator["Members"]:
    joined = Members(deployment)
    try:
        yield joined
    finally:
        joined.close()


class Members:
    """Members of the raters' group that do nothing else, on an event loop of their own."""

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._consumers: list[AIOKafkaConsumer] = []

    def join(self) -> Membership:
        """One more member; returns who it is in the generation that begins with it."""

        async def joining() -> Membership:
            consumer = AIOKafkaConsumer(
                self._deployment.topics.events,
                bootstrap_servers=self._deployment.settings.kafka_bootstrap,
                group_id=self._deployment.group,
                enable_auto_commit=False,
                session_timeout_ms=6000,
                heartbeat_interval_ms=500,
            )
            await consumer.start()
            self._consumers.append(consumer)
            while not consumer._coordinator.generation > 0 or consumer._coordinator.member_id == "":
                await asyncio.sleep(0.05)
            coordinator = consumer._coordinator
            return Membership(self._deployment.group, coordinator.generation, coordinator.member_id)

        return asyncio.run_coroutine_threadsafe(joining(), self._loop).result(30)

    def close(self) -> None:
        async def leaving() -> None:
            for consumer in self._consumers:
                await consumer.stop()

        asyncio.run_coroutine_threadsafe(leaving(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def producer(deployment: Deployment, name: str = "") -> Producer:
    """A producer with the transactional id of partition 0, or with another one."""
    return new_producer(deployment.settings.kafka, f"{deployment.group}-{name or 0}")


def committer(
    deployment: Deployment, producer: Producer, on_step: Callable[[str], None] = lambda step: None
) -> Committer:
    return Committer(
        producer,
        topics=deployment.topics,
        schemas=SCHEMAS,
        partition=0,
        partitions=1,
        worker="test:1",
        on_step=on_step,
    )


def some_batch() -> tuple[Batch, Outcome]:
    """Three events, rated to a row each."""
    records = [message(usage(f"k{i}"), i) for i in range(3)]
    return replace(batch(records), partition=0), run(records)
