"""The published prices, to hold what was rated against: the catalog as it stands in PostgreSQL, for some accounts."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self, TypeVar

from psycopg import Connection

from pipeline.core.catalog import Catalog, Segment
from pipeline.core.charges import Charge
from pipeline.core.documents import Entry, Kind, from_document
from pipeline.core.meters import Meter
from pipeline.core.money import Micros
from pipeline.core.periods import to_micros
from pipeline.core.plans import Plan, PriceList, free, overridden


class NoPrice(LookupError):
    """The catalog does not tell what a line's charge costs; the message says why."""


@dataclass(frozen=True, slots=True)
class Priced:
    """What names the price of a line, as it stands there."""

    account: str
    contract: str
    plan: str
    plan_version: int
    price_version: str
    meter: str
    meter_version: int
    charge: str
    segment_start_us: Micros

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Self:
        """From a row of a view or statement that has these columns, ``segment_start`` as a time."""
        names = (field.name for field in fields(cls) if field.name != "segment_start_us")
        return cls(segment_start_us=to_micros(row["segment_start"]), **{name: row[name] for name in names})


@dataclass(frozen=True, slots=True)
class LinePrice:
    """What a line was priced by.

    ``segment`` is today's, None where other prices or another contract hold there now; then the charge is as published,
    with its price lists, not prorated.
    """

    charge: Charge
    #: None for a charge without a meter, or one whose version cannot be read.
    meter: Meter | None
    segment: Segment | None


# Prices are few and shared; of accounts and contracts there may be millions. An account's contracts are those that any
# version of gave it, so that one handed on to another account is read whole.
_SELECT_PRICES = """
SELECT kind, id, version, valid_from, document FROM billing.catalog_version AS version
WHERE kind NOT IN ('account', 'contract')
"""
_SELECT_ACCOUNTS = """
SELECT kind, id, version, valid_from, document FROM billing.catalog_version AS version
WHERE ((kind = 'account' AND id = ANY(%(accounts)s))
    OR (kind = 'contract' AND id IN (
        SELECT id FROM billing.catalog_version WHERE kind = 'contract' AND document ->> 'account' = ANY(%(accounts)s)
    )))
"""
# The outbox's order is that of publications; what it says nothing of is older.
_UNTIL = """ AND NOT EXISTS (
    SELECT FROM billing.outbox AS later WHERE later.seq > %(until)s
        AND (later.kind, later.id, later.version) = (version.kind, version.id, version.version)
)"""


def read_catalog(connection: "Connection[Any]", accounts: Iterable[str]) -> Catalog:
    """Everything published that prices these accounts, whether or not raters have heard of it yet.

    Raises ValueError for a version this program cannot read.
    """
    return with_accounts(connection, Catalog.empty().extend(read_prices(connection), 0), accounts)


def read_prices(connection: "Connection[Any]", *, until: int | None = None) -> list[Entry]:
    """Every version of every meter, plan and price list; published up to this number of the outbox, or all."""
    statement = _SELECT_PRICES if until is None else _SELECT_PRICES + _UNTIL
    return _entries(connection.execute(statement, {"until": until}).fetchall())


def with_accounts(
    connection: "Connection[Any]", catalog: Catalog, accounts: Iterable[str], *, until: int | None = None
) -> Catalog:
    """The catalog with these accounts and their contracts too, ``until`` as above. Raises as ``read_catalog``."""
    statement = _SELECT_ACCOUNTS if until is None else _SELECT_ACCOUNTS + _UNTIL
    rows = connection.execute(statement, {"accounts": sorted(accounts), "until": until}).fetchall()
    return catalog.extend(_entries(rows), 0)


def _entries(rows: Sequence[tuple[Any, ...]]) -> list[Entry]:
    return [
        Entry(kind, id, version, to_micros(valid_from), document) for kind, id, version, valid_from, document in rows
    ]


_SELECT_VERSION = (
    "SELECT valid_from, document FROM billing.catalog_version WHERE kind = %s AND id = %s AND version = %s"
)

V = TypeVar("V", Plan, PriceList, Meter)


class Prices:
    """The prices of lines; each document is read once."""

    def __init__(self, connection: "Connection[Any]") -> None:
        self._connection = connection
        self._catalog: Catalog | None = None
        self._accounts: set[str] = set()
        self._versions: dict[tuple[Kind, str, int], Any] = {}

    def catalog(self, accounts: Iterable[str]) -> Catalog:
        """Today's catalog, with these accounts among others. Raises ValueError for a version that cannot be read."""
        if self._catalog is None:
            self._catalog = read_catalog(self._connection, ())
        missing = set(accounts) - self._accounts
        if missing:
            self._catalog = with_accounts(self._connection, self._catalog, missing)
            self._accounts |= missing
        return self._catalog

    def find(self, line: Priced) -> LinePrice:
        """What a line was priced by. Raises NoPrice when a version that it names cannot be read or lacks the charge."""
        segment = self._segment(line)
        charges = self._as_published(line) if segment is None else segment.charges
        for charge in charges:
            if charge.id == line.charge:
                return LinePrice(charge, self._meter(line), segment)
        raise NoPrice(f"plan {line.plan} version {line.plan_version} has no charge {line.charge}")

    def _meter(self, line: Priced) -> Meter | None:
        try:
            return self._version("meter", line.meter, line.meter_version, Meter) if line.meter else None
        except NoPrice:
            return None  # reported where versions are checked; the price does not depend on it

    def _segment(self, line: Priced) -> Segment | None:
        """Today's segment, if it is still the one the line was priced in."""
        try:
            found = self.catalog([line.account]).segment(line.account, line.segment_start_us, line.contract)
        except ValueError as error:
            raise NoPrice(str(error)) from error
        if not isinstance(found, Segment):
            return None
        now = (found.contract.id, found.price_version, found.start_us)
        return found if now == (line.contract, line.price_version, line.segment_start_us) else None

    def _as_published(self, line: Priced) -> tuple[Charge, ...]:
        """The charges of the versions that the line names."""
        plan = self._version("plan", line.plan, line.plan_version, Plan)
        _, *others = line.price_version.split("+")
        if "trial" in others:
            return tuple(map(free, plan.charges))
        price_lists = []
        for name in others:
            id, _, version = name.rpartition("@")
            price_lists.append(self._version("price_list", id, int(version), PriceList))
        return overridden(plan, price_lists)[0]

    def _version(self, kind: Kind, id: str, version: int, of: type[V]) -> V:
        key = (kind, id, version)
        if key not in self._versions:
            self._versions[key] = self._read(kind, id, version)
        found = self._versions[key]
        if not isinstance(found, of):
            raise NoPrice(str(found))
        return found

    def _read(self, kind: Kind, id: str, version: int) -> object:
        """The document, or why there is none."""
        row = self._connection.execute(_SELECT_VERSION, [kind, id, version]).fetchone()
        if row is None:
            return f"{kind.replace('_', ' ')} {id} version {version} is not in the catalog"
        valid_from, document = row
        try:
            return from_document(Entry(kind, id, version, to_micros(valid_from), document))
        except ValueError as error:
            return str(error)
