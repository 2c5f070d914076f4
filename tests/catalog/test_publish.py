"""Publishing on a real PostgreSQL: versions, when they begin, and what is refused."""

import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.rows import TupleRow

from pipeline.catalog import store
from pipeline.catalog.files import Drafts, read_account_files, read_price_files
from pipeline.catalog.publish import Published, Refused, publish
from pipeline.core.periods import BEGINNING, to_micros
from pipeline.infra.postgres import connect
from pipeline.infra.settings import Settings

PRICES = """\
meters:
  - {id: tokens, event_type: call, aggregation: sum, value: tokens, unit: token}
plans:
  - id: standard
    name: Standard
    currency: USD
    charges:
      - {id: tokens, meter: tokens, model: per_unit, unit_price: 0.10}
"""
ACCOUNTS = """\
accounts:
  - id: acme
    name: Acme
    contracts:
      - {id: one, plan: standard, start: 2026-01-01, end: 2026-06-01}
"""
HOUR_US = 3_600_000_000


@pytest.fixture
def prices(tmp_path: Path) -> Callable[[str], Drafts]:
    def read(text: str) -> Drafts:
        file = tmp_path / "prices.yaml"
        file.write_text(text)
        return read_price_files([file])

    return read


@pytest.fixture
def accounts(tmp_path: Path) -> Callable[[str], Drafts]:
    def read(text: str) -> Drafts:
        file = tmp_path / "accounts.yaml"
        file.write_text(text)
        return read_account_files([file])

    return read


Read = Callable[[str], Drafts]


def outcomes(published: list[Published]) -> list[tuple[str, int, str]]:
    return [(one.id, one.version, one.outcome) for one in published]


def refusal(settings: Settings, drafts: Drafts, **options: Any) -> str:
    before = rows(settings, "SELECT count(*) FROM billing.catalog_version")
    with pytest.raises(Refused) as refused:
        publish(settings.dsn, drafts, actor="test", **options)
    assert rows(settings, "SELECT count(*) FROM billing.catalog_version") == before, "a refusal publishes nothing"
    (finding,) = refused.value.findings
    return f"{finding.line}: {finding.path}: {finding.message}"


def rows(settings: Settings, statement: str) -> list[TupleRow]:
    with connect(settings.dsn, application="test") as connection:
        return connection.execute(statement).fetchall()


def now_us() -> int:
    return to_micros(datetime.now(UTC))


def test_new_then_unchanged_then_changed(settings: Settings, prices: Read) -> None:
    first = publish(settings.dsn, prices(PRICES), actor="ada", reason="launch")
    assert outcomes(first) == [("tokens", 1, "new"), ("standard", 1, "new")]
    assert {one.valid_from_us for one in first} == {BEGINNING}

    same = publish(settings.dsn, prices(PRICES.replace("0.10", "0.1")), actor="ada")
    assert outcomes(same) == [("tokens", 1, "unchanged"), ("standard", 1, "unchanged")]

    changed = publish(settings.dsn, prices(PRICES.replace("0.10", "0.2")), actor="bob", reason="dearer")
    assert outcomes(changed) == [("tokens", 1, "unchanged"), ("standard", 2, "changed")]
    begins = changed[1].valid_from_us
    assert begins % 1_000_000 == 0, "a whole second"
    assert timedelta(seconds=55) < timedelta(microseconds=begins - now_us()) <= timedelta(seconds=61)

    assert rows(settings, "SELECT kind, id, version, relayed_at FROM billing.outbox ORDER BY seq") == [
        ("meter", "tokens", 1, None),
        ("plan", "standard", 1, None),
        ("plan", "standard", 2, None),
    ]
    audit = rows(settings, "SELECT actor, action, target, detail ->> 'reason' FROM billing.audit ORDER BY id")
    assert audit == [
        ("ada", "meter.publish", "meter/tokens/1", "launch"),
        ("ada", "plan.publish", "plan/standard/1", "launch"),
        ("bob", "plan.publish", "plan/standard/2", "dearer"),
    ]


