"""``tally plans`` as a user types it."""

import json
from pathlib import Path

import pytest

from pipeline.infra.postgres import connect
from pipeline.infra.resources import demo_dir
from pipeline.infra.settings import Settings

from .running import Tally

PRICES = demo_dir() / "prices.yaml"


@pytest.fixture
def tally(settings: Settings) -> Tally:
    return Tally(settings)


def edited(folder: Path, old: str, new: str) -> Path:
    file = folder / "edited.yaml"
    text = PRICES.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    return file


def propose(tally: Tally, file: Path, *options: object) -> str:
    """What a change of a published price says, which waits for a second person."""
    done = tally("plans", "publish", file, *options)
    assert "Proposed, not published yet" in done.stderr
    return done.stdout


def test_check_of_a_right_file(tally: Tally) -> None:
    assert tally("plans", "check", PRICES).stdout == "No mistakes: 2 meters, 1 plan, 2 charges.\n"
    assert tally.json("plans", "check", PRICES) == {
        "meters": 2,
        "plans": 1,
        "charges": 2,
        "price_lists": 0,
        "findings": [],
    }


def test_check_names_every_mistake_with_its_line(tally: Tally, tmp_path: Path) -> None:
    file = edited(tmp_path, "meter: llm-output-tokens", "meter: llm-output-token")
    file.write_text(file.read_text().replace("currency: USD", "currency: dollars"))
    lines = file.read_text().splitlines()
    done = tally("plans", "check", file, code=4)
    assert done.stdout == ""
    currency = 1 + lines.index("    currency: dollars")
    meter = 1 + lines.index("        meter: llm-output-token")
    assert done.stderr.splitlines() == [
        f"{file}:{currency}: plans[llm-standard].currency: expected a currency code of ISO 4217 such as USD, "
        "got 'dollars'",
        f"{file}:{meter}: plans[llm-standard].charges[output-tokens].meter: expected a meter of the files given, "
        "got 'llm-output-token': did you mean 'llm-output-tokens'?",
        "2 mistakes; nothing published.",
    ]
    found = tally.json("plans", "check", file, code=4)["findings"]
    assert [(finding["line"], finding["path"]) for finding in found] == [
        (currency, "plans[llm-standard].currency"),
        (meter, "plans[llm-standard].charges[output-tokens].meter"),
    ]


def test_check_against_what_is_published_and_issued(tally: Tally, settings: Settings, tmp_path: Path) -> None:
    """An issued invoice never changes: the file is refused where it says so, and nothing is published by asking."""
    tally("plans", "publish", PRICES)
    tally("accounts", "apply", demo_dir() / "accounts.yaml")
    file = edited(tmp_path, "unit_price: 0.000015", "unit_price: 0.000018")
    file.write_text(file.read_text().replace("    currency: USD", "    currency: USD\n    valid_from: 2026-01-01"))
    where = ("plans", "check", file, "--published")
    assert "60 seconds after publishing" in tally(*where, code=4).stderr
    assert tally(*where, "--back-dated").stdout.startswith("No mistakes")
    with connect(settings.dsn, application="test") as connection:
        connection.execute(
            """
            WITH issued AS (
                INSERT INTO billing.invoice (account, currency, period_start, period_end, state)
                VALUES ('acct-00', 'USD', '2026-01-01Z', '2026-02-01Z', 'issued') RETURNING id
            )
            INSERT INTO billing.invoice_line (
                invoice_id, contract, plan, plan_version, price_version, meter, meter_version, charge, segment_start
            )
            SELECT id, 'acct-00-main', 'llm-standard', 1, 'llm-standard@1', 'm', 1, 'output-tokens', '2026-01-01Z'
            FROM issued
            """
        )
    line = 1 + file.read_text().splitlines().index("  - id: llm-standard")
    done = tally(*where, "--back-dated", code=4)
    assert f"{file}:{line}:" in done.stderr
    assert "an issued invoice never changes" in done.stderr
    assert tally.json("plans", "show", "llm-standard")["version"] == 1


