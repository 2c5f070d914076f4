"""Credits: who pays for what, and the laws that hold whatever is used and granted."""

from collections import defaultdict
from dataclasses import replace
from decimal import Decimal
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.charges import Charge, Tier
from pipeline.core.closing import Counter, Span, close_segment, closing_price
from pipeline.core.credits import (
    Draw,
    Grant,
    Owed,
    Rollover,
    burn_order,
    check_grant,
    check_reason,
    credit_segment,
    credits_for,
    draw,
    draw_units,
    minor_step,
    rolled_over,
    spread,
)
from pipeline.core.members import Member
from pipeline.core.meters import Meter
from pipeline.core.money import amount_decimal
from pipeline.core.periods import Period
from pipeline.core.plans import Pool


def use(at_us: int, amount: int, line: str = "a", charge: str = "") -> Owed:
    return Owed(at_us, f"{at_us}", line, charge or line, amount)


# -- which grant goes first


def test_priority_then_end_then_unpaid_then_oldest() -> None:
    grants = [
        Grant("never ends, oldest", 1, granted_us=1),
        Grant("paid, later", 1, end_us=90, granted_us=4),
        Grant("paid, earlier", 1, end_us=90, granted_us=3),
        Grant("promotional", 1, end_us=90, granted_us=5, kind="promotional"),
        Grant("ends first", 1, end_us=80, granted_us=6),
        Grant("asked for first", 1, priority=1, granted_us=7),
    ]
    order = ["asked for first", "ends first", "promotional", "paid, earlier", "paid, later", "never ends, oldest"]
    assert [grant.id for grant in burn_order(grants)] == order
    assert [grant.id for grant in burn_order(reversed(grants))] == order


def test_a_grant_pays_for_usage_of_its_time_only() -> None:
    """Burn-down over an expiry: what came before pays before, and what is left of it is gone."""
    promotion = Grant("promotion", 100, 0, 50, "promotional")
    prepaid = Grant("prepaid", 100, 20)
    drawn = draw([promotion, prepaid], [use(10, 30), use(49, 30), use(50, 30), use(60, 30)])
    assert drawn.draws == (Draw("promotion", "a", 60), Draw("prepaid", "a", 60))
    assert drawn.left == {"promotion": 40, "prepaid": 40}
    assert drawn.balance == 80
    assert not drawn.uncovered


def test_a_late_event_draws_what_was_valid_at_its_time() -> None:
    promotion, prepaid = Grant("promotion", 10, 0, 50), Grant("prepaid", 100)
    on_time = [use(30, 10), use(60, 5)]
    drawn = draw([promotion, prepaid], [*on_time, use(20, 10)])  # arrived last
    assert drawn == draw([promotion, prepaid], [use(20, 10), *on_time])
    assert drawn.left == {"promotion": 0, "prepaid": 85}


def test_a_grant_for_some_charges_leaves_the_others_alone() -> None:
    drawn = draw(
        [Grant("storage only", 100, charges=frozenset({"storage"}))], [use(1, 30, "api"), use(2, 40, "storage")]
    )
    assert drawn.draws == (Draw("storage only", "storage", 40),)
    assert drawn.uncovered == {"api": 30}


def test_overdraft_goes_so_far_and_the_rest_is_billed() -> None:
    drawn = draw([Grant("g", 10)], [use(1, 25)], overdraft=12)
    assert (drawn.amount, drawn.overdraft, drawn.balance) == (10, 12, -12)
    assert drawn.uncovered == {"a": 3}


def test_what_a_void_gives_back_is_uncovered_first_then_overdraft_then_the_latest_draw() -> None:
    grants = [Grant("first", 10, end_us=90), Grant("second", 10)]
    uses = [use(1, 26)]

    def after(back: int) -> tuple[dict[str, int], int, int]:
        drawn = draw(grants, [*uses, use(2, -back)], overdraft=4)
        return dict(drawn.left), drawn.overdraft, sum(drawn.uncovered.values())

    assert after(1) == ({"first": 0, "second": 0}, 4, 1)
    assert after(4) == ({"first": 0, "second": 0}, 2, 0)
    assert after(9) == ({"first": 0, "second": 3}, 0, 0)
    assert after(18) == ({"first": 2, "second": 10}, 0, 0)
    assert after(40) == ({"first": 10, "second": 10}, 0, 0)


