"""PostgreSQL: connections and migrations. Statements stand beside the functions that run them, in the stages.

The program works as the role ``tally_program`` (``schemas/postgres/0014.roles.sql``), which owns nothing, whomever the
DSN names: the owner, as embedded, or a login that is a member of it. Migrations and set-up work as the DSN's user.
"""

from typing import Any
from urllib.parse import urlencode

from psycopg import Connection, ProgrammingError
from psycopg.conninfo import conninfo_to_dict
from psycopg.errors import InsufficientPrivilege
from yoyo import get_backend, read_migrations
from yoyo.migrations import MigrationList

from pipeline.infra.resources import schemas_dir

#: What the program may do is granted to this role.
PROGRAM_ROLE = "tally_program"
_MIGRATE = "`tally migrate`, with the DSN of the owner"


class NotReady(ProgrammingError):
    """The database is there, but not as the program needs it: not migrated, or its role not granted."""

    def __init__(self, found: str, fix: str) -> None:
        super().__init__(found, fix)
        self.found, self.fix = found, fix

    def __str__(self) -> str:
        return f"{self.found}: {self.fix}"


# The role, if it may use the tables. No row where there is no such role yet, no schema, or it has no rights there.
_TAKE_ROLE = """
SELECT set_config('role', rolname, false) FROM pg_roles
WHERE rolname = %s AND has_schema_privilege(rolname, to_regnamespace('billing'), 'USAGE')
"""


def connect(
    dsn: str, *, application: str, autocommit: bool = False, role: str | None = PROGRAM_ROLE
) -> "Connection[Any]":
    """Open a connection that speaks UTC and shows its name in pg_stat_activity.

    ``role``: whose rights it has; None leaves it those of the DSN's user, for what must own the tables. Role, time zone
    and advisory locks belong to the session: a pooler between must keep one (PgBouncer: ``pool_mode = session``).

    Raises psycopg.OperationalError when the server is away, NotReady.
    """
    connection = Connection.connect(
        dsn,
        application_name=f"tally-{application}",
        autocommit=True,  # the role would end with a transaction that is rolled back
        options="-c timezone=UTC",
        connect_timeout=10,
    )
    try:
        if role is not None:
            _take_role(connection, role)
        connection.autocommit = autocommit
    except BaseException:
        connection.close()
        raise
    return connection


def _take_role(connection: "Connection[Any]", role: str) -> None:
    info = connection.info
    try:
        taken = connection.execute(_TAKE_ROLE, [role]).fetchone()
    except InsufficientPrivilege as error:
        found = f"expected {info.user} to be a member of role {role}, it is not"
        raise NotReady(found, f"an administrator can GRANT {role} TO {info.user}") from error
    if taken is None:
        raise _not_migrated(connection)


def migrate(dsn: str) -> list[str]:
    """Apply the migrations of ``schemas/postgres`` that are missing, in order; return their names.

    Each runs in its own transaction under a lock, so two processes may call this at once. Raises NotReady when some are
    missing and the DSN's user does not own what they change; psycopg.Error when a statement fails: what went before
    stays applied.
    """
    if not pending(dsn):
        return []
    _check_owner(dsn)
    with get_backend(_yoyo_url(dsn)) as backend, backend.lock():
        missing = backend.to_apply(_migrations())
        names = [migration.id for migration in missing]
        backend.apply_migrations(missing)
    return names


def pending(dsn: str) -> list[str]:
    """Names of the migrations not applied yet, in order. Raises NotReady when the DSN's user may not know."""
    with connect(dsn, application="migrations", role=None) as connection:
        try:
            known = connection.execute("SELECT to_regclass('_yoyo_migration')").fetchone() != (None,)
            applied = connection.execute("SELECT migration_id FROM _yoyo_migration").fetchall() if known else []
        except InsufficientPrivilege as error:
            raise _not_migrated(connection) from error
    return [migration.id for migration in _migrations() if (migration.id,) not in applied]


def _migrations() -> MigrationList:
    return read_migrations(str(schemas_dir() / "postgres"))


_OWNS = """
SELECT has_database_privilege(current_database(), 'CREATE') AND NOT EXISTS (
    SELECT FROM pg_namespace WHERE nspname IN ('billing', 'finance') AND NOT pg_has_role(nspowner, 'USAGE')
)
"""


def _check_owner(dsn: str) -> None:
    with connect(dsn, application="migrations", role=None) as connection:
        if connection.execute(_OWNS).fetchone() != (True,):
            found = f"expected the owner of the tables, since migrations are missing, got {connection.info.user}"
            raise NotReady(found, _MIGRATE)


def _not_migrated(connection: "Connection[Any]") -> NotReady:
    return NotReady(f"expected a migrated database, {connection.info.dbname} gives the program no rights", _MIGRATE)


def _yoyo_url(dsn: str) -> str:
    """The DSN as yoyo wants it: everything but the database as query arguments, which reach psycopg as they are."""
    parts = {name: str(value) for name, value in conninfo_to_dict(dsn).items() if value is not None}
    database = parts.pop("dbname", "postgres")
    return f"postgresql+psycopg:///{database}?{urlencode(parts)}"
