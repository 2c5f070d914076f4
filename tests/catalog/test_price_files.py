"""Price files and account files: what they mean, and every mistake with its line."""

from decimal import Decimal
from pathlib import Path
from textwrap import dedent

import pytest

from pipeline.catalog.files import Drafts, read_account_files, read_price_files
from pipeline.core.charges import Charge, Tier
from pipeline.core.contracts import Account, Contract
from pipeline.core.meters import Filter, Meter
from pipeline.core.periods import parse_instant
from pipeline.core.plans import Plan
from pipeline.infra.resources import demo_dir


def prices(folder: Path, text: str) -> Drafts:
    file = folder / "prices.yaml"
    file.write_text(dedent(text))
    return read_price_files([file])


def accounts(folder: Path, text: str) -> Drafts:
    file = folder / "accounts.yaml"
    file.write_text(dedent(text))
    return read_account_files([file])


def findings(drafts: Drafts) -> list[str]:
    """The findings as a person sees them, with the file's bare name."""
    return [str(finding).replace(finding.file, Path(finding.file).name) for finding in drafts.findings]


METERS = """\
meters:
  - {id: tokens, event_type: call, aggregation: sum, value: tokens, unit: token}
"""


def test_a_price_file_with_everything(tmp_path: Path) -> None:
    drafts = prices(
        tmp_path,
        """\
        meters:
          - {id: tokens, event_type: call, aggregation: sum, value: tokens, unit: token, allow_negative: true}
          - id: calls
            event_type: call
            aggregation: count
            unit: call
            filters: {region: eu, model: [small, large]}
            valid_from: 2026-02-01
        plans:
          - id: standard
            name: Standard
            currency: USD
            valid_from: 2026-01-01T09:00:00+01:00
            charges:
              - {id: a, meter: tokens, model: per_unit, unit_price: 0.000003, included: 1e6, references: [order, file]}
              - {id: b, meter: tokens, model: graduated, tiers: [{up_to: 9, unit_price: 1, flat: 2}, {unit_price: 0.5}]}
              - {id: c, meter: calls, model: volume, tiers: [{flat: 5}], flat_on_zero: false, references: order}
              - {id: d, meter: calls, model: package, package_size: 100, package_price: 5}
        """,
    )
    assert findings(drafts) == []
    assert [draft.item for draft in drafts.meters] == [
        Meter("tokens", 0, "call", "sum", "tokens", "token", (), True, 0),
        Meter(
            "calls",
            0,
            "call",
            "count",
            None,
            "call",
            (Filter("model", ("small", "large")), Filter("region", ("eu",))),
            False,
            0,
        ),
    ]
    (plan,) = drafts.plans
    assert plan.valid_from_us == parse_instant("2026-01-01T08:00:00Z")
    assert drafts.meters[1].valid_from_us == parse_instant("2026-02-01T00:00:00Z")
    one = 10**9
    assert plan.item == Plan(
        "standard",
        0,
        "Standard",
        "USD",
        0,
        (
            Charge(
                "a",
                "tokens",
                "per_unit",
                unit_price=Decimal("0.000003"),
                included=1_000_000 * one,
                references=("order", "file"),
            ),
            Charge(
                "b",
                "tokens",
                "graduated",
                tiers=(Tier(9 * one, Decimal(1), Decimal(2)), Tier(None, Decimal("0.5"))),
            ),
            Charge(
                "c",
                "calls",
                "volume",
                tiers=(Tier(None, Decimal(0), Decimal(5)),),
                flat_on_zero=False,
                references=("order",),
            ),
            Charge("d", "calls", "package", package_size=100 * one, package_price=Decimal(5)),
        ),
    )


def test_an_unquoted_price_never_passes_through_a_float(tmp_path: Path) -> None:
    text = "0.100000000000000001"
    drafts = prices(
        tmp_path,
        METERS
        + "plans:\n  - {id: p, name: P, currency: USD, charges: "
        + f"[{{id: c, meter: tokens, model: per_unit, unit_price: {text}}}]}}\n",
    )
    assert drafts.plans[0].item.charges[0].unit_price == Decimal(text)


