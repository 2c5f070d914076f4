"""``tally invoicing`` and ``tally fx`` as a user types them."""

from pathlib import Path

import pytest

from pipeline.infra.resources import demo_dir
from pipeline.infra.settings import Settings

from .running import Tally

FILE = demo_dir() / "invoicing.yaml"
DATA = Path(__file__).parents[1] / "catalog" / "data"


@pytest.fixture
def tally(settings: Settings) -> Tally:
    return Tally(settings)


def test_check_apply_and_show(tally: Tally, tmp_path: Path) -> None:
    assert tally.json("invoicing", "check", FILE)["findings"] == []
    refused = tally.json("invoicing", "apply", FILE, code=4)
    assert len(refused["findings"]) == 12
    assert "expected an account that there is, got 'acct-00'" in refused["findings"][0]["message"]
    tally("plans", "publish", demo_dir() / "prices.yaml", "--wait", 0)
    tally("accounts", "apply", demo_dir() / "accounts.yaml", "--wait", 0)
    assert "would be applied; nothing was" in tally("invoicing", "apply", FILE, "--dry-run").stderr
    applied = tally.json("invoicing", "apply", FILE, "--reason", "begin")["applied"]
    assert {one["outcome"] for one in applied} == {"new"}
    assert {one["kind"] for one in applied} == {"legal_entity", "customer", "tax", "coupon"}
    (entity,) = tally.json("invoicing", "show", "tally-demo")
    assert (entity["kind"], entity["version"], entity["applied_by"], entity["reason"], entity["counts"]) == (
        "legal_entity",
        1,
        "ada",
        "begin",
        True,
    )
    assert "address.city" in tally("invoicing", "show", "customer/acct-00").stdout
    assert "tally invoicing show" in tally("invoicing", "show", "nobody", code=3).stderr
    bad = tmp_path / "bad.yaml"
    bad.write_text("customers:\n  - {account: acct-00}\n")
    shown = tally("invoicing", "check", bad, code=4).stderr
    assert f"{bad}:2: customers[#1].name: expected a value, got nothing" in shown
    assert "2 mistakes; nothing changed." in shown


def test_load_and_show_rates(tally: Tally, tmp_path: Path) -> None:
    loaded = tally.json("fx", "load", DATA / "eurofxref-hist.csv")["loaded"]
    assert loaded == {
        "source": "ECB",
        "new": 27,
        "unchanged": 0,
        "corrected": 0,
        "first_day": "2007-12-31",
        "last_day": "2024-01-02",
    }
    (rate,) = tally.json("fx", "show", "USD", "--on", "2024-01-01")
    assert rate == {"base": "EUR", "currency": "USD", "rate": "1.1050", "day": "2023-12-29"}
    assert "tally fx load FILE" in tally("fx", "show", "USD", "--on", "2023-01-20", code=3).stderr
    other = tmp_path / "rates.csv"
    other.write_text("Date,USD\n2024-01-02,1.0957\n")
    assert "expected 1.0956 for USD on 2024-01-02" in tally("fx", "load", other, code=4).stderr
    assert "expected a reason" in tally("fx", "load", other, "--correct", code=2).stderr
    assert tally.json("fx", "load", other, "--correct", "--reason", "typo")["loaded"]["corrected"] == 1
