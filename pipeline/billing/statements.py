"""What a payer owes for a billing period, exactly, and what earlier documents have billed of it.

One rule makes every document: it bills what should be, less what was booked. ``Due`` is what should be, ``Booked`` what
was, and ``differences`` what is left to bill: nothing where they agree, else a reversal of what was booked and a new
line. The close bills a period for the first time, an adjustment bills it again after late usage, a threshold bill bills
it early.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, timedelta
from functools import lru_cache
from typing import Any, Literal, NamedTuple, TypeAlias

from psycopg import Connection
from psycopg.rows import dict_row

from pipeline.billing import line_discounts, line_taxes
from pipeline.billing.close_entries import StoredLine, line_terms
from pipeline.billing.coupon_shares import unnamed_shares
from pipeline.billing.lines import open_invoices
from pipeline.billing.queue import Task
from pipeline.billing.rated import Terms
from pipeline.billing.rerate import Month, price_period
from pipeline.core.catalog import NOTICE_S, Catalog, Segment
from pipeline.core.cells import cell_values
from pipeline.core.charges import Charge, Share
from pipeline.core.credits import Grant
from pipeline.core.discounts import LineDiscount
from pipeline.core.fees import Fee
from pipeline.core.invoice import Line, LineKind
from pipeline.core.meters import Meter
from pipeline.core.money import (
    AMOUNT_DECIMALS,
    QUANTITY_DECIMALS,
    Amount,
    Micros,
    Quantity,
    amount_decimal,
    minor_units,
    plain,
    quantity_decimal,
    scaled,
)
from pipeline.core.periods import Period, format_instant, to_datetime, to_micros
from pipeline.core.rerating import ClosedLine, ClosedPeriod
from pipeline.core.totals import LineSum, close_sums

#: usage: a metered charge's line. fee: a charge's without a meter. commitment: what a spend commitment adds.
DueKind: TypeAlias = Literal["usage", "fee", "commitment"]

#: Parts of a price that a line shows; of a charge per subject there may be one for each of thousands.
_PARTS_MAX = 100


class Key(NamedTuple):
    """Names one thing owed, the same before and after a correction: lines of documents meet by it."""

    kind: DueKind
    account: str
    contract: str
    price_version: str
    charge: str
    cell: str
    segment_start_us: Micros


@dataclass(frozen=True, slots=True)
class Due:
    """One thing owed for a period: a line to be. Quantity in 1e-9 of its unit, amount in 1e-12, exact."""

    key: Key
    legal_entity: str
    currency: str
    plan: str
    plan_version: int
    meter: str
    quantity: Quantity
    unit: str
    exact_amount: Amount
    #: Before the charge's maximum and minimum.
    gross: Amount
    #: What the customer pays for, in time.
    service: Period
    tax_category: str
    #: The charge as it holds there; None for a commitment.
    charge: Charge | None
    segment: Segment | None
    #: The container's lines behind it, one for each version of its meter. None yet where booking its close entry makes
    #: it, none ever for a fee in advance and a commitment.
    line_ids: tuple[int, ...] = ()
    #: Units that credits paid for, by grant (1e-9): what is owed is the price of the others.
    units: Mapping[str, Quantity] = field(default_factory=dict)
    #: What a document shows of it, as JSON.
    detail: Mapping[str, Any] = field(default_factory=dict)

    @property
    def line_id(self) -> int | None:
        """The last version's line, which a document's line is linked to."""
        return self.line_ids[-1] if self.line_ids else None

    @property
    def is_nothing(self) -> bool:
        """Not worth a line: nothing was used, nothing is owed."""
        return not self.exact_amount and not self.quantity


@dataclass(frozen=True, slots=True)
class Booked:
    """A line that an issued or reviewed document billed, and no later one took back. Scaled as ``Due``."""

    key: Key
    document_id: int
    document_line_id: int
    #: "" of a document that is reviewed only.
    number: str
    legal_entity: str
    currency: str
    kind: LineKind
    tax_date: date
    service: Period
    plan: str
    plan_version: int
    meter: str
    #: The container's line behind it; None for a fee in advance and a commitment.
    line_id: int | None
    quantity: Quantity
    unit: str
    tax_category: str
    #: As it was billed, in smallest units, with its taxes.
    line: Line
    detail: Mapping[str, Any]

    def agrees(self, due: Due) -> bool:
        """Whether it bills what is due, in quantity and exact amount."""
        return (self.quantity, self.line.exact) == (due.quantity, due.exact_amount)


@dataclass(frozen=True, slots=True)
class Difference:
    """What a document has to bill for one key: what it takes back, and what it bills instead; either may be missing."""

    taken_back: tuple[Booked, ...]
    due: Due | None


def differences(dues: Iterable[Due], booked: Iterable[Booked]) -> list[Difference]:
    """What is left to bill, in the order of the dues, then of what is no longer due.

    Nothing is where one line was booked that agrees in quantity and exact amount. Lines of progress bills are taken
    back always, so that the period's own document shows the whole period.
    """
    before: defaultdict[Key, list[Booked]] = defaultdict(list)
    for one in booked:
        before[one.key].append(one)
    found = []
    for due in dues:
        lines = before.pop(due.key, [])
        if len(lines) == 1 and lines[0].kind != "progress" and lines[0].agrees(due):
            continue
        if lines or not due.is_nothing:
            found.append(Difference(tuple(lines), None if due.is_nothing else due))
    found += [Difference(tuple(lines), None) for lines in before.values()]
    return found


# What containers hold -----------------------------------------------------------------------------------------------


class AccountPeriod(NamedTuple):
    """A billing period of an account."""

    account: str
    period: Period


@dataclass(frozen=True, slots=True)
class Container:
    """An account's usage of a period in a currency, as ``billing.invoice`` collects it."""

    id: int
    currency: str
    state: Literal["open", "draft", "reviewed", "issued", "void"]
    supplement: int
    created_us: Micros