def test_publish_list_and_show(tally: Tally, tmp_path: Path) -> None:
    first = tally.json("plans", "publish", PRICES, "--reason", "launch", "--wait", 0)
    assert [(one["kind"], one["version"], one["valid_from"], one["outcome"]) for one in first["published"]] == [
        ("meter", 1, "1970-01-01T00:00:00Z", "new"),
        ("meter", 1, "1970-01-01T00:00:00Z", "new"),
        ("plan", 1, "1970-01-01T00:00:00Z", "new"),
    ]
    again = tally("plans", "publish", PRICES, "--wait", 0)
    assert "Nothing changed, nothing published." in again.stderr
    cheaper = edited(tmp_path, "0.000015", "0.000014")
    propose(tally, cheaper, "--valid-from", "2100-01-01T00:00:00Z", "--reason", "spring")
    changed = tally("plans", "approve", 1, "--by", "bob", "--wait", 0)
    assert "1 published, 0 unchanged." in changed.stderr
    assert "2100-01-01T00:00:00Z" in changed.stdout

    (listed,) = tally.json("plans", "list")
    assert (listed["id"], listed["version"], listed["currency"], listed["published_by"]) == (
        "llm-standard",
        2,
        "USD",
        "ada",
    )
    assert "llm-standard" in tally("plans", "list").stdout

    newest, oldest = (
        tally.json("plans", "show", "llm-standard"),
        tally.json("plans", "show", "llm-standard", "--version", 1),
    )
    assert newest["charges"][1]["unit_price"] == "0.000014"
    assert oldest["charges"][1]["unit_price"] == "0.000015"
    assert [(version["version"], version["reason"]) for version in newest["versions"]] == [(1, "launch"), (2, "spring")]
    assert {meter["id"] for meter in newest["meters"]} == {"llm-input-tokens", "llm-output-tokens"}

    table = tally("plans", "show", "llm-standard", "--version", 1).stdout
    for row in ("0 to 500,000", "500,000 to 1,200,000", "above 1,200,000", "0.0000025", "every token", "the beginning"):
        assert row in table


def test_a_refused_publication_says_where_and_what_to_do(tally: Tally, tmp_path: Path) -> None:
    tally("plans", "publish", PRICES, "--wait", 0)
    euros = edited(tmp_path, "currency: USD", "currency: EUR")
    refused = tally("plans", "publish", euros, code=4)
    assert "expected currency USD, as in version 1" in refused.stderr
    assert refused.stderr.endswith("1 mistake; nothing published.\n")
    assert tally.json("plans", "publish", euros, code=4)["findings"][0]["path"] == "plans[llm-standard].id"
    assert [plan["version"] for plan in tally.json("plans", "list")] == [1]


def test_what_is_not_there(tally: Tally, tmp_path: Path) -> None:
    assert "No plan is published yet" in tally("plans", "list").stderr
    assert "expected a published plan, got 'gold'" in tally("plans", "show", "gold", code=3).stderr
    tally("plans", "publish", PRICES, "--wait", 0)
    missing = tally("plans", "show", "llm-standard", "--version", 7, code=3).stderr
    assert "expected a version from 1 to 1 of plan 'llm-standard', got 7" in missing
    assert "does not exist" in tally("plans", "check", tmp_path / "none.yaml", code=2).stderr
    assert "expected --valid-from now" in tally("plans", "publish", PRICES, "--valid-from", "soon", code=2).stderr


def test_a_publication_without_a_relay_is_a_warning_of_what_follows(tally: Tally, tmp_path: Path) -> None:
    first = tally("plans", "publish", PRICES, "--wait", 0)
    assert "WARNING: raters do not have this yet: no relay is running (`tally status`). 3 of 3 wait." in first.stderr
    assert "Until then usage that needs it is refused or parked" in first.stderr
    cheaper = edited(tmp_path, "0.000015", "0.000014")
    propose(tally, cheaper, "--valid-from", "2100-01-01T00:00:00Z", "--reason", "spring")
    changed = tally("plans", "approve", 1, "--by", "bob", "--wait", 0).stderr
    assert "It counts from 2100-01-01T00:00:00Z anyway: usage from then on" in changed
    assert "start it: `tally up`, or `tally relay`" in changed
    again = tally("plans", "publish", cheaper, "--wait", 0, "--json")
    assert json.loads(again.stdout)["relayed"] is False
    assert "WARNING" in again.stderr, "nothing changed, and raters still do not have it"


