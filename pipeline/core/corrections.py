"""Taking usage back and setting it right, while its period is open: the words, and what a correction says.

A correction names one billed event and the rows it holds now. Its entry number is the event's next one: rows of kind
*void* take the held rows back under it, and a replacement's rows of kind *correction* stand under the number after it.
Nothing is updated (law 9), and the identity stays the event's own, so a voided event's key stays used up.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, Self

from pipeline.core.catalog import Terms
from pipeline.core.charges import Charge
from pipeline.core.meters import Meter
from pipeline.core.money import (
    AMOUNT_DECIMALS,
    QUANTITY_DECIMALS,
    Amount,
    Micros,
    Quantity,
    amount_decimal,
    quantity_decimal,
    scaled,
)
from pipeline.core.periods import to_datetime, to_micros


class ReasonCode(StrEnum):
    """Why usage is corrected. Values are written into tables: never rename one."""

    DUPLICATE = "duplicate"  # the same use, sent under two keys
    WRONG_QUANTITY = "wrong_quantity"
    WRONG_ACCOUNT = "wrong_account"
    WRONG_PROPERTIES = "wrong_properties"
    TEST_USAGE = "test_usage"  # never meant to be billed
    SERVICE_FAULT = "service_fault"  # used because of a fault of ours
    MISSING_USAGE = "missing_usage"  # was used and never sent
    BACKFILL = "backfill"
    GOODWILL = "goodwill"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class HeldRow:
    """A rated row that a correction takes back, as it stands in PostgreSQL. Names as in ``RatedUsage``.

    Quantity in units of 1e-9, amount in units of 1e-12, times in microseconds since 1970 UTC: exact.
    """

    contract: str
    plan: str
    plan_version: int
    meter: str
    meter_version: int
    price_version: str
    charge: str
    period_start_us: Micros
    period_end_us: Micros
    segment_start_us: Micros
    cell: str
    currency: str
    price_class: str
    quantity: Quantity
    amount: Amount
    late: bool


@dataclass(frozen=True, slots=True)
class Correction:
    """One billed event to take back (``replacement`` is None) or to set right.

    ``event`` and ``replacement`` are framed ``UsageEvent``s of one identity and time. The origin is the event's.
    """

    number: int  #: of ``billing.correction``
    entry: int  #: of the rows of kind void, at least 1; a replacement's rows have the next
    reason_code: str
    actor: str
    decided_at_us: Micros
    catalog_offset: int  #: the rows were rated with the catalog up to here
    origin_topic: str
    origin_partition: int
    origin_offset: int
    origin_appended_ms: int
    event: bytes
    rows: tuple[HeldRow, ...]
    replacement: bytes | None = None

    def to_record(self) -> dict[str, Any]:
        """As the Avro record ``Correction`` has it."""
        return {
            "number": self.number,
            "entry": self.entry,
            "reason_code": self.reason_code,
            "actor": self.actor,
            "decided_at": to_datetime(self.decided_at_us),
            "catalog_offset": self.catalog_offset,
            "origin_topic": self.origin_topic,
            "origin_partition": self.origin_partition,
            "origin_offset": self.origin_offset,
            "origin_appended_at": to_datetime(self.origin_appended_ms * 1000),
            "event": self.event,
            "rows": [_row_record(row) for row in self.rows],
            "replacement": self.replacement,
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """Read back. Raises ValueError for what no command writes."""
        if not (1 <= record["entry"] < _INT_MAX and 0 <= record["origin_partition"] <= _INT_MAX):
            got = f"{record['entry']} and {record['origin_partition']}"
            raise ValueError(f"expected an entry number from 1 and a partition from 0, of 32 bits, got {got}")
        if not record["rows"]:
            raise ValueError("expected rows to take back, got none")
        return cls(
            number=record["number"],
            entry=record["entry"],
            reason_code=record["reason_code"],
            actor=record["actor"],
            decided_at_us=to_micros(record["decided_at"]),
            catalog_offset=record["catalog_offset"],
            origin_topic=record["origin_topic"],
            origin_partition=record["origin_partition"],
            origin_offset=record["origin_offset"],
            origin_appended_ms=to_micros(record["origin_appended_at"]) // 1000,
            event=record["event"],
            rows=tuple(_held_row(row) for row in record["rows"]),
            replacement=record["replacement"],
        )


#: Fields of a held row that stand in a rated row as they are.
_PLAIN: Final = (
    "contract",
    "plan",
    "plan_version",
    "meter",
    "meter_version",
    "price_version",
    "charge",
    "cell",
    "currency",
    "price_class",
    "late",
)
_INT_MAX: Final = 2**31 - 1
_TIMES: Final = ("period_start", "period_end", "segment_start")


def terms_record(row: HeldRow) -> dict[str, Any]:
    """The part of a rated row that a held row gives unchanged: terms, class and lateness."""
    times = {name: to_datetime(getattr(row, f"{name}_us")) for name in _TIMES}
    return {name: getattr(row, name) for name in _PLAIN} | times


def priced_as(row: HeldRow, terms: Terms) -> tuple[Charge, Meter] | None:
    """The charge and meter that price the row's event now, if they are those it was rated by."""
    segment = terms.segment
    then = (row.contract, row.plan, row.plan_version, row.price_version, row.segment_start_us)
    now = (segment.contract.id, segment.plan.id, segment.plan.version, segment.price_version, segment.start_us)
    if now != then:
        return None
    for charge, meter in terms.priced:
        if charge.id == row.charge and (meter.id, meter.version) == (row.meter, row.meter_version):
            return charge, meter
    return None


def _row_record(row: HeldRow) -> dict[str, Any]:
    numbers = {"quantity": quantity_decimal(row.quantity), "amount": amount_decimal(row.amount)}
    return terms_record(row) | numbers


def _held_row(record: Mapping[str, Any]) -> HeldRow:
    plain: dict[str, Any] = {name: record[name] for name in _PLAIN}
    times: dict[str, Any] = {f"{name}_us": to_micros(record[name]) for name in _TIMES}
    return HeldRow(
        **plain,
        **times,
        quantity=scaled(record["quantity"], QUANTITY_DECIMALS),
        amount=scaled(record["amount"], AMOUNT_DECIMALS),
    )