@dataclass(frozen=True, slots=True)
class HeldLine:
    """A container's line, with what a document shows of it."""

    stored: StoredLine
    container: int
    events: int
    late_events: int
    first_us: Micros | None
    last_us: Micros | None
    references: Mapping[str, Any]
    #: Whether close entries gave or took quantity: then it no longer holds the sum of its own events.
    moved: bool


@dataclass(frozen=True, slots=True)
class Held:
    """An account's period as it stands: all its containers, supplements too, and their lines by id."""

    account: str
    period: Period
    containers: tuple[Container, ...]
    lines: tuple[HeldLine, ...]


_SELECT_CONTAINERS = """
SELECT account, period_start, period_end, id, currency, state::text, supplement, created_at FROM billing.invoice
WHERE account = ANY(%s) AND period_end > %s AND period_end <= %s ORDER BY id
"""
#: An account's month ends up to a day beside that of UTC.
_DAY = timedelta(days=1)


def make_containers(connection: "Connection[Any]", catalog: Catalog, accounts: Collection[str], month: Month) -> None:
    """Make a container for every billing period that ends in a month, and currency of it, that has none.

    Before any lock is taken: the sink may be making one too, and then wants others.
    """
    keys = [
        (account, currency, period.start_us, period.end_us)
        for account, period in _periods(catalog, accounts, month)
        for currency in {segment.plan.currency for segment in catalog.segments_of(account, period)}
    ]
    open_invoices(connection, keys)


def hold(
    connection: "Connection[Any]", catalog: Catalog, accounts: Collection[str], month: Month, *, lock: bool
) -> dict[AccountPeriod, Held]:
    """The accounts' billing periods that end in a month, as they stand; by account, then by end.

    With ``lock`` all are held until the transaction ends, in the order the sink takes them in: nothing is added to them
    meanwhile.
    """
    wanted = _periods(catalog, accounts, month)
    found: defaultdict[AccountPeriod, list[Container]] = defaultdict(list)
    ends = to_datetime(month.period_in("UTC").start_us) - _DAY, to_datetime(month.period_in("UTC").end_us) + _DAY
    statement = _SELECT_CONTAINERS + (" FOR NO KEY UPDATE" if lock else "")
    for account, start, end, id, currency, state, supplement, created_at in connection.execute(
        statement, [sorted(accounts), *ends]
    ):
        period = Period(to_micros(start), to_micros(end))
        within = month_of(catalog, account, month)
        if within.start_us < period.end_us <= within.end_us:
            container = Container(id, currency, state, supplement, to_micros(created_at))
            found[AccountPeriod(account, period)].append(container)
    lines = _read_lines(connection, [container.id for containers in found.values() for container in containers])
    ordered = sorted(found.keys() | wanted, key=lambda one: (one.account, one.period.end_us, one.period.start_us))
    return {
        one: Held(
            *one,
            tuple(found.get(one, ())),
            tuple(line for container in found.get(one, ()) for line in lines.get(container.id, ())),
        )
        for one in ordered
    }


def _periods(catalog: Catalog, accounts: Iterable[str], month: Month) -> list[AccountPeriod]:
    return [
        AccountPeriod(account, period)
        for account in accounts
        for period in catalog.periods_ending(account, month_of(catalog, account, month))
    ]


