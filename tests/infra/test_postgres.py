import threading

import psycopg
from psycopg import sql

from pipeline.infra.embedded import Endpoints
from pipeline.infra.postgres import connect, migrate, pending
from pipeline.infra.settings import Settings


def test_migrations_apply_once(settings: Settings) -> None:
    assert pending(settings.dsn) == []
    assert migrate(settings.dsn) == []


def test_two_processes_may_migrate_at_once(services: Endpoints, settings: Settings) -> None:
    with psycopg.connect(settings.dsn, autocommit=True) as connection:
        name = f"{connection.info.dbname}_empty"
        connection.execute(sql.SQL("CREATE DATABASE {} TEMPLATE template0").format(sql.Identifier(name)))
    dsn = psycopg.conninfo.make_conninfo(settings.dsn, dbname=name)
    applied: list[list[str]] = []
    try:
        threads = [threading.Thread(target=lambda: applied.append(migrate(dsn))) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(map(len, applied))[0] == 0
        assert max(applied, key=len)[0] == "0001.tables"
    finally:
        with psycopg.connect(services.postgres_dsn, autocommit=True) as admin:
            admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


def test_sessions_speak_utc_and_show_their_name(settings: Settings) -> None:
    with connect(settings.dsn, application="test") as connection:
        row = connection.execute("SELECT current_setting('timezone'), current_setting('application_name')").fetchone()
    assert row == ("UTC", "tally-test")
