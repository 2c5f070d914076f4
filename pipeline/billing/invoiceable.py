"""Who gets an invoice for a month, and what stands in the way of making it: no price, no seller, no buyer, no tax, no
rate of exchange.

The close finds all of it too, payer by payer, as it fails; this looks at everybody beforehand, and adds up how many.
"""

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from decimal import Decimal
from typing import Any, Literal, NamedTuple, TypeAlias
from zoneinfo import ZoneInfo

from psycopg import Connection

from pipeline.billing import fx_rates, queue
from pipeline.billing.commitments import promising
from pipeline.billing.invoicing_store import Invoicing, consolidating, load, mark
from pipeline.billing.late_months import Late, concerned, late_months, read_open
from pipeline.billing.months import next_month
from pipeline.billing.prices import read_prices, with_accounts
from pipeline.billing.queue import Task
from pipeline.billing.rerate import Month
from pipeline.billing.statements import month_of, shared_period
from pipeline.core.catalog import Catalog, Segment
from pipeline.core.fees import due_in_advance
from pipeline.core.fx import NoRate, Rate, rate_on
from pipeline.core.parties import Customer, LegalEntity
from pipeline.core.periods import Period, to_datetime
from pipeline.core.tax import NoTaxRate, treatment

Kind: TypeAlias = Literal["prices", "legal_entities", "customers", "taxes", "rates"]

#: Payers named before "and n more".
_NAMED_MAX = 5
#: Payers whose part of the catalog and the configuration is read at a time.
_PAYERS_AT_ONCE = 500
#: How far an account's month may lie beside that of UTC.
_BESIDE = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Obstacle:
    """What is missing for how many payers, what their usage of the month comes to by currency, and what to do."""

    kind: Kind
    what: str
    payers: int
    todo: str
    money: tuple[tuple[str, Decimal], ...]


class _Sale(NamedTuple):
    """A part of a contract that a document of the month bills: by one plan, with one tax date."""

    payer: str
    contract: str
    #: As the contract names it; "" where it names none.
    legal_entity: str
    currency: str
    tax_date: date
    #: Charges with their tax categories, before the customer's own.
    charges: frozenset[tuple[str, str]]


_MONEY = """
SELECT invoice.currency, sum(line.amount)
FROM billing.invoice JOIN billing.invoice_line AS line ON line.invoice_id = invoice.id
WHERE invoice.account = ANY(%s) AND period_end > %s AND period_end <= %s
GROUP BY invoice.currency ORDER BY invoice.currency
"""


#: Who lacks a thing, by what it is.
_Lacking: TypeAlias = defaultdict[str, set[str]]


def obstacles(
    connection: "Connection[Any]", month: Month, *, now: datetime, accounts: Sequence[str] = ()
) -> list[Obstacle]:
    """What stands in the way of the invoices that are left to make of a month, for those who pay for these accounts,
    or for all.

    Asked are legal entity, customer and taxes as of the documents' tax dates, for all that they may bill: every plan
    that holds in a period, fees in advance, commitments, late usage of months before; and rates of exchange as of
    ``now``, an aware time. Raises ValueError for configuration this program cannot read.
    """
    first_day = date(month.year, month.month, 1)
    applied = mark(connection)
    parents = consolidating(connection, applied_until=applied, on=next_month(first_day) - timedelta(days=1))
    prices = Catalog.empty().extend(read_prices(connection), 0)
    lacking: dict[Kind, _Lacking] = {kind: defaultdict(set) for kind in _TODO}
    unnamed: set[str] = set()  # contracts that would have to name their seller
    rates: dict[date, list[Rate]] = {}
    for tasks in queue.planned_chunks(connection, str(month), accounts, consolidating=parents, at_once=_PAYERS_AT_ONCE):
        by_day: defaultdict[date, list[_Sale]] = defaultdict(list)
        for task, found in _sales(connection, prices, tasks, month):
            if isinstance(found, ValueError):
                lacking["prices"][str(found)].add(task.payer)
                continue
            for sale in found:
                by_day[sale.tax_date].append(sale)
        for day, sales in by_day.items():
            invoicing = load(connection, applied_until=applied, on=day, accounts={sale.payer for sale in sales})
            for sale in sales:
                for kind, what in _judge(connection, sale, invoicing, now, rates):
                    lacking[kind][what].add(sale.payer)
                    if what.startswith(_NAMES_NONE):
                        unnamed.add(sale.contract)
    utc = month.period_in("UTC")
    span = to_datetime(utc.start_us), to_datetime(utc.end_us) + _BESIDE
    todo = _TODO | {"legal_entities": _name_sellers(lacking["legal_entities"], unnamed)}
    return [_obstacle(connection, kind, found, todo[kind], *span) for kind, found in lacking.items() if found]


