"""``tally credits`` and ``tally commitments`` as users type them; in this process, since each has much to say."""

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.cli.output import CommandError
from pipeline.infra.postgres import connect
from pipeline.infra.settings import Settings

from .running import Tally

SINCE = ("--from", "2026-11-01T00:00Z")


class Here:
    """Runs a command with a deployment's settings and checks its exit code; its messages, or its JSON."""

    def __call__(self, *arguments: object, code: int = 0) -> str:
        result = CliRunner().invoke(app, [*map(str, arguments)])
        error = result.exception
        if isinstance(error, CommandError):
            assert error.code == code, error
            return str(error)
        assert result.exit_code == code, result.output
        return result.output

    def json(self, *arguments: object) -> Any:
        return json.loads(self(*arguments, "--json"))


@pytest.fixture
def tally(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Here:
    for name, value in {
        "KAFKA_BOOTSTRAP": str(settings.kafka_bootstrap),
        "POSTGRES_DSN": settings.dsn,
        "TOPIC_PREFIX": settings.topic_prefix,
        "ACTOR": "ada",
    }.items():
        monkeypatch.setenv(f"TALLY_{name}", value)
    with connect(settings.dsn, application="test") as connection:
        connection.execute(
            """INSERT INTO billing.catalog_version (kind, id, version, valid_from, document, published_by)
            VALUES ('account', 'acct-02', 1, '1970-01-01Z', '{"name": "A", "time_zone": "UTC"}', 'test')"""
        )
    return Here()


def test_from_a_request_to_a_balance_and_its_end(tally: Here, settings: Settings) -> None:
    said = tally("credits", "grant", "acct-02", "250.00", "USD", "--reason", "purchase", *SINCE, "--note", "PO 7")
    assert "another person than ada approves it: `tally credits approve 1 --by NAME`" in said
    (waiting,) = tally.json("credits", "list", "--open")
    assert (waiting["request"], waiting["action"], waiting["note"]) == (1, "grant", "PO 7")
    assert tally.json("credits", "balance", "acct-02") == []

    assert "expected another person than ada to approve 1, got ada" in tally("credits", "approve", 1, code=4)
    assert tally.json("credits", "approve", 1, "--by", "grace")["state"] == "approved"
    (balance,) = tally.json("credits", "balance", "acct-02")
    assert (balance["balance"], balance["reduces"], balance["unit"]) == ("250", "total", "USD")
    shown = Tally(settings)("credits", "list").stdout  # as a process of its own, once
    assert "acct-02" in shown
    assert "valid" in shown

    void = tally.json("credits", "void", 1, "--reason", "refunded")
    assert (void["action"], void["target"], void["state"]) == ("void", 1, "open")
    tally("credits", "approve", void["request"], "--by", "grace")
    assert [one["state"] for one in tally.json("credits", "list")] == ["void"]
    assert tally.json("credits", "balance", "acct-02")[0]["balance"] == "0"


def test_mistakes_say_what_to_do(tally: Here) -> None:
    grant = ("credits", "grant", "--reason", "purchase", *SINCE)
    assert "expected credits above 0, got -5" in tally(*grant, "--", "acct-02", "-5", "USD", code=2)
    assert "expected a number such as 12.50, got 'ten'" in tally(*grant, "acct-02", "ten", "USD", code=2)
    assert "expected --kind to be one of" in tally(*grant, "acct-02", "1", "USD", "--kind", "free", code=2)
    assert "expected an account of the catalog" in tally(*grant, "nobody", "1", "USD", code=3)
    undated = ("credits", "grant", "acct-02", "1", "USD", "--reason", "purchase", "--from", "2026-11-01")
    assert "expected a time with zone" in tally(*undated, code=2)
    assert "expected a request, got 77" in tally("credits", "approve", 77, "--by", "grace", code=3)


def test_commitments_overdrafts_and_budgets(tally: Here) -> None:
    yearly = ("--per", "year", "--overage-factor", "1.5")
    made = tally.json("commitments", "add", "acct-02", "1000", "USD", *SINCE, *yearly)
    tally("credits", "approve", made["request"], "--by", "grace")
    (found,) = tally.json("commitments", "list")
    assert (found["amount"], found["per"], found["overage_factor"]) == ("1000", "year", "1.5")
    assert found["decided_by"] == "grace"
    stops = tally("credits", "overdraft", "acct-02", "50", "USD", "--hard-stop")
    assert "may overdraw 50 USD; its services stop then" in stops
    assert "has a budget of 200 in USD" in tally("credits", "budget", "acct-02", "200", "USD")
    assert "has no budget in USD" in tally("credits", "budget", "acct-02", "none", "USD")


def test_what_no_contract_could_meet_is_refused(tally: Here, settings: Settings) -> None:
    with connect(settings.dsn, application="test") as connection:
        connection.execute(
            """INSERT INTO billing.catalog_version (kind, id, version, valid_from, document, published_by)
            VALUES ('plan', 'p', 1, '1970-01-01Z', '{"currency": "USD", "charges": [{"id": "tokens"}]}', 'test'),
                ('plan', 'q', 1, '1970-01-01Z', '{"currency": "USD", "charges": [{"id": "seats"}]}', 'test'),
                ('contract', 'c', 1, '1970-01-01Z',
                '{"account": "acct-02", "plan": "p", "later_phases": [{"plan": "q"}]}', 'test')"""
        )
    grant = ("credits", "grant", "acct-02", "5")
    said = tally(*grant, "EUR", "--reason", "purchase", *SINCE, code=2)
    assert "expected USD, the currency of acct-02's contracts, got EUR" in said
    said = tally(*grant, "USD", "--reason", "purchase", *SINCE, "--charge", "tokns", code=2)
    assert "got 'tokns': they have seats, tokens" in said
    assert "got EUR" in tally("commitments", "add", "acct-02", 9, "EUR", *SINCE, code=2)
    for charge in ("tokens", "seats"):
        tally(*grant, "USD", "--reason", "purchase", *SINCE, "--charge", charge)


def test_an_amount_below_0_is_no_unknown_option(tally: Here) -> None:
    for command in (("credits", "grant"), ("commitments", "add")):
        said = tally(*command, "acct-02", "-50", "USD", *SINCE, "--reason", "purchase", code=2)
        assert "expected an amount of 0 or more, got -50" in " ".join(said.split())


def test_the_second_person_sees_what_is_asked_for(tally: Here) -> None:
    tally("credits", "grant", "acct-02", "50.00", "USD", "--reason", "purchase", *SINCE)
    tally("commitments", "add", "acct-02", 1000, "USD", *SINCE, "--per", "year")
    asked = [(one["amount"], one["unit"], one["kind"]) for one in tally.json("credits", "list", "--open")]
    assert asked == [("50", "USD", "prepaid"), ("1000", "USD", "per year")]
    assert "grant of 50 USD prepaid, account acct-02" in tally("credits", "approve", 1, "--by", "grace")
    assert "an end of 1, 50 USD prepaid" in tally("credits", "void", 1, "--reason", "refunded")


def test_balances_of_nobody_are_not_found(tally: Here) -> None:
    for command in (("credits", "balance"), ("credits", "list"), ("commitments", "list")):
        assert "expected an account of the catalog, got 'acct-99'" in tally(*command, "acct-99", code=3)
