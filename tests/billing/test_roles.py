"""What the role of the program may do, table by table, and what the triggers refuse whoever asks."""

import contextlib
import secrets
from collections.abc import Iterator
from datetime import date
from typing import Any

import psycopg
import pytest
from psycopg import Connection, conninfo, sql
from psycopg.errors import InsufficientPrivilege, RaiseException
from pydantic import SecretStr
from yoyo import get_backend

from pipeline.billing.commit import prepare
from pipeline.billing.months import ensure_months
from pipeline.infra.embedded import Endpoints
from pipeline.infra.postgres import PROGRAM_ROLE, NotReady, _migrations, _yoyo_url, connect, migrate, pending
from pipeline.infra.settings import Settings
from tests.cli.running import Tally

#: What the program may do beside reading, for every table of schema billing: one that a migration adds is added here.
#: ``update`` names the columns; guarded: a trigger refuses every change and removal, whoever asks.
RIGHTS = """
accepted_gap         insert guarded
alert                insert guarded
alert_outbox         insert update(relayed_at)
asset                insert guarded
audit                insert guarded
backfill             insert update(events sent state updated_at)
backfill_event       insert guarded
balance_entry        insert guarded
balance_mark         insert update(computed_at usage_mark)
budget               insert guarded
catalog_version      insert guarded
close_entry          insert guarded
close_override       insert guarded
close_run            insert update(finished_at)
close_task           insert update(documents finished_at outcome problem state)
commitment           insert guarded
control_total        insert delete update(delivered first_sequence first_spooled last_sequence received_at rejected rejections said_at spooled)
correction           insert guarded
correction_outbox    insert delete
credit_balance       insert delete
credit_decision      insert guarded
credit_entry         insert guarded
credit_estimate      insert update(drawn)
credit_grant         insert guarded
credit_request       insert guarded
currency
document             insert delete update(due_date fx_currency fx_date fx_net_amount fx_rate fx_source fx_tax_amount fx_total_amount issue_date issued_at issued_by number number_serial number_series number_year reviewed_at reviewed_by state void_note void_reason_code voided_at voided_by)
document_discount    insert
document_line        insert
document_tax         insert
fx_rate              insert guarded
invoice              insert update(state)
invoice_line         insert update(amount events first_event_at last_event_at late_events price_class quantity reference_values updated_at)
invoicing_version    insert guarded
number_range         insert update(last)
outbox               insert update(relayed_at)
overdraft            insert guarded
proposal             insert guarded
proposal_decision    insert guarded
proposal_document    insert guarded
proposal_version     insert guarded
quarantine           insert
rated_usage          insert guarded
receipt              insert
settlement           insert guarded
sink_position        insert update(next_offset)
source               insert update(closed_at first_at highest last_at mark mark_at older_mark older_mark_at settled_blocks updated_at)
source_hour          insert delete
source_sequence      insert delete update(bits updated_at)
unrated_event        insert update(account appended_at attempts decided_at decided_by decision decision_reason event_time event_type idempotency_key key letter_dead letter_offset letter_partition letter_topic message not_before parked_at reason replays stage state updated_at value)
"""  # noqa: E501

_STATED = {name: words for name, *words in map(str.split, RIGHTS.strip().splitlines())}
#: Tables to which the program only ever adds.
APPEND_ONLY = [name for name, words in _STATED.items() if words[:2] in (["insert"], ["insert", "guarded"])]
GUARDED = [name for name, words in _STATED.items() if "guarded" in words]

_GRANTED = """
SELECT class.relname,
    ARRAY(
        SELECT lower(privilege_type) FROM aclexplode(class.relacl)
        WHERE grantee = 'tally_program'::regrole AND privilege_type <> 'SELECT'
        ORDER BY privilege_type <> 'INSERT', privilege_type
    ),
    (
        SELECT coalesce(jsonb_object_agg(kind, names), '{}') FROM (
            SELECT lower(privilege_type) AS kind, jsonb_agg(attname ORDER BY attname) AS names
            FROM pg_attribute AS attribute, aclexplode(attribute.attacl)
            WHERE attrelid = class.oid AND grantee = 'tally_program'::regrole GROUP BY privilege_type
        ) AS of_columns
    )
FROM pg_class AS class
WHERE class.relnamespace = 'billing'::regnamespace AND class.relkind IN ('r', 'p') AND NOT class.relispartition
"""