def test_a_published_version_cannot_be_changed(settings: Settings, prices: Read) -> None:
    publish(settings.dsn, prices(PRICES), actor="test")
    with connect(settings.dsn, application="test") as connection, pytest.raises(psycopg.Error, match="append only"):
        connection.execute("UPDATE billing.catalog_version SET valid_from = now()")


def test_a_first_version_may_begin_at_any_time(settings: Settings, prices: Read) -> None:
    text = PRICES.replace("currency: USD", "currency: USD\n    valid_from: 2020-02-02")
    assert publish(settings.dsn, prices(text), actor="test")[1].valid_from_us == to_micros(
        datetime(2020, 2, 2, tzinfo=UTC)
    )


def dated(text: str, day: datetime) -> str:
    return text.replace("currency: USD", f"currency: USD\n    valid_from: {day:%Y-%m-%dT%H:%M:%SZ}")


def test_when_a_later_version_may_begin(settings: Settings, prices: Read) -> None:
    now = datetime.now(UTC)
    publish(settings.dsn, prices(dated(PRICES, now - timedelta(days=9))), actor="test")
    dearer = PRICES.replace("0.10", "0.2")

    still = refusal(settings, prices(dated(dearer, now - timedelta(days=9))))
    assert still.startswith("4: plans[standard].id: expected valid_from ")
    assert still.endswith("Z, still that of version 1, though the content changed")
    assert "(60 seconds after publishing) or later, or none" in refusal(
        settings, prices(dated(dearer, now + timedelta(seconds=30)))
    )
    assert "a published version never moves" in refusal(settings, prices(dated(PRICES, now)))

    planned = publish(settings.dsn, prices(dated(dearer, now + timedelta(days=2))), actor="test")
    assert outcomes(planned)[1] == ("standard", 2, "changed")
    dearest = PRICES.replace("0.10", "0.3")
    assert "to replace version 2 planned for then, or later" in refusal(
        settings, prices(dated(dearest, now + timedelta(days=1)))
    )
    replaced = publish(settings.dsn, prices(dated(dearest, now + timedelta(days=2))), actor="test")
    assert outcomes(replaced)[1] == ("standard", 3, "changed")
    assert replaced[1].valid_from_us == planned[1].valid_from_us


def test_when_given_on_the_command_line_stands_in_for_the_files(settings: Settings, prices: Read) -> None:
    publish(settings.dsn, prices(PRICES), actor="test")
    dearer = PRICES.replace("0.10", "0.2")
    assert "(60 seconds after publishing) or later" in refusal(settings, prices(dearer), valid_from=now_us())
    at_once = publish(settings.dsn, prices(dearer), actor="test", valid_from=timedelta(0))
    assert at_once[0].valid_from_us == BEGINNING, "what did not change does not move"
    assert 55_000_000 < at_once[1].valid_from_us - now_us() <= 61_000_000
    later = publish(settings.dsn, prices(PRICES), actor="test", valid_from=timedelta(hours=1))
    assert outcomes(later)[1] == ("standard", 3, "changed")
    assert HOUR_US - 5_000_000 < later[1].valid_from_us - now_us() <= HOUR_US + 1_000_000


def test_a_plan_keeps_its_currency(settings: Settings, prices: Read) -> None:
    publish(settings.dsn, prices(PRICES), actor="test")
    refused = refusal(settings, prices(PRICES.replace("USD", "EUR")))
    assert refused.startswith("4: plans[standard].id: expected currency USD, as in version 1")


def test_files_with_mistakes_are_refused(settings: Settings, prices: Read) -> None:
    assert "expected a number of 0 or more" in refusal(settings, prices(PRICES.replace("0.10", "free")))


