"""PostgreSQL: connections and migrations. Statements stand beside the functions that run them, in the stages."""

from typing import Any
from urllib.parse import urlencode

from psycopg import Connection
from psycopg.conninfo import conninfo_to_dict
from yoyo import get_backend, read_migrations

from pipeline.infra.resources import schemas_dir


def connect(dsn: str, *, application: str, autocommit: bool = False) -> "Connection[Any]":
    """Open a connection that speaks UTC and shows its name in pg_stat_activity.

    Raises psycopg.OperationalError when the server is away.
    """
    return Connection.connect(
        dsn,
        application_name=f"tally-{application}",
        autocommit=autocommit,
        options="-c timezone=UTC",
        connect_timeout=10,
    )


def migrate(dsn: str) -> list[str]:
    """Apply the migrations of ``schemas/postgres`` that are missing, in order; return their names.

    Each runs in its own transaction under a lock, so two processes may call this at once. Raises psycopg.Error when a
    statement fails; what went before stays applied.
    """
    with get_backend(_yoyo_url(dsn)) as backend, backend.lock():
        missing = backend.to_apply(read_migrations(str(schemas_dir() / "postgres")))
        names = [migration.id for migration in missing]
        backend.apply_migrations(missing)
    return names


def pending(dsn: str) -> list[str]:
    """Names of the migrations not applied yet."""
    with get_backend(_yoyo_url(dsn)) as backend:
        return [migration.id for migration in backend.to_apply(read_migrations(str(schemas_dir() / "postgres")))]


def _yoyo_url(dsn: str) -> str:
    """The DSN as yoyo wants it: everything but the database as query arguments, which reach psycopg as they are."""
    parts = {name: str(value) for name, value in conninfo_to_dict(dsn).items() if value is not None}
    database = parts.pop("dbname", "postgres")
    return f"postgresql+psycopg:///{database}?{urlencode(parts)}"