# Each case: the charge, and what is said about it. The charge begins on line 9 of the file.
CHARGES = {
    "no unit price": ("meter: tokens, model: per_unit", "9: {c}.unit_price: expected a value, got nothing"),
    "a negative price": (
        "meter: tokens, model: per_unit, unit_price: -1",
        "9: {c}.unit_price: expected a number of 0 or more, got '-1'",
    ),
    "a price in words": (
        "meter: tokens, model: per_unit, unit_price: free",
        "9: {c}.unit_price: expected a number of 0 or more, got 'free'",
    ),
    "a price with thousands": (
        "meter: tokens, model: per_unit, unit_price: '1,000'",
        "9: {c}.unit_price: expected a number of 0 or more, got '1,000'",
    ),
    "a price that is not finite": (
        "meter: tokens, model: per_unit, unit_price: .nan",
        "9: {c}.unit_price: expected a number of 0 or more, got '.nan'",
    ),
    "a price with 19 decimals": (
        "meter: tokens, model: per_unit, unit_price: 0.0000000000000000001",
        "9: {c}.unit_price: expected at most 18 decimals, got '0.0000000000000000001'",
    ),
    "a price of a list": (
        "meter: tokens, model: per_unit, unit_price: [1]",
        "9: {c}.unit_price: expected a number of 0 or more, got a list",
    ),
    "an unknown meter": (
        "meter: token, model: per_unit, unit_price: 1",
        "9: {c}.meter: expected a meter of the files given, got 'token': did you mean 'tokens'?",
    ),
    "an unknown model": (
        "meter: tokens, model: tiered, tiers: [{unit_price: 1}]",
        "9: {c}.model: expected per_unit, graduated, volume or package, got 'tiered'",
    ),
    "a model misspelt": (
        "meter: tokens, model: gradated, tiers: [{unit_price: 1}]",
        "9: {c}.model: expected per_unit, graduated, volume or package, got 'gradated': did you mean 'graduated'?",
    ),
    "a key of another model": (
        "meter: tokens, model: per_unit, unit_price: 1, package_size: 5",
        "9: {c}.package_size: unknown key 'package_size': "
        "expected id, meter, model, included, references or unit_price",
    ),
    "a key misspelt": (
        "meter: tokens, model: per_unit, unitprice: 1, unit_price: 1",
        "9: {c}.unitprice: unknown key 'unitprice': did you mean 'unit_price'?",
    ),
    "a key misspelt in a tier": (
        "meter: tokens, model: volume, tiers: [{unit_price: 1, upto: 5}]",
        "9: {c}.tiers[#1].upto: unknown key 'upto': did you mean 'up_to'?",
    ),
    "a key twice": (
        "meter: tokens, model: per_unit, unit_price: 1, unit_price: 2",
        "9: {c}.unit_price: expected each key once, got it on line 9 too",
    ),
    "bounds that do not ascend": (
        "meter: tokens, model: volume, tiers: [{up_to: 10, flat: 1}, {up_to: 10, flat: 1}, {flat: 1}]",
        "9: {c}.tiers[#2].up_to: expected more than 10, where the tier before ends, got '10'",
    ),
    "the last tier bounded": (
        "meter: tokens, model: volume, tiers: [{up_to: 10, flat: 1}]",
        "9: {c}.tiers[#1].up_to: expected no bound on the last tier (what would lie beyond?), got '10'",
    ),
    "an open tier in the middle": (
        "meter: tokens, model: volume, tiers: [{flat: 1}, {flat: 1}]",
        "9: {c}.tiers[#1].up_to: expected a bound, since only the last tier goes on for ever, got nothing",
    ),
    "a bound of zero": (
        "meter: tokens, model: volume, tiers: [{up_to: 0, flat: 1}, {flat: 1}]",
        "9: {c}.tiers[#1].up_to: expected a number above 0, got '0'",
    ),
    "a tier without price": (
        "meter: tokens, model: volume, tiers: [{}]",
        "9: {c}.tiers[#1]: expected a unit_price, a flat or both, got neither",
    ),
    "no tiers": (
        "meter: tokens, model: graduated, tiers: []",
        "9: {c}.tiers: expected at least one tier, got an empty list",
    ),
    "tiers that are no list": (
        "meter: tokens, model: graduated, tiers: 5",
        "9: {c}.tiers: expected a list, got '5'",
    ),
    "a package of nothing": (
        "meter: tokens, model: package, package_size: 0, package_price: 1",
        "9: {c}.package_size: expected a number above 0, got '0'",
    ),
    "included units too precise": (
        "meter: tokens, model: per_unit, unit_price: 1, included: 0.0000000001",
        "9: {c}.included: expected at most 9 decimals, got '0.0000000001'",
    ),
    "a reference twice": (
        "meter: tokens, model: per_unit, unit_price: 1, references: [a, b, a]",
        "9: {c}.references: expected each value once, got 'a'",
    ),
    "a flag in other words": (
        "meter: tokens, model: volume, tiers: [{flat: 1}], flat_on_zero: yes",
        "9: {c}.flat_on_zero: expected true or false, got 'yes'",
    ),
}


