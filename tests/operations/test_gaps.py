"""Sources that fall silent against their own history, and a person's word on a hole."""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from psycopg import Connection

from pipeline.core.gaps import Verdict
from pipeline.infra.postgres import connect
from pipeline.infra.settings import Settings
from pipeline.operations.gaps import (
    HISTORY_HOURS_MIN,
    NotMissing,
    Run,
    accept,
    accepted_gaps,
    open_gaps,
    silent_sources,
)

#: A Friday, 17:40 UTC.
NOW = datetime(2026, 5, 29, 17, 40, tzinfo=UTC)
HOUR = timedelta(hours=1)


@pytest.fixture
def database(settings: Settings) -> Iterator["Connection[Any]"]:
    with connect(settings.dsn, application="test", autocommit=True) as connection:
        yield connection


def history(connection: "Connection[Any]", source: str, hours: Sequence[datetime], closed: bool = False) -> None:
    """A source with arrivals in these hours, the last one 40 minutes into its hour."""
    last_at = hours[-1] + timedelta(minutes=40)
    connection.execute(
        "INSERT INTO billing.source (source, highest, first_at, last_at, closed_at) VALUES (%s, 1, %s, %s, %s)",
        [source, hours[0], last_at, last_at if closed else None],
    )
    with connection.cursor() as cursor:
        cursor.executemany(
            "INSERT INTO billing.source_hour (source, hour, began_at, highest) VALUES (%s, %s, %s, 1)",
            [(source, hour, hour) for hour in hours],
        )


def every(step: timedelta, *, until: datetime, count: int) -> list[datetime]:
    until = until.replace(minute=0)
    return [until - step * back for back in reversed(range(count))]


def office_hours(until: datetime) -> list[datetime]:
    """Monday to Friday from 9 to 17, four weeks of it."""
    hours = every(HOUR, until=until, count=28 * 24)
    return [hour for hour in hours if hour.weekday() < 5 and 9 <= hour.hour < 18]


