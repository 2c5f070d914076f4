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
from pipeline.core.periods import BEGINNING, format_instant, to_datetime, to_micros
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


# Contracts and the past: what is rated keeps its price ----------------------------------------------------------------

DAY_US = 24 * HOUR_US


def contracts(*items: str) -> str:
    return "accounts:\n  - id: acme\n    name: Acme\n    contracts:\n" + "".join(f"      - {item}\n" for item in items)


def contract(id: str, start_us: int, end_us: int | None = None) -> str:
    end = "" if end_us is None else f", end: {format_instant(end_us)}"
    return f"{{id: {id}, plan: standard, start: {format_instant(start_us)}{end}}}"


def rate(settings: Settings, contract: str, first_us: int, last_us: int) -> None:
    """Usage rated under a contract, as the sink writes its line."""
    with connect(settings.dsn, application="test") as connection:
        row = connection.execute(
            "INSERT INTO billing.invoice (account, currency, period_start, period_end) "
            "VALUES ('acme', 'USD', '2026-01-01', '2026-02-01') RETURNING id"
        ).fetchone()
        assert row is not None
        connection.execute(
            "INSERT INTO billing.invoice_line (invoice_id, contract, plan, plan_version, price_version, meter, "
            "meter_version, charge, segment_start, first_event_at, last_event_at) "
            "VALUES (%s, %s, 'standard', 1, 'standard@1', 'tokens', 1, 'tokens', '2026-01-01', %s, %s)",
            [row[0], contract, to_datetime(first_us), to_datetime(last_us)],
        )


@pytest.fixture
def today(settings: Settings, prices: Read) -> int:
    """A whole second of now; the plan is published."""
    publish(settings.dsn, prices(PRICES), actor="test")
    return now_us() // 1_000_000 * 1_000_000


def test_a_first_contract_may_begin_in_the_past_and_end_there(settings: Settings, accounts: Read, today: int) -> None:
    begun = contracts(contract("old", today - 90 * DAY_US, today - 60 * DAY_US), contract("one", today - 60 * DAY_US))
    assert outcomes(publish(settings.dsn, accounts(begun), actor="test"))[1:] == [("old", 1, "new"), ("one", 1, "new")]
    # A mistake found before any usage was rated is simply mended.
    ended = contracts(contract("one", today - 60 * DAY_US, today - 30 * DAY_US))
    assert outcomes(publish(settings.dsn, accounts(ended), actor="test"))[1:] == [("one", 2, "changed")]


def test_a_contract_with_rated_usage_does_not_end_in_the_past(settings: Settings, accounts: Read, today: int) -> None:
    running = contracts(contract("one", today - 60 * DAY_US))
    publish(settings.dsn, accounts(running), actor="test")
    rate(settings, "one", today - 50 * DAY_US, today - 5 * DAY_US)
    for end_us in (today - 30 * DAY_US, today - DAY_US, today + 30_000_000):
        refused = refusal(settings, accounts(contracts(contract("one", today - 60 * DAY_US, end_us))))
        assert refused.startswith("5: accounts[acme].contracts[one].id: expected an end of ")
        assert refused.endswith("end it later; rating usage again is not possible yet")

    assert outcomes(publish(settings.dsn, accounts(running), actor="test")) == [
        ("acme", 1, "unchanged"),
        ("one", 1, "unchanged"),
    ]
    ended = contracts(contract("one", today - 60 * DAY_US, today + DAY_US))
    assert outcomes(publish(settings.dsn, accounts(ended), actor="test"))[1:] == [("one", 2, "changed")]


def test_an_end_before_usage_from_a_clock_ahead_is_refused(settings: Settings, accounts: Read, today: int) -> None:
    publish(settings.dsn, accounts(contracts(contract("one", today - DAY_US))), actor="test")
    rate(settings, "one", today - HOUR_US, today + 240_000_000)
    soon = contracts(contract("one", today - DAY_US, today + 120_000_000))
    assert f"expected an end of {format_instant(today + 241_000_000)} or later" in refusal(settings, accounts(soon))


def test_an_end_that_has_passed_stays_and_may_be_moved_later(settings: Settings, accounts: Read, today: int) -> None:
    ended = contracts(contract("one", today - 60 * DAY_US, today - 30 * DAY_US))
    publish(settings.dsn, accounts(ended), actor="test")
    rate(settings, "one", today - 50 * DAY_US, today - 31 * DAY_US)
    assert outcomes(publish(settings.dsn, accounts(ended), actor="test"))[1:] == [("one", 1, "unchanged")]
    later = contracts(contract("one", today - 60 * DAY_US, today - 10 * DAY_US))
    assert outcomes(publish(settings.dsn, accounts(later), actor="test"))[1:] == [("one", 2, "changed")]


def test_a_renewal_signed_late_covers_what_was_not_rated(settings: Settings, accounts: Read, today: int) -> None:
    ended = contract("one", today - 60 * DAY_US, today - 3 * DAY_US)
    publish(settings.dsn, accounts(contracts(ended)), actor="test")
    rate(settings, "one", today - 50 * DAY_US, today - 3 * DAY_US - 1)
    renewed = contracts(ended, contract("two", today - 3 * DAY_US))
    assert outcomes(publish(settings.dsn, accounts(renewed), actor="test"))[1:] == [
        ("one", 1, "unchanged"),
        ("two", 1, "new"),
    ]


@pytest.mark.parametrize("planned", [False, True], ids=["new", "planned for later"])
def test_a_contract_over_rated_usage_is_refused(settings: Settings, accounts: Read, today: int, planned: bool) -> None:
    """Its time was another contract's when the usage came: a sink that was behind did not show that at its end."""
    ended = contract("one", today - 60 * DAY_US, today - 30 * DAY_US)
    before = contracts(ended, *([contract("two", today + DAY_US)] if planned else []))
    publish(settings.dsn, accounts(before), actor="test")
    rate(settings, "one", today - 50 * DAY_US, today - 20 * DAY_US)
    refused = refusal(settings, accounts(contracts(ended, contract("two", today - 30 * DAY_US))))
    assert refused.startswith("6: accounts[acme].contracts[two].id: expected a time without rated usage")
    assert f"while 'one' has usage rated from {format_instant(today - 50 * DAY_US)}" in refused
    publish(settings.dsn, accounts(contracts(ended, contract("two", today - 19 * DAY_US))), actor="test")


def test_a_move_to_another_contract_in_the_past_is_refused_at_both_ends(
    settings: Settings, accounts: Read, today: int
) -> None:
    publish(settings.dsn, accounts(contracts(contract("one", today - 60 * DAY_US))), actor="test")
    rate(settings, "one", today - 50 * DAY_US, today - DAY_US)
    switch = today - 10 * DAY_US
    moved = accounts(contracts(contract("one", today - 60 * DAY_US, switch), contract("two", switch)))
    with pytest.raises(Refused) as refused:
        publish(settings.dsn, moved, actor="test")
    assert [finding.line for finding in refused.value.findings] == [5, 6]
