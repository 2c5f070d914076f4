"""Who gets an invoice for a month, and what stands in the way of making it: no seller, no buyer, no tax, no rate.

The close finds all of it too, payer by payer, as it fails; this looks at everybody beforehand, and adds up how many.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from decimal import Decimal
from typing import Any, Literal, NamedTuple, TypeAlias
from zoneinfo import ZoneInfo

from psycopg import Connection

from pipeline.billing import fx_rates
from pipeline.billing.invoicing_store import Invoicing, load, mark
from pipeline.billing.prices import read_catalog
from pipeline.billing.rerate import Month
from pipeline.core.fx import NoRate, Rate, rate_on
from pipeline.core.parties import Customer, LegalEntity
from pipeline.core.periods import to_datetime
from pipeline.core.tax import NoTaxRate, treatment

Kind: TypeAlias = Literal["legal_entities", "customers", "taxes", "rates"]

#: Payers named before "and n more".
_NAMED_MAX = 5
#: Payers whose part of the configuration is read at a time.
_PAYERS_AT_ONCE = 2_000
#: Accounts whose part of the catalog is read at a time.
_ACCOUNTS_AT_ONCE = 500
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
    """A seller, a buyer, and what is sold: payers have one per contract."""

    payer: str
    #: Whose contract it is: the payer's, or of a child whose lines are on its invoice.
    account: str
    contract: str
    #: As the contract names it; "" where it names none.
    legal_entity: str
    currency: str
    #: Tax categories of the plan's charges.
    categories: list[str]


# Whose lines are on whose invoice goes up from child to parent as long as parents consolidate; more than 16 levels are
# a circle. A plan is that of a contract's first phase: what only a later one needs, the close says.
_SALES = """
WITH RECURSIVE newest AS (
    SELECT DISTINCT ON (kind, id) kind, id, document FROM billing.catalog_version
    WHERE kind IN ('account', 'contract', 'plan') ORDER BY kind, id, version DESC
), paid AS (
    SELECT id, id AS payer, 0 AS depth FROM newest WHERE kind = 'account'
    UNION ALL
    SELECT paid.id, parent.document ->> 'parent', depth + 1
    FROM paid JOIN newest AS parent ON parent.kind = 'account' AND parent.id = paid.payer
    WHERE parent.document ->> 'parent' = ANY(%(consolidating)s) AND depth < 16
), payer AS (
    SELECT DISTINCT ON (id) id, payer FROM paid ORDER BY id, depth DESC
)
SELECT payer.payer, payer.id, contract.id, coalesce(contract.document ->> 'legal_entity', ''),
    plan.document ->> 'currency',
    ARRAY(
        SELECT DISTINCT coalesce(charge ->> 'tax_category', 'standard')
        FROM jsonb_array_elements(plan.document -> 'charges') AS charge ORDER BY 1
    )
FROM newest AS contract
JOIN payer ON payer.id = contract.document ->> 'account'
JOIN newest AS plan ON plan.kind = 'plan' AND plan.id = contract.document ->> 'plan'
WHERE contract.kind = 'contract'
    AND (contract.document ->> 'start')::timestamptz < %(until)s
    AND coalesce((contract.document ->> 'end')::timestamptz > %(from)s, true)
    AND (%(accounts)s::text[] IS NULL OR payer.payer IN (SELECT payer FROM payer WHERE id = ANY(%(accounts)s)))
