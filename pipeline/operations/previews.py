"""What a correction would change, before anyone decides it: by account and charge, exact where the stream can tell.

Priced as the rater will price it (``pipeline.rating.correct``), from today's catalog and what the counters hold now: a
row of a running price is taken back, and a replacement's added, at what the price of its counter changes by; other rows
are taken back at what they were billed at. Nothing is changed here.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from difflib import get_close_matches
from functools import cache
from typing import Any, NamedTuple, TypeAlias

from psycopg import Connection

from pipeline.core.aggregation import is_additive
from pipeline.core.catalog import Catalog, Segment, Terms
from pipeline.core.cells import cell_text, cell_values
from pipeline.core.charges import PER_EVENT, Charge, EventPrice, charge_class, compile_event_price, compile_price
from pipeline.core.corrections import HeldRow, priced_as
from pipeline.core.meters import Measure, Meter, Properties, compile_cell, compile_measure, properties_read
from pipeline.core.money import (
    QUANTITY_DECIMALS,
    Amount,
    Micros,
    Quantity,
    amount_decimal,
    quantity_decimal,
    scaled,
)
from pipeline.core.periods import to_datetime, to_micros
from pipeline.core.reasons import Rejection
from pipeline.operations.at_risk import read_catalog
from pipeline.operations.corrections import PORTION, Pick, Row, as_held, held_rows
from pipeline.operations.events import Mend


class Held(NamedTuple):
    """What is billed of picked events on one account and charge now, and what the correction would make of it.

    Exact, in whole units. Quantities are None where quantities of events do not add up to anything: of a maximum, an
    average, a level. ``change`` is None where only the close can tell: a replacement on a charge of class period.
    """

    account: str
    charge: str
    currency: str
    events: int
    quantity: Decimal | None
    amount: Decimal
    #: The replacements', 0 for a void.
    new_quantity: Decimal | None
    change: Decimal | None


@dataclass(frozen=True, slots=True)
class Preview:
    """What a correction would do. ``refused``: replacements that have no price by today's catalog, and why."""

    held: list[Held]
    refused: list[tuple[Pick, str]] = field(default_factory=list)
    #: Properties to be set that nothing prices and that an event lacks, each with what it may have been meant to be.
    unread: dict[str, str] = field(default_factory=dict)


#: Account, contract, charge, segment start, cell, and subject where the charge counts per subject.
_Counter: TypeAlias = tuple[str, str, str, datetime, str, str | None]

# All rows of a counter, on however many lines they stand; none for a counter that no event has reached.
_RUNNING = """
SELECT sum(usage.quantity_after - usage.quantity_before)
FROM billing.invoice
JOIN billing.invoice_line AS line ON line.invoice_id = invoice.id
JOIN billing.rated_usage AS usage ON usage.line_id = line.id
WHERE (invoice.account, line.contract, line.charge, line.segment_start, line.cell) = (%s, %s, %s, %s, %s)
    AND (%s::text IS NULL OR usage.subject = %s)
"""


def preview(connection: "Connection[Any]", picks: Sequence[Pick], mend: Mend | None = None) -> Preview:
    """What voiding these events would change, or replacing them where there is something to mend; voided ones nothing.

    Raises ValueError for a catalog this program cannot read.
    """
    work = _Work(read_catalog(connection, {pick.account for pick in picks}), mend)
    for start in range(0, len(picks), PORTION):
        portion = picks[start : start + PORTION]
        rows_of = held_rows(connection, portion)
        for pick in portion:
            rows = rows_of.get(pick.identity, [])
            if rows and rows[0]["kind"] != "void":
                work.take(pick, rows)
    return Preview(work.priced(connection), work.refused, work.unread)


def unread(
    connection: "Connection[Any]", account: str, event_type: str, at: datetime, names: Iterable[str]
) -> list[str]:
    """Those properties that no meter or charge of the account looks at, in an event of this type and time.

    No names where the account has no terms for it yet. Raises ValueError for a catalog this program cannot read.
    """
    terms = read_catalog(connection, [account]).terms(account, event_type, to_micros(at))
    return [] if isinstance(terms, Rejection) else sorted(set(names) - _read_by(terms))


@dataclass(slots=True)
class _Sum:
    """Of one account, charge and currency. Scaled integers."""

    events: int = 0
    quantity: Quantity = 0
    amount: Amount = 0
    new_quantity: Quantity = 0
    change: Amount = 0
    #: Whether quantities add up; whether the stream can tell the change.
    adds_up: bool = True
    told: bool = True


@dataclass(slots=True)
class _Move:
    """What happens to a counter of a running price."""

    charge: Charge
    currency: str
    #: What moves it, in order, and whether at the price: rows taken back at what they were billed at move it alone.
    steps: list[tuple[Quantity, bool]] = field(default_factory=list)


