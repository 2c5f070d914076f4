"""Letters and resolutions arrive in any order over several topics; what is kept must not depend on it."""

import threading
import time
from itertools import count
from typing import Any

from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from psycopg import Connection

from pipeline.billing.unrated import Letter, Resolution, write_unrated
from pipeline.infra.postgres import connect
from pipeline.infra.settings import Settings
from tests.billing.records import letter_record

TOPIC = "usage.events"


def letter(origin: int, *, dead: bool, attempts: int, replays: int = 0, partition: int = 0, at: int = 0) -> Letter:
    record = letter_record(offset=origin, attempts=attempts, replays=replays, message=f"{replays}/{attempts}")
    topic = "usage.dead-letter" if dead else "usage.retry"
    return Letter(topic, partition, at, record, dead)


def apply(connection: "Connection[Any]", news: list[Letter | Resolution], *, one_by_one: bool = True) -> None:
    for batch in [[one] for one in news] if one_by_one else [news]:
        letters = [one for one in batch if isinstance(one, Letter)]
        write_unrated(connection, letters, [one for one in batch if isinstance(one, Resolution)])


def kept(connection: "Connection[Any]", origin: int) -> tuple[Any, ...] | None:
    row = connection.execute(
        """SELECT state, message, attempts, replays, letter_topic, letter_partition, letter_offset
        FROM billing.unrated_event WHERE origin_offset = %s""",
        [origin],
    ).fetchone()
    return None if row is None else tuple(row)


LETTERS = st.builds(
    lambda dead, attempts, replays, partition, at: {
        "dead": dead,
        "attempts": attempts,
        "replays": replays,
        "partition": partition,
        "at": at,
    },
    st.booleans(),
    st.integers(1, 3),
    st.integers(0, 2),
    st.integers(0, 1),
    st.integers(0, 3),
)
# An offset of a topic holds one letter only, so what stands at one place is one letter.
NEWS = st.lists(
    LETTERS | st.sampled_from(["rated", "duplicate", "parked", "dead_lettered"]),
    min_size=1,
    max_size=7,
    unique_by=lambda one: one if isinstance(one, str) else (one["dead"], one["partition"], one["at"]),
)


def test_order_does_not_matter(settings: Settings) -> None:
    origins = count()
    with connect(settings.dsn, application="test", autocommit=True) as connection:

        def made(news: list[Any], origin: int) -> list[Letter | Resolution]:
            return [
                Resolution(TOPIC, 0, origin, one) if isinstance(one, str) else letter(origin, **one) for one in news
            ]

        @hypothesis_settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
        @given(NEWS.flatmap(lambda news: st.tuples(st.just(news), st.permutations(news))), st.booleans())
        def holds(orders: tuple[list[Any], list[Any]], one_by_one: bool) -> None:
            first, second = next(origins), next(origins)
            apply(connection, made(orders[0], first))
            apply(connection, made(orders[1], second), one_by_one=one_by_one)
            assert kept(connection, first) == kept(connection, second)

        holds()


def test_the_furthest_story_counts(settings: Settings) -> None:
    """Parked, parked again, dead; replayed, parked anew; at last rated. After each step the state is the step's."""
    story: list[tuple[Letter | Resolution, str]] = [
        (letter(5, dead=False, attempts=1), "parked"),
        (letter(5, dead=False, attempts=2, at=1), "parked"),
        (letter(5, dead=True, attempts=2), "dead_lettered"),
        (letter(5, dead=False, attempts=2, replays=1, at=2), "parked"),
        (Resolution(TOPIC, 0, 5, "parked"), "parked"),
        (letter(5, dead=False, attempts=3, replays=1, at=3), "parked"),
        (Resolution(TOPIC, 0, 5, "rated"), "rated"),
        (Resolution(TOPIC, 0, 5, "duplicate"), "rated"),
        (letter(5, dead=True, attempts=9, replays=1, at=9), "rated"),
    ]
    with connect(settings.dsn, application="test", autocommit=True) as connection:
        for news, state in story:
            apply(connection, [news])
            found = kept(connection, 5)
            assert found is not None and found[0] == state


def test_a_decision_survives_news(settings: Settings) -> None:
    with connect(settings.dsn, application="test", autocommit=True) as connection:
        apply(connection, [letter(1, dead=True, attempts=1)])
        connection.execute("UPDATE billing.unrated_event SET decision = 'replay', decided_by = 'kim'")
        apply(connection, [letter(1, dead=False, attempts=1, replays=1)])
        assert connection.execute("SELECT state, decision, decided_by FROM billing.unrated_event").fetchall() == [
            ("parked", "replay", "kim")
        ]


def test_two_sinks_with_news_of_the_same_events_do_not_deadlock(settings: Settings) -> None:
    """One brings letters of 5 and 6 and the end of 3, the other a letter of 3 and the end of 5.

    A third holds 6, so that the first stands still in the middle of its work until the second has begun.
    """
    failed: list[BaseException] = []

    def sink(letters: list[int], resolved: int) -> None:
        try:
            with connect(settings.dsn, application="test") as connection:
                write_unrated(
                    connection,
                    [letter(origin, dead=False, attempts=2) for origin in letters],
                    [Resolution(TOPIC, 0, resolved, "rated")],
                )
        except BaseException as error:  # noqa: BLE001 - handed to the test
            failed.append(error)

    with connect(settings.dsn, application="test", autocommit=True, role=None) as watch:
        apply(watch, [letter(origin, dead=False, attempts=1) for origin in (3, 5, 6)])

        def wait_for_waiting(sinks: int) -> None:
            until = time.monotonic() + 30
            waiting = (
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
            )
            while watch.execute(waiting).fetchone() != (sinks,):
                assert time.monotonic() < until, f"waited 30 s for {sinks} to wait"
                time.sleep(0.02)

        first = threading.Thread(target=sink, args=([5, 6], 3))
        second = threading.Thread(target=sink, args=([3], 5))
        with connect(settings.dsn, application="test") as third:
            third.execute("SELECT FROM billing.unrated_event WHERE origin_offset = 6 FOR UPDATE")
            first.start()
            wait_for_waiting(1)
            second.start()
            wait_for_waiting(2)
        first.join(30)
        second.join(30)
        assert failed == []
        assert [kept(watch, origin)[:2] for origin in (3, 5, 6)] == [  # type: ignore[index]
            ("rated", "0/2"),
            ("rated", "0/2"),
            ("parked", "0/2"),
        ]
