"""The demo, run as a user does, against a second calculation that knows nothing of the product's pricing code."""

import csv
import json
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
USAGE = ROOT / "deploy" / "demo" / "llm_requests_code.csv"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What `tally demo --json` printed."""
    directory = tmp_path_factory.mktemp("demo") / "data"
    command = [sys.executable, "-m", "pipeline.cli", "demo", "--json", "--data-dir", str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    yield json.loads(done.stdout)  # stdout is one object and nothing else


def _independent() -> dict[str, dict[str, tuple[int, Fraction]]]:
    """Quantity and cost per account and charge, from the file and the price list as the issue has them."""
    tokens_in: defaultdict[str, int] = defaultdict(int)
    tokens_out: defaultdict[str, int] = defaultdict(int)
    with USAGE.open(newline="") as file:
        for number, row in enumerate(csv.DictReader(file)):
            account = f"acct-{number % 12:02d}"
            tokens_in[account] += int(row["ContextTokens"])
            tokens_out[account] += int(row["GeneratedTokens"])

    def input_cost(tokens: int) -> Fraction:
        first = min(tokens, 500_000)
        second = min(max(tokens - 500_000, 0), 700_000)
        rest = max(tokens - 1_200_000, 0)
        return first * Fraction(3, 10**6) + second * Fraction(25, 10**7) + rest * Fraction(2, 10**6)

    return {
        account: {
            "input-tokens": (tokens_in[account], input_cost(tokens_in[account])),
            "output-tokens": (tokens_out[account], tokens_out[account] * Fraction(15, 10**6)),
        }
        for account in tokens_in
    }


def test_counts_close(report: dict[str, Any]) -> None:
    assert report["received"] == 8_999
    assert report["rated_events"] == 8_819
    assert report["rated_rows"] == 17_638
    assert report["duplicates"] == 177
    assert report["parked"] == 1
    assert report["dead_letters"] == {"not_a_number": 1, "undecodable": 1}
    assert report["reconciled"] is True
    states = report["rated_events"] + report["duplicates"] + report["parked"] + sum(report["dead_letters"].values())
    assert states == report["received"]


def test_amounts_equal_an_independent_calculation(report: dict[str, Any]) -> None:
    expected = _independent()
    assert [entry["account"] for entry in report["accounts"]] == sorted(expected)
    for entry in report["accounts"]:
        lines = {line["charge"]: line for line in entry["lines"]}
        assert lines.keys() == expected[entry["account"]].keys()
        for charge, (quantity, amount) in expected[entry["account"]].items():
            assert Fraction(lines[charge]["quantity"]) == quantity
            assert Fraction(lines[charge]["amount"]) == amount, (entry["account"], charge)
        assert Fraction(entry["subtotal"]) == sum(amount for _, amount in expected[entry["account"]].values())


def test_every_tier_is_reached_by_someone() -> None:
    """Else the demo's amounts would prove less than they seem to."""
    tiers = Counter(
        "third" if quantity > 1_200_000 else "second" if quantity > 500_000 else "first"
        for charges in _independent().values()
        for quantity, _ in [charges["input-tokens"]]
    )
    assert tiers["third"] >= 1


def test_exact_strings(report: dict[str, Any]) -> None:
    for entry in report["accounts"]:
        for text in [entry["subtotal"], *(line["amount"] for line in entry["lines"])]:
            assert isinstance(text, str)
            assert "E" not in text.upper()
            Decimal(text)


def test_the_month_is_closed_once_all_is_decided(report: dict[str, Any]) -> None:
    """Refused for the parked event and both dead letters, then an invoice for every customer, the late one's too."""
    close = report["close"]
    assert {one["kind"]: one["count"] for one in close["missing"]} == {"parked": 1, "dead_letters": 2}
    assert [one["account"] for one in close["invoices"]] == [*(f"acct-{n:02d}" for n in range(12)), "acct-99"]
    assert [one["number"][-5:] for one in close["invoices"]] == [f"{n:05d}" for n in range(1, 14)]
    for one in close["invoices"]:
        assert Decimal(one["net"]) + Decimal(one["tax"]) == Decimal(one["total"])


def test_an_invoice_equals_an_independent_calculation(report: dict[str, Any]) -> None:
    """Each line rounded once; a coupon of 10 % for acct-03; VAT of 19 % at home, none to France and abroad."""
    invoices = {one["account"]: one for one in report["close"]["invoices"]}
    # acct-00 got the mended event too, of 100 input tokens and 10 output tokens.
    for account, percent_off, vat in (("acct-01", 0, 0), ("acct-02", 0, 0), ("acct-03", 10, 19), ("acct-04", 0, 19)):
        lines = [_cents(amount) for _, amount in _independent()[account].values()]
        net = sum(lines) - _cents(Fraction(sum(lines) * percent_off, 10_000))
        assert Decimal(invoices[account]["net"]) * 100 == net, account
        assert Decimal(invoices[account]["tax"]) * 100 == _cents(Fraction(net * vat, 10_000)), account


def _cents(amount: Fraction) -> int:
    """Half up, of an amount that is not below 0."""
    return int(amount * 100 + Fraction(1, 2))


def test_a_late_event_becomes_an_adjustment(report: dict[str, Any]) -> None:
    """250,000 input tokens in the last tier and 40,000 output tokens, 10 % off, with VAT."""
    close = report["close"]
    (of_account,) = [one for one in close["invoices"] if one["account"] == "acct-03"]
    adjustment = close["adjustment"]
    assert adjustment["corrects"] == of_account["number"]
    costs = [amount for _, amount in _independent()["acct-03"].values()]
    added = [costs[0] + 250_000 * Fraction(2, 10**6), costs[1] + 40_000 * Fraction(15, 10**6)]
    net = sum(map(_cents, added)) - _cents(Fraction(sum(map(_cents, added)), 1_000))
    total = net + _cents(Fraction(net * 19, 10_000))
    assert Decimal(adjustment["total"]) * 100 == total - Decimal(of_account["total"]) * 100


def test_every_document_is_written_as_pdf(report: dict[str, Any]) -> None:
    assert len(report["close"]["pdfs"]) == len(report["close"]["invoices"]) + 1
    for path in report["close"]["pdfs"]:
        assert Path(path).read_bytes().startswith(b"%PDF-")