def test_publications_at_the_same_time_make_versions_without_holes(settings: Settings, tmp_path: Path) -> None:
    begins = now_us() // 1_000_000 * 1_000_000 + HOUR_US
    failures: list[Exception] = []

    def one(number: int) -> None:
        file = tmp_path / f"{number}.yaml"
        file.write_text(PRICES.replace("0.10", f"0.1{number}"))
        try:
            publish(settings.dsn, read_price_files([file]), actor="test", valid_from=begins)
        except Exception as error:  # noqa: BLE001  shown by the test's own thread
            failures.append(error)

    threads = [threading.Thread(target=one, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    with connect(settings.dsn, application="test") as connection:
        assert [version.entry.version for version in store.versions(connection, "plan", "standard")] == [1, 2, 3, 4]
        assert [version.entry.version for version in store.versions(connection, "meter", "tokens")] == [1]


# Accounts -----------------------------------------------------------------------------------------------------------


def test_accounts_and_contracts(settings: Settings, prices: Read, accounts: Read) -> None:
    publish(settings.dsn, prices(PRICES), actor="test")
    applied = publish(settings.dsn, accounts(ACCOUNTS), actor="test")
    assert outcomes(applied) == [("acme", 1, "new"), ("one", 1, "new")]
    assert outcomes(publish(settings.dsn, accounts(ACCOUNTS), actor="test")) == [
        ("acme", 1, "unchanged"),
        ("one", 1, "unchanged"),
    ]
    renamed = publish(settings.dsn, accounts(ACCOUNTS.replace("Acme", "Acme Ltd")), actor="test")
    assert outcomes(renamed) == [("acme", 2, "changed"), ("one", 1, "unchanged")]
    ended = publish(settings.dsn, accounts(ACCOUNTS.replace("2026-06-01", "2026-05-01")), actor="test")
    assert outcomes(ended) == [("acme", 3, "changed"), ("one", 2, "changed")]


NEXT = "accounts:\n  - id: acme\n    name: Acme\n    contracts:\n      - {id: two, plan: standard, start: 2026-05-01}\n"
CONTRADICTIONS = {
    "a plan that is not published": (
        ACCOUNTS.replace("plan: standard", "plan: standart"),
        "5: accounts[acme].contracts[one].plan: expected a published plan, got 'standart': did you mean 'standard'?",
    ),
    "another plan under a contract that has begun": (
        ACCOUNTS.replace("plan: standard", "plan: other"),
        "5: accounts[acme].contracts[one].plan: expected plan 'standard' from 2026-01-01T00:00:00Z, since 'one' has",
    ),
    "another start of a contract that has begun": (
        ACCOUNTS.replace("2026-01-01", "2026-02-01"),
        "5: accounts[acme].contracts[one].plan: expected plan 'standard' from 2026-01-01T00:00:00Z, since 'one' has",
    ),
    "another time zone once a contract has begun": (
        ACCOUNTS.replace("name: Acme", "name: Acme\n    time_zone: Asia/Tokyo"),
        "2: accounts[acme].id: expected time_zone UTC, since a contract has begun",
    ),
    "an overlap with a contract that is not in the file": (
        NEXT,
        "5: accounts[acme].contracts[two].id: expected contracts of an account one after another, got 'two' "
        "(2026-05-01T00:00:00Z to open end) while 'one' (2026-01-01T00:00:00Z to 2026-06-01T00:00:00Z) runs",
    ),
    "a contract of another account": (
        ACCOUNTS.replace("acme", "rival"),
        "5: accounts[rival].contracts[one].id: expected a new id, got 'one', a contract of 'acme'",
    ),
}


@pytest.mark.parametrize(("text", "expected"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_a_contradiction_to_what_is_published(
    settings: Settings, prices: Read, accounts: Read, text: str, expected: str
) -> None:
    other = PRICES + PRICES[PRICES.index("  - id: standard") :].replace("standard", "other")
    publish(settings.dsn, prices(other), actor="test")
    publish(settings.dsn, accounts(ACCOUNTS), actor="test")
    with pytest.raises(Refused) as refused:
        publish(settings.dsn, accounts(text), actor="test")
    shown = [f"{finding.line}: {finding.path}: {finding.message}" for finding in refused.value.findings]
    assert any(line.startswith(expected) for line in shown), shown


def test_accounts_before_any_plan(settings: Settings, accounts: Read) -> None:
    assert refusal(settings, accounts(ACCOUNTS)).endswith("got 'standard': `tally plans publish` comes first")
