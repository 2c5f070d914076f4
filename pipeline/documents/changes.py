"""What changed since a customer's invoice before: prices, the plan, the way usage is counted.

Told from versions, which never change: those that priced the invoice before, issued earlier, and those that priced
this one. So the notices of a document are the same whenever they are looked up. A charge that was not on the invoice
before has nothing to compare with; a version that changed other charges only is no news.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import date, datetime
from typing import Any, NamedTuple, TypeAlias, cast
from zoneinfo import ZoneInfo

from psycopg import Connection

from pipeline.core.charges import Charge
from pipeline.core.documents import Entry, Kind, from_document
from pipeline.core.money import Micros
from pipeline.core.periods import to_micros
from pipeline.core.plans import Plan, PriceList, overridden
from pipeline.documents.model import Notice


class Priced(NamedTuple):
    """A line, by what named its price and how it was counted."""

    account: str
    contract: str
    charge: str
    name: str
    plan: str
    plan_name: str
    price_version: str
    unit: str
    meter: str
    #: None for a fee, and for usage whose container is not known.
    meter_version: int | None
    segment_start: datetime


_Version: TypeAlias = tuple[Kind, str, int]
_Versions: TypeAlias = Mapping[_Version, Entry]

_SELECT_BEFORE = """
SELECT document.id, line.account, line.contract, line.charge, '' AS name, line.plan, '' AS plan_name,
    line.price_version, line.unit, line.meter, held.meter_version, line.segment_start
FROM billing.document
JOIN LATERAL (
    SELECT earlier.id FROM billing.document AS earlier
    WHERE earlier.account = document.account AND earlier.currency = document.currency
        AND earlier.legal_entity = document.legal_entity AND earlier.kind = 'invoice'
        AND earlier.state IN ('issued', 'void') AND earlier.period_end <= document.period_start
        AND (document.issued_at IS NULL OR (earlier.issued_at, earlier.id) < (document.issued_at, document.id))
    ORDER BY earlier.period_end DESC, earlier.id DESC LIMIT 1
) AS earlier ON true
JOIN billing.document_line AS line ON line.document_id = earlier.id AND line.kind IN ('usage', 'fee')
LEFT JOIN billing.invoice_line AS held ON held.id = line.line_id
WHERE document.id = ANY(%s) AND document.kind = 'invoice'
ORDER BY document.id, line.segment_start, line.position
"""
_SELECT_VERSIONS = """
SELECT version.kind::text, version.id, version.version, version.valid_from, version.document
FROM unnest(%s::text[], %s::text[], %s::integer[]) AS wanted (kind, id, version)
JOIN billing.catalog_version AS version
    ON (version.kind::text, version.id, version.version) = (wanted.kind, wanted.id, wanted.version)
"""


def notices_of(
    connection: "Connection[Any]", lines: Mapping[int, Sequence[Priced]], zones: Mapping[int, ZoneInfo]
) -> dict[int, tuple[Notice, ...]]:
    """Notices of invoices by id, from their lines in order of time; days are of each one's time zone."""
    before: dict[int, list[Priced]] = {id: [] for id in lines}
    for id, *columns in connection.execute(_SELECT_BEFORE, [list(lines)]):
        before[id].append(Priced(*columns))
    changes = {id: [*_changes(before[id], now)] for id, now in lines.items() if before[id]}
    versions = _read_versions(connection, (pair for pairs in changes.values() for pair in pairs))
    return {
        id: tuple(dict.fromkeys(notice for pair in pairs for notice in _notices(*pair, versions, zones[id])))
        for id, pairs in changes.items()
    }


def _changes(before: Iterable[Priced], now: Iterable[Priced]) -> Iterator[tuple[Priced, Priced]]:
    """Each line that was priced or counted by another version than the one before it of its charge."""
    last = {(line.account, line.contract, line.charge): line for line in before}
    for line in sorted(now, key=lambda line: line.segment_start):
        key = line.account, line.contract, line.charge
        old = last.get(key)
        if old is not None:
            last[key] = line
            if (old.price_version, old.meter, old.meter_version) != (
                line.price_version,
                line.meter,
                line.meter_version,
            ):
                yield old, line


def _read_versions(connection: "Connection[Any]", pairs: Iterable[tuple[Priced, Priced]]) -> _Versions:
    wanted = sorted({version for pair in pairs for line in pair for version in _versions(line)})
    columns = [list(column) for column in zip(*wanted, strict=True)] or [[], [], []]
    return {
        (kind, id, version): Entry(kind, id, version, to_micros(valid_from), document)
        for kind, id, version, valid_from, document in connection.execute(_SELECT_VERSIONS, columns)
    }


def _versions(line: Priced) -> Iterator[_Version]:
    """What ``Segment.price_version`` names: ``standard@3+education@1``, a trial as ``standard@3+trial``; the meter."""
    kind: Kind = "plan"
    for name in line.price_version.split("+"):
        id, at, version = name.rpartition("@")
        if at:
            yield kind, id, int(version)
        kind = "price_list"
    if line.meter_version is not None:
        yield "meter", line.meter, line.meter_version


def _notices(old: Priced, new: Priced, versions: _Versions, zone: ZoneInfo) -> Iterator[Notice]:
    since = new.segment_start.astimezone(zone).date()
    if old.plan != new.plan:
        yield Notice("plan_changed", new.plan_name or new.plan, since)
        return
    if old.price_version != new.price_version:
        yield from _price_notices(old, new, versions, since)
    if None not in (old.meter_version, new.meter_version) and (old.meter, old.meter_version) != (
        new.meter,
        new.meter_version,
    ):
        counted = versions.get(("meter", new.meter, new.meter_version or 0))
        yield Notice("meter_changed", new.name, _day(counted.valid_from_us, zone) if counted else since)


def _price_notices(old: Priced, new: Priced, versions: _Versions, since: date) -> Iterator[Notice]:
    before, after = _charge(old, versions), _charge(new, versions)
    if before == after:
        return
    plain = before and after and replace(before, unit_price=after.unit_price) == after
    if plain and before and after:
        yield Notice("price_changed", new.name, since, before.unit_price, after.unit_price, new.unit)
    else:
        yield Notice("price_changed", new.name, since)


def _charge(line: Priced, versions: _Versions) -> Charge | None:
    """What priced a line, but for what does not change its price. None: free, as in a trial."""
    if line.price_version.endswith("+trial"):
        return None
    plan, *price_lists = (from_document(versions[of]) for of in _versions(line) if of[0] != "meter")
    charges, _ = overridden(cast(Plan, plan), cast("list[PriceList]", price_lists))
    found = next((charge for charge in charges if charge.id == line.charge), None)
    return found and replace(found, name="", references=(), tax_category="")


def _day(at_us: Micros, zone: ZoneInfo) -> date:
    return datetime.fromtimestamp(at_us // 1_000_000, zone).date()
