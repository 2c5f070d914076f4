"""``tally accounts`` as a user types it."""

from pathlib import Path

import pytest

from pipeline.infra.resources import demo_dir
from pipeline.infra.settings import Settings

from .running import Tally

PRICES, ACCOUNTS = demo_dir() / "prices.yaml", demo_dir() / "accounts.yaml"


@pytest.fixture
def tally(settings: Settings) -> Tally:
    return Tally(settings)


def test_apply_list_and_show(tally: Tally) -> None:
    tally("plans", "publish", PRICES, "--wait", 0)
    applied = tally.json("accounts", "apply", ACCOUNTS, "--wait", 0)["published"]
    assert len(applied) == 24
    assert {one["outcome"] for one in applied} == {"new"}
    assert "Nothing changed" in tally("accounts", "apply", ACCOUNTS, "--wait", 0).stderr

    listed = tally.json("accounts", "list")
    assert [account["id"] for account in listed] == [f"acct-{number:02}" for number in range(12)]
    assert listed[3] == {
        "id": "acct-03",
        "version": 1,
        "name": "Demo customer 03",
        "time_zone": "UTC",
        "customer_segment": None,
        "parent": None,
        "aliases": [],
        "contracts": [
            {
                "id": "acct-03-main",
                "version": 1,
                "plan": "llm-standard",
                "start": "2020-01-01T00:00:00Z",
                "end": None,
                "legal_entity": "",
                "cycle": {"every": "month", "day": 1, "month": 1},
                "phases": [
                    {
                        "start": "2020-01-01T00:00:00Z",
                        "plan": "llm-standard",
                        "price_list": None,
                        "trial_days": None,
                    }
                ],
            }
        ],
    }
    assert "acct-11-main" in tally("accounts", "list").stdout

    shown = tally("accounts", "show", "acct-03").stdout
    assert "acct-03: Demo customer 03, in the time zone UTC" in shown
    assert "billed by: calendar months (acct-03-main)" in shown
    assert "open end" in shown
    assert [version["kind"] for version in tally.json("accounts", "show", "acct-03")["versions"]] == [
        "account",
        "contract",
    ]


def test_segment_family_and_phases(tally: Tally) -> None:
    tally("plans", "publish", demo_dir() / "all-prices.yaml", "--wait", 0)
    tally("accounts", "apply", demo_dir() / "all-accounts.yaml", "--wait", 0)
    shown = tally("accounts", "show", "crm-4711").stdout
    assert "acme: Acme, in the time zone Europe/Berlin" in shown
    assert "billed by: calendar months (acme-2026), quarters from 31 January (acme-support)" in shown
    assert "customer segment: education" in shown
    assert "belongs to: acme-group" in shown
    parent, child = tally.json("accounts", "show", "acme-group"), tally.json("accounts", "show", "acme")
    assert parent["children"] == ["acme"]
    assert [(phase["start"], phase["price_list"]) for phase in child["contracts"][0]["phases"]] == [
        ("2025-12-31T23:00:00Z", "ramp-year-1"),
        ("2026-12-31T23:00:00Z", None),
        ("2027-12-31T23:00:00Z", "ramp-year-1"),
    ]


def test_accounts_come_after_their_plan(tally: Tally) -> None:
    refused = tally("accounts", "apply", ACCOUNTS, code=4).stderr
    assert (
        "contracts[#1].plan: expected a published plan, got 'llm-standard': `tally plans publish` comes first"
        in refused
    )
    assert refused.endswith("12 mistakes; nothing published.\n")
    assert tally.json("accounts", "list") == []


def test_every_mistake_with_its_line(tally: Tally, tmp_path: Path) -> None:
    file = tmp_path / "accounts.yaml"
    file.write_text("accounts:\n  - id: a\n    time_zone: Mars\n    contracts: [{plan: p, start: soon}]\n")
    refused = tally("accounts", "apply", file, code=4).stderr.splitlines()
    assert [line.removeprefix(str(file)).split(" expected")[0] for line in refused[:-1]] == [
        ":2: accounts[a].name:",
        ":3: accounts[a].time_zone:",
        ":4: accounts[a].contracts[#1].start:",
    ]


def test_what_is_not_there(tally: Tally) -> None:
    assert "No account yet" in tally("accounts", "list").stderr
    assert "expected a known account, got 'acme'" in tally("accounts", "show", "acme", code=3).stderr
