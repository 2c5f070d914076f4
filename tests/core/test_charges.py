"""Price models against a table of cases, and against the same rules written a second time in fractions."""

from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.charges import Charge, Tier, compile_price, tier_shares
from pipeline.core.money import amount_decimal, plain, scaled


def q(text: str) -> int:
    return scaled(Decimal(text), 9)


def tiers(*lines: tuple[str | None, str, str]) -> tuple[Tier, ...]:
    return tuple(Tier(None if up is None else q(up), Decimal(unit), Decimal(flat)) for up, unit, flat in lines)


DEMO = tiers(("500000", "0.000003", "0"), ("1200000", "0.0000025", "0"), (None, "0.000002", "0"))
FLATS = tiers(("10", "10", "2"), ("20", "5", "3"), (None, "5", "3"))

PER_UNIT = Charge("c", "m", "per_unit", unit_price=Decimal("0.000015"))
GRADUATED = Charge("c", "m", "graduated", tiers=DEMO)
GRADUATED_FLAT = Charge("c", "m", "graduated", tiers=FLATS)
VOLUME = Charge("c", "m", "volume", tiers=tiers(("5", "7", "0"), ("10", "6.5", "0"), (None, "6", "0")))
VOLUME_FLAT = Charge("c", "m", "volume", tiers=tiers(("100", "2", "10"), ("200", "1", "0"), (None, "0.5", "50")))
PACKAGE = Charge("c", "m", "package", package_size=q("100"), package_price=Decimal("5"))

CASES = {
    "per unit, nothing": (PER_UNIT, "0", "0"),
    "per unit, one": (PER_UNIT, "1", "0.000015"),
    "per unit, a fraction of a unit": (PER_UNIT, "0.5", "0.0000075"),
    "per unit, below zero costs what zero costs": (PER_UNIT, "-5", "0"),
    "per unit, included units are free": (replace(PER_UNIT, included=q("100")), "100", "0"),
    "per unit, one unit past the included": (replace(PER_UNIT, included=q("100")), "101", "0.000015"),
    "per unit, rounded once half up at 12 decimals": (
        replace(PER_UNIT, unit_price=Decimal("0.0000000000005")),
        "1",
        "0.000000000001",
    ),
    "per unit, just below half": (replace(PER_UNIT, unit_price=Decimal("0.00000000000049")), "1", "0"),
    "per unit, eighteen decimals": (
        replace(PER_UNIT, unit_price=Decimal("0.000000000000000001")),
        "1000000",
        "0.000000000001",
    ),
    "graduated, nothing": (GRADUATED, "0", "0"),
    "graduated, the last unit of the first tier": (GRADUATED, "500000", "1.5"),
    "graduated, crosses a tier by one unit": (GRADUATED, "500001", "1.5000025"),
    "graduated, crosses a tier by a billionth": (GRADUATED, "500000.000000001", "1.500000000000"),
    "graduated, crosses two tiers": (GRADUATED, "1200001", "3.250002"),
    "graduated, first flat fee at zero": (GRADUATED_FLAT, "0", "2"),
    "graduated, no flat fee at zero where the charge says so": (replace(GRADUATED_FLAT, flat_on_zero=False), "0", "0"),
    "graduated, first flat fee from the first unit": (replace(GRADUATED_FLAT, flat_on_zero=False), "1", "12"),
    "graduated, second flat fee not yet due on the bound": (GRADUATED_FLAT, "10", "102"),
    "graduated, second flat fee past the bound": (GRADUATED_FLAT, "11", "110"),
    "graduated, tiers begin after the included units": (replace(GRADUATED_FLAT, included=q("5")), "16", "110"),
    "graduated, flat fee due while all is included": (replace(GRADUATED_FLAT, included=q("5")), "5", "2"),
    "volume, the bound belongs to its tier": (VOLUME, "5", "35"),
    "volume, crosses a tier by one unit": (VOLUME, "6", "39"),
    "volume, far into the last tier": (VOLUME, "25", "150"),
    "volume, a cheaper tier costs less in total": (VOLUME_FLAT, "101", "101"),
    "volume, flat fee at zero": (VOLUME_FLAT, "0", "10"),
    "volume, tiers begin after the included units": (replace(VOLUME, included=q("2")), "7", "35"),
    "package, nothing": (PACKAGE, "0", "0"),
    "package, one begun": (PACKAGE, "1", "5"),
    "package, exactly full": (PACKAGE, "100", "5"),
    "package, the next one begun by a billionth": (PACKAGE, "100.000000001", "10"),
    "package, after included units": (replace(PACKAGE, included=q("100")), "201", "10"),
    "package, all included": (replace(PACKAGE, included=q("200")), "121", "0"),
    "package, price finer than an amount": (
        replace(PACKAGE, package_price=Decimal("0.0000000000004")),
        "300",
        "0.000000000001",
    ),
}