def test_a_relay_that_is_held_up(tally: Tally, settings: Settings) -> None:
    with connect(settings.dsn, application="test", autocommit=True) as relay:
        relay.execute("SELECT pg_advisory_lock(hashtextextended('tally.relay', 0))")
        said = tally("plans", "publish", PRICES, "--wait", 0).stderr
    assert "the relay runs but has not carried it" in said


def test_a_publication_waits_until_raters_have_it(tally: Tally, settings: Settings) -> None:
    with tally.running("relay"):
        assert tally.json("plans", "publish", PRICES, "--wait", 30)["relayed"] is True
        applied = tally("accounts", "apply", demo_dir() / "accounts.yaml", "--wait", 30).stderr
    assert "24 published, 0 unchanged.\nRaters have it since 2" in applied
    with connect(settings.dsn, application="test") as connection:
        assert connection.execute("SELECT count(*) FROM billing.outbox WHERE relayed_at IS NULL").fetchone() == (0,)
    # Nobody need be there when nothing waits.
    again = tally("plans", "publish", PRICES)
    assert "Raters have it since" in again.stderr and "WARNING" not in again.stderr


def test_a_price_manager_s_session(tally: Tally, tmp_path: Path) -> None:
    """As the README tells it: look at the difference, propose, a second person, and back again."""
    tally("plans", "publish", PRICES, "--reason", "launch", "--wait", 0)
    dearer = edited(tmp_path, "0.000015", "0.00003")
    change = "  charge output-tokens: unit price 0.000015 → 0.00003 (+100 %)"
    assert change in tally("plans", "diff", dearer).stdout.splitlines()
    assert change in propose(tally, dearer, "--reason", "output tokens cost more").splitlines()
    assert [plan["version"] for plan in tally.json("plans", "list")] == [1]
    assert "plan llm-standard" in tally("plans", "proposals").stdout

    own = tally("plans", "approve", 1, code=4)
    assert own.stderr == "error: expected another person than its proposer ada to approve it, got ada\n"
    approved = tally.json("plans", "approve", 1, "--by", "bob", "--reason", "agreed", "--wait", 0)
    assert [(one["id"], one["version"]) for one in approved["published"]] == [("llm-standard", 2)]
    shown = tally("plans", "proposals", 1).stdout
    assert change in shown.splitlines() and "Approved by bob at 2" in shown
    (decided,) = tally.json("plans", "proposals", "--all")
    assert (decided["state"], decided["proposed_by"], decided["decision"]["decided_by"]) == ("approved", "ada", "bob")

    back = tally("plans", "rollback", "llm-standard", "--reason", "too dear").stdout
    assert back.splitlines()[1:] == [
        "plan llm-standard: version 2 changes",
        "  charge output-tokens: unit price 0.00003 → 0.000015 (-50 %)",
        "  counts from 60 seconds after approval",
        "  inside a month: tiers, their flat fees and included units count anew from then on",
    ]
    tally("plans", "approve", 2, "--by", "bob", "--wait", 0)
    history = tally("plans", "show", "llm-standard").stdout
    assert history.count("ada, approved by bob") == 2 and "output tokens cost more" in history
    newest = tally.json("plans", "show", "llm-standard")
    assert (newest["version"], newest["charges"][1]["unit_price"]) == (3, "0.000015")