def silent(connection: "Connection[Any]", now: datetime, *, caught_up: bool = True) -> list[tuple[str, int, int]]:
    found = silent_sources(connection, now, caught_up=caught_up)
    return [(one.source, one.usual_seconds // 3600, one.silent_seconds // 3600) for one in found]


def test_a_source_without_pause_is_silent_after_two_hours(database: "Connection[Any]") -> None:
    history(database, "s", every(HOUR, until=NOW, count=30))
    assert silent(database, NOW + 2 * HOUR) == []
    assert silent(database, NOW + 2 * HOUR + timedelta(minutes=1)) == [("s", 1, 2)]


def test_nights_and_weekends_are_the_rhythm_of_office_hours(database: "Connection[Any]") -> None:
    history(database, "s", office_hours(NOW))
    monday_morning = NOW + timedelta(days=2, hours=15)
    assert silent(database, monday_morning) == []
    assert silent(database, monday_morning + timedelta(days=3)) == [("s", 64, 135)]


def test_one_outage_does_not_blur_the_rhythm(database: "Connection[Any]") -> None:
    hours = every(HOUR, until=NOW, count=200)
    history(database, "s", hours[:100] + hours[112:])
    assert silent(database, NOW + 3 * HOUR) == [("s", 1, 3)]


def test_a_daily_source_may_be_silent_for_a_day(database: "Connection[Any]") -> None:
    history(database, "s", every(24 * HOUR, until=NOW, count=20))
    assert silent(database, NOW + 40 * HOUR) == []
    assert silent(database, NOW + 49 * HOUR) == [("s", 24, 49)]


def test_who_has_no_history_is_not_judged(database: "Connection[Any]") -> None:
    history(database, "young", every(HOUR, until=NOW, count=HISTORY_HOURS_MIN - 1))
    history(database, "old enough", every(HOUR, until=NOW, count=HISTORY_HOURS_MIN))
    assert [source for source, *_ in silent(database, NOW + 5 * HOUR)] == ["old enough"]


def test_who_closed_was_replaced_or_is_long_gone_is_not_silent(database: "Connection[Any]") -> None:
    hours = every(HOUR, until=NOW, count=30)
    history(database, "closed", hours, closed=True)
    history(database, "svc/000000000001", hours)
    history(database, "svc/000000000002", [NOW + HOUR])
    history(database, "twin/000000000001", hours)
    history(database, "twin/000000000002", [*hours[:-1], NOW + 5 * HOUR])  # beside it all the time: no replacement
    assert [source for source, *_ in silent(database, NOW + 5 * HOUR)] == ["twin/000000000001"]
    assert "twin/000000000001" not in [source for source, *_ in silent(database, NOW + timedelta(days=29))]


def test_what_workers_have_not_rated_is_no_silence(database: "Connection[Any]") -> None:
    """All sources look silent while the rater is behind: time is what the last receipt says."""
    history(database, "s", every(HOUR, until=NOW, count=30))
    history(database, "another", [NOW])
    assert silent(database, NOW + 9 * HOUR, caught_up=False) == []
    assert silent(database, NOW + 9 * HOUR) == [("s", 1, 9)]


# -- holes


def test_absurd_numbers_of_many_sources_are_added_up(database: "Connection[Any]") -> None:
    database.execute(
        "INSERT INTO billing.source (source, highest) SELECT 's' || n, %s FROM generate_series(1, 20) n", [2**63 - 1]
    )
    found = open_gaps(database, grace_s=0)
    assert (found.runs, found.sources, found.missing) == (20, 20, 20 * 10**18)


# -- accepting


@pytest.fixture
def holes(database: "Connection[Any]") -> "Connection[Any]":
    """A source with 2 to 3 and 5 to 9 missing."""
    database.execute("INSERT INTO billing.source (source, highest) VALUES ('s', 10)")
    bits = "".join("1" if n in (1, 4, 10) else "0" for n in range(1000))
    database.execute("INSERT INTO billing.source_sequence (source, block, bits) VALUES ('s', 0, %s::bit(1000))", [bits])
    return database


def runs(connection: "Connection[Any]") -> list[str]:
    return [gap.numbers for gap in open_gaps(connection, grace_s=0).explained]


def test_part_of_a_hole_can_be_accepted_and_is_recorded_for_good(holes: "Connection[Any]") -> None:
    done = accept(holes, "s", [Run(6, 7)], verdict=Verdict.LOST, reason="disk died", actor="ada")
    assert done == [Run(6, 7)]
    assert runs(holes) == ["2-3", "5", "8-9"]
    (one,) = accepted_gaps(holes, source="s", limit=9)
    assert (one.first, one.last, one.verdict, one.reason, one.actor) == (6, 7, Verdict.LOST, "disk died", "ada")
    audit = holes.execute("SELECT actor, action, target, detail ->> 'reason' FROM billing.audit").fetchall()
    assert audit == [("ada", "accept gap", "s#6-7", "disk died")]


def test_all_that_is_missing_can_be_accepted_at_once(holes: "Connection[Any]") -> None:
    assert accept(holes, "s", None, verdict=Verdict.NEVER_EXISTED, reason="r", actor="ada") == [Run(2, 3), Run(5, 9)]
    assert runs(holes) == []
    assert accept(holes, "s", None, verdict=Verdict.NEVER_EXISTED, reason="r", actor="ada") == []


@pytest.mark.parametrize("run", [Run(4, 4), Run(3, 5), Run(9, 10), Run(11, 12), Run(1, 9)])
def test_what_arrived_or_was_never_reached_cannot_be_accepted(holes: "Connection[Any]", run: Run) -> None:
    with pytest.raises(NotMissing, match=f"2-3.*got {run}$|5-9.*got {run}$"):
        accept(holes, "s", [Run(2, 2), run], verdict=Verdict.LOST, reason="r", actor="ada")
    assert runs(holes) == ["2-3", "5-9"]
    assert accepted_gaps(holes, source=None, limit=9) == []