@pytest.mark.parametrize(("charge", "expected"), CHARGES.values(), ids=CHARGES)
def test_a_mistake_in_a_charge(tmp_path: Path, charge: str, expected: str) -> None:
    drafts = prices(
        tmp_path,
        METERS + "plans:\n  - id: p\n    name: P\n    currency: USD\n    charges:\n"
        f"      # the charge\n      - {{id: c, {charge}}}\n",
    )
    assert findings(drafts) == ["prices.yaml:" + expected.format(c="plans[p].charges[c]")]


FILES = {
    "not YAML": (
        "meters: [",
        ["prices.yaml:1: expected YAML, got while parsing a flow node: expected the node content"],
    ),
    "empty": ("", ["prices.yaml:1: expected a mapping, got an empty file"]),
    "a list": ("- 1", ["prices.yaml:1: expected a mapping with meters or plans, got a list"]),
    "an account file": (
        "accounts: []",
        [
            "prices.yaml:1: expected meters or plans, got neither",
            "prices.yaml:1: accounts: unknown key 'accounts': that belongs to `tally accounts apply`",
        ],
    ),
    "two documents": ("meters: []\n---\nplans: []\n", ["prices.yaml:2: expected YAML"]),
    "an alias of what it stands in": (
        "meters: &m\n  - *m\n",
        ["prices.yaml:1: meters[#1]: expected a mapping", "prices.yaml:1: meters[#1]: expected a value, got an alias"],
    ),
    "a sum of nothing": (
        "meters:\n  - {id: m, event_type: e, aggregation: sum, unit: u}",
        ["prices.yaml:2: meters[m].value: expected the property to sum, got nothing"],
    ),
    "a count of something": (
        "meters:\n  - {id: m, event_type: e, aggregation: count, unit: u, value: x}",
        ["prices.yaml:2: meters[m].value: expected no value, since a count looks at none, got 'x'"],
    ),
    "an aggregation we do not have": (
        "meters:\n  - id: m\n    event_type: e\n    unit: u\n    aggregation: max\n",
        ["prices.yaml:5: meters[m].aggregation: expected sum or count, got 'max'"],
    ),
    "an id twice": (
        METERS + "  - {id: tokens, event_type: call, aggregation: count, unit: call}\n",
        ["prices.yaml:3: meters[tokens].id: expected each id once, got 'tokens' again after"],
    ),
    "an id with a space": (
        "meters:\n  - {id: my meter, event_type: e, aggregation: count, unit: u}",
        ["prices.yaml:2: meters[my meter].id: expected an id (a letter or digit, then"],
    ),
    "a filter that is no mapping": (
        "meters:\n  - {id: m, event_type: e, aggregation: count, unit: u, filters: [a]}",
        ["prices.yaml:2: meters[m].filters: expected a mapping of properties to values, got a list"],
    ),
    "an unknown currency": (
        METERS + "plans:\n  - {id: p, name: P, currency: XXX, charges: "
        "[{id: c, meter: tokens, model: per_unit, unit_price: 1}]}",
        ["prices.yaml:4: plans[p].currency: expected a currency code of ISO 4217 such as USD, got 'XXX'"],
    ),
    "a charge twice": (
        METERS + "plans:\n  - id: p\n    name: P\n    currency: USD\n    charges:\n"
        "    - {id: c, meter: tokens, model: per_unit, unit_price: 1}\n"
        "    - {id: c, meter: tokens, model: per_unit, unit_price: 1}\n",
        ["prices.yaml:9: plans[p].charges[c].id: expected each id once, got 'c' again after"],
    ),
    "no charges": (
        "plans:\n  - {id: p, name: P, currency: USD}",
        ["prices.yaml:2: plans[p].charges: expected at least one charge, got nothing"],
    ),
    "a time without zone": (
        "meters:\n  - {id: m, event_type: e, aggregation: count, unit: u, valid_from: 2026-01-01T00:00:00}",
        ["prices.yaml:2: meters[m].valid_from: expected a date such as 2026-01-31 or a time with zone"],
    ),
    "a day that is none": (
        "meters:\n  - {id: m, event_type: e, aggregation: count, unit: u, valid_from: 2026-02-30}",
        ["prices.yaml:2: meters[m].valid_from: expected a date such as 2026-01-31 or a time with zone"],
    ),
    "every mistake at once": (
        """\
        meters:
          - id: m
            event_type: e
            agregation: sum
            unit: u
        plans:
          - id: p
            name: P
            currency: dollars
            charges:
              - id: a
                meter: n
                model: per_unit
                unit_price: -1
              - id: b
                meter: m
                model: volume
                tiers:
                  - {up_to: 5, unit_price: x}
                  - {up_to: 4, unit_price: 1}
                  - {up_to: 3, unit_price: 1}
        """,
        [
            "prices.yaml:2: meters[m].aggregation: expected a value, got nothing",
            "prices.yaml:4: meters[m].agregation: unknown key 'agregation': did you mean 'aggregation'?",
            "prices.yaml:9: plans[p].currency: expected a currency code of ISO 4217 such as USD, got 'dollars'",
            "prices.yaml:12: plans[p].charges[a].meter: expected a meter of the files given, got 'n'",
            "prices.yaml:14: plans[p].charges[a].unit_price: expected a number of 0 or more, got '-1'",
            "prices.yaml:19: plans[p].charges[b].tiers[#1].unit_price: expected a number of 0 or more, got 'x'",
            "prices.yaml:20: plans[p].charges[b].tiers[#2].up_to: expected more than 5, where the tier before ends",
            "prices.yaml:21: plans[p].charges[b].tiers[#3].up_to: expected more than 4, where the tier before ends",
            "prices.yaml:21: plans[p].charges[b].tiers[#3].up_to: expected no bound on the last tier",
        ],
    ),
}