@pytest.mark.parametrize(
    ("begins", "inside"),
    [
        ("2999-01-01T00:00:00Z", False),
        ("2998-12-31T10:00:00Z", False),  # the year begins in Kiritimati
        ("2998-12-31T09:59:59Z", True),
        ("2999-01-01T12:00:00Z", False),  # and on Baker Island
        ("2999-01-01T12:00:01Z", True),
    ],
)
def test_a_second_person_sees_that_a_price_splits_a_month(
    tally: Tally, tmp_path: Path, begins: str, inside: bool
) -> None:
    tally("plans", "publish", PRICES, "--wait", 0)
    shown = propose(tally, edited(tmp_path, "0.000015", "0.000014"), "--reason", "x", "--valid-from", begins)
    assert f"counts from {begins}" in shown and ("inside a month" in shown) is inside


def test_after_a_back_dated_price_it_says_what_is_left_to_do(tally: Tally, tmp_path: Path) -> None:
    tally("plans", "publish", PRICES, "--wait", 0)
    dearer = edited(tmp_path, "0.000015", "0.00003")
    refused = tally("plans", "publish", dearer, "--reason", "x", "--valid-from", "2020-01-01T00:00:00Z", code=4)
    assert "what is to correct the past is published with --back-dated" in refused.stderr
    propose(tally, dearer, "--reason", "x", "--valid-from", "2020-01-01T00:00:00Z", "--back-dated")
    approved = tally("plans", "approve", 1, "--by", "bob", "--wait", 0)
    assert "keeps its amounts until `tally rerate --period YYYY-MM`" in approved.stderr


def test_a_proposal_as_data(tally: Tally, tmp_path: Path) -> None:
    tally("plans", "publish", PRICES, "--wait", 0)
    cheaper = edited(tmp_path, "0.0000025", "0.000002")
    proposal = tally.json("plans", "publish", cheaper, "--reason", "spring", "--valid-from", "+2h")["proposal"]
    assert (proposal["id"], proposal["state"], proposal["valid_from"]) == (1, "open", "7200 seconds after approval")
    (document,) = proposal["documents"]
    assert (document["kind"], document["id"], document["version_before"]) == ("plan", "llm-standard", 1)
    assert document["changes"] == [
        {
            "path": "charges[input-tokens].tiers[#2].unit_price",
            "before": "0.0000025",
            "after": "0.000002",
            "percent": "-20",
            "words": "charge input-tokens, tier 2 (500,000 to 1,200,000): unit price 0.0000025 → 0.000002 (-20 %)",
        }
    ]
    example = {"charge": "input-tokens", "quantity": "1200000", "before": "3.25", "after": "2.9"}
    assert document["examples"][1] == example
    assert tally.json("plans", "diff", cheaper)[2]["changes"] == document["changes"]


def test_what_a_proposal_needs(tally: Tally, tmp_path: Path) -> None:
    tally("plans", "publish", PRICES, "--wait", 0)
    cheaper = edited(tmp_path, "0.000015", "0.000014")
    assert "expected a reason for the change" in tally("plans", "publish", cheaper, code=2).stderr
    assert "expected a proposal, got 7" in tally("plans", "approve", 7, "--by", "bob", code=3).stderr
    assert "expected an earlier version of plan 'llm-standard'" in (
        tally("plans", "rollback", "llm-standard", "--reason", "back", code=3).stderr
    )
    assert "expected a plan's id, or meter/ID" in tally("plans", "rollback", "x/y", "--reason", "back", code=2).stderr
    propose(tally, cheaper, "--reason", "spring")
    assert "Proposal 1 is rejected." in tally("plans", "reject", 1, "--reason", "not yet").stderr


def test_one_pair_of_eyes_where_that_is_set(settings: Settings, tmp_path: Path) -> None:
    alone = Tally(settings, TALLY_FOUR_EYES="false")
    alone("plans", "publish", PRICES, "--wait", 0)
    cheaper = edited(tmp_path, "0.000015", "0.000014")
    changed = alone.json("plans", "publish", cheaper, "--wait", 0)
    back = alone.json("plans", "rollback", "llm-standard", "--reason", "back", "--wait", 0)
    assert [[one["version"] for one in said["published"]] for said in (changed, back)] == [[1, 1, 2], [3]]
