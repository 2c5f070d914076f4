"""What invoices are made with besides prices, as it stands in PostgreSQL: legal entities, customers, taxes, coupons.

Versions are only added (``tally invoicing apply``). Of an item the newest version counts that is valid on the day asked
for and was applied until a mark; so a close that goes on after a crash, or a document made again, sees what the first
attempt saw.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from datetime import date, datetime
from typing import Any, NamedTuple, cast

from psycopg import Connection

from pipeline.core.discounts import Coupon
from pipeline.core.invoicing_documents import Item, Kind, TaxTable, from_document
from pipeline.core.parties import Customer, LegalEntity
from pipeline.core.tax import TaxRate


@dataclass(frozen=True, slots=True)
class Invoicing:
    """What counts on a day. Customers by account, the others by id."""

    legal_entities: dict[str, LegalEntity]
    customers: dict[str, Customer]
    #: Every rate of every tax, past and future.
    taxes: tuple[TaxRate, ...]
    coupons: dict[str, Coupon]

    def legal_entity(self, id: str) -> LegalEntity | None:
        """The one of this id; for "", which contracts say that name none, the only one there is."""
        if id == "" and len(self.legal_entities) == 1:
            return next(iter(self.legal_entities.values()))
        return self.legal_entities.get(id)


def mark(connection: "Connection[Any]") -> datetime:
    """A time, by the database's clock: versions and rates of exchange known by now are before it, later ones behind."""
    row = connection.execute("SELECT billing.invoicing_mark()").fetchone()
    assert row is not None, "a SELECT without FROM has one row"
    return cast(datetime, row[0])


# Statements of their own, so that each finds its rows by the primary key: of customers there may be millions.
_SELECT = """
SELECT DISTINCT ON (kind, id) kind, id, version, document FROM billing.invoicing_version
WHERE {} AND valid_from <= %(day)s AND applied_at <= %(applied_until)s ORDER BY kind, id, version DESC
"""
_SELECT_COMMON = _SELECT.format("kind IN ('legal_entity', 'tax', 'coupon')")
_SELECT_ALL_CUSTOMERS = _SELECT.format("kind = 'customer'")
_SELECT_CUSTOMERS = _SELECT.format("kind = 'customer' AND id = ANY(%(accounts)s)")
# The newest version counts for all times, and from a contract's begin on none has another zone.
_SELECT_TIME_ZONES = """
SELECT DISTINCT ON (id) id, document ->> 'time_zone' FROM billing.catalog_version
WHERE kind = 'account' AND id = ANY(%s) ORDER BY id, version DESC
"""


def load(
    connection: "Connection[Any]",
    *,
    applied_until: datetime,
    on: date,
    accounts: Collection[str] | None = None,
) -> Invoicing:
    """What counts for documents of a tax date, of what was applied until a time; customers of ``accounts``, or all.

    Customers come with their accounts' time zones. Raises ValueError for a version this program cannot read.
    """
    asked = {"day": on, "applied_until": applied_until, "accounts": sorted(accounts or ())}
    customers = _SELECT_ALL_CUSTOMERS if accounts is None else _SELECT_CUSTOMERS
    found: dict[Kind, dict[str, Item]] = {"legal_entity": {}, "customer": {}, "tax": {}, "coupon": {}}
    for statement in (_SELECT_COMMON, customers):
        for kind, id, version, document in connection.execute(statement, asked):
            found[kind][id] = from_document(kind, id, version, document)
    tables = cast(dict[str, TaxTable], found["tax"])
    customers_found = cast(dict[str, Customer], found["customer"])
    zones = dict(connection.execute(_SELECT_TIME_ZONES, [list(customers_found)]).fetchall()) if customers_found else {}
    return Invoicing(
        legal_entities=cast(dict[str, LegalEntity], found["legal_entity"]),
        customers={
            id: replace(customer, billing_time_zone=zones.get(id, "")) for id, customer in customers_found.items()
        },
        taxes=tuple(rate for table in tables.values() for rate in table.rates),
        coupons=cast(dict[str, Coupon], found["coupon"]),
    )


class Version(NamedTuple):
    """One version as it is stored: from which tax date on it counts, and who applied it when (UTC) and why."""

    kind: Kind
    id: str
    version: int
    valid_from: date
    document: dict[str, Any]
    applied_at: datetime
    applied_by: str
    reason: str


_VERSIONS = """
SELECT kind, id, version, valid_from, document, applied_at, applied_by, reason FROM billing.invoicing_version
WHERE (%(kind)s::text IS NULL OR kind = %(kind)s) AND (%(id)s::text IS NULL OR id = %(id)s)
ORDER BY kind, id, version
"""


def versions(connection: "Connection[Any]", *, kind: Kind | None = None, id: str | None = None) -> list[Version]:
    """Every version of a kind and id, or of all, by kind and id, the oldest first."""
    return [Version(*row) for row in connection.execute(_VERSIONS, {"kind": kind, "id": id})]


_CONSOLIDATING = """
SELECT id FROM (
    SELECT DISTINCT ON (id) id, document FROM billing.invoicing_version
    WHERE kind = 'customer' AND valid_from <= %(day)s AND applied_at <= %(applied_until)s ORDER BY id, version DESC
) AS customer WHERE (document ->> 'consolidates')::boolean ORDER BY id
"""


def consolidating(connection: "Connection[Any]", *, applied_until: datetime, on: date) -> list[str]:
    """The customers whose invoices take in the lines of the accounts whose parents they are."""
    return [id for (id,) in connection.execute(_CONSOLIDATING, {"day": on, "applied_until": applied_until})]
