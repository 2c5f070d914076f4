"""How far raters and sinks are, looked at all the time; and how long any partition ever stood still with work to do."""

import contextlib
import threading
import time
from collections import defaultdict
from collections.abc import Callable

import psycopg
from confluent_kafka import Consumer, KafkaException, TopicPartition

from pipeline.infra.postgres import connect
from pipeline.infra.settings import Settings

_LOOK_S, _ANSWER_S = 0.5, 5.0
_WORTH_SAYING_S = 10.0
RATER, SINK = "rater", "rater and sink"

_WRITTEN = """
SELECT partition, (SELECT next_offset FROM billing.receipt AS newest
    WHERE newest.topic = %(topic)s AND newest.partition = places.partition ORDER BY first_offset DESC LIMIT 1)
FROM generate_series(0, %(partitions)s - 1) AS places (partition)
"""
_PARKED = "SELECT count(*) FROM billing.unrated_event WHERE state = 'parked'"


class Watch:
    """A thread that looks twice a second, as long as broker and database answer."""

    def __init__(self, settings: Settings, topic: str, say: Callable[[str], None]) -> None:
        self._settings, self._topic, self._say = settings, topic, say
        self._ends: dict[int, int] = {}
        self._at: defaultdict[str, dict[int, int]] = defaultdict(dict)
        #: Since when a partition has stood still with work to do.
        self._since: dict[tuple[str, int], float] = {}
        self._longest: defaultdict[str, float] = defaultdict(float)
        self._parked = 0
        self._stop = threading.Event()
        self._looks = 0
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def status(self) -> str:
        left = {stage: sum(self._ends.values()) - sum(self._at[stage].values()) for stage in (RATER, SINK)}
        return (
            f"arrived {sum(self._ends.values())}, lag {left[RATER]} rater, {left[SINK]} in PostgreSQL, "
            f"parked {self._parked}"
        )

    def done(self) -> bool:
        """Has everything been rated and written, as of a look that began after this call?"""
        looks = self._looks
        deadline = time.monotonic() + 10
        while self._looks < looks + 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        return self._looks >= looks + 2 and all(self._at[stage] == self._ends for stage in (RATER, SINK))

    def longest(self) -> dict[str, float]:
        return {stage: round(seconds, 1) for stage, seconds in self._longest.items()}

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        consumer = Consumer(self._settings.kafka | {"group.id": f"{self._settings.topic_prefix}rater"})
        places = [TopicPartition(self._topic, partition) for partition in range(self._settings.partitions)]
        with contextlib.closing(consumer):
            while not self._stop.wait(_LOOK_S):
                # Positions first: what is behind an end taken later is work.
                with contextlib.suppress(KafkaException, psycopg.OperationalError):
                    rated = {place.partition: max(place.offset, 0) for place in consumer.committed(places, _ANSWER_S)}
                    with connect(self._settings.dsn, application="watch", autocommit=True) as connection:
                        rows = connection.execute(
                            _WRITTEN, {"topic": self._topic, "partitions": len(places)}
                        ).fetchall()
                        parked = connection.execute(_PARKED).fetchone()
                    ends = {place.partition: consumer.get_watermark_offsets(place, _ANSWER_S)[1] for place in places}
                    self._parked = parked[0] if parked else 0
                    self._note(RATER, rated)
                    self._note(SINK, {partition: offset or 0 for partition, offset in rows})
                    self._ends = ends
                    self._looks += 1

    def _note(self, stage: str, at: dict[int, int]) -> None:
        now = time.monotonic()
        for partition, offset in at.items():
            if offset >= self._ends.get(partition, 0) or offset > self._at[stage].get(partition, 0):
                stood = now - self._since.get((stage, partition), now)
                if stood > _WORTH_SAYING_S:
                    self._say(f"partition {partition} had stood still for {stood:.1f} s ({stage})")
                self._since[stage, partition] = now
            else:
                stood = now - self._since.setdefault((stage, partition), now)
                self._longest[stage] = max(self._longest[stage], stood)
        self._at[stage] = at