_TODO: dict[Kind, str] = {
    "prices": "publish what is missing, `tally plans publish FILE`",
    "legal_entities": "`tally invoicing apply FILE` says who sells",
    "customers": "`tally invoicing apply FILE` says who buys",
    "taxes": "`tally invoicing apply FILE` says what is charged",
    "rates": "`tally fx load FILE`",
}


# What there is to bill ------------------------------------------------------------------------------------------------


def _sales(
    connection: "Connection[Any]", prices: Catalog, tasks: Sequence[Task], month: Month
) -> Iterator[tuple[Task, set[_Sale] | ValueError]]:
    """What the documents of these payers may bill, as the close finds it; of one without a price, the problem."""
    accounts = concerned(connection, [member for task in tasks for member in task.members])
    catalog = with_accounts(connection, prices, accounts)
    promised = promising(connection, accounts)
    members = {task.payer: task.members for task in tasks}
    late = late_months(connection, catalog, members, read_open(connection, accounts), before=month)
    for task in tasks:
        try:
            own = set(_own_sales(catalog, task, month, promised))
            yield task, own.union(*(_late_sales(catalog, one, promised) for one in late.get(task.payer, ())))
        except ValueError as error:
            yield task, error


def _own_sales(catalog: Catalog, task: Task, month: Month, promised: Collection[str]) -> Iterator[_Sale]:
    """The month's own, and what is billed ahead with it."""
    months = {member: month_of(catalog, member, month) for member in task.members}
    periods = {member: catalog.periods_ending(member, months[member]) for member in task.members}
    shared = None if len(task.members) == 1 else shared_period(task, periods, months[task.payer])
    for member, own in periods.items():
        for period in own:
            yield from _of_period(catalog, task.payer, shared or period, member, period, promised)
        last = own[-1] if own else months[member]
        for fee in due_in_advance(catalog, member, months[member].end_us):
            charge = fee.charge.id, fee.charge.tax_category
            yield _sale(catalog, task.payer, shared or last, fee.segment, frozenset([charge]))


def _late_sales(catalog: Catalog, late: Late, promised: Collection[str]) -> Iterator[_Sale]:
    """A closed month's, which goes on the payer's next document with its own tax date."""
    shown = month_of(catalog, late.payer, late.month)
    for account in late.accounts:
        for period in catalog.periods_ending(account, month_of(catalog, account, late.month)):
            yield from _of_period(catalog, late.payer, shown, account, period, promised)


def _of_period(
    catalog: Catalog, payer: str, shown: Period, account: str, period: Period, promised: Collection[str]
) -> Iterator[_Sale]:
    """What an account's period comes to: a sale for each of its segments."""
    for segment in catalog.segments_of(account, period):
        charges = {(charge.id, charge.tax_category) for charge in segment.plan.charges}
        if account in promised:  # what a commitment adds is no charge of a plan
            charges.add(("", "standard"))
        yield _sale(catalog, payer, shown, segment, frozenset(charges))


