"""What a partition's state costs: per key at 1M and at 50M keys, in memory, restored from the changelogs, and resumed.

``python -m tests.bench.state`` measures alone, on the Kafka of ``TALLY_KAFKA_BOOTSTRAP``, in about two minutes and
2.5 GB of disk.
"""

import json
import multiprocessing
import secrets
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient

from pipeline.infra.settings import Settings
from pipeline.infra.topics import Topics, ensure_topics
from pipeline.rating.changelog import SEEN_DAYS, pack_seen
from pipeline.rating.commit import new_producer
from pipeline.rating.manifest import SEEN_ROW_BYTES
from pipeline.rating.segments import KEY_BYTES
from pipeline.rating.state import PartitionState, Positions
from pipeline.rating.take import take
from tests.bench.figures import Figure

T = TypeVar("T")

FEW_KEYS, MANY_KEYS = 1_000_000, 50_000_000
RESTORED_KEYS = 10_000_000
PARTITIONS = 4
#: Records of a usual batch, and how many batches are measured: enough to pay for the merges they cause.
BATCH, BATCHES = 1_000, 800
#: Identities in a record of the changelog.
BLOCK = 5_000
FIRST_DAY = 20_500
_FILL = 100_000


class Cost(NamedTuple):
    """Of one process with all partitions open."""

    look_up_us: float
    insert_us: float
    anonymous_mib: float
    mapped_mib: float

    @property
    def both_us(self) -> float:
        return self.look_up_us + self.insert_us


def state(settings: Settings) -> Iterator[Figure]:
    """Each part in a process of its own, whose memory is nothing else's."""
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    few = _in_process(_cost, settings, FEW_KEYS)
    many = _in_process(_cost, settings, MANY_KEYS)
    peer = f"with {FEW_KEYS / 1e6:.0f}M keys"
    for name, ours, theirs in (
        ("look_up", many.look_up_us, few.look_up_us),
        ("insert", many.insert_us, few.insert_us),
        ("look_up_and_insert", many.both_us, few.both_us),
    ):
        yield Figure(f"state_{name}_us", ours, "µs of CPU a key, 50M keys", peer, theirs, ours / theirs)
    yield Figure("state_rss_anon_mib", many.anonymous_mib, "MiB of RssAnon, 50M keys")
    yield Figure("state_rss_file_mib", many.mapped_mib, "MiB of RssFile, 50M keys")
    here = settings.model_copy(update={"topic_prefix": f"{settings.topic_prefix}state-", "partitions": PARTITIONS})
    ensure_topics(here)
    try:
        _write_changelogs(here)
        restored_s = _in_process(_take_all, here, RESTORED_KEYS)
        yield Figure("state_restored_keys_per_s", RESTORED_KEYS / restored_s, "keys/s from the changelogs")
        resumed_s = _in_process(_take_all, here, 0)
        yield Figure("state_resume_s", resumed_s, "s, 10M keys on the disk")
    finally:
        admin = AdminClient(here.kafka)
        ours = [name for name in admin.list_topics(timeout=15).topics if name.startswith(here.topic_prefix)]
        for deleted in admin.delete_topics(ours).values():
            deleted.result(30)
        shutil.rmtree(here.data_dir / "states", ignore_errors=True)


def _in_process(what: Callable[[Settings, int], T], settings: Settings, keys: int) -> T:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(what, settings, keys).result()


def _cost(settings: Settings, keys: int) -> Cost:
    dice = np.random.default_rng(keys)
    folder = settings.data_dir / "keys"
    states = [PartitionState(folder / str(number), {}) for number in range(PARTITIONS)]
    try:
        share = keys // PARTITIONS
        for one in states:
            for done in range(0, share, _FILL):
                day = FIRST_DAY + SEEN_DAYS * done // share
                rows = min(_FILL, share - done)
                one.apply({day: [dice.bytes(rows * SEEN_ROW_BYTES)]}, {}, Positions(done, 0))
        looked_up = inserted = 0.0
        for number in range(BATCHES):
            one = states[number % PARTITIONS]
            packed = dice.bytes(BATCH * SEEN_ROW_BYTES)
            identities = b"".join(packed[at : at + KEY_BYTES] for at in range(0, len(packed), SEEN_ROW_BYTES))
            started = time.thread_time()
            known = one.known(identities)
            middle = time.thread_time()
            one.apply({FIRST_DAY + SEEN_DAYS: [packed]}, {}, Positions(keys + number, 0))
            inserted += time.thread_time() - middle
            looked_up += middle - started
            if any(known) or not all(one.known(identities[: 9 * KEY_BYTES])):
                raise RuntimeError("the state does not know what it was given")
        memory = _memory_mib()
        total = BATCH * BATCHES / 1e6
        return Cost(looked_up / total, inserted / total, memory["RssAnon"], memory["RssFile"])
    finally:
        for one in states:
            one.close()
        shutil.rmtree(folder)


def _write_changelogs(settings: Settings) -> None:
    dice = np.random.default_rng(11)
    topics = Topics(settings.topic_prefix)
    producer = Producer({**settings.kafka, "linger.ms": 20, "queue.buffering.max.kbytes": 1_000_000})
    share = RESTORED_KEYS // PARTITIONS
    for done in range(0, share, BLOCK):
        day = FIRST_DAY + SEEN_DAYS * done // share
        for partition in range(PARTITIONS):
            for record in pack_seen({day: [dice.bytes(BLOCK * SEEN_ROW_BYTES)]}):
                producer.produce(topics.seen, record, None, partition)
    if producer.flush(120):
        raise RuntimeError("the changelog was not written")
    # A rater that finds state without offsets refuses to start: say that it is at the beginning.
    group = Consumer({**settings.kafka, "group.id": f"{settings.topic_prefix}rater"})
    beginning = [TopicPartition(topics.events, number, 0) for number in range(PARTITIONS)]
    group.commit(offsets=beginning, asynchronous=False)
    group.close()


def _take_all(settings: Settings, expected: int) -> float:
    """Open and take all partitions at once, as a worker does; seconds. ``expected``: identities to be restored."""
    restored = [0] * PARTITIONS
    topics = Topics(settings.topic_prefix)

    def take_one(partition: int) -> None:
        one = PartitionState(settings.data_dir / "states" / str(partition), {})
        taken = take(
            new_producer(settings.kafka, f"{settings.topic_prefix}rater-{partition}"),
            one,
            kafka=settings.kafka,
            group=f"{settings.topic_prefix}rater",
            topics=topics,
            partition=partition,
            stopped=lambda: False,
        )
        restored[partition] = taken.restored_seen
        one.close()

    threads = [threading.Thread(target=take_one, args=(partition,)) for partition in range(PARTITIONS)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started
    if sum(restored) != expected:
        raise RuntimeError(f"expected {expected} identities restored, got {restored}")
    return seconds


def _memory_mib() -> dict[str, float]:
    lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    return {line[0].rstrip(":"): int(line[1]) / 1024 for line in lines if line[0].startswith("Rss")}


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="tally-state-") as folder:
        settings = Settings(data_dir=Path(folder), topic_prefix=f"bench-{secrets.token_hex(4)}-")
        for figure in state(settings):
            sys.stdout.write(json.dumps(figure.as_json(), ensure_ascii=False) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
