"""What status sees of a real deployment: lag that is lag, and what only looks like it."""

from collections.abc import Callable, Iterator
from contextlib import closing

import pytest
from pydantic import SecretStr

from pipeline.infra.settings import Settings
from pipeline.operations import lag as lag_module
from pipeline.operations.lag import StageLag
from pipeline.operations.status import Status, Watcher, as_json, headline
from tests.billing.running import query, tamper
from tests.operations.world import World, eventually


@pytest.fixture
def look(world: World) -> Iterator[Callable[[], Status]]:
    with closing(Watcher(world.settings)) as watcher:
        yield watcher.look


def seen(stage: StageLag | None) -> StageLag:
    assert stage is not None
    return stage


def test_from_nothing_to_caught_up(world: World, look: Callable[[], Status]) -> None:
    first = look()
    assert headline(first) == "all caught up; no rater is running; no sink is running"
    origins = [world.event(f"k{n}") for n in range(20)]
    behind = look()
    assert headline(behind) == "rater is 20 events behind on 1 partition, and none is running; no sink is running"
    [place] = [one for one in seen(behind.rater).partitions if one.lag]
    assert (place.topic, place.partition, place.lag) == (world.topics.events, origins[0].partition, 20)
    assert place.position is None and place.end == 20 and place.oldest_at is not None
    assert not behind.caught_up and behind.reachable

    with world.rater():
        rated = eventually(look, lambda status: seen(status.rater).lag == 0 and len(seen(status.rater).group.members))
        assert seen(rated.sink).lag > 0
        assert "sink is" in headline(rated) and "none is running" in headline(rated)
        with world.sink():
            done = eventually(look, lambda status: status.caught_up and len(seen(status.sink).group.members))
            # The raters' transactions leave a marker behind the last record: an offset, and no lag.
            rows = [one for one in seen(done.sink).partitions if one.topic == world.topics.rated and one.end]
            assert [one.end - (one.position or 0) for one in rows] == [1]
            assert headline(done) == "all caught up"
            [rater] = seen(done.rater).group.members
            owned = [f"{topic}/{n}" for topic in (world.topics.events, world.topics.retry) for n in range(4)]
            assert rater.partitions == owned
            assert {one.member for one in seen(done.rater).partitions} == {rater.id}


def test_rates_come_from_two_looks(world: World, look: Callable[[], Status]) -> None:
    with world.rater(), world.sink():
        eventually(
            look, lambda status: len(seen(status.rater).group.members) + len(seen(status.sink).group.members) == 2
        )
        for n in range(30):
            world.event(f"k{n}")
        eventually(lambda: world.scalar("SELECT count(*) FROM billing.rated_usage"), lambda rows: rows == 60)
        status = look()
    assert (seen(status.rater).per_second or 0) > 0
    assert (seen(status.sink).per_second or 0) > (seen(status.rater).per_second or 0)  # two rows an event


def test_parked_events_wait_and_are_no_lag(world: World, look: Callable[[], Status]) -> None:
    stranger = world.event("who", "acct-9")
    world.event("bad", input_tokens="many")
    with world.rater(), world.sink():
        # Four attempts on, the next one is seconds away.
        eventually(lambda: world.row(stranger), lambda row: row.get("attempts", 0) >= 4)
        status = eventually(look, lambda status: seen(status.rater).waiting == 1)
    assert seen(status.rater).lag == 0
    assert status.refused is not None
    [parked] = status.refused.parked
    [dead] = status.refused.dead_letters
    assert (parked.reason, parked.events, parked.replaying) == ("unknown_account", 1, 0)
    assert parked.next_due_at is not None and parked.next_due_at > status.at
    assert (dead.reason, dead.events, dead.discarded) == ("not_a_number", 1, 0)
    assert dead.oldest_at is not None and dead.oldest_at < status.at


def test_catalog_versions_and_quarantined_rows_are_shown(world: World, look: Callable[[], Status]) -> None:
    world.connection.execute("INSERT INTO billing.outbox (kind, id, version) VALUES ('plan', 'llm', 1)")
    world.connection.execute(
        "INSERT INTO billing.quarantine (reason, rated_topic, rated_partition, rated_offset, value) "
        "VALUES ('already_billed', 't', 0, 0, '')"
    )
    status = look()
    assert "1 catalog version waits for the relay" in headline(status)
    assert not status.caught_up
    assert as_json(status)["quarantined"] == [{"reason": "already_billed", "rows": 1}]


def test_says_what_is_away_and_comes_back(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lag_module, "KAFKA_ANSWERS_S", 1.0)
    nowhere = {"kafka_bootstrap": "127.0.0.1:9", "postgres_dsn": SecretStr("postgresql://nobody@127.0.0.1:9/x")}
    for gone in (["kafka_bootstrap"], ["postgres_dsn"], ["kafka_bootstrap", "postgres_dsn"]):
        with closing(Watcher(world.settings_with(**{name: nowhere[name] for name in gone}))) as watcher:
            status = watcher.look()
        assert not status.reachable and not status.caught_up
        assert (status.kafka_problem is not None) == ("kafka_bootstrap" in gone)
        assert (status.postgres_problem is not None) == ("postgres_dsn" in gone)
        assert (status.rater is None) == ("kafka_bootstrap" in gone)
        assert status.sink is None  # its positions are in PostgreSQL, the topics' ends in Kafka
        assert (status.refused is None) == ("postgres_dsn" in gone)
        assert "refused" in headline(status)

    with closing(Watcher(world.settings)) as watcher:
        assert watcher.look().reachable
        query(
            world.settings,
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE application_name = 'tally-status' AND datname = current_database()",
        )
        assert watcher.look().postgres_problem is not None
        assert watcher.look().reachable


def test_no_address_and_no_tables_are_said(world: World) -> None:
    with closing(Watcher(Settings(kafka_bootstrap=None, postgres_dsn=None))) as watcher:
        status = watcher.look()
    assert "tally up" in (status.kafka_problem or "") and "tally up" in (status.postgres_problem or "")
    tamper(world.settings, "DROP SCHEMA billing CASCADE")
    with closing(Watcher(world.settings)) as watcher:
        assert "tally migrate" in (watcher.look().postgres_problem or "")
    other = world.settings_with(topic_prefix=f"{world.settings.topic_prefix}none-")
    with closing(Watcher(other)) as watcher:
        assert "does not exist" in (watcher.look().kafka_problem or "")