ORDER BY 1
"""
_CONSOLIDATING = """
SELECT id FROM (
    SELECT DISTINCT ON (id) id, document FROM billing.invoicing_version
    WHERE kind = 'customer' AND valid_from <= %s ORDER BY id, version DESC
) AS newest
WHERE (document ->> 'consolidates')::boolean
"""
_MONEY = """
SELECT invoice.currency, sum(line.amount) FROM billing.invoice
JOIN billing.invoice_line AS line ON line.invoice_id = invoice.id
WHERE invoice.account = ANY(%s) AND period_end > %s AND period_end <= %s
GROUP BY invoice.currency ORDER BY invoice.currency
"""


@dataclass(slots=True)
class _Lacking:
    """Sales that lack one thing, by what it is."""

    sales: dict[str, list[_Sale]] = field(default_factory=dict)

    def add(self, what: str, sale: _Sale) -> None:
        self.sales.setdefault(what, []).append(sale)

    def payers(self, billed: Collection[str]) -> dict[str, set[str]]:
        """Who pays for what is sold to these accounts, by what is lacking."""
        payers = {what: {sale.payer for sale in sales if sale.account in billed} for what, sales in self.sales.items()}
        return {what: found for what, found in payers.items() if found}


def obstacles(
    connection: "Connection[Any]", month: Month, *, now: datetime, accounts: Collection[str] | None = None
) -> list[Obstacle]:
    """What stands in the way of the month's invoices, for those who pay for these accounts, or for all.

    Asked are legal entity, customer and taxes as of the month's last day, and rates of exchange as of ``now``, an aware
    time. Raises ValueError for configuration this program cannot read.
    """
    utc = month.period_in("UTC")
    start, end = to_datetime(utc.start_us) - _BESIDE, to_datetime(utc.end_us) + _BESIDE
    last_day = (end - 2 * _BESIDE).date()
    consolidating = [id for (id,) in connection.execute(_CONSOLIDATING, [last_day])]
    asked = {"from": start, "until": end, "consolidating": consolidating, "accounts": accounts and sorted(accounts)}
    lacking: dict[Kind, _Lacking] = {kind: _Lacking() for kind in _TODO}
    rates: dict[date, list[Rate]] = {}
    applied = mark(connection)
    for sales in _chunks(connection, asked):
        buyers = {sale.payer for sale in sales}
        invoicing = load(connection, applied_until=applied, on=last_day, accounts=buyers)
        for sale in sales:
            entity, customer = invoicing.legal_entity(sale.legal_entity), invoicing.customers.get(sale.payer)
            if entity is None:
                lacking["legal_entities"].add(_no_seller(sale, invoicing), sale)
            if customer is None:
                lacking["customers"].add("no name and address", sale)
            if entity is None or customer is None:
                continue
            for problem in _untaxed(entity, customer, sale, last_day, invoicing):
                lacking["taxes"].add(problem, sale)
            day = now.astimezone(ZoneInfo(entity.time_zone)).date()
            if day not in rates:
                rates[day] = fx_rates.published(connection, day)
            no_rate = _without_rate(entity, customer, sale, day, rates[day])
            if no_rate is not None:
                lacking["rates"].add(no_rate, sale)
    flagged = {sale.account for found in lacking.values() for sales in found.sales.values() for sale in sales}
    billed = _billed(connection, month, sorted(flagged))
    by_kind = {kind: found.payers(billed) for kind, found in lacking.items()}
    todo = _TODO | {"legal_entities": _name_sellers(lacking["legal_entities"], billed)}
    return [
        _obstacle(connection, kind, found, todo[kind], start + _BESIDE, end) for kind, found in by_kind.items() if found
    ]


_TODO: dict[Kind, str] = {
    "legal_entities": "`tally invoicing apply FILE` says who sells",
    "customers": "`tally invoicing apply FILE` says who buys",
    "taxes": "`tally invoicing apply FILE` says what is charged",
    "rates": "`tally fx load FILE`",
}


#: Said of a contract that names none, where there are several.
_NAMES_NONE = "expected a contract that names its legal entity, or one legal entity only"


def _no_seller(sale: _Sale, invoicing: Invoicing) -> str:
    known = ", ".join(sorted(invoicing.legal_entities)) or "none"
    if sale.legal_entity:
        return f"expected legal entity {sale.legal_entity!r}, got {known}"
    if not invoicing.legal_entities:
        return "expected a legal entity, got none"
    return f"{_NAMES_NONE}, got {known}"


def _name_sellers(lacking: _Lacking, billed: Collection[str]) -> str:
    """What to do about contracts without a legal entity: name one, where there are several, or apply it."""
    unnamed, unknown = set(), False
    for what, sales in lacking.sales.items():
        contracts = {sale.contract for sale in sales if sale.account in billed}
        if what.startswith(_NAMES_NONE):
            unnamed |= contracts
        else:
            unknown = unknown or bool(contracts)
    todo = [f"add legal_entity to contract {_named(sorted(unnamed))} and `tally accounts apply`"] if unnamed else []
    return "; ".join([*todo, *([_TODO["legal_entities"]] if unknown else [])])


def _billed(connection: "Connection[Any]", month: Month, accounts: Sequence[str]) -> set[str]:
    """Those of the accounts that have a billing period which ends in the month: of a quarter only its last has one."""
    billed = set()
    for first in range(0, len(accounts), _ACCOUNTS_AT_ONCE):
        catalog = read_catalog(connection, accounts[first : first + _ACCOUNTS_AT_ONCE])
        for id, account in catalog.accounts.items():
            if catalog.periods_ending(id, month.period_in(account.time_zone)):
                billed.add(id)
    return billed


def _chunks(connection: "Connection[Any]", asked: dict[str, Any]) -> Iterator[list[_Sale]]:
    with connection.transaction(), connection.cursor("sales") as cursor:  # on the server: there may be millions
        cursor.execute(_SALES, asked)
        while rows := cursor.fetchmany(_PAYERS_AT_ONCE):
            yield [_Sale(*row) for row in rows]


def _untaxed(entity: LegalEntity, customer: Customer, sale: _Sale, day: date, invoicing: Invoicing) -> Iterator[str]:
    for category in {*sale.categories, *customer.tax_categories.values()}:
        try:
            treatment(entity, customer, category, day, invoicing.taxes)
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