#: A row of rated usage.
_ROW = """
INSERT INTO billing.rated_usage
VALUES ('{}', gen_random_uuid(), 1, 0, 0, 1, 1, '2026-05-10Z', '2026-05-10Z', 0, 0, 0, 'usage', false, 'calls',
    '', 'acme', 'k', 'call', '', 's', 1, 0, 1, 5, '{{}}');
"""
#: And a month with it, a line and an entry in a container, and the document that bills it, still a draft.
_WORLD = """
SELECT billing.ensure_month('2026-05-01');
INSERT INTO billing.invoice (id, account, currency, period_start, period_end) OVERRIDING SYSTEM VALUE
VALUES (1, 'acme', 'EUR', '2026-05-01Z', '2026-06-01Z');
INSERT INTO billing.invoice_line (id, invoice_id, contract, plan, plan_version, price_version, meter, meter_version,
    charge, segment_start, quantity, amount, events) OVERRIDING SYSTEM VALUE
VALUES (1, 1, 'one', 'api', 1, 'api@1', 'calls', 1, 'calls', '2026-05-01Z', 2, 10, 1),
    (2, 1, 'one', 'api', 1, 'api@1', 'calls', 1, 'fees', '2026-05-01Z', 1, 5, 0);
INSERT INTO billing.close_entry (line_id, reasons, quantity_before, quantity_after, amount_before, amount_after,
    booked_by)
VALUES (1, '{back_dated}', 1, 2, 5, 10, 'ada');
INSERT INTO billing.document (id, kind, legal_entity, account, currency, period_start, period_end, tax_date,
    lines_amount, discounts_amount, net_amount, tax_amount, total_amount, credits_amount, balance_amount,
    payable_amount, created_by)
VALUES (1, 'invoice', 'e', 'acme', 'EUR', '2026-05-01Z', '2026-06-01Z', '2026-05-31', 10, 0, 10, 0, 10, 0, 0, 10, 'a');
INSERT INTO billing.document_line (document_id, position, kind, account, line_id, period_start, period_end, charge,
    segment_start, quantity, exact_amount, amount, discount_amount, net_amount, tax_amount, total_amount, tax_category)
VALUES (1, 1, 'usage', 'acme', 1, '2026-05-01Z', '2026-06-01Z', 'calls', '2026-05-01Z', 2, 10, 10, 0, 10, 0, 10, 's');
INSERT INTO billing.document_tax VALUES (1, 1, 'VAT', 'standard', 0, 10, 0, '');
INSERT INTO billing.document_discount VALUES (1, 1, 'ten', NULL, 0, NULL, '');
""" + _ROW.format("2026-05-01")
_REVIEW = """
UPDATE billing.document SET state = 'reviewed', reviewed_at = now(), reviewed_by = 'bob';
UPDATE billing.invoice SET state = 'reviewed';
"""
_EXCHANGE = """
UPDATE billing.document SET fx_currency = 'USD', fx_rate = 1, fx_date = '2026-05-29', fx_source = 'ECB',
    fx_net_amount = 10, fx_tax_amount = 0, fx_total_amount = 10
"""
_ISSUE = """
UPDATE billing.document SET state = 'issued', number = 'R1', number_series = 'R', number_year = 2026, number_serial = 1,
    issue_date = '2026-06-02', due_date = '2026-06-30', issued_at = now(), issued_by = 'bob'{};
UPDATE billing.invoice SET state = 'issued';
"""
_VOID = """
UPDATE billing.document SET state = 'void', voided_at = now(), voided_by = 'ada', void_reason_code = 'mistake'{}
"""