class _Work:
    """Gathers events; prices them together at the end, since they share counters."""

    def __init__(self, catalog: Catalog, mend: Mend | None) -> None:
        self._catalog, self._mend = catalog, mend
        self._sums: defaultdict[tuple[str, str, str], _Sum] = defaultdict(_Sum)
        self._moves: dict[_Counter, _Move] = {}
        self.refused: list[tuple[Pick, str]] = []
        self.unread: dict[str, str] = {}

    def take(self, pick: Pick, rows: Sequence[Row]) -> None:
        for row in rows:
            self._take_back(row, as_held(row))
        if self._mend and (problem := self._replace(rows[0])):
            self.refused.append((pick, problem))

    def _take_back(self, row: Row, held: HeldRow) -> None:
        total = self._sums[row["account"], held.charge, held.currency]
        meter = self._catalog.meter(held.meter, to_micros(row["event_time"]))
        additive = meter is not None and is_additive(meter)
        total.adds_up &= additive
        total.events += 1
        total.quantity += held.quantity
        total.amount += held.amount
        terms = self._catalog.terms(row["account"], row["event_type"], to_micros(row["event_time"]))
        found = None if isinstance(terms, Rejection) else priced_as(held, terms)
        if found is not None:
            charge = found[0] if additive else None
        elif isinstance(terms, Rejection) or held.price_class == "period":
            charge = None
        else:  # another version counts now: its counter goes on from where the row leaves it
            charge = next((one for one, _ in terms.priced if one.id == held.charge), None)
        move = None
        if charge is not None and charge.model not in PER_EVENT:
            move = self._move(row, held.contract, charge, held.segment_start_us, held.cell, held.currency)
        if move is not None and found is not None and held.price_class == "running":
            move.steps.append((-held.quantity, True))
            return
        total.change -= held.amount
        if move is not None:
            move.steps.append((-held.quantity, False))

    def _replace(self, row: Row) -> str | None:
        """Count the event as it would be; why it would be refused, if so."""
        assert self._mend is not None
        texts: dict[str, str] = {**row["properties"], **self._mend.properties}
        event_type = str(self._mend.fields.get("event_type", row["event_type"]))
        row = row | {"subject": self._mend.fields.get("subject", row["subject"])}
        at_us = to_micros(row["event_time"])
        terms = self._catalog.terms(row["account"], event_type, at_us)
        if isinstance(terms, Rejection):
            return terms.message
        read = _read_by(terms)
        for name in self._mend.properties.keys() - read - row["properties"].keys():
            self.unread[name] = _meant(name, read)
        properties = {name.encode(): value.encode() for name, value in texts.items()}
        measured = []
        for charge, meter in terms.priced:
            quantity = _measure(meter)(properties)
            if isinstance(quantity, Rejection):
                return quantity.message
            if quantity is not None:
                measured.append((charge, meter, quantity))
        if not measured:
            return "no charge of the plan counts it: the filters of all its meters leave it out"
        for charge, meter, quantity in measured:
            if problem := self._add(row, terms.segment, charge, meter, quantity, properties):
                return problem
        return None

    def _add(
        self, row: Row, segment: Segment, charge: Charge, meter: Meter, quantity: Quantity, properties: Properties
    ) -> str | None:
        currency = segment.plan.currency
        total = self._sums[row["account"], charge.id, currency]
        total.adds_up &= is_additive(meter)
        total.new_quantity += quantity
        pooled = segment.pool_of(charge.id) is not None
        if charge_class(charge, meter, pooled=pooled) == "period":
            total.told = False
        elif charge.model in PER_EVENT:
            amount = _event_price(charge)(quantity, properties)
            if isinstance(amount, Rejection):
                return amount.message
            total.change += amount
        else:
            cell = cell_text(tuple(value.decode() for value in compile_cell(charge.by)(properties)))
            move = self._move(row, segment.contract.id, charge, segment.start_us, cell, currency)
            move.steps.append((quantity, True))
        return None

    def _move(self, row: Row, contract: str, charge: Charge, start_us: Micros, cell: str, currency: str) -> _Move:
        subject = row["subject"] if charge.per_subject else None
        counter = (row["account"], contract, charge.id, to_datetime(start_us), cell, subject)
        return self._moves.setdefault(counter, _Move(charge, currency))

    def priced(self, connection: "Connection[Any]") -> list[Held]:
        for counter, move in self._moves.items():
            account, _, name, *_, cell, subject = counter
            found = connection.execute(_RUNNING, [*counter, subject]).fetchone()
            assert found is not None
            running = None if found[0] is None else scaled(found[0], QUANTITY_DECIMALS)
            price = compile_price(move.charge, cell_values(cell, len(move.charge.by)))
            total = self._sums[account, name, move.currency]
            for quantity, at_the_price in move.steps:
                before, running = running, (running or 0) + quantity
                if at_the_price:
                    # A counter that no event has reached costs nothing.
                    costs = price(running), 0 if before is None else price(before)
                    total.told &= None not in costs
                    total.change += (costs[0] or 0) - (costs[1] or 0)
        return [
            Held(
                *key,
                total.events,
                quantity_decimal(total.quantity) if total.adds_up else None,
                amount_decimal(total.amount),
                quantity_decimal(total.new_quantity) if total.adds_up else None,
                amount_decimal(total.change) if total.told else None,
            )
            for key, total in sorted(self._sums.items())
        ]


def _read_by(terms: Terms) -> frozenset[str]:
    """Every property of an event that its price or its line shows."""
    names: set[str] = set()
    for charge, meter in terms.priced:
        names |= properties_read(meter) | set(charge.by) | set(charge.references)
        names |= {charge.amount_property} if charge.amount_property else set()
    return frozenset(names)


def _meant(name: str, read: Iterable[str]) -> str:
    """``, did you mean tokens?``, or all there are."""
    known = sorted(read)
    close = get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else f"read are {', '.join(known) or 'none'}"


@cache
def _measure(meter: Meter) -> Measure:
    return compile_measure(meter)


@cache
def _event_price(charge: Charge) -> EventPrice:
    return compile_event_price(charge)
