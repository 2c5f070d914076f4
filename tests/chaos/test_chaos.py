"""A short run of the chaos harness: every important kind of fault once, and then nothing lost, doubled or mispriced."""

from pathlib import Path

import pytest

from pipeline.infra import embedded
from pipeline.infra.postgres import connect
from tests.chaos.run import Options, Run, deployed
from tests.chaos.services import orphans

#: Seconds of load, and the faults dealt in them: the most important kinds, in an order drawn from the seed.
_SECONDS, _FAULTS, _EVENTS = 30, 14, 5000

#: What is done behind the pipeline's back, by how the judge names it.
_TAMPERING = {
    "expected dead_lettered too_old, is duplicate": """
        UPDATE billing.unrated_event SET state = 'duplicate'
        WHERE ctid = (SELECT ctid FROM billing.unrated_event WHERE reason = 'too_old' LIMIT 1)""",
    "expected dead_lettered conflicting_duplicate, is dead_lettered too_old": """
        UPDATE billing.unrated_event SET reason = 'too_old'
        WHERE ctid = (SELECT ctid FROM billing.unrated_event WHERE reason = 'conflicting_duplicate' LIMIT 1)""",
    "expected rated, is duplicate": """
        DELETE FROM billing.rated_usage WHERE identity = (
            SELECT identity FROM billing.rated_usage WHERE account = 'acct-03' LIMIT 1)""",
    ": two rows for ": """
        INSERT INTO billing.rated_usage
        SELECT (jsonb_populate_record(NULL::billing.rated_usage, to_jsonb(one) || '{"entry": 1}')).*
        FROM (SELECT * FROM billing.rated_usage WHERE account = 'acct-04' LIMIT 1) AS one""",
    "account='acct-05'": """
        UPDATE billing.invoice_line SET amount = amount + 0.000000000001 WHERE id = (
            SELECT line_id FROM billing.rated_usage WHERE account = 'acct-05' LIMIT 1)""",
}


@pytest.mark.skipif(bool(embedded.missing_packages()), reason="needs the packages of the embedded services")
def test_nothing_is_lost_doubled_or_mispriced(tmp_path: Path) -> None:
    """And then the judge is judged: what is taken away, added or changed afterwards, it names."""
    options = Options(seed=897, minutes=_SECONDS / 60, events=_EVENTS, faults=_FAULTS, session_timeout=6)
    with deployed(options, tmp_path) as running:
        running.play()
        running.drain()
        summary, found = running.judge()
        assert found == [], f"logs in {tmp_path}/logs"
        assert sum(summary.faults.values()) == _FAULTS
        assert summary.events > _EVENTS
        assert summary.outcomes.keys() == {"rated", "duplicate", "parked", "dead_lettered"}
        assert summary.price_versions == 2
        _tamper(running)
        _, found = running.judge()
        for what in _TAMPERING:
            assert any(what in difference for difference in found), what
        assert any("tally reconcile" in difference for difference in found)
    assert orphans(tmp_path) == []


def _tamper(running: Run) -> None:
    with connect(running.settings.dsn, application="chaos", role=None) as connection:
        connection.execute("SET LOCAL session_replication_role = replica")  # past the triggers that refuse it
        for statement in _TAMPERING.values():
            assert connection.execute(statement.encode()).rowcount > 0, statement