@pytest.mark.parametrize(("text", "expected"), FILES.values(), ids=FILES)
def test_a_mistake_in_a_price_file(tmp_path: Path, text: str, expected: list[str]) -> None:
    found = findings(prices(tmp_path, text))
    assert len(found) == len(expected), found
    for line, beginning in zip(found, expected, strict=True):
        assert line.startswith(beginning)


def test_a_file_that_is_not_utf_8(tmp_path: Path) -> None:
    file = tmp_path / "prices.yaml"
    file.write_bytes(b"meters: \xff\xfe\n")
    (finding,) = read_price_files([file]).findings
    assert "expected YAML in UTF-8" in finding.message


def test_files_given_together_are_one_whole(tmp_path: Path) -> None:
    meters, plans = tmp_path / "meters.yaml", tmp_path / "plans.yaml"
    meters.write_text(METERS)
    plans.write_text(
        "plans:\n  - {id: p, name: P, currency: USD, charges: [{id: c, meter: tokens, model: per_unit, unit_price: 1}]}"
    )
    assert read_price_files([plans, meters]).findings == []
    (finding,) = read_price_files([plans]).findings
    assert finding.message.endswith("got 'tokens': give the file that defines it too")
    repeated = read_price_files([meters, plans, meters]).findings
    assert [finding.message for finding in repeated] == [f"expected each id once, got 'tokens' again after {meters}:2"]


