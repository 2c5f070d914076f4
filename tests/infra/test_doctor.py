from pathlib import Path

import psycopg
import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient, NewTopic

from pipeline.infra import doctor
from pipeline.infra.doctor import Finding, examine
from pipeline.infra.settings import Settings
from pipeline.infra.topics import Topics
from tests.operations.world import eventually


@pytest.fixture(autouse=True)
def any_broker_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one the tests are given may keep offsets for its default of 7 days."""
    monkeypatch.setattr(doctor, "OFFSETS_KEPT_MIN_MINUTES", 1)


def _findings(settings: Settings) -> dict[str, Finding]:
    return {finding.check: finding for finding in examine(settings)}


def test_all_is_well_but_for_the_workers(settings: Settings) -> None:
    findings = _findings(settings)
    assert {name for name, finding in findings.items() if not finding.ok} == {"raters", "sinks"}
    assert "tally up" in findings["raters"].fix
    assert {
        "python",
        "kafka",
        "kept offsets",
        "topics",
        "broker clock",
        "postgres",
        "postgres clock",
        "rights",
        "migrations",
    } <= findings.keys()


def test_nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TALLY_KAFKA_BOOTSTRAP", raising=False)
    monkeypatch.delenv("TALLY_POSTGRES_DSN", raising=False)
    findings = _findings(Settings(data_dir=tmp_path / "none"))
    assert {name for name, finding in findings.items() if not finding.ok} == {"kafka", "postgres"}
    assert findings["java"].ok and findings["disk"].ok and findings["packages"].ok


def test_services_that_do_not_answer(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "_TIMEOUT", 2)
    away = Settings(
        kafka_bootstrap="127.0.0.1:9",
        postgres_dsn="postgresql://nobody@127.0.0.1:9/x",
        registry_url="http://127.0.0.1:9",
        data_dir=settings.data_dir,
    )
    findings = _findings(away)
    assert not findings["kafka"].ok and "refused" in findings["kafka"].found
    assert not findings["postgres"].ok and "refused" in findings["postgres"].found
    assert not findings["registry"].ok and "TALLY_REGISTRY_URL" in findings["registry"].fix
    assert "topics" not in findings and "migrations" not in findings
    assert capfd.readouterr().err == "", "the findings say it"


def test_offsets_that_are_forgotten_too_soon(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "OFFSETS_KEPT_MIN_MINUTES", 10**9)
    kept = _findings(settings)["kept offsets"]
    assert not kept.ok and "offsets.retention.minutes=" in kept.found
    assert "server.properties" in kept.fix


def test_other_partition_count(settings: Settings) -> None:
    topics = _findings(settings.model_copy(update={"partitions": 3}))["topics"]
    assert (topics.ok, topics.fix) == (
        False,
        "set TALLY_PARTITIONS=4, or migrate (drain, rebuild state by account, switch)",
    )


def test_topics_are_a_finding_each(settings: Settings) -> None:
    admin, topics = AdminClient(settings.kafka), Topics(settings.topic_prefix)
    for future in admin.delete_topics([topics.seen, topics.catalog]).values():
        future.result(15)
    admin.create_topics([NewTopic(topics.catalog, 1, 1)])[topics.catalog].result(15)
    eventually(lambda: topics.catalog in (known := admin.list_topics(timeout=15).topics) and topics.seen not in known)
    missing, other = (finding for finding in examine(settings) if finding.check == "topics")
    assert not missing.ok and missing.found.startswith(f"{topics.seen}: none")
    assert other.expected == "max.message.bytes=2097152 or more, cleanup.policy=compact"


def test_pending_migration_is_named(settings: Settings) -> None:
    with psycopg.connect(settings.dsn, autocommit=True) as connection:
        connection.execute("DELETE FROM _yoyo_migration")
    migrations = _findings(settings)["migrations"]
    assert not migrations.ok
    assert "0001.tables" in migrations.found
    assert migrations.fix == "`tally migrate`"


def test_rights_that_are_missing_are_named(settings: Settings) -> None:
    """As in a database from before there was the role: nothing else can be asked of it."""
    with psycopg.connect(settings.dsn, autocommit=True) as connection:
        connection.execute("REVOKE USAGE ON SCHEMA billing FROM tally_program")
    findings = _findings(settings)
    assert not findings["rights"].ok and "gives the program no rights" in findings["rights"].found
    assert findings["rights"].fix == "`tally migrate`, with the DSN of the owner"
    assert findings["postgres clock"].ok and "migrations" not in findings


def test_broker_clock_ahead(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    producer = Producer(settings.kafka)
    producer.produce(Topics(settings.topic_prefix).events, b"x", key=b"a")
    assert producer.flush(15) == 0
    assert _findings(settings)["broker clock"].ok
    true_time = doctor.time.time
    monkeypatch.setattr(doctor.time, "time", lambda: true_time() - 60)
    findings = _findings(settings)
    assert not findings["broker clock"].ok
    assert not findings["postgres clock"].ok
    assert findings["postgres clock"].found.startswith(("59.", "60."))