@pytest.mark.parametrize(("charge", "quantity", "expected"), CASES.values(), ids=CASES)
def test_price(charge: Charge, quantity: str, expected: str) -> None:
    assert plain(amount_decimal(compile_price(charge)(q(quantity)))) == plain(Decimal(expected))


BROKEN = {
    "per unit without a price": (replace(PER_UNIT, unit_price=None), "unit_price of 0 or more, got None"),
    "a negative price": (replace(PER_UNIT, unit_price=Decimal(-1)), "unit_price of 0 or more, got -1"),
    "a price that is no number": (replace(PER_UNIT, unit_price=Decimal("NaN")), "unit_price of 0 or more, got NaN"),
    "more than 18 decimals": (replace(PER_UNIT, unit_price=Decimal("1E-19")), "at most 18 decimals"),
    "negative included units": (replace(PER_UNIT, included=-1), "0 or more included units"),
    "no tiers": (replace(GRADUATED, tiers=()), "the last without up_to"),
    "the last tier bounded": (replace(GRADUATED, tiers=DEMO[:1]), "the last without up_to"),
    "bounds that do not ascend": (replace(VOLUME, tiers=(DEMO[1], DEMO[0], DEMO[2])), "bounds that ascend"),
    "an open tier in the middle": (replace(VOLUME, tiers=(DEMO[2], DEMO[2])), "bounds that ascend"),
    "a first tier of nothing": (replace(VOLUME, tiers=(Tier(0, Decimal(1)), DEMO[2])), "bounds that ascend"),
    "a package of nothing": (replace(PACKAGE, package_size=0), "package_size above 0"),
    "a package without price": (replace(PACKAGE, package_price=None), "package_price of 0 or more"),
}