# Accounts -----------------------------------------------------------------------------------------------------------


def test_an_account_file(tmp_path: Path) -> None:
    drafts = accounts(
        tmp_path,
        """\
        accounts:
          - id: acme
            name: Acme
            time_zone: America/New_York
            contracts:
              - {plan: standard, start: 2026-03-01, end: 2026-04-01}
              - {id: acme-2, plan: plus, start: 2026-04-01}
          - {id: lone, name: Lone}
        """,
    )
    assert findings(drafts) == []
    assert [draft.item for draft in drafts.accounts] == [
        Account("acme", 0, "Acme", "America/New_York"),
        Account("lone", 0, "Lone", "UTC"),
    ]
    change = parse_instant("2026-04-01T04:00:00Z")
    assert [draft.item for draft in drafts.contracts] == [
        Contract("acme-main", 0, "acme", "standard", parse_instant("2026-03-01T05:00:00Z"), change),
        Contract("acme-2", 0, "acme", "plus", change, None),
    ]


ACCOUNTS = {
    "an unknown time zone": ("time_zone: Mars", ["5: accounts[a].time_zone: expected an IANA time zone"]),
    "a time zone that is a folder": ("time_zone: Europe", ["5: accounts[a].time_zone: expected an IANA time zone"]),
    "a time zone outside the database": (
        "time_zone: ../../etc/passwd",
        ["5: accounts[a].time_zone: expected an IANA time zone"],
    ),
    "a key misspelt": ("timezone: UTC", ["5: accounts[a].timezone: unknown key 'timezone': did you mean 'time_zone'?"]),
    "an end before the start": (
        "contracts: [{plan: p, start: 2026-03-01, end: 2026-03-01}]",
        ["5: accounts[a].contracts[#1].end: expected an end after the start, got '2026-03-01'"],
    ),
    "no start": (
        "contracts: [{plan: p}]",
        ["5: accounts[a].contracts[#1].start: expected a value, got nothing"],
    ),
    "a start before anything": (
        "contracts: [{plan: p, start: 0001-01-01}]",
        ["5: accounts[a].contracts[#1].start: expected a year from 1970 to 9998, got '0001-01-01'"],
    ),
    "two contracts without ids": (
        "contracts:\n      - {plan: p, start: 2026-03-01, end: 2026-04-01}\n      - {plan: p, start: 2026-04-01}",
        ["7: accounts[a].contracts[#2].id: expected each id once, got 'a-main' again after"],
    ),
    "overlapping contracts": (
        "contracts:\n      - {plan: p, start: 2026-03-01}\n      - {id: b, plan: p, start: 2026-04-01}",
        [
            "7: accounts[a].contracts[b].id: expected contracts of an account one after another, got 'b' "
            "(2026-04-01T00:00:00Z to open end) while 'a-main' (2026-03-01T00:00:00Z to open end) runs"
        ],
    ),
}


@pytest.mark.parametrize(("more", "expected"), ACCOUNTS.values(), ids=ACCOUNTS)
def test_a_mistake_in_an_account_file(tmp_path: Path, more: str, expected: list[str]) -> None:
    found = findings(accounts(tmp_path, f"accounts:\n  - {{id: b, name: B}}\n  - id: a\n    name: A\n    {more}\n"))
    assert len(found) == len(expected), found
    for line, beginning in zip(found, expected, strict=True):
        assert line.startswith(f"accounts.yaml:{beginning}")


def test_the_demo_s_files_are_right() -> None:
    assert read_price_files([demo_dir() / "prices.yaml"]).findings == []
    drafts = read_account_files([demo_dir() / "accounts.yaml"])
    assert drafts.findings == []
    assert [draft.item.id for draft in drafts.accounts] == [f"acct-{n:02}" for n in range(12)]