def month_of(catalog: Catalog, account: str, month: Month) -> Period:
    """The month by an account's clock; of one that is not known, by UTC's."""
    known = catalog.accounts.get(account)
    return month.period_in(known.time_zone if known else "UTC")


def shared_period(task: Task, periods: Mapping[str, Sequence[Period]], month: Period) -> Period:
    """The period of a document with lines of several accounts: the payer's own, else from their first start to their
    last end; the month, by the payer's clock, where none has a period that ends in it.
    """
    every = [*periods[task.payer][-1:]] or [period for member in task.members for period in periods[member]] or [month]
    return Period(min(period.start_us for period in every), max(period.end_us for period in every))


_SELECT_LINES = """
SELECT line.invoice_id, invoice.state::text AS invoice_state, invoice.currency, invoice.period_start,
    invoice.period_end, line.id, line.contract, line.plan, line.plan_version, line.price_version, line.meter,
    line.meter_version, line.charge, line.segment_start, line.cell, line.quantity, line.amount,
    line.price_class::text AS price_class, line.events, line.late_events, line.first_event_at, line.last_event_at,
    line.reference_values, entries.back_dated, entries.moved, coalesce(entries.booked, 0) AS booked
FROM billing.invoice JOIN billing.invoice_line AS line ON line.invoice_id = invoice.id
LEFT JOIN LATERAL (
    SELECT bool_or('back_dated' = ANY(entry.reasons)) AS back_dated, bool_or(entry.quantity <> 0) AS moved,
        sum(entry.amount) AS booked
    FROM billing.close_entry AS entry WHERE entry.line_id = line.id
) AS entries ON true
WHERE invoice.id = ANY(%s) ORDER BY line.id
"""


def _read_lines(connection: "Connection[Any]", containers: Sequence[int]) -> dict[int, list[HeldLine]]:
    found: defaultdict[int, list[HeldLine]] = defaultdict(list)
    with connection.cursor(row_factory=dict_row) as cursor:
        for row in cursor.execute(_SELECT_LINES, [list(containers)]):
            found[row["invoice_id"]].append(_held_line(row))
    return found


def _held_line(row: dict[str, Any]) -> HeldLine:
    first, last = row["first_event_at"], row["last_event_at"]
    return HeldLine(
        stored=StoredLine(
            row["id"],
            line_terms(row),
            row["invoice_state"],
            scaled(row["quantity"], QUANTITY_DECIMALS),
            scaled(row["amount"], AMOUNT_DECIMALS),
            back_dated=bool(row["back_dated"]),
            booked=scaled(row["booked"], AMOUNT_DECIMALS),
        ),
        container=row["invoice_id"],
        events=row["events"],
        late_events=row["late_events"],
        first_us=None if first is None else to_micros(first),
        last_us=None if last is None else to_micros(last),
        references=row["reference_values"],
        moved=bool(row["moved"]),
    )


# What should be -----------------------------------------------------------------------------------------------------


class PublishedMeter(NamedTuple):
    """When a version of a meter was published, and from when it counts."""

    meter: str
    valid_from_us: Micros
    published_us: Micros


def price(
    connection: "Connection[Any]",
    catalog: Catalog,
    held: Held,
    published: Collection[PublishedMeter],
    grants: Sequence[Grant] = (),
) -> ClosedPeriod:
    """An account's period at its closing prices: from what its lines add up to where that is exact, else from events.

    ``grants``: unit credits that count in the period. They are drawn in the order of events, which no sum knows.

    Raises ValueError for a charge that cannot be priced, and for billed events that have no price.
    """
    closed = None
    if not grants and not any(line.moved or line.stored.back_dated for line in held.lines):
        sums = (_sum_of(line) for line in held.lines)
        closed = close_sums(catalog, held.account, held.period, sums, unsettled=_unsettled(held, published))
    if closed is None:
        closed = price_period(connection, catalog, held.account, held.period, grants=grants)
    if closed.refused:
        use, rejection = closed.refused[0]
        more = f" and {len(closed.refused) - 1:,} more events" if len(closed.refused) > 1 else ""
        raise ValueError(
            f"{closed.account}/{use.key} of {format_instant(use.at_us)}{more} were billed and have no price by today's "
            f"catalog: {rejection.message}. Publish what is missing, or void them"
        )
    return closed


