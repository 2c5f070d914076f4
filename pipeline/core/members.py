"""One event as a closing price sees it."""

from typing import NamedTuple

from pipeline.core.money import Amount, Micros, Quantity


class Member(NamedTuple):
    """An event that counts in a counter, each event once: voided ones are left out, corrected ones as they are now.

    Compares in the order that law 3 prices in: event time, then idempotency key.
    """

    at_us: Micros  #: the event's own time
    key: str  #: its idempotency key
    quantity: Quantity  #: what the meter measures of it alone, 1e-9
    text: str = ""  #: the value that a unique count counts
    subject: str = ""
    amount: Amount = 0  #: the amount the event brings, for dynamic charges: 1e-12
