"""Open invoices and their lines: found or created when their first usage arrives, ids remembered between batches.

An invoice here is the container of an account's usage in a period and currency. Once it is closed nothing is added to
it; usage that comes later goes to the next supplement, a further container of the same period.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

from psycopg import Connection
from psycopg.types.json import Jsonb

from pipeline.billing.rated import PRICE_CLASSES, PriceClass, Row, Terms
from pipeline.core.periods import to_datetime

#: Values of a reference property kept on a line; finance looks others up in the rated usage.
REFERENCE_VALUES_MAX = 20
#: Lines remembered, about 1 KB each.
_LINES_MAX = 200_000

#: (account, currency, period start, period end): what there is at most one open invoice of. Times in µs since 1970 UTC.
InvoiceKey: TypeAlias = tuple[str, str, int, int]
#: (account, terms): what there is one line of.
LineKey: TypeAlias = tuple[str, Terms]


class PeriodsClosed(Exception):
    """Lines were asked for whose period is closed: its last invoice is not open. Nothing was created."""

    def __init__(self, keys: frozenset[LineKey]) -> None:
        super().__init__(f"{len(keys)} lines of closed periods")
        self.keys = keys


@dataclass(slots=True)
class Line:
    """A line's ids, and which values of its reference properties are stored for sure."""

    id: int
    invoice_id: int
    references: tuple[str, ...]
    stored: dict[str, set[str]] = field(default_factory=dict)
    full: set[str] = field(default_factory=set)  # properties with no room left: nothing to merge any more


class Lines:
    """The lines this consumer has met. Ids it created in a transaction are only good once that has committed: after a
    rollback, ``forget``."""

    def __init__(self) -> None:
        self._lines: dict[LineKey, Line] = {}
        self._references: dict[tuple[str, int, str], tuple[str, ...]] = {}

    def forget(self) -> None:
        self._lines.clear()

    def lock(
        self, connection: "Connection[Any]", keys: Collection[LineKey], *, late: Collection[LineKey] = ()
    ) -> dict[LineKey, Line]:
        """The lines of all keys, their invoices locked until the transaction ends. What is missing is created.

        Of the keys ``late`` a closed period is known to be closed: its next supplement is opened for them. Raises
        PeriodsClosed for other keys of closed periods; its locks are then held in vain, so begin the transaction anew:
        invoices are locked in the order of their ids, and a supplement's may be one that comes before them.
        """
        if len(self._lines) > _LINES_MAX:
            self._lines.clear()
        missing = [key for key in keys if key not in self._lines]
        invoice_of = {key: self._lines[key].invoice_id for key in keys if key in self._lines}
        if missing:
            wanted = {_invoice_key(key) for key in missing}
            invoices = _find_invoices(connection, wanted, {_invoice_key(key) for key in late})
            invoice_of |= {key: invoices[_invoice_key(key)] for key in missing}
        still_open = _lock_invoices(connection, set(invoice_of.values()))
        closed = frozenset(key for key in keys if invoice_of[key] not in still_open)
        if closed:
            for key in closed:
                self._lines.pop(key, None)
            raise PeriodsClosed(closed)
        if missing:
            missing.sort(key=_line_order)  # so that the same usage gives the same ids
            ids = _create_lines(connection, [(invoice_of[key], key[1]) for key in missing])
            _set_price_classes(connection, zip(ids, missing, strict=True))
            for key, line_id in zip(missing, ids, strict=True):
                self._lines[key] = Line(line_id, invoice_of[key], self._references_of(connection, key[1]))
        return {key: self._lines[key] for key in keys}

    def _references_of(self, connection: "Connection[Any]", terms: Terms) -> tuple[str, ...]:
        key = (terms.plan, terms.plan_version, terms.charge)
        if key not in self._references:
            found = connection.execute(
                _SELECT_REFERENCES, {"plan": terms.plan, "version": terms.plan_version, "charge": terms.charge}
            ).fetchone()
            if found is None:  # a plan version not seen yet is no reason to remember that it has none
                return ()
            self._references[key] = tuple(found[0])
        return self._references[key]


