"""Price files and account files: what they mean, and every mistake with its line."""

import time
from decimal import Decimal
from pathlib import Path
from textwrap import dedent

import pytest
import yaml
from pydantic import BaseModel

from pipeline.catalog.files import Drafts, read_account_files, read_price_files
from pipeline.catalog.models import (
    CHARGE_MODELS,
    AccountModel,
    ContractModel,
    EventTypeModel,
    MeterModel,
    PhaseModel,
    PlanModel,
    PriceListModel,
)
from pipeline.core.charges import Cell, Charge, Tier
from pipeline.core.contracts import Account, Contract, Phase
from pipeline.core.cycles import Cycle
from pipeline.core.meters import Conversion, Filter, Meter, Rounding
from pipeline.core.periods import parse_instant
from pipeline.core.plans import PRICE_FIELDS, Override, Plan, Pool, PoolOverride, PriceList, changed, free
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


def test_meters_of_every_kind(tmp_path: Path) -> None:
    drafts = prices(
        tmp_path,
        """\
        event_types:
          - {id: seats, properties: [seats, plan, region]}
        meters:
          - id: seat-hours
            event_type: seats
            aggregation: time_weighted
            expression: seats * 2
            time_unit: hour
            level: add
            carries_over: true
            allow_negative: true
            unit: seat-hour
            dimensions: [region]
            convert: {multiply: 3, divide: 1024}
            rounding: {mode: up, step: 60}
            derived_per: total
            filters:
              plan: {not_in: [free, trial]}
              region: {exists: true}
              seats: {gt: 0, le: 1e3}
        """,
    )
    assert findings(drafts) == []
    (draft,) = drafts.meters
    assert draft.item == Meter(
        "seat-hours",
        0,
        "seats",
        "time_weighted",
        None,
        "seat-hour",
        (
            Filter("plan", ("free", "trial"), "not_in"),
            Filter("region", (), "exists"),
            Filter("seats", ("0",), "gt"),
            Filter("seats", ("1e3",), "le"),
        ),
        True,
        0,
        expression="seats * 2",
        convert=Conversion(Decimal(3), Decimal(1024)),
        rounding=Rounding("up", 60 * 10**9),
        derived_per="total",
        level="add",
        time_unit="hour",
        carries_over=True,
        dimensions=("region",),
    )


EVERY_MODEL = """\
plans:
  - id: p
    name: P
    currency: USD
    prorate: pool_and_tiers
    trial_days: 14
    pools:
      - {id: tokens, unit: token, included: 1e6, charges: [graduated, unit]}
    charges:
      - {id: unit, meter: tokens, model: per_unit, unit_price: 1, per_subject: true, minimum: 5, maximum: 50}
      - {id: graduated, meter: tokens, model: graduated, beyond: park, bound: exclusive, tiers: [{up_to: 5, cap: 3}]}
      - {id: step, meter: tokens, model: stairstep, tiers: [{up_to: 5, flat: 3}, {above: 5, flat: 9}]}
      - {id: block, meter: tokens, model: block, package_size: 10, min_packages: 1, tiers: [{unit_price: 4}]}
      - {id: rated, meter: tokens, model: graduated_percentage, tiers: [{rate: 1.5, flat: 0.1}]}
      - id: matrix
        meter: by-model
        model: matrix
        by: [region, model]
        unit_price: 2
        cells:
          - {when: {model: large, region: eu}, unit_price: 3}
          - {when: {model: small, region: null}, unit_price: 1}
      - {id: percentage, meter: tokens, model: percentage, rate: 2.9, fixed: 0.3, free_events: 5, event_maximum: 9}
      - {id: dynamic, meter: tokens, model: dynamic, amount_property: cost, multiplier: 1.2, event_minimum: 0.01}
      - {id: fee, model: flat, unit_price: 49, quantity: 3, in_advance: true, prorate: false}
"""


