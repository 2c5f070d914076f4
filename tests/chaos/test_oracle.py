"""The oracle by itself: what it ought to say of a topic, worked out by hand."""

from datetime import UTC, datetime
from fractions import Fraction

import pytest

from tests.chaos import schedule
from tests.chaos.load import EVENT_FRAME, body
from tests.chaos.oracle import Arrival, Identity, Known, Line, Place, expect
from tests.chaos.prices import PriceList, Version, charges, cost

_NOW = datetime(2026, 3, 10, 12, tzinfo=UTC)
_NOW_US = int(_NOW.timestamp()) * 1_000_000
_CHANGE_US = _NOW_US + 10_000_000
_PRICES = PriceList([Version(1, 0, charges(1, 1)), Version(2, _CHANGE_US, charges(1, 2))])
_KNOWN = Known(_PRICES, {"acct-00": "America/New_York"}, {"late-0": "UTC"}, {b"nonsense": "undecodable"})
_MARCH_IN_NEW_YORK = int(datetime(2026, 3, 1, 5, tzinfo=UTC).timestamp()) * 1_000_000


def _arrivals(*events: tuple[str, str, int, str]) -> list[Arrival]:
    """(account, key, microseconds after now, bytes) in order of arrival, all now."""
    return [
        Arrival(
            Place(0, offset),
            _NOW_US // 1000,
            EVENT_FRAME
            + body(
                {
                    "idempotency_key": key,
                    "account": account,
                    "event_type": "api.call",
                    "timestamp": _NOW_US + after_us,
                    "subject": "",
                    "properties": {"bytes": value},
                    "source": "producer-1/epoch",
                    "sequence": offset + 1,
                }
            ),
        )
        for offset, (account, key, after_us, value) in enumerate(events)
    ]


def test_the_first_of_an_identity_is_rated_and_order_decides_what_the_others_are() -> None:
    found = expect(
        _arrivals(
            ("acct-00", "a", 0, "many"),  # does not use its key up
            ("acct-00", "a", 0, "7"),
            ("acct-00", "a", 0, "7"),
            ("acct-00", "a", 0, "8"),
            ("acct-00", "a", 1, "7"),
            ("acct-00", "b", 0, "3.5"),
        ),
        _KNOWN,
    )
    assert list(found.states.values()) == [
        ("dead_lettered", "not_a_number"),
        ("rated", ""),
        ("duplicate", ""),
        ("dead_lettered", "conflicting_duplicate"),
        ("dead_lettered", "conflicting_duplicate"),
        ("rated", ""),
    ]
    assert found.lines == {Line("acct-00", "bytes", 1, _MARCH_IN_NEW_YORK): (Fraction("10.5"), 2)}
    assert found.arrived == {"producer-1": {1, 2, 3, 4, 5, 6}}


def test_age_and_price_go_by_the_events_time() -> None:
    days = 86_400_000_000
    found = expect(
        _arrivals(
            ("acct-00", "a", -35 * days, "1"),
            ("acct-00", "b", -35 * days - 1, "1"),
            ("acct-00", "c", 300_000_000, "1"),
            ("acct-00", "d", 300_000_001, "1"),
            ("acct-00", "e", 9_999_999, "1"),
        ),
        _KNOWN,
    )
    assert [reason for _, reason in found.states.values()] == ["", "too_old", "", "in_the_future", ""]
    assert sorted((line.version, events) for line, (_, events) in found.lines.items()) == [(1, 1), (1, 1), (2, 1)]


def test_usage_of_accounts_that_came_later() -> None:
    found = expect(
        _arrivals(("late-0", "a", 0, "1"), ("nobody", "a", 0, "1"), ("late-0", "a", 0, "1"), ("late-0", "b", 0, "-1")),
        _KNOWN,
    )
    assert found.any_one == {Identity("late-0", "a"): (frozenset({Place(0, 0), Place(0, 2)}), {"bytes": Fraction(1)})}
    assert found.states == {
        Place(0, 1): ("parked", "unknown_account"),
        Place(0, 3): ("dead_lettered", "negative_quantity"),
    }
    assert found.outcomes == {"rated": 1, "duplicate": 1, "parked": 1, "dead_lettered": 1}


def test_what_is_no_usage_is_refused_for_the_reason_it_was_made_for() -> None:
    assert expect([Arrival(Place(1, 0), 0, b"nonsense")], _KNOWN).states == {
        Place(1, 0): ("dead_lettered", "undecodable")
    }


_TIERS = [{"up_to": "10", "unit_price": "0.5", "flat": "3"}, {"unit_price": "0.25", "flat": "1"}]


@pytest.mark.parametrize(
    ("charge", "quantity", "price"),
    [
        ({"model": "per_unit", "unit_price": "0.0000000000005"}, "1", "0.000000000001"),  # half up
        ({"model": "package", "package_size": "7", "package_price": "2"}, "7.000000001", "4"),
        ({"model": "graduated", "tiers": _TIERS}, "10", "8"),
        ({"model": "graduated", "tiers": _TIERS}, "12", "9.5"),
        ({"model": "graduated", "tiers": _TIERS, "included": "2"}, "1", "3"),
        ({"model": "volume", "tiers": _TIERS}, "10", "8"),
        ({"model": "volume", "tiers": _TIERS}, "12", "4"),
    ],
)
def test_prices(charge: dict[str, object], quantity: str, price: str) -> None:
    assert cost(charge, Fraction(quantity)) == Fraction(price)


def test_a_seed_gives_the_same_faults_again() -> None:
    assert schedule.draw(7, 600, 90) == schedule.draw(7, 600, 90)
    assert schedule.draw(7, 600, 90) != schedule.draw(8, 600, 90)


def test_nobody_is_dealt_two_faults_at_once() -> None:
    ends: dict[str, float] = {}
    for fault in schedule.draw(11, 1800, 270):
        if fault.target:
            assert fault.at >= ends.get(fault.target, 0.0), fault
            ends[fault.target] = fault.at + fault.seconds