def test_what_is_free_goes_before_credits() -> None:
    drawn = draw([Grant("g", 100)], [use(1, 30), use(2, 30)], free={"a": 40})
    assert drawn.amount == 20


# -- units, before price


def test_unit_credits_are_units_that_a_closing_price_does_not_see() -> None:
    one = 10**9
    charge = Charge("api", "calls", "per_unit", unit_price=Decimal("0.01"), included=5 * one)
    meter = Meter("calls", 1, "call", "sum", "calls", "call", (), False, 0)
    counter, span = Counter("api"), Span(0, 10, Period(0, 10))
    members = [Member(at, f"k{at}", 10 * one) for at in range(3)]
    grant = Grant("units", 30 * one, 0, 2, reduces="units", charges=frozenset({"api"}))
    drawn, units = draw_units([grant], {counter: members}, free={counter: charge.included})
    # Of the first event 5 are included and 5 are credits, as are all of the second; the third comes when they ended.
    assert units == {counter: 15 * one}
    assert drawn.left == {"units": 15 * one}
    closing = closing_price(charge, meter, members, span, credited=units[counter])
    assert amount_decimal(closing.amount) == Decimal("0.10")


def test_units_of_another_charge_are_not_drawn() -> None:
    grant = Grant("units", 10, reduces="units", charges=frozenset({"api"}))
    assert draw_units([grant], {Counter("storage"): [Member(0, "k", 5)]})[1] == {}


def test_units_are_drawn_for_what_is_used_in_the_end_only() -> None:
    """Ten units used and eight of them taken back leave eight credits for the other counter, as a pool would."""
    grant = Grant("units", 10, reduces="units", charges=frozenset({"a", "b"}))
    usage = {Counter("a"): [Member(0, "x", 10), Member(5, "y", -8)], Counter("b"): [Member(1, "z", 9)]}
    assert draw_units([grant], usage)[1] == {Counter("a"): 2, Counter("b"): 8}


SPAN = Span(0, 100, Period(0, 100))
SUM = Meter("calls", 1, "call", "sum", "calls", "call", (), True, 0)
UNITS = (
    Charge("a", "calls", "per_unit", unit_price=Decimal(3), included=7),
    Charge("b", "calls", "graduated", tiers=(Tier(20, Decimal(2)), Tier(None, Decimal(1)))),
)
unit_grants = st.lists(
    st.builds(
        lambda amount, start, length, priority, charges: Grant(
            "", amount, start, None if length is None else start + length, "prepaid", "units", priority, 0, charges
        ),
        st.integers(1, 60),
        st.integers(0, 60),
        st.none() | st.integers(1, 40),
        st.integers(0, 2),
        st.frozensets(st.sampled_from("ab"), min_size=1),
    ),
    max_size=4,
).map(lambda given: [replace(grant, id=f"g{number}") for number, grant in enumerate(given)])
unit_usage = st.lists(
    st.tuples(st.sampled_from([Counter("a"), Counter("b")]), st.integers(0, 99), st.integers(-15, 40)),
    min_size=1,
    max_size=12,
).map(
    lambda events: {
        counter: [Member(at, f"k{n}", quantity) for n, (of, at, quantity) in enumerate(events) if of == counter]
        for counter, *_ in events
    }
)


@given(unit_grants, st.integers(0, 30), unit_usage, st.randoms(use_true_random=False))
def test_units_drawn_and_units_priced_are_the_quantity_whatever_the_order_of_arrival(
    given_grants: list[Grant], included: int, usage: dict[Counter, list[Member]], random: Random
) -> None:
    charges, pools = [(charge, SUM) for charge in UNITS], [Pool("pool", "call", included, ("a", "b"))]
    left, units = credit_segment(given_grants, charges, pools, usage)
    credited = {counter: sum(parts.values()) for counter, parts in units.items()}
    closings = close_segment(charges, pools, usage, SPAN, credited=credited)
    for counter, members in usage.items():
        by_kind: defaultdict[str, int] = defaultdict(int)
        for part in closings[counter].parts:
            by_kind[part.kind] += part.quantity
        assert by_kind["credits"] == credited.get(counter, 0) >= 0
        assert sum(by_kind.values()) == max(sum(member.quantity for member in members), 0)
        priced = next(charge for charge in UNITS if charge.id == counter.charge)
        alone = closing_price(
            replace(priced, included=0), SUM, [Member(0, "", by_kind["usage"])], SPAN, cell=counter.cell
        )
        assert closings[counter].amount == alone.amount
    drawn = {grant.id: sum(parts.get(grant.id, 0) for parts in units.values()) for grant in given_grants}
    assert [grant.amount + drawn[grant.id] for grant in left] == [grant.amount for grant in given_grants]
    assert all(grant.amount >= 0 for grant in left)
    shuffled = {counter: random.sample(members, len(members)) for counter, members in reversed(usage.items())}
    assert credit_segment(random.sample(given_grants, len(given_grants)), charges, pools, shuffled)[1] == units
    # Once more with what was drawn, or anything up to what there was: the same (``billing.credits.units_drawn``).
    again = [replace(grant, amount=random.randint(drawn[grant.id], grant.amount)) for grant in given_grants]
    assert credit_segment(again, charges, pools, usage)[1] == units


