"""The balance that goes on from document to document, and payments."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.balances import PaymentState, Settlement, carry, open_amount, payment_state


@pytest.mark.parametrize(
    ("due", "balance", "applied", "payable", "after"),
    [(100, 0, 0, 100, 0), (100, 30, 30, 70, 0), (100, 130, 100, 0, 30), (-40, 30, -40, 0, 70), (0, 30, 0, 0, 30)],
    ids=["no balance", "part of it", "all of it", "what is given back is carried", "nothing due"],
)
def test_carry(due: int, balance: int, applied: int, payable: int, after: int) -> None:
    assert carry(due, balance) == (applied, payable, after)


@given(st.integers(-100, 100), st.integers(0, 100))
def test_nothing_is_lost_and_nothing_is_asked_below_0(due: int, balance: int) -> None:
    applied, payable, after = carry(due, balance)
    assert (applied + payable, applied + after) == (due, balance)
    assert payable >= 0
    assert after >= 0
    assert payable == 0 or after == 0


def test_a_debt_is_no_balance() -> None:
    with pytest.raises(ValueError, match="expected a balance of 0 or more in the customer's favour, got -1"):
        carry(100, -1)


@pytest.mark.parametrize(
    ("payable", "settlements", "left", "state"),
    [
        (100, [], 100, "unpaid"),
        (100, [Settlement("payment", 40)], 60, "partly_paid"),
        (100, [Settlement("payment", 100)], 0, "paid"),
        (100, [Settlement("payment", 100), Settlement("refund", -10)], 10, "partly_paid"),
        (100, [Settlement("payment", 100), Settlement("refund", -100)], 100, "unpaid"),
        (100, [Settlement("payment", 100), Settlement("credit_note", 10), Settlement("refund", -10)], 0, "paid"),
        (100, [Settlement("payment", 40), Settlement("write_off", 60)], 0, "uncollectible"),
        (0, [], 0, "paid"),
        (-100, [Settlement("refund", -100)], 0, "paid"),
    ],
)
def test_what_is_open(payable: int, settlements: list[Settlement], left: int, state: PaymentState) -> None:
    assert open_amount(payable, settlements) == left
    assert payment_state(payable, settlements) == state