#: What nobody does to what is reviewed or issued.
REFUSED = """
UPDATE billing.document SET note = 'x'
UPDATE billing.document SET state = 'draft'
UPDATE billing.document SET state = 'draft', reviewed_at = NULL, reviewed_by = NULL
UPDATE billing.document SET lines_amount = 11
UPDATE billing.document SET reviewed_by = 'eve'
UPDATE billing.document SET state = 'void', voided_at = now(), voided_by = 'a', void_reason_code = 'm', account = 'x'
DELETE FROM billing.document
TRUNCATE billing.document CASCADE
UPDATE billing.document_line SET amount = 0
DELETE FROM billing.document_line
INSERT INTO billing.document_tax VALUES (1, 2, 'VAT', 'standard', 20, 1, 1, '')
UPDATE billing.document_tax SET percent = 1
DELETE FROM billing.document_tax
INSERT INTO billing.document_discount VALUES (1, 2, 'ten', NULL, 1, NULL, '')
UPDATE billing.document_discount SET amount = 1
DELETE FROM billing.document_discount
UPDATE billing.invoice SET state = 'open'
UPDATE billing.invoice SET state = 'void'
UPDATE billing.invoice SET period_end = '2026-07-01Z'
UPDATE billing.invoice SET state = 'issued', account = 'x'
DELETE FROM billing.invoice
UPDATE billing.invoice_line SET amount = 0
UPDATE billing.invoice_line SET reference_values = '{"file": {"values": ["x"], "more": false}}'
UPDATE billing.invoice_line SET charge = 'x'
DELETE FROM billing.invoice_line WHERE charge = 'fees'
TRUNCATE billing.invoice_line CASCADE
UPDATE billing.rated_usage SET amount = 0
DELETE FROM billing.rated_usage
TRUNCATE billing.rated_usage
UPDATE billing.rated_usage_2026_05 SET line_id = 2
DELETE FROM billing.rated_usage_2026_05
TRUNCATE billing.rated_usage_2026_05
UPDATE billing.close_entry SET note = 'x'
DELETE FROM billing.close_entry
UPDATE billing.number_range SET last = last - 1
""".strip().splitlines()


@contextlib.contextmanager
def _database(services: Endpoints, template: str, owner: str | None = None) -> Iterator[str]:
    """DSN of a database of its own; ``owner``: a role it belongs to."""
    name = f"tally_roles_{secrets.token_hex(4)}"
    with psycopg.connect(services.postgres_dsn, autocommit=True) as admin:
        made = sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(sql.Identifier(name), sql.Identifier(template))
        admin.execute(made if owner is None else made + sql.SQL(" OWNER {}").format(sql.Identifier(owner)))
        try:
            yield conninfo.make_conninfo(services.postgres_dsn, dbname=name)
        finally:
            admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


@contextlib.contextmanager
def _login(services: Endpoints, dsn: str, attributes: str = "") -> Iterator[str]:
    """DSN with a login of its own in place of the administrator's."""
    name = f"tally_login_{secrets.token_hex(4)}"
    with psycopg.connect(services.postgres_dsn, autocommit=True) as admin:
        admin.execute(f"CREATE ROLE {name} LOGIN PASSWORD '{name}' {attributes}".encode())
        try:
            yield conninfo.make_conninfo(dsn, user=name, password=name)
        finally:
            admin.execute(f"DROP ROLE {name}".encode())


@pytest.fixture(scope="module")
def dsn(services: Endpoints, template_database: str) -> Iterator[str]:
    """A migrated database that no test changes."""
    with _database(services, template_database) as made:
        yield made


@pytest.fixture
def owner(dsn: str) -> Iterator["Connection[Any]"]:
    with connect(dsn, application="test", role=None) as connection, connection.transaction(force_rollback=True):
        yield connection


@pytest.fixture
def program(dsn: str) -> Iterator["Connection[Any]"]:
    with connect(dsn, application="test") as connection, connection.transaction(force_rollback=True):
        yield connection


# -- Rights ------------------------------------------------------------------------------------------------------------


def test_every_table_has_the_rights_that_are_stated(owner: "Connection[Any]") -> None:
    found = {}
    for table, rights, columns in owner.execute(_GRANTED):
        words = [*rights, *(f"{right}({' '.join(names)})" for right, names in columns.items())]
        found[table] = " ".join(words).split()
    stated = {table: [word for word in words if word != "guarded"] for table, words in _STATED.items()}
    assert found == stated, "expected each table of schema billing above, with what its migration grants tally_program"


