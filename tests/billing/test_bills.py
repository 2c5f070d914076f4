"""Another system's bills: reading them, and holding prices against them."""

from pathlib import Path

import pytest

from pipeline.billing.bills import BadBills, Bills, compare_bills, read_bills

ONE = 10**12


def bills(folder: Path, text: str) -> Bills:
    file = folder / "bills.csv"
    file.write_text(text, encoding="utf-8-sig")  # as spreadsheets write it
    return read_bills(file)


def test_by_charge_and_split_lines_added_up(tmp_path: Path) -> None:
    found = bills(tmp_path, "account,charge,note,amount\nacme,calls,,1.5\nacme,calls,more,0.25\nzed,fee,,-1\n")
    assert found == Bills(True, {("acme", "calls"): ONE * 7 // 4, ("zed", "fee"): -ONE})


def test_each_line_gets_a_verdict(tmp_path: Path) -> None:
    there = bills(tmp_path, "account,charge,amount\nacme,calls,1\nacme,fee,2\nzed,fee,5\nold,fee,0\n")
    here = {("acme", "calls"): ONE, ("acme", "fee"): 3 * ONE, ("new", "fee"): ONE, ("idle", "calls"): 0}
    assert [(line.account, line.charge, line.verdict, line.difference) for line in compare_bills(here, there)] == [
        ("acme", "calls", "equal", 0),
        ("acme", "fee", "differs", ONE),
        ("new", "fee", "only here", ONE),
        ("old", "fee", "only there", 0),
        ("zed", "fee", "only there", -5 * ONE),
    ]


def test_bills_without_charges_are_compared_by_account(tmp_path: Path) -> None:
    there = bills(tmp_path, "account,amount\nacme,4\n")
    (line,) = compare_bills({("acme", "calls"): ONE, ("acme", "fee"): 3 * ONE}, there)
    assert (line.charge, line.verdict) == ("", "equal")


def test_every_mistake_at_once(tmp_path: Path) -> None:
    with pytest.raises(BadBills) as error:
        bills(tmp_path, "account,amount\nacme,1\nacme,1 EUR\n,2\nzed\nacme,1e-13\n")
    said = [message.removeprefix(f"{tmp_path}/bills.csv") for message in str(error.value).splitlines()]
    assert said == [
        ":3: expected a number with at most 12 decimals as amount, got '1 EUR'",
        ":4: expected an account, got none",
        ":5: expected a number with at most 12 decimals as amount, got None",
        ":6: expected a number with at most 12 decimals as amount, got '1e-13'",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", ":1: expected columns account and amount, got an empty file: add account and amount"),
        ("account;amount\n", ":1: expected columns account and amount, got account;amount: add account and amount"),
        ('account,amount\nacme,"1\n', ":2: expected CSV in UTF-8, got unexpected end of data"),
    ],
)
def test_what_is_no_list_of_bills(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(BadBills) as error:
        bills(tmp_path, text)
    assert str(error.value) == f"{tmp_path}/bills.csv{said}"
