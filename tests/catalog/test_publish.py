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
    with (
        connect(settings.dsn, application="test", role=None) as owner,
        pytest.raises(psycopg.Error, match="append only"),
    ):
        owner.execute("UPDATE billing.catalog_version SET valid_from = now()")


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
    assert "Z, still that of version 1, though the content changed" in still
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
#: A plan that charges no events at all.
SUPPORT = "  - {id: support, name: Support, currency: USD, charges: [{id: support, model: flat, unit_price: 300}]}\n"
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
        "5: accounts[acme].contracts[two].id: expected one contract of an account at a time to charge call, got 'two' "
        "(2026-05-01T00:00:00Z to open end) while 'one' (2026-01-01T00:00:00Z to 2026-06-01T00:00:00Z) does",
    ),
    "an overlap within the file": (
        ACCOUNTS + "      - {id: two, plan: other, start: 2026-05-31}\n",
        "6: accounts[acme].contracts[two].id: expected one contract of an account at a time to charge call, got 'two' ",
    ),
    "an overlap with a later phase": (
        ACCOUNTS.replace(
            "2026-06-01", "2026-09-01, phases: [{start: 2026-05-01, plan: support}, {start: 2026-07-31, plan: other}]"
        )
        + "      - {id: two, plan: standard, start: 2026-05-01}\n",
        "6: accounts[acme].contracts[two].id: expected one contract of an account at a time to charge call, got 'two' ",
    ),
    "another cycle once a contract has begun": (
        ACCOUNTS.replace("end: 2026-06-01", "end: 2026-06-01, cycle: {every: quarter, anchor: 2026-05-31}"),
        "5: accounts[acme].contracts[one].plan: expected a cycle of calendar months, since 'one' has begun and other "
        "periods would overlap billed ones, got quarters from 31 May: end it and add another after it",
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
    other = PRICES + PRICES[PRICES.index("  - id: standard") :].replace("standard", "other") + SUPPORT
    publish(settings.dsn, prices(other), actor="test")
    publish(settings.dsn, accounts(ACCOUNTS), actor="test")
    with pytest.raises(Refused) as refused:
        publish(settings.dsn, accounts(text), actor="test")
    shown = [f"{finding.line}: {finding.path}: {finding.message}" for finding in refused.value.findings]
    assert any(line.startswith(expected) for line in shown), shown


def test_accounts_before_any_plan(settings: Settings, accounts: Read) -> None:
    assert refusal(settings, accounts(ACCOUNTS)).endswith("got 'standard': `tally plans publish` comes first")


def test_unknown_names_are_told_with_the_other_mistakes(settings: Settings, accounts: Read) -> None:
    """A parent that has mistakes itself is no unknown one."""
    file = accounts(
        "accounts:\n"
        "  - {id: acme, name: Acme, parent: group, contracts: [{plan: standart, start: 2026-01-01}]}\n"
        "  - {id: group, name: Group, time_zone: Mars, parent: nobody}\n"
        "  - {id: umbrella, name: Umbrella, parent: umbrela}\n"
    )
    with pytest.raises(Refused) as refused:
        publish(settings.dsn, file, actor="test")
    assert [f"{one.line}: {one.message.partition(', got')[0]}" for one in refused.value.findings] == [
        "2: expected a published plan",
        "3: expected an IANA time zone such as Europe/Berlin",
        "4: expected an account as parent",
    ]


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
        assert refused.endswith("end it later, or --back-dated and then `tally rerate`")

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


def test_several_subscriptions_at_a_time(settings: Settings, prices: Read, accounts: Read, today: int) -> None:
    """Also beside usage that is rated, which stays what it is; of whatever cycle."""
    publish(settings.dsn, prices(PRICES + SUPPORT), actor="test")
    one = contract("one", today - 60 * DAY_US)
    publish(settings.dsn, accounts(contracts(one)), actor="test")
    rate(settings, "one", today - 50 * DAY_US, today - 5 * DAY_US)
    support = contract("help", today - 20 * DAY_US).replace("standard", "support")[:-1] + ", cycle: year}"
    published = publish(settings.dsn, accounts(contracts(one, support)), actor="test")
    assert outcomes(published)[1:] == [("one", 1, "unchanged"), ("help", 1, "new")]


def test_a_plan_does_not_begin_to_charge_what_a_contract_beside_charges(
    settings: Settings, prices: Read, accounts: Read, today: int
) -> None:
    publish(settings.dsn, prices(PRICES + SUPPORT), actor="test")
    support = contract("help", today - DAY_US).replace("standard", "support")
    publish(settings.dsn, accounts(contracts(contract("one", today - DAY_US), support)), actor="test")
    charging = SUPPORT.replace("300}", "300}, {id: calls, meter: tokens, model: per_unit, unit_price: 1}")
    assert refusal(settings, prices(PRICES + charging)) == (
        "9: plans[support].id: expected no charge of call in plan 'support', since account 'acme' has 'help' "
        "and 'one' at a time: both would charge it"
    )
    over = contract("help", today - DAY_US, today + 3600 * 1_000_000).replace("standard", "support")
    publish(settings.dsn, accounts(contracts(contract("one", today - DAY_US), over)), actor="test")
    assert refusal(settings, prices(PRICES + charging)), "the hour in which both still run"
    other = charging.replace("meter: tokens", "meter: faxes")
    faxes = PRICES.replace("plans:", "  - {id: faxes, event_type: fax, aggregation: count, unit: fax}\nplans:")
    assert outcomes(publish(settings.dsn, prices(faxes + other), actor="test"))[-1] == ("support", 2, "changed")


# What is back-dated ---------------------------------------------------------------------------------------------------


def test_a_back_dated_contract_corrects_open_periods(settings: Settings, accounts: Read, today: int) -> None:
    publish(settings.dsn, accounts(contracts(contract("one", today - 60 * DAY_US))), actor="test")
    rate(settings, "one", today - 50 * DAY_US, today - DAY_US)
    switch = today - 10 * DAY_US
    moved = accounts(contracts(contract("one", today - 60 * DAY_US, switch), contract("two", switch)))
    published = publish(settings.dsn, moved, actor="test", back_dated=True)
    assert outcomes(published)[1:] == [("one", 2, "changed"), ("two", 1, "new")]


def test_back_dating_moves_no_usage_between_periods(settings: Settings, accounts: Read, today: int) -> None:
    publish(settings.dsn, accounts(contracts(contract("one", today - 60 * DAY_US))), actor="test")
    rate(settings, "one", today - 50 * DAY_US, today - DAY_US)
    switch = today - 10 * DAY_US
    ended, other = contract("one", today - 60 * DAY_US, switch), contract("two", switch)[:-1] + ", cycle: quarter}"
    refused = refusal(settings, accounts(contracts(ended, other)), back_dated=True)
    assert refused.startswith(
        "6: accounts[acme].contracts[two].id: expected a cycle of calendar months, since usage of 'one' from"
    )
    assert refused.endswith("is on invoices of its periods, got calendar quarters: begin after it")
    later = contract("two", today)[:-1] + ", cycle: quarter}"
    published = publish(
        settings.dsn,
        accounts(contracts(contract("one", today - 60 * DAY_US, today), later)),
        actor="test",
        back_dated=True,
    )
    assert outcomes(published)[1:] == [("one", 2, "changed"), ("two", 1, "new")]


def test_a_back_dated_price_counts_between_those_before_and_after(settings: Settings, prices: Read, today: int) -> None:
    planned, past = today + 2 * DAY_US, today - 5 * DAY_US
    publish(settings.dsn, prices(PRICES.replace("0.10", "0.2")), actor="test", valid_from=planned)
    assert "(60 seconds after publishing) or later" in refusal(settings, prices(PRICES), valid_from=past)
    corrected = publish(settings.dsn, prices(PRICES), actor="test", valid_from=past, back_dated=True)
    assert [(one.version, one.valid_from_us) for one in corrected if one.kind == "plan"] == [(3, past)]


ISSUED = """
UPDATE billing.invoice SET state = 'issued', period_start = %s, period_end = %s WHERE account = 'acme'
"""


def test_nothing_changes_an_issued_invoice(settings: Settings, prices: Read, accounts: Read, today: int) -> None:
    publish(settings.dsn, accounts(contracts(contract("one", today - 90 * DAY_US))), actor="test")
    rate(settings, "one", today - 50 * DAY_US, today - 45 * DAY_US)
    end = today - 30 * DAY_US
    with connect(settings.dsn, application="test", role=None) as connection:
        connection.execute(ISSUED, [to_datetime(end - 30 * DAY_US), to_datetime(end)])
    changes = {
        "plans[standard].id": prices(PRICES.replace("0.10", "0.2")),
        "meters[tokens].id": prices(PRICES.replace("unit: token", "unit: tokens")),
        "price_lists[cheap].id": prices(PRICES + LIST),
        "accounts[acme].contracts[one].id": accounts(contracts(contract("one", today - 90 * DAY_US, end - DAY_US))),
        "accounts[acme].id": accounts(
            contracts(contract("one", today - 90 * DAY_US)).replace(
                "name: Acme", f"name: Acme\n    customer_segment: x\n    valid_from: {format_instant(end - DAY_US)}"
            )
        ),
    }
    for place, drafts in changes.items():
        refused = refusal(settings, drafts, valid_from=end - DAY_US, back_dated=True)
        assert f"{place}: expected a time after {format_instant(end)}" in refused
        assert refused.endswith(f"got {format_instant(end - DAY_US)}: begin later")
    for place, drafts in changes.items():
        if not place.startswith("accounts"):
            assert publish(settings.dsn, drafts, actor="test", valid_from=end, back_dated=True)


# Price lists ----------------------------------------------------------------------------------------------------------

LIST = """\
price_lists:
  - {id: cheap, name: Cheap, plan: standard, currency: USD, customer_segment: x,
     charges: [{id: tokens, unit_price: 0.05}]}
"""


def test_a_price_list_counts_from_the_beginning_only_with_its_plan(settings: Settings, prices: Read) -> None:
    both = publish(settings.dsn, prices(PRICES + LIST), actor="test")
    assert [(one.kind, one.valid_from_us) for one in both][-1] == ("price_list", BEGINNING)
    other = PRICES + LIST.replace("cheap", "other").replace("segment: x", "segment: y")
    late = publish(settings.dsn, prices(other), actor="test")[-1]
    assert (late.outcome, late.version) == ("new", 1)
    assert 55_000_000 < late.valid_from_us - now_us() <= 61_000_000, (
        "who has the plan already pays its price until then"
    )
    named = PRICES + LIST.replace("cheap", "named").replace("customer_segment: x,", "")
    assert publish(settings.dsn, prices(named), actor="test")[-1].valid_from_us == BEGINNING, "nobody names it yet"


def test_a_plan_keeps_the_charges_that_price_lists_override(settings: Settings, prices: Read) -> None:
    publish(settings.dsn, prices(PRICES + LIST), actor="test")
    renamed = PRICES.replace("- {id: tokens, meter", "- {id: input, meter")
    assert refusal(settings, prices(renamed)) == (
        "4: plans[standard].id: expected charge 'tokens' in plan 'standard', since price list 'cheap' overrides it"
    )
    repriced = PRICES.replace("model: per_unit, unit_price: 0.10", "model: volume, tiers: [{unit_price: 1}]")
    assert refusal(settings, prices(repriced)).endswith(
        "under price list 'cheap': charge tokens: expected fields of a volume charge, got unit_price"
    )
    ended = renamed + LIST.replace("charges: [{id: tokens, unit_price: 0.05}]", "charges: []")
    assert outcomes(publish(settings.dsn, prices(ended), actor="test")) == [
        ("tokens", 1, "unchanged"),
        ("standard", 2, "changed"),
        ("cheap", 2, "changed"),
    ]


def test_a_price_list_fits_every_version_of_its_plan_to_come(settings: Settings, prices: Read, today: int) -> None:
    renamed = PRICES.replace("- {id: tokens, meter", "- {id: input, meter")
    publish(settings.dsn, prices(renamed), actor="test", valid_from=today + DAY_US)
    alone = prices(PRICES + LIST)  # as an approval has it: what did not change is not there
    alone.meters, alone.plans = [], []
    assert "expected charge 'tokens' in plan 'standard' version 2" in refusal(settings, alone)


def test_a_price_list_that_contradicts_another(settings: Settings, prices: Read) -> None:
    publish(settings.dsn, prices(PRICES + LIST), actor="test")
    other = refusal(settings, prices(PRICES + LIST.replace("id: cheap", "id: other")))
    assert other.endswith("for customer segment 'x', got 'other' beside 'cheap': put their charges into one")
    moved = refusal(settings, prices(PRICES + LIST.replace("segment: x", "segment: y")))
    assert "expected a price list of plan 'standard' for x, as in version 1, got a price list of plan" in moved
    own = LIST.replace("id: cheap", "id: own").replace("customer_segment: x", "account: acme")
    assert refusal(settings, prices(PRICES + own)).endswith(
        "expected a published account, got 'acme': `tally accounts apply` comes first"
    )


def test_lists_that_no_plan_can_have_together(settings: Settings, prices: Read, accounts: Read) -> None:
    """The segment's replaces the model, the account's changes a field that the new model has not."""
    publish(settings.dsn, prices(PRICES), actor="test")
    publish(settings.dsn, accounts(ACCOUNTS), actor="test")
    replaced = LIST.replace("unit_price: 0.05", "model: volume, tiers: [{unit_price: 1}]")
    publish(settings.dsn, prices(PRICES + replaced), actor="test")
    own = LIST.replace("cheap", "own").replace("customer_segment: x", "account: acme")
    assert refusal(settings, prices(PRICES + own)).endswith(
        "to have a price under price list 'cheap' and 'own': charge tokens: expected fields of a volume charge, got "
        "unit_price"
    )


def test_nor_those_of_an_account_and_its_contract(settings: Settings, prices: Read, accounts: Read) -> None:
    publish(settings.dsn, prices(PRICES), actor="test")
    publish(settings.dsn, accounts(ACCOUNTS), actor="test")
    replaced = LIST.replace("unit_price: 0.05", "model: volume, tiers: [{unit_price: 1}]")
    own = replaced.replace("cheap", "own").replace("customer_segment: x", "account: acme")
    publish(settings.dsn, prices(PRICES + own), actor="test")
    vip = LIST.replace("cheap", "vip").replace(", customer_segment: x", "").replace("    customer_segment: x\n", "")
    assert refusal(settings, prices(PRICES + vip)).endswith(
        "to have a price under price list 'own' and 'vip': charge tokens: expected fields of a volume charge, got "
        "unit_price"
    )


def test_a_pool_takes_no_charge_that_a_price_list_made_one_of_single_events(settings: Settings, prices: Read) -> None:
    publish(settings.dsn, prices(PRICES + LIST.replace("unit_price: 0.05", "model: percentage, rate: 1")), actor="test")
    pooled = PRICES + "    pools: [{id: p, unit: token, included: 5, charges: [tokens]}]\n"
    assert "got percentage by price list 'cheap'" in refusal(settings, prices(pooled))


def test_a_meter_keeps_what_published_plans_need(settings: Settings, prices: Read) -> None:
    split = PRICES.replace("unit: token", "unit: token, dimensions: [model]")
    split = split.replace("unit_price: 0.10}", "unit_price: 0.10, by: [model]}")
    pooled = split + "    pools: [{id: p, unit: token, included: 5, charges: [tokens]}]\n"
    publish(settings.dsn, prices(pooled), actor="test")
    alone = split[: split.index("plans:")]
    assert outcomes(publish(settings.dsn, prices(alone), actor="test")) == [("tokens", 1, "unchanged")]
    assert "plan 'standard': charge tokens: expected dimensions of meter tokens" in refusal(
        settings, prices(alone.replace("[model]", "[region]"))
    )
    assert "expected unit token, that of pool 'p' of plan 'standard', got piece" in refusal(
        settings, prices(alone.replace("unit: token", "unit: piece"))
    )


# Phases, customer segments, relations ---------------------------------------------------------------------------------


@pytest.fixture
def plans(settings: Settings, prices: Read) -> None:
    text = PRICES + PRICES[PRICES.index("  - id: standard") :].replace("standard", "plus")
    text += PRICES[PRICES.index("  - id: standard") :].replace("standard", "euro").replace("USD", "EUR")
    named = LIST.replace("customer_segment: x,", "")
    publish(settings.dsn, prices(text + named + LIST.replace("cheap", "edu")[len("price_lists:\n") :]), actor="test")


def phased(*phases: str, more: str = "") -> str:
    text = "accounts:\n  - id: acme\n    name: Acme\n    contracts:\n"
    text += f"      - {{id: one, plan: standard, start: 2026-01-01{more}, phases: [{', '.join(phases)}]}}\n"
    return text


PHASES = {
    "a plan of another currency": (
        phased("{start: 2027-01-01, plan: euro}"),
        "expected plans of one currency, since a contract has one, got USD and EUR: make it two contracts",
    ),
    "a plan that is not there": (phased("{start: 2027-01-01, plan: pluss}"), "expected a published plan, got 'pluss'"),
    "a price list that is not there": (
        phased("{start: 2027-01-01, price_list: chep}"),
        "expected a price list of plan 'standard', got 'chep': did you mean 'cheap'?",
    ),
    "a price list of another plan": (
        phased("{start: 2027-01-01, plan: plus, price_list: cheap}"),
        "expected a price list of plan 'plus', got 'cheap'",
    ),
    "a price list for a customer segment": (
        phased("{start: 2027-01-01, price_list: edu}"),
        "expected a price list for the contracts that name it, got 'edu', for x",
    ),
}


@pytest.mark.usefixtures("plans")
def test_a_mistake_in_a_phase(settings: Settings, accounts: Read) -> None:
    for mistake, (text, expected) in PHASES.items():
        refused = refusal(settings, accounts(text))
        assert refused.startswith(f"5: accounts[acme].contracts[one].plan: {expected}"), mistake


@pytest.mark.usefixtures("plans")
def test_what_of_a_contract_has_begun_stays(settings: Settings, accounts: Read) -> None:
    ramp = phased("{start: 2026-03-01, price_list: cheap}", "{start: 2090-01-01, plan: plus}", more=", trial_days: 7")
    publish(settings.dsn, accounts(ramp), actor="test")
    later = publish(settings.dsn, accounts(ramp.replace("2090-01-01", "2091-01-01")), actor="test")
    assert outcomes(later)[1:] == [("one", 2, "changed")], "what has not begun may change"
    changes = [
        (("2026-03-01", "2026-04-01"), "expected the phases of 'one' up to "),
        ((", price_list: cheap", ", plan: plus"), "expected the phases of 'one' up to "),
        (
            ("trial_days: 7", "trial_days: 70"),
            "(standard from 2026-01-01T00:00:00Z, 7 days of trial; standard with list",
        ),
        (("start: 2090-01-01, plan: plus", "start: 2026-04-01, plan: plus"), "begin a new phase after it"),
    ]
    for change, expected in changes:
        changed = accounts(ramp.replace(*change))
        assert expected in refusal(settings, changed)
    assert outcomes(publish(settings.dsn, changed, actor="test", back_dated=True))[1:] == [("one", 3, "changed")]


def test_a_contract_keeps_its_legal_entity(settings: Settings, prices: Read, accounts: Read) -> None:
    publish(settings.dsn, prices(PRICES), actor="test")
    publish(settings.dsn, accounts(phased(more=", legal_entity: acme-inc")), actor="test")
    moved = accounts(phased(more=", legal_entity: acme-gmbh"))
    assert "expected legal_entity acme-inc, since 'one' has begun" in refusal(settings, moved, back_dated=True)


APPLIED = """
INSERT INTO billing.invoicing_version (kind, id, version, valid_from, document, applied_by)
SELECT 'legal_entity', id, 1, '2026-01-01', '{}', 'test' FROM unnest(ARRAY['acme-inc', 'acme-gmbh']) AS id
"""
DRAFTED = """
WITH document AS (
    INSERT INTO billing.document (kind, legal_entity, account, currency, period_start, period_end, tax_date,
        lines_amount, discounts_amount, net_amount, tax_amount, total_amount, credits_amount, balance_amount,
        payable_amount, created_by)
    VALUES ('invoice', 'acme-inc', 'group', 'USD', '2026-01-01Z', '2026-02-01Z', '2026-01-31', 0, 0, 0, 0, 0, 0, 0,
        0, 'a')
    RETURNING id
) INSERT INTO billing.document_line (document_id, position, kind, account, contract, period_start, period_end, charge,
    segment_start, quantity, exact_amount, amount, discount_amount, net_amount, tax_amount, total_amount, tax_category)
SELECT id, 1, 'usage', 'acme', 'one', '2026-01-01Z', '2026-02-01Z', 'tokens', '2026-01-01Z', 0, 0, 0, 0, 0, 0, 0,
    'standard' FROM document
"""
NUMBERED = """
UPDATE billing.document SET state = 'issued', number = '1', number_series = 'R', number_year = 2026, number_serial = 1,
    issue_date = '2026-02-01', issued_at = now(), issued_by = 'a'
"""


def test_a_contract_that_names_no_legal_entity_may_name_one(settings: Settings, prices: Read, accounts: Read) -> None:
    """Who issued its documents, or any where it has none: with a second legal entity it could not be billed else."""
    publish(settings.dsn, prices(PRICES), actor="test")
    publish(settings.dsn, accounts(phased()), actor="test")
    inc, gmbh = (accounts(phased(more=f", legal_entity: {name}")) for name in ("acme-inc", "acme-gmbh"))
    assert refusal(settings, inc).endswith("got 'acme-inc': `tally invoicing apply` comes first")
    with connect(settings.dsn, application="test", autocommit=True) as connection:
        connection.execute(APPLIED)
        typo = accounts(phased(more=", legal_entity: acme-in"))
        assert refusal(settings, typo).endswith("is applied, got 'acme-in': did you mean 'acme-inc'?")
        connection.execute(DRAFTED)
        connection.execute(NUMBERED)
    for back_dated in (False, True):
        assert refusal(settings, gmbh, back_dated=back_dated).endswith(
            "expected legal_entity acme-inc, since 'one' has documents of that company, got acme-gmbh: end it and add "
            "another after it"
        )
    assert outcomes(publish(settings.dsn, inc, actor="test"))[1:] == [("one", 2, "changed")]
    assert "expected legal_entity acme-inc, since 'one' has begun" in refusal(settings, gmbh, back_dated=True)
    assert "got none: end it" in refusal(settings, accounts(phased()))


def test_a_contract_without_documents_may_name_any_legal_entity(
    settings: Settings, prices: Read, accounts: Read
) -> None:
    publish(settings.dsn, prices(PRICES), actor="test")
    publish(settings.dsn, accounts(phased()), actor="test")
    with connect(settings.dsn, application="test", autocommit=True) as connection:
        connection.execute(APPLIED)
        connection.execute(DRAFTED)  # made anew by the next run
    named = publish(settings.dsn, accounts(phased(more=", legal_entity: acme-gmbh")), actor="test")
    assert outcomes(named)[1:] == [("one", 2, "changed")]


def test_a_customer_segment_changes_from_a_time_on(settings: Settings, prices: Read, accounts: Read) -> None:
    publish(settings.dsn, prices(PRICES), actor="test")
    segmented = ACCOUNTS.replace("name: Acme", "name: Acme\n    customer_segment: x")
    assert publish(settings.dsn, accounts(segmented), actor="test")[0].valid_from_us == BEGINNING
    moved = segmented.replace("segment: x", "segment: y")
    begins = publish(settings.dsn, accounts(moved), actor="test")[0].valid_from_us
    assert 55_000_000 < begins - now_us() <= 61_000_000
    renamed = publish(settings.dsn, accounts(moved.replace("Acme", "Acme Ltd")), actor="test")[0]
    assert (renamed.version, renamed.valid_from_us) == (3, begins), "the segment counts from when it did"
    dated = moved.replace("Acme", "Acme Inc") + "    valid_from: 2030-01-01\n"
    assert "expected no valid_from, since of an account only a change of customer_segment" in refusal(
        settings, accounts(dated)
    )
    early = moved.replace("segment: y", "segment: z\n    valid_from: 2026-01-01")
    assert "(60 seconds after publishing) or later" in refusal(settings, accounts(early))


FAMILY = "accounts:\n  - {id: group, name: Group, aliases: [holding]}\n  - {id: child, name: Child, parent: group}\n"
RELATIONS = {
    "a parent that is not there": (
        "accounts:\n  - {id: a, name: A, parent: b}\n",
        "2: accounts[a].id: expected an account as parent, got 'b'",
    ),
    "a circle with what is published": (
        "accounts:\n  - {id: group, name: Group, aliases: [holding], parent: child}\n",
        "2: accounts[group].id: expected a parent that is not below the account, got child under group under child",
    ),
    "an alias that is another's": (
        "accounts:\n  - {id: a, name: A, aliases: [holding]}\n",
        "2: accounts[a].id: expected a name of no other account, got 'holding', a name of 'group'",
    ),
    "an alias that is another's id": (
        "accounts:\n  - {id: a, name: A, aliases: [child]}\n",
        "2: accounts[a].id: expected a name of no other account, got 'child', a name of 'child'",
    ),
    "an id that is another's alias": (
        "accounts:\n  - {id: holding, name: A}\n",
        "2: accounts[holding].id: expected a name of no other account, got 'holding', a name of 'group'",
    ),
}


def test_a_contradiction_to_other_accounts(settings: Settings, accounts: Read) -> None:
    publish(settings.dsn, accounts(FAMILY), actor="test")
    for contradiction, (text, expected) in RELATIONS.items():
        assert refusal(settings, accounts(text)).startswith(expected), contradiction