# Plan documents are written by pipeline.core.documents.
_SELECT_REFERENCES = """
SELECT coalesce((
    SELECT charge -> 'references' FROM jsonb_array_elements(document -> 'charges') AS charge
    WHERE charge ->> 'id' = %(charge)s
), '[]') FROM billing.catalog_version WHERE kind = 'plan' AND id = %(plan)s AND version = %(version)s
"""


def _invoice_key(key: LineKey) -> InvoiceKey:
    account, terms = key
    return account, terms.currency, terms.period_start_us, terms.period_end_us


def _line_order(key: LineKey) -> tuple[str, str, int, str, str, int, int, str]:
    account, terms = key
    counter = account, terms.contract, terms.segment_start_us, terms.charge, terms.cell
    return *counter, terms.plan_version, terms.meter_version, terms.price_version


# Sorted, so that two sinks that create the same invoices wait for each other in one order.
_CREATE_INVOICES = """
INSERT INTO billing.invoice (account, currency, period_start, period_end, supplement)
SELECT * FROM unnest(%s::text[], %s::text[], %s::timestamptz[], %s::timestamptz[], %s::integer[])
ON CONFLICT DO NOTHING
"""
# Usage belongs on the last: those before it are closed.
_SELECT_INVOICES = """
SELECT DISTINCT ON (wanted.at) wanted.at, invoice.id, invoice.supplement, invoice.state = 'open'
FROM unnest(%s::text[], %s::text[], %s::timestamptz[], %s::timestamptz[])
    WITH ORDINALITY AS wanted (account, currency, period_start, period_end, at)
JOIN billing.invoice USING (account, currency, period_start, period_end)
ORDER BY wanted.at, invoice.supplement DESC
"""


def open_invoices(connection: "Connection[Any]", keys: Collection[InvoiceKey]) -> None:
    """Create the invoice of each period that has none yet; its usage then goes there.

    For before any lock is taken, as everybody does: who waits for another's insert must hold nothing the other wants.
    """
    ordered = sorted(set(keys))
    _create_invoices(connection, ordered, [0] * len(ordered))


def _find_invoices(
    connection: "Connection[Any]", keys: set[InvoiceKey], late: Collection[InvoiceKey]
) -> dict[InvoiceKey, int]:
    """The last invoice of each period, created where there is none; of ``late``, one that was open when it was read."""
    ordered = sorted(keys)
    _create_invoices(connection, ordered, [0] * len(ordered))
    # A statement of its own: it sees invoices that another sink committed while the one before waited for it.
    found = _last_invoices(connection, ordered)
    closed = [key for key in ordered if key in late and not found[key].is_open]
    if closed:
        _create_invoices(connection, closed, [found[key].supplement + 1 for key in closed])
        found |= _last_invoices(connection, closed)
    return {key: invoice.id for key, invoice in found.items()}


class _Invoice(NamedTuple):
    id: int
    supplement: int
    is_open: bool


def _create_invoices(connection: "Connection[Any]", keys: Sequence[InvoiceKey], supplements: Sequence[int]) -> None:
    connection.execute(_CREATE_INVOICES, [*_columns(keys), supplements])


def _last_invoices(connection: "Connection[Any]", keys: Sequence[InvoiceKey]) -> dict[InvoiceKey, _Invoice]:
    return {keys[at - 1]: _Invoice(*rest) for at, *rest in connection.execute(_SELECT_INVOICES, _columns(keys))}


def _columns(keys: Sequence[InvoiceKey]) -> list[list[Any]]:
    return [
        [key[0] for key in keys],
        [key[1] for key in keys],
        [to_datetime(key[2]) for key in keys],
        [to_datetime(key[3]) for key in keys],
    ]


# The close takes the same locks in the same order before it moves an invoice on.
_LOCK_INVOICES = """
SELECT id FROM (
    SELECT id, state FROM billing.invoice WHERE id = ANY(%s) ORDER BY id FOR NO KEY UPDATE
) AS locked WHERE state = 'open'
"""


def _lock_invoices(connection: "Connection[Any]", ids: set[int]) -> set[int]:
    return {invoice_id for (invoice_id,) in connection.execute(_LOCK_INVOICES, [sorted(ids)])}