def _sum_of(line: HeldLine) -> LineSum:
    terms = line.stored.terms
    return LineSum(
        terms.contract,
        terms.price_version,
        terms.segment_start_us,
        terms.charge,
        terms.meter,
        terms.meter_version,
        terms.cell,
        line.stored.quantity,
        line.events,
        line.first_us,
        line.last_us,
    )


def _unsettled(held: Held, published: Iterable[PublishedMeter]) -> frozenset[str]:
    """Meters that may not have been known to the rater yet when it rated usage of the period."""
    created_us = min((container.created_us for container in held.containers), default=0)
    known_us = created_us - NOTICE_S * 1_000_000
    return frozenset(
        one.meter for one in published if one.published_us > known_us and one.valid_from_us < held.period.end_us
    )


def dues(catalog: Catalog, held: Held, closed: ClosedPeriod) -> list[Due]:
    """What an account owes for its own period: a due per closing line, in the order of segments and charges."""
    lines: defaultdict[Key, list[HeldLine]] = defaultdict(list)
    for line in held.lines:
        lines[key_of(held.account, line.stored.terms)].append(line)
    return [_due(catalog, held.account, line, lines) for line in closed.lines]


def key_of(account: str, terms: Terms) -> Key:
    """The key of what stands on a container's line."""
    kind: DueKind = "usage" if terms.meter else "fee"
    return Key(
        kind,
        account,
        terms.contract,
        terms.price_version,
        terms.charge,
        terms.cell,
        terms.segment_start_us,
    )


def fee_due(account: str, fee: Fee) -> Due:
    """A fee in advance, for a period that is not over."""
    segment, charge = fee.segment, fee.charge
    key = Key("fee", account, segment.contract.id, segment.price_version, charge.id, "", segment.start_us)
    parts = fee.closing.parts
    detail = {**_described(segment, charge), "parts": [_part(share) for share in parts]}
    return _from_segment(segment, charge, None, key, fee.closing.quantity, fee.amount, parts, (), detail)


def _due(catalog: Catalog, account: str, line: ClosedLine, held: Mapping[Key, Sequence[HeldLine]]) -> Due:
    segment, charge, meter = line.segment, line.charge, line.meter
    kind: DueKind = "usage" if meter else "fee"
    key = Key(kind, account, segment.contract.id, segment.price_version, charge.id, line.cell, segment.start_us)
    behind = held.get(key, ())
    shares = [share for closing in line.closings.values() for share in closing.parts]
    detail = _described(segment, charge)
    if charge.by:
        detail["cell"] = dict(zip(charge.by, cell_values(line.cell, len(charge.by)), strict=True))
    if len(shares) <= _PARTS_MAX:
        detail["parts"] = [_part(share) for share in shares]
    if behind:
        detail |= _usage_shown(behind)
    line_ids = tuple(one.stored.id for one in sorted(behind, key=lambda one: one.stored.terms.meter_version))
    due = _from_segment(segment, charge, meter, key, line.quantity, line.amount, shares, line_ids, detail)
    return replace(due, units=line.units) if line.units else due


def _from_segment(
    segment: Segment,
    charge: Charge,
    meter: Meter | None,
    key: Key,
    quantity: Quantity,
    amount: Amount,
    shares: Iterable[Share],
    line_ids: tuple[int, ...],
    detail: Mapping[str, Any],
) -> Due:
    return Due(
        key=key,
        legal_entity=segment.contract.legal_entity,
        currency=segment.plan.currency,
        plan=segment.plan.id,
        plan_version=segment.plan.version,
        meter=meter.id if meter else "",
        quantity=quantity,
        unit=meter.unit if meter else "",
        exact_amount=amount,
        gross=sum(share.amount for share in shares if share.kind not in ("minimum", "maximum")),
        service=Period(segment.start_us, segment.end_us),
        tax_category=charge.tax_category,
        charge=charge,
        segment=segment,
        line_ids=line_ids,
        detail=detail,
    )


def _described(segment: Segment, charge: Charge) -> dict[str, Any]:
    described: dict[str, Any] = {"name": charge.title, "plan_name": segment.plan.name}
    if not segment.portion.is_whole:
        described["share"] = {
            "start": segment.portion.start,
            "end": segment.portion.end,
            "whole": segment.portion.whole,
        }
    return described


def _part(share: Share) -> dict[str, Any]:
    """A part of a price as JSON: numbers as exact text. ``over`` and ``up_to`` bound it within the whole quantity."""
    return {
        "kind": share.kind,
        "over": plain(quantity_decimal(share.first)),
        "up_to": plain(quantity_decimal(share.last)),
        "quantity": plain(quantity_decimal(share.quantity)),
        "packages": share.packages,
        "events": share.events,
        "unit_price": _price_text(share.unit_price),
        "flat": _price_text(share.flat),
        "amount": plain(amount_decimal(share.amount)),
    }


