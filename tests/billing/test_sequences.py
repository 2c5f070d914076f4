"""Missing sequence numbers: what PostgreSQL finds against a naive set, and what it need not look at."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from psycopg import Connection

from pipeline.billing.receipts import Receipt
from pipeline.billing.sequences import ControlTotal, write_sequences
from pipeline.infra.postgres import connect
from pipeline.infra.settings import Settings
from tests.billing.records import control_record, receipt_record, sequences

NOW = datetime.now(UTC)
HOUR = NOW.replace(minute=0, second=0, microsecond=0)
GRACE_S = 900.0
FAR = 10**15
_names = map("svc-{}".format, itertools.count())


@pytest.fixture
def database(settings: Settings) -> Iterator["Connection[Any]"]:
    with connect(settings.dsn, application="test", autocommit=True) as connection:
        yield connection


def receipt(source: str, numbers: Sequence[int], at: datetime = NOW) -> Receipt:
    blocks = itertools.groupby(sorted(numbers), lambda number: number // 1000)
    record = receipt_record(sequences=[sequences(source, block, *members) for block, members in blocks])
    return Receipt("usage.receipts", 0, 0, b"", record, at)


def arrive(connection: "Connection[Any]", source: str, numbers: Sequence[int], at: datetime = NOW) -> None:
    with connection.transaction():
        write_sequences(connection, [receipt(source, numbers, at)], [], grace_s=GRACE_S)


def say(connection: "Connection[Any]", source: str, first: int, last: int, hour: datetime = HOUR, **rest: Any) -> None:
    record = control_record(source=source, first_sequence=first, last_sequence=last, **rest)
    with connection.transaction():
        write_sequences(connection, [], [ControlTotal(record, hour, NOW)], grace_s=GRACE_S)


def accept(connection: "Connection[Any]", source: str, first: int, last: int) -> None:
    connection.execute(
        "INSERT INTO billing.accepted_gap (source, first_sequence, last_sequence, verdict, reason, actor) "
        "VALUES (%s, %s, %s, 'lost', 'test', 'test')",
        [source, first, last],
    )
    connection.execute("SELECT billing.settle(%s)", [source])


def gaps(connection: "Connection[Any]", source: str, grace: str = "0") -> list[tuple[int, int]]:
    return connection.execute(
        "SELECT first_missing, last_missing FROM billing.sequence_gaps(%s::interval) WHERE source = %s ORDER BY 1",
        [grace, source],
    ).fetchall()


def scalar(connection: "Connection[Any]", statement: str, *parameters: object) -> Any:
    row = connection.execute(statement, parameters).fetchone()
    assert row is not None
    return row[0]


def stored_blocks(connection: "Connection[Any]", source: str) -> list[int]:
    rows = connection.execute("SELECT block FROM billing.source_sequence WHERE source = %s ORDER BY 1", [source])
    return [block for (block,) in rows]


# -- against a naive set

#: Numbers come in runs, as they do; some with a step, as from one partition of several; some far out.
_RUNS = st.builds(
    lambda first, length, step, far: range(first + far, first + far + length, step),
    st.integers(1, 4500),
    st.integers(1, 2300),
    st.sampled_from([1, 1, 1, 2, 7]),
    st.sampled_from([0, 0, 0, 0, 0, FAR]),
)
_STEPS = st.lists(st.one_of(_RUNS.map(lambda run: ("arrive", run)), _RUNS.map(lambda run: ("accept", run))), max_size=8)


def naive(there: set[int], highest: int) -> list[tuple[int, int]]:
    """Runs of numbers from 1 to the highest that are not there."""
    missing: list[tuple[int, int]] = []
    before = 0
    for number in [*sorted(number for number in there if number <= highest), highest + 1]:
        if number > before + 1:
            missing.append((before + 1, number - 1))
        before = number
    return missing


@hypothesis_settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=_STEPS)
def test_gaps_are_those_of_a_naive_set(database: "Connection[Any]", steps: list[tuple[str, range]]) -> None:
    """In any order, with repeats, and with gaps accepted in between that may come after all."""
    source, there, highest = next(_names), set[int](), 0
    for what, run in steps:
        if what == "arrive":
            arrive(database, source, run)
            highest = max(highest, run[-1])
        else:
            accept(database, source, run[0], run[-1])
            run = range(run[0], run[-1] + 1)
        there |= set(run)
        assert gaps(database, source) == naive(there, highest)
        # What is folded away is settled, and nothing of it is kept.
        settled = scalar(
            database, "SELECT coalesce(max(settled_blocks), 0) FROM billing.source WHERE source = %s", source
        )
        assert set(range(1, min(settled * 1000, 10_000))) <= there
        assert all(block >= settled for block in stored_blocks(database, source))


# -- folding


def test_complete_blocks_are_folded_and_their_repeats_forgotten(database: "Connection[Any]") -> None:
    arrive(database, "s", range(1, 3500))
    assert stored_blocks(database, "s") == [3]
    arrive(database, "s", [5, 1999, 3500])
    assert stored_blocks(database, "s") == [3]
    assert gaps(database, "s") == []


def test_a_hole_holds_up_folding_until_it_is_filled_or_accepted(database: "Connection[Any]") -> None:
    arrive(database, "s", [number for number in range(1, 5000) if number not in (1500, 2600)])
    assert stored_blocks(database, "s") == [1, 2, 3, 4]
    accept(database, "s", 1500, 1500)
    assert stored_blocks(database, "s") == [2, 3, 4]
    arrive(database, "s", [2600])
    assert stored_blocks(database, "s") == []
    assert gaps(database, "s") == []


def test_an_absurd_jump_costs_nothing_and_can_be_accepted(database: "Connection[Any]") -> None:
    arrive(database, "s", [1, 2, FAR + 999])
    assert gaps(database, "s") == [(3, FAR + 998)]
    accept(database, "s", 3, FAR + 998)
    assert gaps(database, "s") == []
    assert scalar(database, "SELECT settled_blocks FROM billing.source") == FAR // 1000 + 1


def test_the_last_number_of_all_is_not_counted_to(database: "Connection[Any]") -> None:
    arrive(database, "s", [2**63 - 1])
    assert gaps(database, "s") == [(1, 10**18)]


# -- grace


def test_young_holes_wait_for_the_grace_time_while_numbers_come_without_end(database: "Connection[Any]") -> None:
    def later(minutes: int) -> None:
        """Time goes by: everything noted is so much older."""
        database.execute(
            "UPDATE billing.source SET updated_at = updated_at - %(age)s, mark_at = mark_at - %(age)s, "
            "older_mark_at = older_mark_at - %(age)s",
            {"age": timedelta(minutes=minutes)},
        )

    shown = []
    for minute in range(0, 60, 5):
        first = minute * 10 + 1
        arrive(database, "s", [number for number in range(first, first + 50) if number != 7])
        shown.append((minute, gaps(database, "s", "15 minutes")))
        later(5)
    young = [minute for minute, found in shown if not found]
    assert young == list(range(0, young[-1] + 5, 5))  # once shown, it stays
    assert 10 <= young[-1] < 30  # not before one grace time, not after two
    assert all(found == [(7, 7)] for minute, found in shown if minute > young[-1])


def test_a_source_that_stops_shows_its_holes_after_one_grace_time(database: "Connection[Any]") -> None:
    arrive(database, "s", [1, 3])
    assert gaps(database, "s", "15 minutes") == []
    database.execute("UPDATE billing.source SET updated_at = now() - interval '16 minutes'")
    assert gaps(database, "s", "15 minutes") == [(2, 2)]


# -- control totals


def test_a_control_total_shows_a_lost_tail_and_a_source_of_which_nothing_came(database: "Connection[Any]") -> None:
    arrive(database, "s", range(1, 11))
    say(database, "s", 1, 12)
    say(database, "never", 1, 3)
    assert (gaps(database, "s"), gaps(database, "never")) == ([(11, 12)], [(1, 3)])
    assert gaps(database, "s", "15 minutes") == []
    short = "SELECT source, emitted, missing FROM billing.short_hours('0') ORDER BY 1"
    assert database.execute(short).fetchall() == [("never", 3, 3), ("s", 12, 2)]
    arrive(database, "s", [11, 12])
    assert gaps(database, "s") == []
    assert database.execute(short).fetchall() == [("never", 3, 3)]


def test_of_an_hour_the_last_total_counts_and_hours_add_up(database: "Connection[Any]") -> None:
    say(database, "s", 1, 5, HOUR - timedelta(hours=1))
    say(database, "s", 6, 8)
    say(database, "s", 6, 9)
    arrive(database, "s", [1, 2, 3, 4, 6, 7])
    short = database.execute("SELECT hour, emitted, missing FROM billing.short_hours('0') ORDER BY 1").fetchall()
    assert short == [(HOUR - timedelta(hours=1), 5, 1), (HOUR, 4, 2)]
    accept(database, "s", 5, 5)
    assert database.execute("SELECT hour FROM billing.short_hours('0')").fetchall() == [(HOUR,)]


def test_hours_and_totals_are_forgotten_after_37_days_once_settled(database: "Connection[Any]") -> None:
    old = NOW - timedelta(days=38)
    arrive(database, "s", range(1, 1001), old)
    say(database, "s", 1, 500, old.replace(minute=0, second=0, microsecond=0))
    say(database, "s", 501, 1001, old.replace(minute=0, second=0, microsecond=0) + timedelta(hours=1))
    arrive(database, "s", [1002])  # an hour begins
    assert scalar(database, "SELECT count(*) FROM billing.source_hour") == 1
    assert scalar(database, "SELECT array_agg(first_sequence) FROM billing.control_total") == [501]  # 1001 is missing


# -- what is known of a gap


def cause(connection: "Connection[Any]", first: int, last: int, source: str = "s") -> str:
    return str(
        scalar(
            connection,
            "SELECT likely_cause FROM (SELECT %s::text AS s, %s::bigint AS f, %s::bigint AS l) AS g, "
            "LATERAL billing.gap_facts(s, f, l), "
            "LATERAL billing.likely_cause(rejected_because, spooled, confirmed, newer_source)",
            source,
            first,
            last,
        )
    )


def _spooled(connection: "Connection[Any]") -> None:
    say(connection, "s", 1, 9, delivered=5, spooled=4, first_spooled=6)


def _rejected(connection: "Connection[Any]") -> None:
    say(connection, "s", 1, 9, delivered=8, rejected=1, rejections=[{"first": 7, "last": 7, "reason": "too large"}])


def _confirmed(connection: "Connection[Any]") -> None:
    say(connection, "s", 1, 5, HOUR - timedelta(hours=1))
    say(connection, "s", 6, 9)


def _restarted(connection: "Connection[Any]") -> None:
    connection.execute("INSERT INTO billing.source (source, first_at) VALUES ('s/0123456789ab', now() + '1 min')")


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (_spooled, "spooled"),
        (_rejected, "rejected"),
        (_confirmed, "confirmed"),
        (_restarted, "restarted"),
        (lambda connection: say(connection, "s", 1, 6), "unknown"),  # it does not cover all of them
        (lambda connection: None, "unknown"),
    ],
    ids=["spooled", "rejected", "confirmed", "restarted", "half covered", "nothing said"],
)
def test_the_likely_cause_is_what_data_tell(
    database: "Connection[Any]", said: Callable[["Connection[Any]"], None], expected: str
) -> None:
    arrive(database, "s", [1, 2, 3, 4, 5, 9])
    said(database)
    assert gaps(database, "s") == [(6, 8)]
    assert cause(database, 6, 8) == expected


def test_it_lies_between_the_commits_that_passed_it(database: "Connection[Any]") -> None:
    hours = [HOUR - timedelta(hours=back) + timedelta(minutes=7) for back in (5, 4, 2, 1)]
    arrive(database, "s", range(1, 6), hours[0])
    arrive(database, "s", [6], hours[1])
    arrive(database, "s", [9], hours[2])
    arrive(database, "s", [2, 10], hours[3])
    facts = database.execute("SELECT passed_after, passed_before FROM billing.gap_facts('s', 7, 8)").fetchone()
    assert facts == (hours[1], hours[2])


def test_finance_sees_open_and_accepted_gaps(database: "Connection[Any]") -> None:
    arrive(database, "s", [1, 4, 6])
    accept(database, "s", 5, 5)
    database.execute("UPDATE billing.source SET updated_at = now() - interval '1 hour'")
    seen = database.execute(
        "SELECT first_missing, last_missing, missing, state, decided_by FROM finance.usage_gaps ORDER BY 1"
    ).fetchall()
    assert seen == [(2, 3, 2, "open", None), (5, 5, 1, "lost", "test")]


def test_a_decision_is_never_changed(database: "Connection[Any]") -> None:
    arrive(database, "s", [2])
    accept(database, "s", 1, 1)
    database.execute("RESET ROLE")  # the owner is held as well
    for change in ("UPDATE billing.accepted_gap SET reason = 'x'", "DELETE FROM billing.accepted_gap"):
        with pytest.raises(psycopg.errors.RaiseException, match="append only"):
            database.execute(change)