_LINE_COLUMNS = (
    "invoice_id, contract, plan, plan_version, price_version, meter, meter_version, charge, segment_start, cell"
)
_UNNEST_LINES = (
    "unnest(%s::bigint[], %s::text[], %s::text[], %s::integer[], %s::text[], %s::text[], %s::integer[], %s::text[], "
    "%s::timestamptz[], %s::text[])"
)
_CREATE_LINES = f"""
INSERT INTO billing.invoice_line ({_LINE_COLUMNS}) SELECT * FROM {_UNNEST_LINES} ON CONFLICT DO NOTHING
"""
_SELECT_LINES = f"""
SELECT line.id FROM {_UNNEST_LINES} WITH ORDINALITY AS wanted ({_LINE_COLUMNS}, at)
JOIN billing.invoice_line AS line USING ({_LINE_COLUMNS}) ORDER BY wanted.at
"""


def _create_lines(connection: "Connection[Any]", lines: list[tuple[int, Terms]]) -> list[int]:
    columns: list[list[object]] = [
        [invoice_id for invoice_id, _ in lines],
        [terms.contract for _, terms in lines],
        [terms.plan for _, terms in lines],
        [terms.plan_version for _, terms in lines],
        [terms.price_version for _, terms in lines],
        [terms.meter for _, terms in lines],
        [terms.meter_version for _, terms in lines],
        [terms.charge for _, terms in lines],
        [to_datetime(terms.segment_start_us) for _, terms in lines],
        [terms.cell for _, terms in lines],
    ]
    connection.execute(_CREATE_LINES, columns)
    return [line_id for (line_id,) in connection.execute(_SELECT_LINES, columns)]


# A line keeps the least sure class it met; the type's order is that of sureness.
_SET_PRICE_CLASSES = """
UPDATE billing.invoice_line AS line SET price_class = met.price_class
FROM unnest(%s::bigint[], %s::billing.price_class[]) AS met (id, price_class)
WHERE line.id = met.id AND line.price_class < met.price_class
"""


def _set_price_classes(connection: "Connection[Any]", met: Iterable[tuple[int, LineKey]]) -> None:
    """A new line is of class running until said otherwise."""
    classes: dict[int, PriceClass] = {}
    for line_id, (_, terms) in met:
        if PRICE_CLASSES.index(terms.price_class) > PRICE_CLASSES.index(classes.get(line_id, "running")):
            classes[line_id] = terms.price_class
    if classes:
        connection.execute(_SET_PRICE_CLASSES, [list(classes), list(classes.values())])


# -- reference values


def merge_references(connection: "Connection[Any]", rows: Iterable[tuple[Line, Row]]) -> None:
    """Add what the rows bring as reference values to their lines, the first 20 of each property.

    The lines' invoices are locked, so reading, merging and writing is safe.
    """
    news: dict[int, tuple[Line, dict[str, dict[str, None]]]] = {}
    for line, row in rows:
        for name in line.references:
            value = row.head.properties.get(name)
            if value is not None and name not in line.full and value not in line.stored.get(name, ()):
                news.setdefault(line.id, (line, {}))[1].setdefault(name, {})[value] = None
    if not news:
        return
    stored = connection.execute(
        "SELECT id, reference_values FROM billing.invoice_line WHERE id = ANY(%s)", [sorted(news)]
    ).fetchall()
    changed = []
    for line_id, references in stored:
        line, values = news[line_id]
        for name, new in values.items():
            kept = references.setdefault(name, {"values": [], "more": False})
            added = [value for value in new if value not in kept["values"]]
            room = REFERENCE_VALUES_MAX - len(kept["values"])
            kept["values"] += added[:room]
            kept["more"] = kept["more"] or len(added) > room
            line.stored[name] = set(kept["values"])
            if kept["more"]:
                line.full.add(name)
        changed.append((Jsonb(references), line_id))
    with connection.cursor() as cursor:
        cursor.executemany("UPDATE billing.invoice_line SET reference_values = %s WHERE id = %s", changed)