def test_units_of_a_charge_that_is_priced_by_its_events_are_refused_where_it_is_used() -> None:
    charge = Charge("a", "calls", "percentage", rate=Decimal(1))
    grant = Grant("units", 10, 5, 9, reduces="units", charges=frozenset({"a"}))
    assert credit_segment([grant], [(charge, SUM)], (), {Counter("a"): [Member(4, "k", 5)]}) == ([grant], {})
    with pytest.raises(ValueError, match="granted for charge a, which cannot draw units"):
        credit_segment([grant], [(charge, SUM)], (), {Counter("a"): [Member(5, "k", 5)]})


# -- spreading


def test_spreads_a_total_with_its_tax_in_cents() -> None:
    cent = minor_step("EUR")
    parts = spread(1772 * cent, [use(1, 1), use(2, 1), use(3, 1)], step=cent)
    assert [part.amount // cent for part in parts] == [591, 590, 591]
    assert all(part.amount % cent == 0 for part in parts)


def test_a_spread_over_nothing_is_refused_unless_it_is_nothing() -> None:
    assert spread(0, []) == []
    with pytest.raises(ValueError, match="expected parts to spread 5 over, got none"):
        spread(5, [])
    with pytest.raises(ValueError, match="expected an amount in steps of 10, got 5"):
        spread(5, [use(1, 1)], step=10)


uses = st.lists(
    st.builds(
        lambda at, key, line, amount: Owed(at, f"{key:04}", line, line, amount),
        st.integers(0, 40),
        st.integers(0, 9999),
        st.sampled_from("abc"),
        st.integers(-30, 100),
    ),
    max_size=12,
    unique_by=lambda owed: owed.key,
)
grants = st.lists(
    st.builds(
        lambda amount, start, length, kind, priority, granted, charges: Grant(
            "", amount, start, None if length is None else start + length, kind, "total", priority, granted, charges
        ),
        st.integers(1, 150),
        st.integers(0, 30),
        st.none() | st.integers(1, 20),
        st.sampled_from(["prepaid", "promotional", "service", "correction"]),
        st.integers(0, 2),
        st.integers(0, 5),
        st.frozensets(st.sampled_from("abc"), max_size=2),
    ),
    max_size=5,
).map(lambda given: [replace(grant, id=f"g{number}") for number, grant in enumerate(given)])


@given(st.integers(-10_000, 10_000), st.lists(st.integers(-50, 100), min_size=1, max_size=8), st.sampled_from([1, 10]))
def test_a_spread_adds_up_in_whole_steps(amount: int, weights: list[int], step: int) -> None:
    parts = spread(amount * step, [use(at, weight) for at, weight in enumerate(weights)], step=step)
    assert sum(part.amount for part in parts) == amount * step
    assert all(part.amount % step == 0 for part in parts)


# -- laws


@given(grants, uses, st.integers(0, 60), st.randoms(use_true_random=False))
def test_nothing_is_lost_and_arrival_does_not_matter(
    given_grants: list[Grant], owed: list[Owed], overdraft: int, random: Random
) -> None:
    drawn = draw(given_grants, owed, overdraft=overdraft)
    due: defaultdict[str, int] = defaultdict(int)
    for one in owed:
        due[one.line] += one.amount
    paid: defaultdict[str, int] = defaultdict(int)
    by_grant: defaultdict[str, int] = defaultdict(int)
    for part in drawn.draws:
        paid[part.line] += part.amount
        by_grant[part.grant] += part.amount
    for line, amount in due.items():
        assert paid[line] + drawn.overdrawn.get(line, 0) + drawn.uncovered.get(line, 0) == max(amount, 0)
    for grant in given_grants:
        assert drawn.left[grant.id] + by_grant[grant.id] == grant.amount
        assert 0 <= drawn.left[grant.id] <= grant.amount
    assert 0 <= drawn.overdraft <= overdraft
    assert min([*drawn.overdrawn.values(), *drawn.uncovered.values()], default=1) > 0
    shuffled, others = list(owed), list(given_grants)
    random.shuffle(shuffled)
    random.shuffle(others)
    assert draw(others, shuffled, overdraft=overdraft) == drawn


@given(grants, uses)
def test_what_credits_do_not_pay_no_valid_grant_had_left(given_grants: list[Grant], owed: list[Owed]) -> None:
    """Greedy and complete: a use is billed only where every grant valid at its time was empty."""
    owed = [one._replace(amount=abs(one.amount)) for one in owed]
    drawn = draw(given_grants, owed)
    for one in owed:
        if drawn.uncovered.get(one.line) and len([other for other in owed if other.line == one.line]) == 1:
            valid = (grant for grant in given_grants if grant.valid_at(one.at_us) and grant.pays_for(one.charge))
            assert all(drawn.left[grant.id] == 0 for grant in valid)


@given(grants, uses, uses)
def test_use_and_its_void_leave_the_rest_as_without(
    given_grants: list[Grant], owed: list[Owed], extra: list[Owed]
) -> None:
    """Added and taken back at the same time, before anything else."""
    added = [one._replace(at_us=0, key=f"A{one.key}", amount=abs(one.amount)) for one in extra]
    voided = [one._replace(key=f"B{one.key}", amount=-one.amount) for one in added]
    rest = [one._replace(key=f"C{one.key}") for one in owed]
    assert draw(given_grants, [*added, *voided, *rest]).left == draw(given_grants, rest).left


# -- rollover, wallets, checks


@pytest.mark.parametrize(
    ("left", "overage", "rule", "balance"),
    [
        pytest.param(90, 0, Rollover(50), 50, id="at most the maximum"),
        pytest.param(30, 0, Rollover(50), 30, id="what is left"),
        pytest.param(0, 0, Rollover(50, 20), 20, id="at least the minimum"),
        pytest.param(0, 10, Rollover(50, 50, preserve_overage=True), 40, id="the overage is taken off"),
        pytest.param(0, 10, Rollover(50, 50), 50, id="or forgotten"),
        pytest.param(0, 10, Rollover(50, 0, preserve_overage=True), -10, id="and may be a debt"),
    ],
)
def test_rollover(left: int, overage: int, rule: Rollover, balance: int) -> None:
    assert rolled_over(left, rule, overage=overage) == balance


def test_a_payment_buys_credits_at_a_price() -> None:
    assert credits_for(10 * 10**12, Decimal(2)) == 5 * 10**12
    assert credits_for(10**12, Decimal(3)) == 333_333_333_333
    with pytest.raises(ValueError, match="expected a price per credit above 0, got 0"):
        credits_for(1, Decimal(0))


@pytest.mark.parametrize(
    ("grant", "rollover", "says"),
    [
        (Grant("g", 0), None, "expected credits above 0, got 0"),
        (Grant("g", -5), None, "expected credits above 0, got -5"),
        (Grant("g", 1, 5, 5), None, "end after they begin"),
        (Grant("g", 1, reduces="units"), None, "expected the charges that unit credits pay for"),
        (Grant("g", 1, 0, 9), Rollover(1, 2), "got 2 to 1"),
        (Grant("g", 1), Rollover(1), "expected an end of credits that roll over"),
    ],
)
def test_credits_that_cannot_be_given_say_why(grant: Grant, rollover: Rollover | None, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        check_grant(grant, rollover)


def test_a_reason_that_does_not_fit_is_answered_with_those_that_do() -> None:
    assert check_reason("fraud", {"fraud", "refunded"}) == "fraud"
    with pytest.raises(ValueError, match="expected a reason code of fraud, refunded, got 'whim'"):
        check_reason("whim", {"fraud", "refunded"})