def test_charges_of_every_model(tmp_path: Path) -> None:
    text = MORE_METERS + EVERY_MODEL.replace("cap: 3", "cap: 3, unit_price: 1")
    drafts = prices(tmp_path, text)
    assert findings(drafts) == []
    (draft,) = drafts.plans
    one = 10**9
    assert (draft.item.prorate, draft.item.trial_days) == ("pool_and_tiers", 14)
    assert draft.item.pools == (Pool("tokens", "token", 10**6 * one, ("unit", "graduated")),), "in the plan's order"
    assert draft.item.charges == (
        Charge(
            "unit",
            "tokens",
            "per_unit",
            unit_price=Decimal(1),
            per_subject=True,
            minimum=Decimal(5),
            maximum=Decimal(50),
        ),
        Charge(
            "graduated",
            "tokens",
            "graduated",
            tiers=(Tier(5 * one, Decimal(1), cap=Decimal(3)),),
            beyond="park",
            bound="exclusive",
        ),
        Charge("step", "tokens", "stairstep", tiers=(Tier(5 * one, flat=Decimal(3)), Tier(None, flat=Decimal(9)))),
        Charge("block", "tokens", "block", package_size=10 * one, min_packages=1, tiers=(Tier(None, Decimal(4)),)),
        Charge(
            "rated",
            "tokens",
            "graduated_percentage",
            tiers=(Tier(None, rate=Decimal("1.5"), flat=Decimal("0.1")),),
        ),
        Charge(
            "matrix",
            "by-model",
            "matrix",
            by=("region", "model"),
            unit_price=Decimal(2),
            cells=(Cell(("eu", "large"), Decimal(3)), Cell(("", "small"), Decimal(1))),
        ),
        Charge(
            "percentage",
            "tokens",
            "percentage",
            rate=Decimal("2.9"),
            fixed=Decimal("0.3"),
            free_events=5,
            event_maximum=Decimal(9),
        ),
        Charge(
            "dynamic",
            "tokens",
            "dynamic",
            amount_property="cost",
            multiplier=Decimal("1.2"),
            event_minimum=Decimal("0.01"),
        ),
        Charge("fee", None, "flat", unit_price=Decimal(49), quantity=3 * one, in_advance=True, prorate=False),
    )


def test_price_lists(tmp_path: Path) -> None:
    drafts = prices(
        tmp_path,
        MORE_METERS
        + EVERY_MODEL.replace("cap: 3", "cap: 3, unit_price: 1")
        + """\
price_lists:
  - id: education
    name: Education
    plan: p
    currency: USD
    customer_segment: education
    valid_from: 2026-03-01
    charges:
      - {id: unit, unit_price: 0.5}
      - {id: matrix, cells: [{when: {region: eu, model: large}, unit_price: 1}]}
    pools:
      - {id: tokens, included: 2e6}
  - {id: acme, name: Acme, plan: p, currency: USD, account: acme, charges: [{id: unit, model: package, package_size: 9,
     package_price: 4}]}
  - {id: ramp, name: Ramp, plan: p, currency: USD}
""",
    )
    assert findings(drafts) == []
    education, acme, ramp = (draft.item for draft in drafts.price_lists)
    assert drafts.price_lists[0].valid_from_us == parse_instant("2026-03-01T00:00:00Z")
    assert education == PriceList(
        "education",
        0,
        "Education",
        "p",
        "USD",
        0,
        (
            Override("unit", (("unit_price", Decimal("0.5")),)),
            Override("matrix", (("cells", (Cell(("eu", "large"), Decimal(1)),)),)),
        ),
        (PoolOverride("tokens", 2 * 10**15),),
        customer_segment="education",
    )
    (override,) = acme.overrides
    assert dict(override.changes)["model"] == "package"
    unit = next(charge for charge in drafts.plans[0].item.charges if charge.id == "unit")
    assert changed(unit, override) == Charge(
        "unit", "tokens", "package", package_size=9 * 10**9, package_price=Decimal(4), per_subject=True
    )
    assert (ramp.overrides, ramp.customer_segment, ramp.account) == ((), None, None)


def test_price_files_know_every_field_of_every_model() -> None:
    """What a file cannot say, no plan can have; what it can, a price list may change, but for what the charge is."""
    for name, model in CHARGE_MODELS.items():
        said = model.model_fields.keys() - {"id", "meter", "model", "references", "name", "tax_category"}
        assert said == PRICE_FIELDS[name], name  # type: ignore[index]  # the names of the table are the models'


MODELS = (
    "per_unit, graduated, volume, package, stairstep, block, graduated_percentage, matrix, percentage, dynamic or flat"
)

MORE_METERS = f"""\
{METERS}\
  - {{id: by-model, event_type: call, aggregation: count, unit: call, dimensions: [model, region]}}
  - {{id: peak, event_type: call, aggregation: max, value: seats, unit: seat}}
"""

