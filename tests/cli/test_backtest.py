"""``tally plans backtest`` as a price manager types it."""

import csv
import io
from pathlib import Path

import pytest

from pipeline.infra.settings import Settings
from tests.scenarios.database import DatabaseWorld

from .running import Tally

PRICES = """\
meters:
  - {id: calls, event_type: call, aggregation: sum, value: n, unit: call}
plans:
  - id: standard
    name: Standard
    currency: USD
    charges:
      - {id: calls, meter: calls, model: per_unit, unit_price: 0.10}
      - {id: fee, model: flat, unit_price: 5}
"""
ACCOUNTS = """\
accounts:
  - {id: acme, name: Acme, contracts: [{plan: standard, start: 2026-01-01}]}
  - {id: zed, name: Zed, contracts: [{plan: standard, start: 2026-01-01}]}
"""
EVENTS = """\
2026-10-02T00:00:00Z acme/a1 call u n=1000
2026-10-20T00:00:00Z zed/z1 call u n=10
"""


@pytest.fixture
def tally(settings: Settings, tmp_path: Path) -> Tally:
    world = DatabaseWorld(tmp_path, settings)
    world.publish(PRICES, "prices", None)
    world.publish(ACCOUNTS, "accounts", None)
    world.use(EVENTS.splitlines(), None)
    return Tally(settings)


@pytest.fixture
def dearer(tmp_path: Path) -> Path:
    file = tmp_path / "dearer.yaml"
    file.write_text(PRICES.replace("0.10", "0.12"))
    return file


def test_who_pays_more_and_why(tally: Tally, dearer: Path) -> None:
    shown = tally("plans", "backtest", dearer, "--period", "2026-10").stdout
    largest, other = (line for line in shown.splitlines() if "│ calls" in line)
    for part in ("acme", "100 USD", "120 USD", "+20 USD", "+20", "█" * 16, "unit price 0.1 → 0.12 (+20 %)"):
        assert part in largest
    assert "zed" in other and "▎" in other
    assert "fee" not in shown
    assert "101 USD → 121.2 USD: +20.2 USD (+20 %)" in shown
    assert "2 accounts, 2 on prices that differ, 2 that pay more or less. Priced 2 from running totals, 0" in shown

    data = tally.json("plans", "backtest", dearer, "--period", "2026-10")
    assert (data["accounts"], data["concerned"], data["moved"], data["from_totals"]) == (2, 2, 2, 2)
    assert data["totals"] == [
        {"currency": "USD", "before": "101", "after": "121.2", "difference": "20.2", "percent": "20"}
    ]
    rows = list(csv.DictReader(io.StringIO(tally("plans", "backtest", dearer, "--period", "2026-10", "--csv").stdout)))
    assert rows == data["charges"]
    assert (rows[0]["account"], rows[0]["contract"], rows[0]["difference"], rows[0]["billed_after"]) == (
        "acme",
        "acme-main",
        "20",
        "120",
    )


def test_against_another_system_s_bills(tally: Tally, dearer: Path, tmp_path: Path) -> None:
    bills = tmp_path / "bills.csv"
    bills.write_text("account,charge,amount\nacme,calls,120\nacme,fee,5\nzed,calls,1.20\nzed,fee,5.00\n")
    command = ("plans", "backtest", dearer, "--period", "2026-10", "--against", bills)
    assert tally(*command).stdout == "4 of 4 lines are equal.\n"
    bills.write_text("account,charge,amount\nacme,calls,100\nacme,fee,5\nzed,calls,1.20\n")
    shown = tally(*command, code=4).stdout
    assert "2 of 4 lines are equal." in shown
    assert "differs" in shown and "only here" in shown
    data = tally.json(*command, code=4)
    assert (data["equal"], data["different"]) == (2, 2)
    assert data["lines"][0] == {
        "account": "acme",
        "charge": "calls",
        "here": "120",
        "there": "100",
        "difference": "20",
        "verdict": "differs",
    }


def test_nothing_moves_and_what_is_wrong(tally: Tally, dearer: Path, tmp_path: Path) -> None:
    same = tmp_path / "same.yaml"
    same.write_text(PRICES)
    assert tally("plans", "backtest", same, "--period", "2026-10").stdout.startswith(
        "2 accounts, 0 on prices that differ, 0 that pay more or less. Priced 0 from running totals, 0 event by"
    )
    wrong = tally("plans", "backtest", dearer, "--period", "2026-13", code=2).stderr
    assert "--period: expected a month such as 2026-10, got '2026-13'" in wrong
    same.write_text("plans: 3")
    assert "expected a list, got '3'" in tally("plans", "backtest", same, "--period", "2026-10", code=4).stderr
    bills = tmp_path / "bills.csv"
    bills.write_text("account,amount\nacme,much\n")
    refused = tally("plans", "backtest", dearer, "--period", "2026-10", "--against", bills, code=4).stderr
    assert f"{bills}:2: expected a number" in refused


def test_a_month_without_usage_says_so(tally: Tally, dearer: Path) -> None:
    assert "Nothing was used or owed in 2025-09." in tally("plans", "backtest", dearer, "--period", "2025-09").stdout
