"""Fixtures of the integration tests: real services, and a fresh world on them for every test.

Where the services come from, in this order: ``TALLY_KAFKA_BOOTSTRAP`` and ``TALLY_POSTGRES_DSN`` when both are set, a
Docker engine when one answers, else the embedded ones in a directory of the session's own.
"""

import contextlib
import os
import secrets
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from confluent_kafka.admin import AdminClient
from hypothesis import settings as hypothesis_settings
from psycopg import conninfo, sql
from pydantic import SecretStr

from pipeline.infra import embedded
from pipeline.infra.embedded import Endpoints
from pipeline.infra.postgres import migrate
from pipeline.infra.settings import Settings
from pipeline.infra.topics import ensure_topics

# How long an example takes says more about the machine than about the code.
hypothesis_settings.register_profile("untimed", deadline=None)
hypothesis_settings.load_profile("untimed")


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """Ctrl-C reaches what tests start, also where the tests themselves run in the background and ignore it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoints]:
    """A running Kafka and PostgreSQL, one of each for the whole session."""
    given = Settings()
    if given.kafka_bootstrap and given.postgres_dsn:
        yield Endpoints(given.kafka_bootstrap, given.dsn)
    elif _docker_answers():
        with _containers() as endpoints:
            yield endpoints
    else:
        with embedded.running(tmp_path_factory.mktemp("services")) as running:
            yield running.endpoints


@pytest.fixture(scope="session")
def template_database(services: Endpoints) -> Iterator[str]:
    """A migrated database to copy: far faster than migrating one for every test."""
    name = f"tally_template_{secrets.token_hex(4)}"
    with _admin(services) as admin:
        admin.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    try:
        migrate(_dsn(services, name))
        yield name
    finally:
        _drop_database(services, name)


@pytest.fixture
def settings(services: Endpoints, template_database: str, tmp_path: Path) -> Iterator[Settings]:
    """Settings of a deployment of its own: topics under a fresh prefix, a migrated database, a data directory."""
    with fresh_settings(services, template_database, tmp_path) as made:
        yield made


@contextlib.contextmanager
def fresh_settings(services: Endpoints, template: str, folder: Path, **options: Any) -> Iterator[Settings]:
    """As the fixture ``settings``, with options, for as long as it is entered."""
    unique = secrets.token_hex(4)
    database = f"tally_test_{unique}"
    with _admin(services) as admin:
        statement = sql.SQL("CREATE DATABASE {} TEMPLATE {}")
        admin.execute(statement.format(sql.Identifier(database), sql.Identifier(template)))
    settings = Settings(
        kafka_bootstrap=services.kafka_bootstrap,
        postgres_dsn=SecretStr(_dsn(services, database)),
        topic_prefix=f"t{unique}-",
        data_dir=folder / "data",
        **options,
    )
    try:
        ensure_topics(settings)
        yield settings
    finally:
        _drop_database(services, database)
        _delete_topics(settings)


def _admin(services: Endpoints) -> "psycopg.Connection[tuple[object, ...]]":
    return psycopg.connect(services.postgres_dsn, autocommit=True)


def _dsn(services: Endpoints, database: str) -> str:
    return conninfo.make_conninfo(services.postgres_dsn, dbname=database)


def _drop_database(services: Endpoints, name: str) -> None:
    with _admin(services) as admin:
        admin.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))


def _delete_topics(settings: Settings) -> None:
    admin = AdminClient(settings.kafka)
    names = [name for name in admin.list_topics(timeout=15).topics if name.startswith(settings.topic_prefix)]
    if names:
        for future in admin.delete_topics(names).values():
            future.result(15)


def _docker_answers() -> bool:
    if not (os.environ.get("DOCKER_HOST") or Path("/var/run/docker.sock").is_socket()):
        return False  # without asking: the client leaks a socket when there is nothing to connect to
    import docker
    from docker.errors import DockerException

    try:
        client = docker.from_env(timeout=3)
    except DockerException:
        return False
    with contextlib.closing(client):
        try:
            return bool(client.ping())
        except (DockerException, OSError):
            return False


@contextlib.contextmanager
def _containers() -> Iterator[Endpoints]:
    from testcontainers.community.kafka import KafkaContainer
    from testcontainers.community.postgres import PostgresContainer

    kafka = (
        KafkaContainer("confluentinc/cp-kafka:8.1.0")
        .with_kraft()
        .with_env("KAFKA_AUTO_CREATE_TOPICS_ENABLE", "false")
        .with_env("KAFKA_GROUP_INITIAL_REBALANCE_DELAY_MS", "0")
        .with_env("KAFKA_TRANSACTION_STATE_LOG_REPLICATION_FACTOR", "1")
        .with_env("KAFKA_TRANSACTION_STATE_LOG_MIN_ISR", "1")
    )
    with kafka, PostgresContainer("postgres:18", driver=None) as postgres:
        yield Endpoints(kafka.get_bootstrap_server(), postgres.get_connection_url())
