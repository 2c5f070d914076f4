"""Why credits were given back: a column of its own, which the migration that adds it fills in for what there is."""

from pipeline.infra.postgres import connect
from pipeline.infra.resources import schemas_dir
from pipeline.infra.settings import Settings

ENTRIES = [
    ("10", "close of 2026-10", None, "drawn"),
    ("-3", "credit note 2026-000002", 1, "credited"),
    ("-2", "void of 2026-000001", 1, "voided"),
    ("-1", "late usage of 2026-10", 1, "restated"),
    ("-4", "close of 2026-11", None, "drawn"),  # units: less was used
    ("5", "credit note in its note only", 1, "drawn"),
]


def test_the_migration_says_of_old_entries_why_they_are_there(database: Settings) -> None:
    """And the table stays append only meanwhile: no trigger is taken away for it."""
    migration = (schemas_dir() / "postgres" / "0015.after_issue.sql").read_text()
    adding = migration[: migration.index("COMMENT ON")]
    with connect(database.dsn, application="test", role=None) as connection:
        connection.execute("ALTER TABLE billing.credit_entry DROP COLUMN kind CASCADE")
        with connection.transaction():
            connection.execute("SET LOCAL session_replication_role = replica")  # of no grant and no invoice
            for amount, note, document, _ in ENTRIES:
                connection.execute(
                    "INSERT INTO billing.credit_entry (grant_id, invoice_id, amount, note, document_id, booked_by) "
                    "VALUES (1, 1, %s, %s, %s, 'x')",
                    [amount, note, document],
                )
            connection.execute("SET LOCAL session_replication_role = origin")
        connection.execute(adding)  # type: ignore[arg-type]
        kinds = [kind for (kind,) in connection.execute("SELECT kind FROM billing.credit_entry ORDER BY id")]
        connection.rollback()
    assert kinds == [kind for *_, kind in ENTRIES]
    assert "DISABLE TRIGGER" not in migration
