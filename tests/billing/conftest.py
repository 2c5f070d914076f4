"""A database of its own for a test that needs no Kafka: made from the session's template, gone at the end."""

import secrets
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg import conninfo, sql
from pydantic import SecretStr

from pipeline.infra.embedded import Endpoints
from pipeline.infra.settings import Settings


@pytest.fixture
def database(services: Endpoints, template_database: str, tmp_path: Path) -> Iterator[Settings]:
    """Settings with a migrated database; their Kafka has no topics."""
    name = f"tally_close_{secrets.token_hex(4)}"
    with psycopg.connect(services.postgres_dsn, autocommit=True) as admin:
        statement = sql.SQL("CREATE DATABASE {} TEMPLATE {}")
        admin.execute(statement.format(sql.Identifier(name), sql.Identifier(template_database)))
        try:
            yield Settings(
                kafka_bootstrap=services.kafka_bootstrap,
                postgres_dsn=SecretStr(conninfo.make_conninfo(services.postgres_dsn, dbname=name)),
                topic_prefix=f"{name}-",
                data_dir=tmp_path / "data",
            )
        finally:
            admin.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))