@pytest.mark.parametrize(("charge", "message"), BROKEN.values(), ids=BROKEN)
def test_refuses_what_cannot_be_priced(charge: Charge, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compile_price(charge)


# Laws, for charges of every model -----------------------------------------------------------------------------------

prices = st.decimals(0, 1000, places=18, allow_nan=False) | st.sampled_from(
    [Decimal("0.000003"), Decimal("0.1"), Decimal("5E-13"), Decimal(0)]
)
quantities = st.integers(0, 10**27) | st.integers(0, 1000).map(lambda n: n * 10**9) | st.integers(0, 10**12)
included = st.just(0) | quantities


@st.composite
def tiered(draw: st.DrawFn) -> Charge:
    bounds = sorted(draw(st.sets(quantities.filter(bool), max_size=5)))
    return Charge(
        "c",
        "m",
        draw(st.sampled_from(["graduated", "volume"])),
        tiers=tuple(Tier(bound, draw(prices), draw(prices)) for bound in [*bounds, None]),
        included=draw(included),
        flat_on_zero=draw(st.booleans()),
    )


charges = st.one_of(
    st.builds(Charge, st.just("c"), st.just("m"), st.just("per_unit"), unit_price=prices, included=included),
    st.builds(
        Charge,
        st.just("c"),
        st.just("m"),
        st.just("package"),
        package_size=st.integers(1, 10**15),
        package_price=prices,
        included=included,
    ),
    tiered(),
)


def cost_in_fractions(charge: Charge, quantity: int) -> Fraction:
    """The rules of the price models once more, unit by unit, without scaled integers: whole units, whole currency."""
    free = Fraction(charge.included, 10**9)
    units = max(Fraction(quantity, 10**9) - free, Fraction(0))
    if charge.model == "per_unit":
        return units * Fraction(charge.unit_price or 0)
    if charge.model == "package":
        size = Fraction(charge.package_size or 0, 10**9)
        packages = 0 if not units else (units / size).__ceil__()
        return packages * Fraction(charge.package_price or 0)
    if not units:
        return Fraction(charge.tiers[0].flat) if charge.flat_on_zero else Fraction(0)
    cost, lower = Fraction(0), Fraction(0)
    for tier in charge.tiers:
        upper = units if tier.up_to is None else min(Fraction(tier.up_to, 10**9), units)
        if upper > lower:
            if charge.model == "graduated":
                cost += Fraction(tier.flat) + (upper - lower) * Fraction(tier.unit_price)
            else:
                cost = Fraction(tier.flat) + units * Fraction(tier.unit_price)
        lower = upper
    return cost


@given(charges, quantities)
def test_integer_arithmetic_equals_fractions_rounded_once(charge: Charge, quantity: int) -> None:
    exact = cost_in_fractions(charge, quantity) * 10**12
    assert compile_price(charge)(quantity) == (exact + Fraction(1, 2)).__floor__()


@given(charges, st.lists(st.integers(0, 10**15), max_size=20), st.randoms(use_true_random=False))
def test_order_and_splitting_of_usage_do_not_matter(charge: Charge, parts: list[int], shuffled: object) -> None:
    price = compile_price(charge)

    def billed(pieces: list[int]) -> int:
        """The sum of the amounts of single events, as the rater books them: the first against an absent counter."""
        totals = [sum(pieces[:n]) for n in range(1, len(pieces) + 1)]
        amounts = [price(after) - before for after, before in zip(totals, [0, *map(price, totals)], strict=False)]
        return sum(amounts)

    assert billed(parts) == (price(sum(parts)) if parts else 0)
    assert billed(sorted(parts)) == billed(parts)
    assert billed([sum(parts)]) == price(sum(parts))


@given(charges, quantities)
def test_shares_add_up_exactly(charge: Charge, quantity: int) -> None:
    shares = tier_shares(charge, quantity)
    assert sum(share.amount for share in shares) == compile_price(charge)(quantity)
    assert sum(share.quantity for share in shares) == (quantity if shares else 0)
    assert all(left.last == right.first for left, right in pairwise(shares))
    assert all(share.amount >= 0 for share in shares[:-1])


def test_shares_show_each_tier() -> None:
    shown = [
        (share.quantity // 10**9, plain(share.unit_price), plain(share.flat), plain(amount_decimal(share.amount)))
        for share in tier_shares(replace(GRADUATED_FLAT, included=q("5")), q("26"))
    ]
    assert shown == [(5, "0", "0", "0"), (10, "10", "2", "102"), (10, "5", "3", "53"), (1, "5", "3", "8")]


def test_shares_show_packages() -> None:
    free, packed = tier_shares(replace(PACKAGE, included=q("100")), q("201"))
    assert (free.quantity, free.amount) == (q("100"), 0)
    assert (packed.quantity, packed.packages, packed.amount) == (q("101"), 2, 10 * 10**12)


def test_shares_of_a_flat_fee_without_usage() -> None:
    (only,) = tier_shares(VOLUME_FLAT, -3)
    assert (only.quantity, only.flat, only.amount) == (0, Decimal(10), 10 * 10**12)


def test_nothing_used_and_nothing_due_has_no_shares() -> None:
    assert tier_shares(PER_UNIT, 0) == []
    assert tier_shares(replace(VOLUME_FLAT, flat_on_zero=False), 0) == []