def _sale(catalog: Catalog, payer: str, shown: Period, segment: Segment, charges: frozenset[tuple[str, str]]) -> _Sale:
    """``shown``: the document's period, whose last day by the payer's clock is its tax date."""
    known = catalog.accounts.get(payer)
    zone = ZoneInfo(known.time_zone if known else "UTC")
    tax_date = to_datetime(shown.end_us - 1).astimezone(zone).date()
    contract = segment.contract
    return _Sale(payer, contract.id, contract.legal_entity, segment.plan.currency, tax_date, charges)


# What it lacks --------------------------------------------------------------------------------------------------------


def _judge(
    connection: "Connection[Any]", sale: _Sale, invoicing: Invoicing, now: datetime, rates: dict[date, list[Rate]]
) -> Iterator[tuple[Kind, str]]:
    """What a sale lacks; ``rates`` keeps those of exchange by day."""
    entity, customer = invoicing.legal_entity(sale.legal_entity), invoicing.customers.get(sale.payer)
    if entity is None:
        yield "legal_entities", _no_seller(sale, invoicing)
    if customer is None:
        yield "customers", "no name and address"
    if entity is None or customer is None:
        return
    for problem in _untaxed(entity, customer, sale, invoicing):
        yield "taxes", problem
    day = now.astimezone(ZoneInfo(entity.time_zone)).date()
    if day not in rates:
        rates[day] = fx_rates.published(connection, day)
    no_rate = _without_rate(entity, customer, sale, day, rates[day])
    if no_rate is not None:
        yield "rates", no_rate


#: Said of a contract that names none, where there are several.
_NAMES_NONE = "expected a contract that names its legal entity, or one legal entity only"


def _no_seller(sale: _Sale, invoicing: Invoicing) -> str:
    known = ", ".join(sorted(invoicing.legal_entities)) or "none"
    if sale.legal_entity:
        return f"expected legal entity {sale.legal_entity!r}, got {known}"
    if not invoicing.legal_entities:
        return "expected a legal entity, got none"
    return f"{_NAMES_NONE}, got {known}"


def _name_sellers(lacking: Collection[str], unnamed: Collection[str]) -> str:
    """What to do about contracts without a legal entity: name one, where there are several, or apply it."""
    todo = [f"add legal_entity to contract {_named(sorted(unnamed))} and `tally accounts apply`"] if unnamed else []
    unknown = any(not what.startswith(_NAMES_NONE) for what in lacking)
    return "; ".join([*todo, *([_TODO["legal_entities"]] if unknown else [])])


def _untaxed(entity: LegalEntity, customer: Customer, sale: _Sale, invoicing: Invoicing) -> Iterator[str]:
    for category in {customer.tax_categories.get(charge, category) for charge, category in sale.charges}:
        try:
            treatment(entity, customer, category, sale.tax_date, invoicing.taxes)
        except NoTaxRate as error:
            yield str(error)


def _without_rate(entity: LegalEntity, customer: Customer, sale: _Sale, day: date, rates: list[Rate]) -> str | None:
    quote = customer.document_currency or entity.reporting_currency
    if quote == sale.currency:
        return None
    try:
        rate_on(sale.currency, quote, day, rates)
    except NoRate as error:
        return str(error)
    return None


def _obstacle(
    connection: "Connection[Any]",
    kind: Kind,
    found: Mapping[str, set[str]],
    todo: str,
    after: datetime,
    until: datetime,
) -> Obstacle:
    payers = sorted(set().union(*found.values()))
    problems = sorted(found, key=lambda what: (-len(found[what]), what))
    more = f" and {len(problems) - _NAMED_MAX:,} more" * (len(problems) > _NAMED_MAX)
    what = (
        f"{len(payers):,} payer{'s' * (len(payers) != 1)} ({_named(payers)}): {'; '.join(problems[:_NAMED_MAX])}{more}"
    )
    money = connection.execute(_MONEY, [payers, after, until]).fetchall()
    cents = tuple((currency, amount.quantize(Decimal("0.01"))) for currency, amount in money if amount)
    return Obstacle(kind, what, len(payers), todo, cents)


def _named(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED_MAX]) + f" and {len(names) - _NAMED_MAX:,} more" * (len(names) > _NAMED_MAX)