def test_the_program_reads_everything(owner: "Connection[Any]") -> None:
    """Also what a migration adds that says nothing of it."""
    owner.execute("CREATE TABLE billing.of_a_later_migration (id int)")
    owner.execute("CREATE VIEW finance.of_a_later_migration AS SELECT 1 AS one")
    unread = owner.execute(
        """SELECT oid::regclass FROM pg_class
        WHERE relnamespace IN ('billing'::regnamespace, 'finance'::regnamespace) AND relkind IN ('r', 'p', 'v')
            AND NOT has_table_privilege('tally_program', oid, 'SELECT')"""
    )
    assert unread.fetchall() == []


def test_nobody_else_has_rights(owner: "Connection[Any]") -> None:
    grantees = owner.execute(
        """SELECT DISTINCT relname, grantee::regrole::text FROM pg_class, aclexplode(relacl)
        WHERE relnamespace = 'billing'::regnamespace AND grantee NOT IN (relowner, 'tally_program'::regrole)"""
    )
    assert grantees.fetchall() == []


def test_what_runs_as_its_owner_looks_nowhere_else(owner: "Connection[Any]") -> None:
    """A function with its owner's rights that finds a table or function of somebody else's would lend them to him."""
    found = owner.execute(
        """SELECT proname, proconfig FROM pg_proc WHERE prosecdef AND pronamespace = 'billing'::regnamespace"""
    ).fetchall()
    assert "ensure_month" in dict(found)
    assert {tuple(settings or ()) for _, settings in found} == {("search_path=pg_catalog, pg_temp",)}


def _changes(connection: "Connection[Any]", table: str) -> Iterator[bytes]:
    """Statements that change nothing, and would be refused for nothing else."""
    (column,) = connection.execute(
        """SELECT attname FROM pg_attribute WHERE attrelid = %s::regclass AND attnum > 0
        AND attidentity = '' AND attgenerated = '' ORDER BY attnum LIMIT 1""",
        [f"billing.{table}"],
    ).fetchone() or ("",)
    for change in ("UPDATE billing.{0} SET {1} = {1}", "DELETE FROM billing.{0}", "TRUNCATE billing.{0} CASCADE"):
        yield change.format(table, column).encode()


@pytest.mark.parametrize("table", APPEND_ONLY)
def test_the_program_only_adds(program: "Connection[Any]", table: str) -> None:
    for statement in _changes(program, table):
        with pytest.raises(InsufficientPrivilege), program.transaction():
            program.execute(statement)


@pytest.mark.parametrize("table", GUARDED)
def test_nor_does_the_owner(owner: "Connection[Any]", table: str) -> None:
    """Short of switching the triggers off."""
    owner.execute(_WORLD.encode())
    for statement in _changes(owner, table):
        with pytest.raises(RaiseException, match="append only"), owner.transaction():
            owner.execute(statement)


@pytest.mark.parametrize(
    "statement",
    [
        "TRUNCATE billing.sink_position",
        "DELETE FROM billing.invoice",
        "DELETE FROM billing.number_range",
        "UPDATE billing.invoice SET account = 'x'",
        "UPDATE billing.invoice_line SET invoice_id = 1",
        "UPDATE billing.document SET total_amount = 0",
        "UPDATE billing.document SET content = '{}'",
        "ALTER TABLE billing.document ADD COLUMN mine integer",
        "ALTER TABLE billing.document DISABLE TRIGGER document_immutable",
        "ALTER TABLE billing.rated_usage DETACH PARTITION billing.rated_usage_2026_05",
        "DROP TABLE billing.audit",
        "CREATE TABLE billing.mine (id integer)",
        "CREATE OR REPLACE FUNCTION billing.guard_document() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN END'",
        "SET session_replication_role = replica",
        "SELECT setval('billing.document_id_seq', 1)",
    ],
)
def test_the_program_owns_nothing(owner: "Connection[Any]", statement: str) -> None:
    owner.execute(_WORLD.encode())
    owner.execute(f"SET LOCAL ROLE {PROGRAM_ROLE}")
    with pytest.raises(InsufficientPrivilege):
        owner.execute(statement.encode())