# Each case: the charge, and what begins what is said about it. The charge begins on line 9 of the file.
CHARGES = {
    "no unit price": ("meter: tokens, model: per_unit", "10: {c}.unit_price: expected a value, got nothing"),
    "a negative price": (
        "meter: tokens, model: per_unit, unit_price: -1",
        "10: {c}.unit_price: expected a number of 0 or more, got '-1'",
    ),
    "a price in words": (
        "meter: tokens, model: per_unit, unit_price: free",
        "10: {c}.unit_price: expected a number of 0 or more, got 'free'",
    ),
    "a price with thousands": (
        "meter: tokens, model: per_unit, unit_price: '1,000'",
        "10: {c}.unit_price: expected a number of 0 or more, got '1,000'",
    ),
    "a price that is not finite": (
        "meter: tokens, model: per_unit, unit_price: .nan",
        "10: {c}.unit_price: expected a number of 0 or more, got '.nan'",
    ),
    "a price with 19 decimals": (
        "meter: tokens, model: per_unit, unit_price: 0.0000000000000000001",
        "10: {c}.unit_price: expected at most 18 decimals, got '0.0000000000000000001'",
    ),
    "a price of a list": (
        "meter: tokens, model: per_unit, unit_price: [1]",
        "10: {c}.unit_price: expected a number of 0 or more, got a list",
    ),
    "an unknown meter": (
        "meter: token, model: per_unit, unit_price: 1",
        "10: {c}.meter: expected a meter of the files given, got 'token': did you mean 'tokens'?",
    ),
    "an unknown model": (
        "meter: tokens, model: tiered, tiers: [{unit_price: 1}]",
        f"10: {{c}}.model: expected {MODELS}, got 'tiered'",
    ),
    "a model misspelt": (
        "meter: tokens, model: gradated, tiers: [{unit_price: 1}]",
        f"10: {{c}}.model: expected {MODELS}, got 'gradated': did you mean 'graduated'?",
    ),
    "a key of another model": (
        "meter: tokens, model: per_unit, unit_price: 1, package_size: 5",
        "10: {c}.package_size: unknown key 'package_size': expected id, model, references, minimum, maximum, prorate, "
        "name, tax_category, meter, by, per_subject, included, unit_price or per_level",
    ),
    "a key misspelt": (
        "meter: tokens, model: per_unit, unitprice: 1, unit_price: 1",
        "10: {c}.unitprice: unknown key 'unitprice': did you mean 'unit_price'?",
    ),
    "a key misspelt in a tier": (
        "meter: tokens, model: volume, tiers: [{unit_price: 1, upto: 5}]",
        "10: {c}.tiers[#1].upto: unknown key 'upto': did you mean 'up_to'?",
    ),
    "a key twice": (
        "meter: tokens, model: per_unit, unit_price: 1, unit_price: 2",
        "10: {c}.unit_price: expected each key once, got it on line 10 too",
    ),
    "bounds that do not ascend": (
        "meter: tokens, model: volume, tiers: [{up_to: 10, flat: 1}, {up_to: 10, flat: 1}, {flat: 1}]",
        "10: {c}.tiers[#2].up_to: expected more than 10, where the tier before ends, got '10'",
    ),
    "the last tier bounded": (
        "meter: tokens, model: volume, tiers: [{up_to: 10, flat: 1}]",
        "10: {c}.tiers[#1].up_to: expected no bound on the last tier, or beyond: last_tier or park on the "
        "charge to say what lies beyond, got '10'",
    ),
    "an open tier in the middle": (
        "meter: tokens, model: volume, tiers: [{flat: 1}, {flat: 1}]",
        "10: {c}.tiers[#1].up_to: expected a bound, since only the last tier goes on for ever, got nothing",
    ),
    "a bound of zero": (
        "meter: tokens, model: volume, tiers: [{up_to: 0, flat: 1}, {flat: 1}]",
        "10: {c}.tiers[#1].up_to: expected a number above 0, got '0'",
    ),
    "a tier without price": (
        "meter: tokens, model: volume, tiers: [{}]",
        "10: {c}.tiers[#1]: expected a unit_price, a flat or both, got neither",
    ),
    "no tiers": (
        "meter: tokens, model: graduated, tiers: []",
        "10: {c}.tiers: expected at least one tier, got an empty list",
    ),
    "tiers that are no list": (
        "meter: tokens, model: graduated, tiers: 5",
        "10: {c}.tiers: expected a list, got '5'",
    ),
    "a package of nothing": (
        "meter: tokens, model: package, package_size: 0, package_price: 1",
        "10: {c}.package_size: expected a number above 0, got '0'",
    ),
    "included units too precise": (
        "meter: tokens, model: per_unit, unit_price: 1, included: 0.0000000001",
        "10: {c}.included: expected at most 9 decimals, got '0.0000000001'",
    ),
    "a price that rises to infinity": (
        "meter: tokens, model: graduated, tiers: [{up_to: 5, unit_price: 1}, {unit_price: .inf}]",
        "10: {c}.tiers[#2].unit_price: expected a number of 0 or more, got '.inf'",
    ),
    "tiers with a gap": (
        "meter: tokens, model: volume, tiers: [{up_to: 10, flat: 1}, {above: 12, flat: 2}]",
        "10: {c}.tiers[#2].above: expected 10, where the tier before ends, got '12': they leave a gap",
    ),
    "tiers that overlap": (
        "meter: tokens, model: volume, tiers: [{above: 0, up_to: 10, flat: 1}, {above: 9, flat: 2}]",
        "10: {c}.tiers[#2].above: expected 10, where the tier before ends, got '9': they overlap",
    ),
    "a price per unit of a step": (
        "meter: tokens, model: stairstep, tiers: [{flat: 5, unit_price: 1}]",
        "10: {c}.tiers[#1].unit_price: unknown key 'unit_price': expected above, up_to, cap or flat",
    ),
    "blocks that end inside": (
        "meter: tokens, model: block, package_size: 10, bound: exclusive, tiers: [{unit_price: 2}]",
        "10: {c}: expected bounds that belong to their tier, since blocks are whole, got exclusive",
    ),
    "a split by what the meter does not tell apart": (
        "meter: tokens, model: per_unit, unit_price: 1, by: [model]",
        "10: {c}.by: expected dimensions of meter 'tokens', got 'model': add it to the dimensions of 'tokens'",
    ),
    "a split by a dimension misspelt": (
        "meter: by-model, model: per_unit, unit_price: 1, by: [modle]",
        "10: {c}.by: expected dimensions of meter 'by-model', got 'modle': did you mean 'model'?",
    ),
    "a cell without one of its dimensions": (
        "meter: by-model, model: matrix, unit_price: 1, by: [model, region], cells: "
        "[{when: {model: a}, unit_price: 2}]",
        "10: {c}.cells[#1].when: expected a value of model and region, as in by, got one of model",
    ),
    "a cell twice": (
        "meter: by-model, model: matrix, unit_price: 1, by: [model], cells: "
        "[{when: {model: a}, unit_price: 2}, {when: {model: a}, unit_price: 3}]",
        "10: {c}.cells[#2].when: expected each cell once",
    ),
    "a maximum below the minimum": (
        "meter: tokens, model: per_unit, unit_price: 1, minimum: 10, maximum: 9",
        "10: {c}: expected a maximum of at least the minimum 10, got 9",
    ),
    "a negative minimum": (
        "meter: tokens, model: per_unit, unit_price: 1, minimum: -1",
        "10: {c}.minimum: expected a number of 0 or more, got '-1'",
    ),
    "single events of a meter that is no sum": (
        "meter: peak, model: percentage, rate: 2",
        "10: {c}: expected a meter of sum or count, converted per event, to price single events (percentage), got",
    ),
    "a flat fee with a meter": (
        "meter: tokens, model: flat, unit_price: 9",
        "10: {c}.meter: unknown key 'meter': expected id, model, references",
    ),
    "a reference twice": (
        "meter: tokens, model: per_unit, unit_price: 1, references: [a, b, a]",
        "10: {c}.references: expected each value once, got 'a'",
    ),
    "a flag in other words": (
        "meter: tokens, model: volume, tiers: [{flat: 1}], flat_on_zero: yes",
        "10: {c}.flat_on_zero: expected true or false, got 'yes'",
    ),
}


