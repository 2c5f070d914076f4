"""Taking usage back and setting it right, while its period is open: the words, and what a correction says.

A correction names one billed event and the rows it holds now. Its entry number is the event's next one: rows of kind
*void* take the held rows back under it, and a replacement's rows of kind *correction* stand under the number after it.
Nothing is updated (law 9), and the identity stays the event's own, so a voided event's key stays used up.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, Final, Self, get_args

from pipeline.core.catalog import Terms
from pipeline.core.charges import Charge, ChargeClass
from pipeline.core.meters import Meter
from pipeline.core.money import (
    AMOUNT_DECIMALS,
    QUANTITY_DECIMALS,
    Amount,
    Micros,
    Quantity,
    amount_decimal,
    minor_units,
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
        if len({(row["charge"], row["cell"]) for row in record["rows"]}) < len(record["rows"]):
            raise ValueError("expected one row of each charge and cell, got one twice")
        _check_years(record["decided_at"], record["origin_appended_at"])
        _check_texts(record["origin_topic"])
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
_CLASSES: Final = frozenset(get_args(ChargeClass))
#: One more digit does not fit into a rated row.
_NUMBER_MAX: Final = 10**38
#: What lines and rows have room for in their unique indexes, all texts of a row together (bytes), and these two alone
#: (characters): the sink takes no more.
_TEXTS_BYTES_MAX: Final = 2_300
_CHARGE_MAX, _CELL_MAX = 200, 400
#: Years in which every time zone can count, as in the catalog.
_YEAR_FIRST, _YEAR_LAST = 1970, 9998
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
    _check_texts(*(value for value in plain.values() if isinstance(value, str)))
    if not (0 <= record["plan_version"] <= _INT_MAX and 0 <= record["meter_version"] <= _INT_MAX):
        raise ValueError(f"expected versions of 32 bits, got {record['plan_version']} and {record['meter_version']}")
    if len(record["charge"]) > _CHARGE_MAX or len(record["cell"]) > _CELL_MAX:
        raise ValueError(f"expected a charge and a cell of at most {_CHARGE_MAX} and {_CELL_MAX} characters")
    _check_years(*(record[name] for name in _TIMES))
    if record["period_end"] <= record["period_start"]:
        raise ValueError(f"expected a period that ends after {record['period_start']}, got {record['period_end']}")
    if record["price_class"] not in _CLASSES:
        raise ValueError(f"expected a price class of {', '.join(sorted(_CLASSES))}, got {record['price_class']!r}")
    minor_units(record["currency"])
    quantity, amount = scaled(record["quantity"], QUANTITY_DECIMALS), scaled(record["amount"], AMOUNT_DECIMALS)
    if max(abs(quantity), abs(amount)) >= _NUMBER_MAX:
        raise ValueError(f"expected a quantity and an amount of at most 38 digits, got {quantity}e-9 and {amount}e-12")
    times: dict[str, Any] = {f"{name}_us": to_micros(record[name]) for name in _TIMES}
    return HeldRow(**plain, **times, quantity=quantity, amount=amount)


def _check_years(*times: datetime) -> None:
    for at in times:
        if not _YEAR_FIRST <= at.year <= _YEAR_LAST:
            raise ValueError(f"expected a time of the years {_YEAR_FIRST} to {_YEAR_LAST}, got {at}")


def _check_texts(*texts: str) -> None:
    for one in texts:
        if "\0" in one:
            raise ValueError(f"expected a text without NUL, got {one[:40]!r}")
    if sum(len(one.encode()) for one in texts) > _TEXTS_BYTES_MAX:
        raise ValueError(f"expected texts of at most {_TEXTS_BYTES_MAX} bytes in all")