def test_the_program_makes_months_and_nothing_else(program: "Connection[Any]") -> None:
    for _ in range(2):
        ensure_months(program, [date(2026, 12, 1), date(2027, 1, 1)])
    bounds = program.execute(
        """SELECT inhrelid::regclass::text, pg_get_expr(relpartbound, inhrelid) FROM pg_inherits
        JOIN pg_class ON pg_class.oid = inhrelid WHERE inhparent = 'billing.rated_usage'::regclass ORDER BY 1"""
    ).fetchall()
    assert bounds == [
        ("billing.rated_usage_2026_12", "FOR VALUES FROM ('2026-12-01') TO ('2027-01-01')"),
        ("billing.rated_usage_2027_01", "FOR VALUES FROM ('2027-01-01') TO ('2027-02-01')"),
    ]
    with pytest.raises(RaiseException, match="expected the first day of a month, got 2026-12-02"):
        ensure_months(program, [date(2026, 12, 2)])


def test_a_month_attached_by_hand_is_held_as_well(owner: "Connection[Any]") -> None:
    owner.execute(_WORLD.encode())
    owner.execute(
        "CREATE TABLE billing.by_hand PARTITION OF billing.rated_usage FOR VALUES FROM ('1999-01-01') TO ('2000-01-01')"
    )
    owner.execute("DROP TABLE billing.rated_usage_2026_05")  # which would refuse to be emptied for itself
    owner.execute(_ROW.format("1999-05-01").encode())
    for statement in (
        "UPDATE billing.by_hand SET amount = 0",
        "DELETE FROM billing.by_hand",
        "TRUNCATE billing.rated_usage",
    ):
        with pytest.raises(RaiseException, match="append only"), owner.transaction():
            owner.execute(statement.encode())


# -- Reviewed and issued -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["reviewed", "issued"])
@pytest.mark.parametrize("statement", REFUSED)
def test_what_is_reviewed_or_issued_is_immutable(owner: "Connection[Any]", state: str, statement: str) -> None:
    owner.execute("INSERT INTO billing.number_range VALUES ('e', 'R', 2026, 1)")
    for before in (_WORLD, _REVIEW, *((_ISSUE.format(""),) if state == "issued" else ())):
        owner.execute(before.encode())
    with pytest.raises(RaiseException), owner.transaction():
        owner.execute(statement.encode())
    owner.execute(f"SET LOCAL ROLE {PROGRAM_ROLE}")
    with pytest.raises((RaiseException, InsufficientPrivilege)):
        owner.execute(statement.encode())


def test_the_lawful_ways_stay_open(owner: "Connection[Any]") -> None:
    owner.execute(_WORLD.encode())
    owner.execute(f"SET LOCAL ROLE {PROGRAM_ROLE}")
    owner.execute("UPDATE billing.invoice_line SET amount = amount + 1, events = events + 1, updated_at = now()")
    owner.execute(_REVIEW.encode())
    with pytest.raises(RaiseException, match="document 1 is reviewed"), owner.transaction():
        owner.execute(_ISSUE.format(", reviewed_by = 'eve'").encode())
    owner.execute(_EXCHANGE.encode())
    with pytest.raises(RaiseException, match="document 1 is reviewed"), owner.transaction():
        owner.execute("UPDATE billing.document SET fx_rate = 2")
    owner.execute(_ISSUE.format("").encode())
    with pytest.raises(RaiseException, match="document R1 is issued"), owner.transaction():
        owner.execute(_VOID.format(", issued_by = 'eve'").encode())
    owner.execute(_VOID.format("").encode())
    owner.execute(
        "INSERT INTO billing.invoice (id, account, currency, period_start, period_end, supplement) "
        "OVERRIDING SYSTEM VALUE VALUES (2, 'acme', 'EUR', '2026-05-01Z', '2026-06-01Z', 1)"
    )
    owner.execute("RESET ROLE")
    owner.execute("ALTER TABLE billing.rated_usage DETACH PARTITION billing.rated_usage_2026_05")
    owner.execute("DROP TABLE billing.rated_usage_2026_05")


def test_drafts_go_with_all_their_rows(owner: "Connection[Any]") -> None:
    owner.execute(_WORLD.encode())
    owner.execute(f"SET LOCAL ROLE {PROGRAM_ROLE}")
    assert owner.execute("DELETE FROM billing.document").rowcount == 1
    for table in ("document_line", "document_tax", "document_discount"):
        assert owner.execute(f"SELECT count(*) FROM billing.{table}".encode()).fetchone() == (0,)


# -- Connecting --------------------------------------------------------------------------------------------------------


