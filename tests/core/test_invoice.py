"""Documents: law 6's order step by step, and the laws that hold whatever is billed."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from decimal import Decimal
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.credit_notes import credit_note, credited, reversal
from pipeline.core.credits import Grant, Owed, minor_step
from pipeline.core.discounts import Coupon
from pipeline.core.invoice import CreditDraw, Document, Item, Limits, Totals, build
from pipeline.core.parties import COUPONS_APPLY, PRICES, TAX_ROUNDINGS, Policy
from pipeline.core.tax import Tax, Treatment

CENT = minor_step("EUR")


def charged(*percents: str) -> Treatment:
    return tuple(Tax(f"tax {percent}", "standard", "DE", Decimal(percent)) for percent in percents)


TREATMENTS = {"standard": charged("20"), "reduced": charged("7"), "both": charged("5", "9.975"), "zero": charged("0")}


def item(id: str, cents: int, **more: Any) -> Item:
    return Item(id, cents * CENT, charge=more.pop("charge", id), **more)


def bill(items: Sequence[Item], **more: Any) -> Document:
    given: dict[str, Any] = {"currency": "EUR", "policy": Policy(), "treatments": TREATMENTS, **more}
    return build(items, **given)


def credits(cents: int, **more: Any) -> Grant:
    return Grant(more.pop("id", "g"), cents * CENT, **more)


# -- the order


def test_a_plan_of_100_and_usage_of_30_at_20_percent() -> None:
    found = bill([item("plan", 10_000), item("usage", 3_000)])
    assert found.totals == Totals(13_000, 0, 13_000, 2_600, 15_600, 0, 0, 15_600)


def test_every_step_in_its_order() -> None:
    """Line coupon 25 %, invoice coupon 10.00, net credit 5.00, tax of 20 %, total credit 8.00, balance 2.00."""
    found = bill(
        [item("api", 8_000), item("fee", 2_000)],
        coupons=[
            Coupon("ten", 1, "", amount=1_000 * CENT, currency="EUR"),
            Coupon("quarter", 1, "", "line", percent=Decimal(25), charges=frozenset({"api"})),
        ],
        grants=[credits(500, id="net", reduces="net", charges=frozenset({"fee"})), credits(800, id="total")],
        balance=200,
    )
    assert found.totals == Totals(10_000, 3_500, 6_500, 1_300, 7_800, 800, 200, 6_800)
    assert [(one.coupon, one.grant, one.line, one.amount) for one in found.discounts] == [
        ("quarter", "", "api", 2_000),
        ("ten", "", None, 1_000),
        ("", "net", "fee", 500),
    ]
    assert found.draws == (CreditDraw("net", "fee", 500), CreditDraw("total", None, 800))
    assert [(line.amount, line.discount, line.net) for line in found.lines] == [
        (8_000, 2_750, 5_250),
        (2_000, 750, 1_250),
    ]
    assert found.balance_after == 0


def test_coupons_after_tax_pay_the_total() -> None:
    ten = Coupon("ten", 1, "", amount=1_000 * CENT, currency="EUR")
    after = bill([item("a", 7_000)], coupons=[ten], grants=[credits(3_000)], policy=Policy(coupons="after_tax"))
    assert after.totals == Totals(7_000, 0, 7_000, 1_400, 8_400, 4_000, 0, 4_400)
    assert [(one.amount, one.after_tax) for one in after.discounts] == [(1_000, True)]
    before = bill([item("a", 7_000)], coupons=[ten], grants=[credits(3_000)])
    assert before.totals == Totals(7_000, 1_000, 6_000, 1_200, 7_200, 3_000, 0, 4_200)


def test_coupons_after_tax_pay_no_more_than_lines_come_to_together() -> None:
    ten = Coupon("ten", 1, "", amount=1_000 * CENT, currency="EUR", charges=frozenset({"used"}))
    policy = Policy(coupons="after_tax")
    found = bill([item("used", 10_000), item("unused", -9_500)], coupons=[ten, ten], policy=policy)
    assert found.totals == Totals(500, 0, 500, 100, 600, 600, 0, 0)
    assert [one.amount for one in found.discounts] == [600]
    found = bill([item("used", 10_000), item("unused", -11_000)], coupons=[ten], policy=policy)
    assert found.totals == Totals(-1_000, 0, -1_000, -200, -1_200, 0, -1_200, 0)


def test_prices_with_tax_in_them_are_discounted_with_it() -> None:
    half = Coupon("half", 1, "", percent=Decimal(50))
    found = bill([item("a", 12_000)], coupons=[half], policy=Policy(prices="inclusive"))
    assert found.totals == Totals(12_000, 6_000, 5_000, 1_000, 6_000, 0, 0, 6_000)


@pytest.mark.parametrize(
    ("currency", "exact", "amount"),
    [("EUR", "0.005", 1), ("EUR", "0.004999999999", 0), ("EUR", "-0.005", -1), ("JPY", "0.5", 1), ("KWD", "0.0005", 1)],
)
def test_a_line_is_rounded_once_half_up(currency: str, exact: str, amount: int) -> None:
    one = Item("a", int(Decimal(exact).scaleb(12)), tax_category="zero")
    assert bill([one], currency=currency).totals.payable == max(amount, 0)
    assert bill([one], currency=currency).lines[0].amount == amount


def test_cells_of_a_charge_are_rounded_each() -> None:
    """The header is the sum of the lines as they are printed, not the sum of what they were before."""
    found = bill([Item(str(number), 4 * CENT // 10) for number in range(5)])
    assert found.totals.amount == 0


# -- credits


def test_a_grant_pays_for_the_usage_of_its_time_and_charge() -> None:
    """10.00 used half before the grant and half while it holds: 5.00 + 20 %; of the other charge nothing."""
    uses = (Owed(1, "early", "", "", 1), Owed(9, "late", "", "", 1))
    items = [item("a", 1_000, uses=uses), item("b", 1_000, at_us=9)]
    found = bill(items, grants=[credits(10_000, start_us=5, charges=frozenset({"a"}))])
    assert found.draws == (CreditDraw("g", None, 600),)


def test_credits_pay_no_more_than_lines_come_to_together() -> None:
    """A line that gives back 30.00 lowers what there is to pay: 70.00 net, 84.00 with tax."""
    items = [item("used", 10_000), item("unused", -3_000)]
    assert bill(items, grants=[credits(50_000, reduces="net")]).totals == Totals(7_000, 7_000, 0, 0, 0, 0, 0, 0)
    assert bill(items, grants=[credits(50_000)]).totals == Totals(7_000, 0, 7_000, 1_400, 8_400, 8_400, 0, 0)


def test_a_part_of_the_smallest_unit_stays_with_the_grant() -> None:
    found = bill([item("a", 1_000)], grants=[Grant("g", 100 * CENT + CENT // 2)])
    assert found.draws == (CreditDraw("g", None, 100),)
    halves = [Grant("half", CENT // 2, priority=1), credits(5_000)]
    assert bill([item("a", 1_000)], grants=halves).draws == (CreditDraw("g", None, 1_200),)


# -- below 0


def test_a_document_below_0_is_carried_forward() -> None:
    found = bill([item("unused", -5_000)], grants=[credits(1_000)], balance=100)
    assert found.totals == Totals(-5_000, 0, -5_000, -1_000, -6_000, 0, -6_000, 0)
    assert (found.balance_after, found.draws) == (6_100, ())


def test_a_document_of_nothing() -> None:
    found = bill([])
    assert (found.totals, found.lines, found.taxes) == (Totals(0, 0, 0, 0, 0, 0, 0, 0), (), ())


def test_an_id_used_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="expected lines with ids of their own, got a twice"):
        bill([item("a", 1), item("a", 2)])
    with pytest.raises(ValueError, match="got a twice"):
        bill([item("a", 1)], settled=bill([item("a", 1)]).lines)


# -- lines of other documents


def test_what_was_settled_keeps_its_tax_and_bears_no_coupon() -> None:
    """The final invoice of a period of which 200.00 were billed early at another rate."""
    early = bill([item("early", 20_000, tax_category="reduced")])
    found = bill(
        [item("whole", 40_000)],
        coupons=[Coupon("tenth", 1, "", percent=Decimal(10))],
        settled=[reversal(early.lines[0], "less early")],
    )
    assert found.totals == Totals(20_000, 4_000, 16_000, 7_200 - 1_400, 21_800, 0, 0, 21_800)
    assert [(str(row.tax.percent), row.base, row.amount) for row in found.taxes] == [
        ("20", 36_000, 7_200),
        ("7", -20_000, -1_400),
    ]


def test_credits_pay_for_an_adjustment_by_its_charge_and_time() -> None:
    late = replace(bill([item("late", 1_000, charge="api")]).lines[0], at_us=3)
    assert bill([], settled=[late], grants=[credits(5_000, charges=frozenset({"api"}))]).totals.credits == 1_200
    assert bill([], settled=[late], grants=[credits(5_000, start_us=4)]).totals.credits == 0


def test_credits_of_an_account_pay_for_its_lines_before_those_of_all() -> None:
    """North has 10.00 and 2.00 tax, of which it pays 9.00; the 12.00 of all pay the other 3.00, and 9.00 for South."""
    items = [item("n", 1_000, account="north"), item("s", 1_000, account="south")]
    own = credits(900, id="own", account="north")
    assert bill(items, grants=[credits(1_200), own]).draws == (
        CreditDraw("own", None, 900),
        CreditDraw("g", None, 1_200),
    )
    assert bill(items, grants=[credits(5_000, account="north")]).totals.credits == 1_200
    assert [line.net for line in bill(items, grants=[credits(5_000, reduces="net", account="north")]).lines] == [
        0,
        1_000,
    ]
    # Half of what South gets back is taken off what North owes, as off what Group owes.
    back = [*items[:1], item("g", 1_000, account="group"), item("s", -1_000, account="south")]
    assert bill(back, grants=[credits(5_000, account="north")]).totals.credits == 600


# -- credit notes


def total(documents: Iterable[Document]) -> Totals:
    return Totals(*map(sum, zip(*(document.totals for document in documents), strict=True)))


def test_a_credit_note_gives_back_what_was_payable_then_balance_then_credits() -> None:
    invoice = bill([item("a", 10_000), item("b", 0)], grants=[credits(4_000)], balance=3_000)
    assert invoice.totals == Totals(10_000, 0, 10_000, 2_000, 12_000, 4_000, 3_000, 5_000)
    first = credit_note(invoice, [credited(invoice.lines[0], "1", 1, 2)])
    assert first.totals == Totals(-5_000, 0, -5_000, -1_000, -6_000, 0, -1_000, -5_000)
    second = credit_note(invoice, [credited(invoice.lines[0], "2", 1, 2, before=1)], [first.totals])
    assert second.totals == Totals(-5_000, 0, -5_000, -1_000, -6_000, -4_000, -2_000, 0)
    assert total([invoice, first, second]) == Totals(0, 0, 0, 0, 0, 0, 0, 0)


def test_a_line_is_credited_whole_though_another_is_below_0() -> None:
    """120.00 back on an invoice of 84.00, of which 10.00 were paid by credits: 36.00 were owed to the customer."""
    invoice = bill([item("a", 10_000), item("b", -3_000)], grants=[credits(1_000)])
    first = credit_note(invoice, [reversal(invoice.lines[0], "1")])
    assert first.totals == Totals(-10_000, 0, -10_000, -2_000, -12_000, -1_000, 0, -11_000)
    second = credit_note(invoice, [reversal(invoice.lines[1], "2")], [first.totals])
    assert second.totals == Totals(3_000, 0, 3_000, 600, 3_600, 0, 0, 3_600)
    assert not any(total([invoice, first, second]))


def test_no_more_of_a_line_than_there_is_is_credited() -> None:
    invoice = bill([item("a", 10_000)])
    for part, before in ((4, 0), (2, 2), (0, 0), (-1, 2)):
        with pytest.raises(ValueError, match="expected a credit above 0 up to"):
            credited(invoice.lines[0], "1", part, 3, before=before)


def test_a_credit_by_quantity_is_cut_from_one_ruler() -> None:
    """Thirds of 10.00 and 2.00 tax: 3.33, 3.34, 3.33 and 0.67, 0.66, 0.67."""
    (line,) = bill([item("a", 1_000)]).lines
    parts = [credited(line, str(before), 1, 3, before=before) for before in range(3)]
    assert [(part.net, part.tax) for part in parts] == [(-333, -67), (-334, -66), (-333, -67)]


# -- laws


# Made from a seed: drawn one by one, their many numbers take longer to find than to reckon with.


def arguments(seed: int, *, at_least: int = -(10**6)) -> dict[str, Any]:
    """Arguments of build, of all kinds. ``at_least``: the lowest price of an item, in smallest units."""
    random = Random(seed)
    currency = random.choice(["EUR", "JPY", "KWD"])
    step = minor_step(currency)
    return {
        "items": [some_item(random, str(number), at_least, step) for number in range(random.randint(0, 5))],
        "currency": currency,
        "policy": Policy(random.choice(TAX_ROUNDINGS), random.choice(COUPONS_APPLY), random.choice(PRICES)),
        "treatments": TREATMENTS,
        "coupons": [some_coupon(random, currency, step) for _ in range(random.randint(0, 3))],
        "grants": [
            Grant(
                str(number),
                random.randint(1, 10 ** random.randint(3, 7) * step),
                random.randint(0, 9),
                reduces=random.choice(["net", "total"]),
                charges=some_charges(random),
                account=random.choice(["", "north", "south"]),
            )
            for number in range(random.randint(0, 3))
        ],
        "balance": random.choice([0, random.randint(0, 10**6)]),
    }


def some_item(random: Random, id: str, at_least: int, step: int) -> Item:
    cents = random.choice([0, 1, 10, random.randint(at_least, 10**6)])
    gross = cents * step + random.choice([0, step // 2, random.randrange(step)])
    limits = None
    if random.random() < 0.4:
        maximum, minimum = (random.choice([None, random.randint(0, 10**6 * step)]) for _ in range(2))
        limits = Limits(id, maximum, minimum)
    return Item(
        id,
        gross if limits is None else limits.applied(gross),
        random.choice(["usage", "fee", "commitment"]),
        charge=random.choice("ab"),
        tax_category=random.choice(sorted(TREATMENTS)),
        limits=limits,
        gross=gross,
        at_us=random.randint(0, 9),
        account=random.choice(["group", "north", "south"]),
    )


def some_coupon(random: Random, currency: str, step: int) -> Coupon:
    found = Coupon("coupon", 1, "", random.choice(["line", "invoice"]), charges=some_charges(random))
    if random.random() < 0.5:
        return replace(found, percent=Decimal(random.choice([1, 333, 1_000, 5_000, 10_000])) / 100)
    return replace(found, amount=random.randint(1, 10 ** random.randint(1, 6)) * step, currency=currency)


def some_charges(random: Random) -> frozenset[str]:
    return frozenset(random.choice(["", "", "a", "b"]))


SEEDS = st.integers(0, 2**32)
LAWS = settings(max_examples=200, deadline=None)


def check(found: Document) -> None:
    """Every sum that a document shows."""
    totals = found.totals
    for number, name in enumerate(("amount", "discount", "net", "tax", "total")):
        assert totals[number] == sum(getattr(line, name) for line in found.lines)
    for line in found.lines:
        assert line.total == line.net + line.tax
        assert line.tax == sum(part.amount for part in line.taxes)
        assert {part.base for part in line.taxes} == {line.net}
        assert line.amount - line.discount in (line.net, line.total)
        assert line.discount == sum(part.amount for part in line.discounts if not part.after_tax)
    assert totals.tax == sum(row.amount for row in found.taxes)
    by_tax: dict[Tax, list[int]] = {}
    for part in (part for line in found.lines for part in line.taxes):
        sums = by_tax.setdefault(part.tax, [0, 0])
        sums[0] += part.base
        sums[1] += part.amount
    assert {row.tax: [row.base, row.amount] for row in found.taxes} == by_tax
    assert totals.payable == totals.total - totals.credits - totals.balance
    assert totals.discount == sum(one.amount for one in found.discounts if not one.after_tax)


def check_paid(found: Document, grants: Iterable[Grant]) -> None:
    """What paid the total are draws and coupons after tax; no grant is drawn for more than it has."""
    assert found.totals.credits == sum(one.amount for one in found.draws if one.line is None) + sum(
        one.amount for one in found.discounts if one.after_tax
    )
    drawn: defaultdict[str, int] = defaultdict(int)
    for part in found.draws:
        assert part.amount > 0
        drawn[part.grant] += part.amount * minor_step(found.currency)
    assert all(drawn[grant.id] <= grant.amount for grant in grants)
    account_of = {grant.id: grant.account for grant in grants if grant.account}
    owner_of = {line.id: line.account for line in found.lines}
    assert all(
        owner_of[one.line or ""] == account_of[one.grant]
        for one in found.discounts
        if one.grant in account_of and not one.restates
    )
    for account in set(account_of.values()):
        own = [one.amount for one in found.draws if one.line is None and account_of.get(one.grant) == account]
        due = sum(line.total - line.paid_by_coupons for line in found.lines if line.account == account)
        assert sum(own) <= max(due, 0)


@LAWS
@given(SEEDS, SEEDS)
def test_the_header_is_the_sum_of_the_lines_in_every_column(seed: int, of_other: int) -> None:
    given, other = arguments(seed), arguments(of_other)
    check(build(**given))
    coupons = [coupon for coupon in other["coupons"] if coupon.currency in (None, given["currency"])]
    earlier = build(**{**other, "currency": given["currency"], "coupons": coupons}).lines
    settled = [reversal(line, f"less {line.id}") for line in earlier]
    found = build(**given, settled=settled)
    check(found)
    assert found.totals.payable >= 0
    assert found.balance_after >= 0
    paid_before = sum(line.paid_by_coupons for line in settled)
    assert 0 <= found.totals.credits - paid_before <= max(found.totals.total - paid_before, 0)
    check_paid(found, given["grants"])


@LAWS
@given(SEEDS)
def test_no_document_is_below_0_without_a_credit(seed: int) -> None:
    found = build(**arguments(seed, at_least=0))
    assert min(found.totals) >= 0
    assert all(min(line.discount, line.net, line.tax, line.total) >= 0 for line in found.lines)


@LAWS
@given(SEEDS)
def test_the_order_of_items_and_grants_does_not_matter(seed: int) -> None:
    given = arguments(seed)
    found = build(**given)
    shuffled, grants = (Random(seed).sample(given[name], len(given[name])) for name in ("items", "grants"))
    again = build(**{**given, "items": shuffled, "grants": grants})
    assert [line.id for line in again.lines] == [one.id for one in shuffled]
    assert sorted(again.lines, key=lambda line: line.id) == sorted(found.lines, key=lambda line: line.id)
    assert replace(again, lines=found.lines) == found


@LAWS
@given(SEEDS, st.lists(st.integers(1, 100), min_size=1, max_size=4))
def test_an_invoice_and_credit_notes_on_all_of_it_sum_to_0_in_every_column(seed: int, parts: list[int]) -> None:
    invoice = build(**arguments(seed))
    notes: list[Document] = []
    for number, part in enumerate(parts):
        before = sum(parts[:number])
        lines = [credited(line, f"{line.id}/{number}", part, sum(parts), before=before) for line in invoice.lines]
        notes.append(credit_note(invoice, lines, [note.totals for note in notes]))
        check(notes[-1])
    assert not any(total([invoice, *notes]))
    by_coupon: dict[tuple[str, str], int] = {}
    for off in (off for document in (invoice, *notes) for off in document.discounts if not off.after_tax):
        by_coupon[off.coupon, off.grant] = by_coupon.get((off.coupon, off.grant), 0) + off.amount
    assert not any(by_coupon.values())
    by_tax: dict[Tax, int] = {}
    for row in (row for document in (invoice, *notes) for row in document.taxes):
        by_tax[row.tax] = by_tax.get(row.tax, 0) + row.amount
    assert not any(by_tax.values())