#: Prices are few, and each is on the lines of many accounts.
_price_text = lru_cache(maxsize=4096)(plain)


def _usage_shown(lines: Sequence[HeldLine]) -> dict[str, Any]:
    firsts = [line.first_us for line in lines if line.first_us is not None]
    lasts = [line.last_us for line in lines if line.last_us is not None]
    shown: dict[str, Any] = {
        "events": sum(line.events for line in lines),
        "late_events": sum(line.late_events for line in lines),
        "references": lines[-1].references,
    }
    if firsts and lasts:
        shown |= {"first_event_at": format_instant(min(firsts)), "last_event_at": format_instant(max(lasts))}
    return shown


# What was booked ----------------------------------------------------------------------------------------------------

# A line stands until a later document takes it back. Credit notes give money back; they do not change what is owed.
# What was reviewed is issued as it is: a document made meanwhile must not bill it once more.
_SELECT_BOOKED = """
SELECT line.*, coalesce(document.number, '') AS number, document.currency, document.tax_date, document.legal_entity
FROM unnest(%s::text[], %s::timestamptz[]) AS asked (account, since)
JOIN billing.document_line AS line ON line.account = asked.account AND line.period_end > asked.since
JOIN billing.document ON document.id = line.document_id
WHERE line.role = 'new' AND document.state IN ('reviewed', 'issued') AND document.kind <> 'credit_note'
    AND NOT EXISTS (
        SELECT FROM billing.document_line AS reversal JOIN billing.document AS later ON later.id = reversal.document_id
        WHERE reversal.adjusts_id = line.id AND reversal.role = 'reversal'
            AND later.state IN ('reviewed', 'issued') AND later.kind <> 'credit_note'
    )
ORDER BY line.id
"""


def read_booked(connection: "Connection[Any]", since_us: Mapping[str, Micros]) -> list[Booked]:
    """The lines that documents billed to accounts for service after an instant, each its own, and that still stand."""
    asked = [list(since_us), [to_datetime(at_us) for at_us in since_us.values()]]
    with connection.cursor(row_factory=dict_row) as cursor:
        rows = cursor.execute(_SELECT_BOOKED, asked).fetchall()
    shares = unnamed_shares(connection, [row["id"] for row in rows if "discounts" not in row["detail"]])
    return [_booked(row, shares.get(row["id"], ())) for row in rows]


def _booked(row: dict[str, Any], unnamed: tuple[LineDiscount, ...]) -> Booked:
    digits = minor_units(row["currency"])
    # An adjustment's own kind says nothing of what it stands in for.
    kind_was = row["detail"]["adjusts"]["kind"] if row["kind"] == "adjustment" else row["kind"]
    kind: DueKind = "commitment" if kind_was == "commitment" else "usage" if row["meter"] else "fee"
    return Booked(
        key=Key(
            kind,
            row["account"],
            row["contract"],
            row["price_version"],
            row["charge"],
            row["cell"],
            to_micros(row["segment_start"]),
        ),
        document_id=row["document_id"],
        document_line_id=row["id"],
        number=row["number"],
        legal_entity=row["legal_entity"],
        currency=row["currency"],
        kind=row["kind"],
        tax_date=row["tax_date"],
        service=Period(to_micros(row["period_start"]), to_micros(row["period_end"])),
        plan=row["plan"],
        plan_version=row["plan_version"],
        meter=row["meter"],
        line_id=row["line_id"],
        quantity=scaled(row["quantity"], QUANTITY_DECIMALS),
        unit=row["unit"],
        tax_category=row["tax_category"],
        line=Line(
            id=str(row["id"]),
            exact=scaled(row["exact_amount"], AMOUNT_DECIMALS),
            amount=scaled(row["amount"], digits),
            discount=scaled(row["discount_amount"], digits),
            net=scaled(row["net_amount"], digits),
            tax=scaled(row["tax_amount"], digits),
            total=scaled(row["total_amount"], digits),
            taxes=line_taxes.from_json(row["detail"].get("taxes", ()), row["currency"]),
            charge=row["charge"],
            at_us=to_micros(row["period_end"]) - 1,
            discounts=(
                *line_discounts.from_json(row["detail"], scaled(row["discount_amount"], digits), row["currency"]),
                *unnamed,
            ),
            account=row["account"],
        ),
        detail=row["detail"],
    )