def test_connections_have_the_rights_of_the_program(dsn: str) -> None:
    with connect(dsn, application="test") as connection:
        assert connection.execute("SELECT current_user").fetchone() == (PROGRAM_ROLE,)
        connection.rollback()
        assert connection.execute("SELECT current_user").fetchone() == (PROGRAM_ROLE,)
    with connect(dsn, application="test", role=None) as connection:
        assert connection.execute("SELECT current_user = session_user").fetchone() == (True,)


def test_a_login_of_production(services: Endpoints, dsn: str) -> None:
    """As deploy/database.md makes it: no way leads back to more."""
    with _login(services, dsn, f"IN ROLE {PROGRAM_ROLE}") as login:
        assert pending(login) == []
        assert migrate(login) == []
        with connect(login, application="test", autocommit=True) as connection:
            prepare(connection)
            ensure_months(connection, [date(2026, 12, 1)])
            for way in ("RESET ROLE", "SET ROLE NONE"):
                connection.execute(way)
                with pytest.raises(InsufficientPrivilege):
                    connection.execute("DELETE FROM billing.audit")
            with pytest.raises(InsufficientPrivilege):
                connection.execute("SET ROLE pg_database_owner")


def test_a_login_without_the_role_is_told_so(services: Endpoints, dsn: str) -> None:
    with _login(services, dsn) as login, pytest.raises(NotReady, match="an administrator can GRANT tally_program TO"):
        connect(login, application="test")


@pytest.mark.usefixtures("template_database")
def test_a_database_that_is_not_migrated_is_told_so(services: Endpoints) -> None:
    with _database(services, "template0") as empty, _login(services, empty, f"IN ROLE {PROGRAM_ROLE}") as login:
        for who in (empty, login):
            with pytest.raises(NotReady, match=r"expected a migrated database.*`tally migrate`"):
                connect(who, application="test")
        with pytest.raises(NotReady, match="expected the owner of the tables"):
            migrate(login)
        tally = Tally(Settings(kafka_bootstrap="127.0.0.1:1", postgres_dsn=SecretStr(login)))
        assert "error: expected a migrated database" in tally("plans", "list", code=1).stderr


@pytest.mark.usefixtures("template_database")
def test_a_database_from_before_the_role(services: Endpoints) -> None:
    """It says what to do, and the months it has are held as new ones are."""
    with _database(services, "template0") as old:
        with get_backend(_yoyo_url(old)) as backend, backend.lock():
            backend.apply_migrations(_migrations().filter(lambda migration: migration.id < "0014"))
        with connect(old, application="test", role=None, autocommit=True) as owner:
            owner.execute(
                "CREATE TABLE billing.rated_usage_2026_05 PARTITION OF billing.rated_usage "
                "FOR VALUES FROM ('2026-05-01') TO ('2026-06-01')"
            )
            with pytest.raises(NotReady, match=r"expected a migrated database.*`tally migrate`"):
                connect(old, application="test")
            assert migrate(old)[0] == "0014.roles"
            with connect(old, application="test", autocommit=True) as program:
                program.execute(_WORLD.encode())
                program.execute("SELECT FROM billing.rated_usage_2026_05")
            for statement in ("DELETE FROM billing.rated_usage_2026_05", "TRUNCATE billing.rated_usage_2026_05"):
                with pytest.raises(RaiseException, match="append only"):
                    owner.execute(statement.encode())


@pytest.mark.usefixtures("template_database")
def test_an_owner_that_is_no_superuser(services: Endpoints) -> None:
    with _login(services, services.postgres_dsn) as login:
        name = conninfo.conninfo_to_dict(login)["user"]
        with _database(services, "template0", str(name)) as made:
            own = conninfo.make_conninfo(login, dbname=conninfo.conninfo_to_dict(made)["dbname"])
            assert "0014.roles" in migrate(own)
            with pytest.raises(NotReady, match="an administrator can GRANT tally_program TO"):
                connect(own, application="test")
            with psycopg.connect(services.postgres_dsn, autocommit=True) as admin:
                admin.execute(f"GRANT {PROGRAM_ROLE} TO {name}".encode())
            with connect(own, application="test", autocommit=True) as connection:
                ensure_months(connection, [date(2026, 12, 1)])
