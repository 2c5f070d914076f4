"""What changed, in words and numbers."""

from decimal import Decimal
from pathlib import Path

import pytest

from pipeline.catalog.diff import Change, changes, examples
from pipeline.catalog.files import read_price_files
from pipeline.core.money import QUANTITY_ONE, amount_decimal
from pipeline.core.plans import Plan

PRICES = """\
meters:
  - {id: tokens, event_type: call, aggregation: sum, value: tokens, unit: token}
plans:
  - id: standard
    name: Standard
    currency: USD
    charges:
      - id: input
        meter: tokens
        model: graduated
        tiers:
          - {up_to: 500000, unit_price: 0.000003}
          - {up_to: 1200000, unit_price: 0.0000025}
          - {unit_price: 0.000002}
      - {id: output, meter: tokens, model: per_unit, unit_price: 0.000015, references: [order]}
"""


@pytest.fixture
def plan(tmp_path: Path) -> "Read":
    return Read(tmp_path / "prices.yaml")


class Read:
    def __init__(self, file: Path) -> None:
        self._file = file

    def __call__(self, *edits: tuple[str, str]) -> Plan:
        text = PRICES
        for old, new in edits:
            assert old in text
            text = text.replace(old, new)
        self._file.write_text(text)
        drafts = read_price_files([self._file])
        assert drafts.findings == []
        return drafts.plans[0].item


def words(found: tuple[Change, ...]) -> list[str]:
    return [change.words for change in found]


def test_nothing_changed(plan: Read) -> None:
    assert changes(plan(), plan()) == ()
    assert changes(plan(), plan(("0.000015", "0.0000150"))) == ()


@pytest.mark.parametrize(
    ("edits", "said"),
    [
        pytest.param(
            [("0.000015", "0.00003")],
            ["charge output: unit price 0.000015 → 0.00003 (+100 %)"],
            id="a price",
        ),
        pytest.param(
            [("0.0000025", "0.000002")],
            ["charge input, tier 2 (500,000 to 1,200,000): unit price 0.0000025 → 0.000002 (-20 %)"],
            id="a tier's price",
        ),
        pytest.param(
            [("up_to: 1200000", "up_to: 1000000")],
            ["charge input, tier 2 (500,000 to 1,000,000): up to 1,200,000 → 1,000,000 (-16.7 %)"],
            id="a tier's bound",
        ),
        pytest.param(
            [("          - {up_to: 1200000, unit_price: 0.0000025}\n", "")],
            [
                "charge input, tier 2 (above 500,000): up to 1,200,000 → none",
                "charge input, tier 2 (above 500,000): unit price 0.0000025 → 0.000002 (-20 %)",
                "charge input, tier 3 (above 1,200,000): gone: unit price 0.000002",
            ],
            id="a tier less",
        ),
        pytest.param(
            [("name: Standard", "name: Standard 2"), ("references: [order]", "references: [order, user]")],
            ["name Standard → Standard 2", "charge output: references order → order, user"],
            id="texts",
        ),
        pytest.param(
            [("id: output", "id: out"), ("references: [order]", "included: 10")],
            [
                "charge out: new: meter tokens, model per_unit, unit price 0.000015, included 10",
                "charge output: gone: meter tokens, model per_unit, unit price 0.000015, references order",
            ],
            id="another charge",
        ),
    ],
)
def test_says_what_changed(plan: Read, edits: list[tuple[str, str]], said: list[str]) -> None:
    assert words(changes(plan(), plan(*edits))) == said


def test_a_change_as_data(plan: Read) -> None:
    (change,) = changes(plan(), plan(("0.0000025", "0.0000022")))
    assert change.path == "charges[input].tiers[#2].unit_price"
    assert (change.before, change.after, change.percent) == ("0.0000025", "0.0000022", Decimal("-12.0"))


def test_the_order_of_charges_counts(plan: Read) -> None:
    old = plan()
    new = Plan(old.id, 0, old.name, old.currency, 0, old.charges[::-1])
    assert words(changes(old, new)) == ["order of charges input, output → output, input"]


def test_a_new_document_lists_what_it_has(plan: Read) -> None:
    said = words(changes(None, plan()))
    assert said[:2] == ["name none → Standard", "currency none → USD"]
    assert said[2].startswith("charge input: new: meter tokens, model graduated, tiers (up to 500,000, unit price ")


def test_examples_stand_where_prices_turn(plan: Read) -> None:
    old, new = plan(), plan(("0.0000025", "0.000002"))
    shown = examples(old.charges, new.charges)
    assert [
        (one.charge, one.quantity // QUANTITY_ONE, amount_decimal(one.before or 0), amount_decimal(one.after or 0))
        for one in shown
    ] == [
        ("input", 500_000, Decimal("1.5"), Decimal("1.5")),
        ("input", 1_200_000, Decimal("3.25"), Decimal("2.9")),
        ("input", 2_400_000, Decimal("5.65"), Decimal("5.3")),
    ]


def test_no_examples_of_one_price_everywhere_or_of_what_stays(plan: Read) -> None:
    assert examples(plan().charges, plan(("0.000015", "0.00003")).charges) == ()
    gone = plan().charges
    assert [one.after for one in examples(gone, gone[1:])] == [None, None, None]