@pytest.mark.parametrize(("charge", "expected"), CHARGES.values(), ids=CHARGES)
def test_a_mistake_in_a_charge(tmp_path: Path, charge: str, expected: str) -> None:
    drafts = prices(
        tmp_path,
        MORE_METERS + f"plans:\n  - id: p\n    name: P\n    currency: USD\n    charges:\n      - {{id: c, {charge}}}\n",
    )
    (found,) = findings(drafts)
    assert found.startswith("prices.yaml:" + expected.format(c="plans[p].charges[c]"))


FILES = {
    "not YAML": (
        "meters: [",
        ["prices.yaml:2: expected YAML, got while parsing a flow node: did not find expected"],
    ),
    "empty": ("", ["prices.yaml:1: expected a mapping, got an empty file"]),
    "a list": ("- 1", ["prices.yaml:1: expected a mapping with event_types, meters, plans or price_lists, got a list"]),
    "an account file": (
        "accounts: []",
        [
            "prices.yaml:1: expected event_types, meters, plans or price_lists, got none of them",
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
        ["prices.yaml:2: meters[m].value: expected the property to take the sum of, or an expression instead"],
    ),
    "a count of something": (
        "meters:\n  - {id: m, event_type: e, aggregation: count, unit: u, value: x}",
        ["prices.yaml:2: meters[m].value: expected neither value nor expression: a count counts"],
    ),
    "an aggregation we do not have": (
        "meters:\n  - id: m\n    event_type: e\n    unit: u\n    aggregation: p99\n",
        ["prices.yaml:5: meters[m].aggregation: expected sum, count, max, min, latest, average, unique or time_weigh"],
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
    "a property no event has": (
        "event_types:\n  - {id: call, properties: [tokens, model, ms]}\n"
        "meters:\n  - id: m\n    event_type: call\n    aggregation: sum\n    unit: u\n    expression: tokens * m\n"
        "    dimensions: [modle]\n    filters: {tenant: a}\n"
        "  - {id: n, event_type: cal, aggregation: count, unit: u}\n"
        "plans:\n  - id: p\n    name: P\n    currency: USD\n    charges:\n"
        "      - {id: c, meter: m, model: per_unit, unit_price: 1, references: order}\n",
        [
            "prices.yaml:8: meters[m].expression: expected a property of its event type, got 'm': did you mean 'ms'?",
            "prices.yaml:9: meters[m].dimensions: expected a property of its event type, got 'modle': did you mean",
            "prices.yaml:10: meters[m].filters: expected a property of its event type, got 'tenant': expected",
            "prices.yaml:11: meters[n].event_type: expected a type of event_types, got 'cal': did you mean 'call'?",
            "prices.yaml:17: plans[p].charges[c].references: expected a property of its event type, got 'order'",
        ],
    ),
    "an operator we do not have": (
        "meters:\n  - {id: m, event_type: e, aggregation: count, unit: u, filters: {size: {above: 5}}}",
        ["prices.yaml:2: meters[m].filters.size: expected in, not_in, exists, eq, lt, le, gt or ge, got 'above'"],
    ),
    "a comparison with a word": (
        "meters:\n  - {id: m, event_type: e, aggregation: count, unit: u, filters: {size: {gt: big}}}",
        ["prices.yaml:2: meters[m].filters: expected one decimal number to compare size with"],
    ),
    "a rounding we do not have": (
        "meters:\n  - {id: m, event_type: e, aggregation: sum, value: v, unit: u, rounding: {mode: ceiling, step: 0}}",
        [
            "prices.yaml:2: meters[m].rounding.mode: expected up, down, half_up or half_even, got 'ceiling'",
            "prices.yaml:2: meters[m].rounding.step: expected a number above 0, got '0'",
        ],
    ),
    "pools of what cannot share": (
        MORE_METERS
        + "plans:\n  - id: p\n    name: P\n    currency: USD\n    charges:\n"
        + "    - {id: a, meter: tokens, model: per_unit, unit_price: 1}\n"
        + "    - {id: b, meter: by-model, model: per_unit, unit_price: 1}\n"
        + "    - {id: fee, model: flat, unit_price: 1}\n"
        + "    - {id: d, meter: peak, model: per_unit, unit_price: 1}\n"
        + "    pools:\n"
        + "    - {id: one, unit: token, included: 100, charges: [a, b]}\n"
        + "    - {id: two, unit: seat, included: 100, charges: [a, c, d, fee]}\n",
        [
            "prices.yaml:15: plans[p].pools[one].charges: expected charges per token, got 'b' per call",
            "prices.yaml:16: plans[p].pools[two].charges: d: expected a meter of sum or count",
            "prices.yaml:16: plans[p].pools[two].charges: expected charges of a meter, got 'fee', a flat charge",
            "prices.yaml:16: plans[p].pools[two].charges: expected charges of no other pool, got 'a', which draws from",
            "prices.yaml:16: plans[p].pools[two].charges: expected charges of plan 'p', got 'c'",
        ],
    ),
    "price lists that contradict their plan": (
        MORE_METERS
        + "plans:\n  - id: p\n    name: P\n    currency: USD\n"
        + "    pools: [{id: q, unit: token, included: 1, charges: c}]\n"
        + "    charges:\n    - {id: c, meter: tokens, model: per_unit, unit_price: 1}\n"
        + "price_lists:\n"
        + "  - id: l\n    name: L\n    plan: p\n    currency: EUR\n    account: acme\n    charges:\n"
        + "    - {id: d, unit_price: 2}\n"
        + "    - {id: c, package_size: 5}\n"
        + "    pools: [{id: r, included: 5}]\n"
        + "  - {id: k, name: K, plan: pp, currency: USD, customer_segment: x, account: y}\n"
        + "  - {id: m, name: M, plan: p, currency: USD, account: acme, "
        + "charges: [{id: c, meter: peak, unit_price: -1}]}\n"
        + "  - {id: n, name: N, plan: p, currency: USD, charges: [{id: c, model: percentage, rate: 1}]}\n",
        [
            "prices.yaml:16: price_lists[l].currency: expected USD, the currency of plan 'p', got EUR",
            "prices.yaml:19: price_lists[l].charges[d].id: expected a charge of plan 'p', got 'd'",
            "prices.yaml:20: price_lists[l].charges[c].package_size: unknown key 'package_size'",
            "prices.yaml:21: price_lists[l].pools[r].id: expected a pool of plan 'p', got 'r'",
            "prices.yaml:22: price_lists[k].account: expected a customer_segment or an account, got both",
            "prices.yaml:22: price_lists[k].plan: expected a plan of the files given, got 'pp': did you mean 'p'?",
            "prices.yaml:23: price_lists[m].charges[c].meter: unknown key 'meter'",
            "prices.yaml:23: price_lists[m].charges[c].unit_price: expected a number of 0 or more, got '-1'",
            "prices.yaml:23: price_lists[m].id: expected one price list of plan 'p' for account 'acme', got 'm' beside",
            "prices.yaml:24: price_lists[n].charges[c]: expected a charge by quantity to draw from a pool",
        ],
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


PLAN_WITH = "plans:\n  - {{id: p, name: P, currency: {currency}, charges: [{charges}], pools: [{pools}]}}\n"
#: Where a mistake stands beside another that used to hide it.
BESIDE = {
    "a plan's header and its price list": (
        PLAN_WITH.format(currency="XXX", charges="{id: c, meter: tokens, model: per_unit, unit_price: 1}", pools="")
        + "price_lists:\n  - {id: l, name: L, plan: p, currency: USD, charges: [{id: d, unit_price: 1}]}\n",
        ["plans[p].currency: expected a currency", "price_lists[l].charges[d].id: expected a charge of plan 'p'"],
    ),
    "a price list's header and its charges": (
        PLAN_WITH.format(currency="USD", charges="{id: c, meter: tokens, model: per_unit, unit_price: 1}", pools="")
        + "price_lists:\n"
        "  - {id: l, name: L, plan: p, currency: dollar, charges: [{id: c, unit_prise: 1}], pools: [{}]}\n",
        [
            "price_lists[l].charges[c].unit_prise: unknown key",
            "price_lists[l].currency: expected a currency",
            "price_lists[l].pools[#1].id: expected a value",
            "price_lists[l].pools[#1].included: expected a value",
        ],
    ),
    "a charge, and what only refers to it": (
        PLAN_WITH.format(
            currency="USD",
            charges="{id: c, meter: tokens, model: per_unit, unit_price: x}",
            pools="{id: a, unit: token, included: 1, charges: [c]}",
        )
        + "price_lists:\n  - {id: l, name: L, plan: p, currency: USD, charges: [{id: c, unit_price: 1}]}\n",
        ["plans[p].charges[c].unit_price: expected a number"],
    ),
    "two pools": (
        PLAN_WITH.format(
            currency="USD",
            charges="{id: c, meter: tokens, model: per_unit, unit_price: 1}",
            pools="{id: a, unit: call, included: -1, charges: [c]}, {id: b, unit: token, included: 1, charges: [c, d]}",
        ),
        [
            "plans[p].pools[a].charges: expected charges per call, got 'c' per token",
            "plans[p].pools[a].included: expected a number",
            "plans[p].pools[b].charges: expected charges of no other pool, got 'c', which draws from 'a'",
            "plans[p].pools[b].charges: expected charges of plan 'p', got 'd'",
        ],
    ),
    "several of one charge": (
        PLAN_WITH.format(
            currency="USD",
            charges="{id: c, meter: tokens, model: package, package_size: 1, package_price: -1, by: [planet]}, "
            "{id: d, meter: tokens, model: per_unit, unit_price: 1, per_level: true, minimum: 2, maximum: 1}",
            pools="",
        ),
        [
            "plans[p].charges[c].by: expected dimensions of meter 'tokens'",
            "plans[p].charges[c].package_price: expected a number",
            "plans[p].charges[d]: expected a maximum of at least the minimum 2",
            "plans[p].charges[d]: expected a time-weighted meter",
        ],
    ),
}


@pytest.mark.parametrize(("text", "expected"), BESIDE.values(), ids=BESIDE)
def test_one_mistake_hides_no_other(tmp_path: Path, text: str, expected: list[str]) -> None:
    found = findings(prices(tmp_path, METERS + text))
    assert [one.split(": ", 1)[1][: len(want)] for one, want in zip(found, expected, strict=True)] == expected


def test_an_override_of_tiers_keeps_what_lies_beyond_unless_it_says_otherwise(tmp_path: Path) -> None:
    charge = "{id: c, meter: tokens, model: graduated, beyond: park, tiers: [{up_to: 10, unit_price: 1}]}"
    overrides = "[{id: c, tiers: [{up_to: 20, unit_price: 1}]}]", "[{id: c, beyond: null, tiers: [{unit_price: 1}]}]"
    for changes in overrides:
        price_list = f"price_lists:\n  - {{id: l, name: L, plan: p, currency: USD, charges: {changes}}}\n"
        text = METERS + PLAN_WITH.format(currency="USD", charges=charge, pools="") + price_list
        assert findings(prices(tmp_path, text)) == []


def test_a_thousand_plans_are_read_in_two_seconds(tmp_path: Path) -> None:
    tiers = "tiers: [{up_to: 10, unit_price: 1}, {up_to: 100, unit_price: 0.5}, {unit_price: 0.1}]"
    charges = ", ".join(f"{{id: c{n}, meter: tokens, model: graduated, {tiers}}}" for n in range(5))
    plans = "".join(f"  - {{id: p{n}, name: P, currency: USD, charges: [{charges}]}}\n" for n in range(1000))
    before = time.process_time()
    drafts = prices(tmp_path, f"{METERS}plans:\n{plans}")
    assert time.process_time() - before < 2
    assert (len(drafts.plans), findings(drafts)) == (1000, [])


def test_a_file_too_deep_to_be_one(tmp_path: Path) -> None:
    found = findings(prices(tmp_path, "plans: " + "[" * 3000 + "]" * 3000))
    assert any("expected at most 30 levels, got one more" in one for one in found)


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


def test_dates_of_an_account_are_days_of_its_time_zone(tmp_path: Path) -> None:
    """So that what changes on the first of a month changes with the billing period, not an hour into it."""
    text = """
    accounts:
      - id: acme
        name: Acme
        time_zone: Europe/Berlin
        customer_segment: education
        valid_from: 2026-02-01
        contracts: [{plan: p, start: 2026-02-01}]
    """
    drafts = accounts(tmp_path, text)
    (account,), (contract,) = drafts.accounts, drafts.contracts
    assert account.valid_from_us == contract.item.start_us == parse_instant("2026-01-31T23:00:00Z")


def test_an_account_file_with_everything(tmp_path: Path) -> None:
    drafts = accounts(
        tmp_path,
        """\
        accounts:
          - id: acme
            name: Acme
            time_zone: Europe/Berlin
            customer_segment: startup
            parent: group
            aliases: [crm-1, legacy]
            valid_from: 2026-03-01T00:00:00Z
            contracts:
              - plan: standard
                start: 2026-03-01
                price_list: ramp-1
                trial_days: 14
                legal_entity: acme-gmbh
                phases:
                  - {start: 2026-06-01, price_list: ramp-2}
                  - {start: 2027-01-01, plan: plus, trial_days: 7}
          - {id: group, name: Group, aliases: holding}
        """,
    )
    assert findings(drafts) == []
    assert drafts.accounts[0].item == Account(
        "acme", 0, "Acme", "Europe/Berlin", "startup", "group", ("crm-1", "legacy")
    )
    assert drafts.accounts[0].valid_from_us == parse_instant("2026-03-01T00:00:00Z")
    assert drafts.accounts[1].item.aliases == ("holding",)
    (contract,) = drafts.contracts
    assert contract.item == Contract(
        "acme-main",
        0,
        "acme",
        "standard",
        parse_instant("2026-02-28T23:00:00Z"),
        None,
        "ramp-1",
        14,
        "acme-gmbh",
        (
            Phase(parse_instant("2026-05-31T22:00:00Z"), "standard", "ramp-2"),
            Phase(parse_instant("2026-12-31T23:00:00Z"), "plus", trial_days=7),
        ),
    )


@pytest.mark.parametrize(
    ("said", "cycle"),
    [
        ("month", Cycle()),
        ("{every: year}", Cycle("year")),
        ("{every: month, anchor: 2026-01-31}", Cycle("month", 31)),
        ("{every: quarter, anchor: 2026-12-15}", Cycle("quarter", 15, 3)),
        ("{every: year, anchor: 2024-02-29}", Cycle("year", 29, 2)),
        ("{every: year, anchor: start}", Cycle("year", 31, 5)),
    ],
)
def test_a_contract_s_cycle(tmp_path: Path, said: str, cycle: Cycle) -> None:
    """A start is its day in the account's time zone: 31 May in Auckland, still 30 May in UTC."""
    zone = "{id: a, name: A, time_zone: Pacific/Auckland"
    drafts = accounts(tmp_path, f"accounts: [{zone}, contracts: [{{plan: p, start: 2026-05-31, cycle: {said}}}]}}]")
    assert findings(drafts) == []
    assert drafts.contracts[0].item.cycle == cycle


def test_what_a_charge_is_called_and_taxed_as(tmp_path: Path) -> None:
    charge = "{id: calls, meter: tokens, model: per_unit, unit_price: 1, name: API calls, tax_category: reduced}"
    plan = f"plans: [{{id: p, name: P, currency: USD, prorate_by: day, charges: [{charge}]}}]"
    drafts = prices(tmp_path, METERS + plan)
    assert findings(drafts) == []
    (found,) = drafts.plans
    assert found.item.prorate_by == "day"
    assert (found.item.charges[0].title, found.item.charges[0].tax_category) == ("API calls", "reduced")
    assert free(found.item.charges[0]).title == "API calls", "also on trial"


def test_a_price_list_changes_no_name_and_no_tax(tmp_path: Path) -> None:
    plan = "plans: [{id: p, name: P, currency: USD, charges: [{id: c, meter: tokens, model: per_unit, unit_price: 1}]}]"
    change = "price_lists: [{id: l, name: L, plan: p, currency: USD, charges: [{id: c, name: N, tax_category: T}]}]"
    assert [line.split(": ")[2] for line in findings(prices(tmp_path, f"{METERS}{plan}\n{change}"))] == [
        "unknown key 'name'",
        "unknown key 'tax_category'",
    ]


ACCOUNTS = {
    "a phase before the contract, and one after it": (
        "contracts: [{plan: p, start: 2026-03-01, end: 2026-06-01, "
        "phases: [{start: 2026-03-01}, {start: 2026-07-01}]}]",
        [
            "5: accounts[a].contracts[#1].phases[#1].start: expected a start after 2026-03-01T00:00:00Z and before",
            "5: accounts[a].contracts[#1].phases[#2].start: expected a start after 2026-03-01T00:00:00Z and before",
        ],
    ),
    "phases out of order": (
        "contracts: [{plan: p, start: 2026-03-01, phases: [{start: 2026-05-01}, {start: 2026-04-01}]}]",
        ["5: accounts[a].contracts[#1].phases[#2].start: expected a start after 2026-05-01T00:00:00Z, got"],
    ),
    "a trial that never ends": (
        "contracts: [{plan: p, start: 2026-03-01, trial_days: 1000}]",
        ["5: accounts[a].contracts[#1].trial_days: expected a whole number from 0 to 366, got '1000'"],
    ),
    "an alias of another account": (
        "aliases: [b]",
        ["5: accounts[a].aliases: expected a name of no other account, got 'b', as on"],
    ),
    "its own parent": (
        "parent: a",
        ["5: accounts[a].parent: expected a parent that is not below the account, got a under a"],
    ),
    "parents in a circle": (
        "parent: c\n  - {id: c, name: C, parent: d}\n  - {id: d, name: D, parent: a}",
        ["5: accounts[a].parent: expected a parent that is not below the account, got a under c under d under a"],
    ),
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
    "a cycle nobody bills by": (
        "contracts: [{plan: p, start: 2026-03-01, cycle: fortnight}]",
        ["5: accounts[a].contracts[#1].cycle.every: expected month, quarter or year, got 'fortnight'"],
    ),
    "an anchor that is no day": (
        "contracts: [{plan: p, start: 2026-03-01, cycle: {every: month, anchor: 2026-02-30, day: 3}}]",
        [
            "5: accounts[a].contracts[#1].cycle.anchor: expected a date that a period begins on such as 2026-01-31, or "
            "start, the contract's, got '2026-02-30'",
            "5: accounts[a].contracts[#1].cycle.day: unknown key 'day'",
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


def keys(data: object) -> set[str]:
    """Every key of every mapping below."""
    match data:
        case dict():
            return set(data) | {key for part in data.values() for key in keys(part)}
        case list():
            return {key for part in data for key in keys(part)}
        case _:
            return set()


def test_the_files_that_explain_every_key_are_right_and_whole() -> None:
    prices_file, accounts_file = demo_dir() / "all-prices.yaml", demo_dir() / "all-accounts.yaml"
    drafts = read_price_files([prices_file])
    assert drafts.findings == []
    assert read_account_files([accounts_file]).findings == []
    said = keys(yaml.safe_load(prices_file.read_text())) | keys(yaml.safe_load(accounts_file.read_text()))
    waiting: list[type[BaseModel]] = [EventTypeModel, MeterModel, PlanModel, PriceListModel, *CHARGE_MODELS.values()]
    waiting += [AccountModel, ContractModel, PhaseModel]
    known: set[str] = set()
    while waiting:
        fields = waiting.pop().model_fields
        known |= fields.keys()
        for field in fields.values():
            parts = getattr(field.annotation, "__args__", (field.annotation,))
            waiting += [part for part in parts if isinstance(part, type) and issubclass(part, BaseModel)]
    assert known - said == set(), "keys without an example"
    assert {charge.model for charge in drafts.plans[0].item.charges} == CHARGE_MODELS.keys()
