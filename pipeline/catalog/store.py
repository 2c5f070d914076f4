"""Reading the published versions: PostgreSQL is the truth behind the catalog topic."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

from psycopg import Connection

from pipeline.core.commitments import Commitment
from pipeline.core.contracts import Account, Contract
from pipeline.core.documents import Entry, Item, Kind, from_document
from pipeline.core.money import AMOUNT_DECIMALS, Micros, scaled
from pipeline.core.periods import to_datetime, to_micros
from pipeline.core.plans import Plan


@dataclass(frozen=True, slots=True)
class Version:
    """One published version, with who published it, when (UTC) and why."""

    entry: Entry
    item: Item
    published_at: datetime
    published_by: str
    reason: str


class RatedUsage(NamedTuple):
    """That events were rated under a contract, and the times of the earliest and the newest of them."""

    contract: str
    first_us: Micros
    last_us: Micros


_SELECT_NEWEST = """
SELECT DISTINCT ON (kind, id) kind, id, version, valid_from, document
FROM billing.catalog_version
JOIN unnest(%s::billing.catalog_kind[], %s::text[]) AS wanted (kind, id) USING (kind, id)
ORDER BY kind, id, version DESC
"""


def newest(connection: "Connection[Any]", keys: Sequence[tuple[Kind, str]]) -> dict[tuple[Kind, str], Entry]:
    """The newest version of each of these documents that has one."""
    rows = connection.execute(_SELECT_NEWEST, [[kind for kind, _ in keys], [name for _, name in keys]])
    return {(row[0], row[1]): _entry(*row) for row in rows}


_SELECT_CONTRACTS = """
SELECT DISTINCT ON (id) kind, id, version, valid_from, document
FROM billing.catalog_version
WHERE kind = 'contract' AND document ->> 'account' = ANY(%s)
ORDER BY id, version DESC
"""


def contracts_of(connection: "Connection[Any]", accounts: Iterable[str]) -> list[Contract]:
    """The newest version of every contract of these accounts, by id."""
    entries = [_entry(*row) for row in connection.execute(_SELECT_CONTRACTS, [list(accounts)])]
    return [item for entry in entries if isinstance(item := from_document(entry), Contract)]


_SELECT_COMMITMENTS = """
SELECT commitment.account, commitment.id, currency, amount, charges, starts_at, least(ends_at, voided_at)
FROM billing.commitment JOIN billing.credit_request_state AS request ON request.id = commitment.id
WHERE commitment.account = ANY(%s) AND verdict IS DISTINCT FROM 'rejected'
    AND (voided_at IS NULL OR voided_at > starts_at)
ORDER BY commitment.id
"""


def commitments_of(connection: "Connection[Any]", accounts: Iterable[str]) -> list[tuple[str, str, Commitment]]:
    """What these accounts promised to spend, or somebody asks to record, each with its account and currency."""
    return [
        (
            account,
            currency,
            Commitment(
                str(id),
                scaled(amount, AMOUNT_DECIMALS),
                to_micros(starts_at),
                None if ends_at is None else to_micros(ends_at),
                charges=frozenset(charges),
            ),
        )
        for account, id, currency, amount, charges, starts_at, ends_at in connection.execute(
            _SELECT_COMMITMENTS, [list(accounts)]
        )
    ]


# A contract names its plans at the top and in its later phases.
_SELECT_BESIDE = """
WITH newest AS (
    SELECT DISTINCT ON (id) kind, id, version, valid_from, document FROM billing.catalog_version
    WHERE kind = 'contract' ORDER BY id, version DESC
), concerned AS (
    SELECT document ->> 'account' AS account FROM newest
    GROUP BY 1 HAVING count(*) > 1 AND bool_or(
        document ->> 'plan' = ANY(%(plans)s)
        OR EXISTS (SELECT FROM jsonb_array_elements(document -> 'later_phases') AS phase
            WHERE phase ->> 'plan' = ANY(%(plans)s))
    )
)
SELECT newest.* FROM newest JOIN concerned ON concerned.account = document ->> 'account' ORDER BY id
"""


def contracts_beside(connection: "Connection[Any]", plans: Iterable[str]) -> list[Contract]:
    """The newest version of every contract of accounts that have several, one of them on one of these plans; by id.

    Reads every contract: for a question asked now and then.
    """
    entries = [_entry(*row) for row in connection.execute(_SELECT_BESIDE, {"plans": sorted(plans)})]
    return [item for entry in entries if isinstance(item := from_document(entry), Contract)]


_SELECT_PRICE_LISTS = """
SELECT kind, id, version, valid_from, document, published_at, published_by, reason
FROM billing.catalog_version
WHERE kind = 'price_list' AND document ->> 'plan' = ANY(%s)
ORDER BY id, version
"""


def price_lists_of(connection: "Connection[Any]", plans: Iterable[str]) -> list[Version]:
    """Every version of every price list of these plans, by id and version."""
    return [_version(row) for row in connection.execute(_SELECT_PRICE_LISTS, [sorted(plans)])]


_SELECT_METERED = """
SELECT * FROM (
    SELECT DISTINCT ON (id) kind, id, version, valid_from, document
    FROM billing.catalog_version WHERE kind = 'plan' ORDER BY id, version DESC
) AS newest
WHERE EXISTS (SELECT FROM jsonb_array_elements(document -> 'charges') AS charge WHERE charge ->> 'meter' = ANY(%s))
ORDER BY id
"""


def plans_metered_by(connection: "Connection[Any]", meters: Iterable[str]) -> list[Plan]:
    """The newest version of every plan with a charge on one of these meters, by id."""
    entries = [_entry(*row) for row in connection.execute(_SELECT_METERED, [sorted(meters)])]
    return [item for entry in entries if isinstance(item := from_document(entry), Plan)]


_SELECT_RELATED = """
WITH newest AS (
    SELECT DISTINCT ON (id) kind, id, version, valid_from, document
    FROM billing.catalog_version WHERE kind = 'account' ORDER BY id, version DESC
)
SELECT * FROM newest
WHERE id = ANY(%(accounts)s) OR document ? 'parent' OR document ? 'aliases'
ORDER BY id
"""


def related_accounts(connection: "Connection[Any]", accounts: Iterable[str]) -> list[Account]:
    """The newest version of these accounts, and of all that have a parent or aliases, by id."""
    entries = [_entry(*row) for row in connection.execute(_SELECT_RELATED, {"accounts": list(accounts)})]
    return [item for entry in entries if isinstance(item := from_document(entry), Account)]


class Issued(NamedTuple):
    """An account's newest issued period that ends after some time, and its end."""

    account: str
    end_us: Micros


_SELECT_ISSUED = """
SELECT invoice.account, invoice.period_end
FROM billing.invoice LEFT JOIN billing.invoice_line AS line ON line.invoice_id = invoice.id
WHERE invoice.state = 'issued' AND invoice.period_end > %(after)s
    AND (%(account)s::text IS NULL OR invoice.account = %(account)s)
    AND (%(plan)s::text IS NULL OR line.plan = %(plan)s)
    AND (%(meter)s::text IS NULL OR line.meter = %(meter)s)
ORDER BY invoice.period_end DESC LIMIT 1
"""


def issued(
    connection: "Connection[Any]",
    after_us: Micros,
    *,
    account: str | None = None,
    plan: str | None = None,
    meter: str | None = None,
) -> Issued | None:
    """The last issued invoice of a period that ends after a time, of an account, with a plan, with a meter."""
    parameters = {"after": to_datetime(after_us), "account": account, "plan": plan, "meter": meter}
    row = connection.execute(_SELECT_ISSUED, parameters).fetchone()
    return None if row is None else Issued(row[0], to_micros(row[1]))


_SELECT_LEGAL_ENTITIES = "SELECT DISTINCT id FROM billing.invoicing_version WHERE kind = 'legal_entity' ORDER BY id"
# By the account, which has an index. A voided document was issued, and its re-issue keeps its legal entity.
_SELECT_SELLERS = """
SELECT DISTINCT line.contract, document.legal_entity
FROM billing.document_line AS line JOIN billing.document ON document.id = line.document_id
WHERE line.account = ANY(%s) AND line.contract = ANY(%s) AND document.state <> 'draft'
"""


def sellers(connection: "Connection[Any]", contracts: Iterable[Contract]) -> dict[str, set[str]]:
    """The legal entities whose documents bill these contracts, by contract: reviewed, issued or void, not drafts."""
    named = {contract.id: contract.account for contract in contracts}
    found: dict[str, set[str]] = {}
    for contract, entity in connection.execute(_SELECT_SELLERS, [sorted(set(named.values())), sorted(named)]):
        found.setdefault(contract, set()).add(entity)
    return found


def legal_entities(connection: "Connection[Any]") -> list[str]:
    """Ids of all legal entities that were applied, in order."""
    return [str(id) for (id,) in connection.execute(_SELECT_LEGAL_ENTITIES)]


# From the lines, not the rows: a few per account and month, found by index.
_SELECT_RATED = """
SELECT invoice.account, line.contract, min(line.first_event_at), max(line.last_event_at)
FROM billing.invoice JOIN billing.invoice_line AS line ON line.invoice_id = invoice.id
WHERE invoice.account = ANY(%s) AND line.last_event_at IS NOT NULL
GROUP BY invoice.account, line.contract ORDER BY invoice.account, line.contract
"""


def rated_usage(connection: "Connection[Any]", accounts: Iterable[str]) -> dict[str, list[RatedUsage]]:
    """Which contracts of these accounts have rated usage, by account, as far as the sink has written it."""
    found: dict[str, list[RatedUsage]] = {}
    for account, contract, first, last in connection.execute(_SELECT_RATED, [list(accounts)]):
        found.setdefault(account, []).append(RatedUsage(contract, to_micros(first), to_micros(last)))
    return found


def ids(connection: "Connection[Any]", kind: Kind) -> list[str]:
    """Ids of all documents of a kind, in order."""
    rows = connection.execute("SELECT DISTINCT id FROM billing.catalog_version WHERE kind = %s ORDER BY id", [kind])
    return [str(row[0]) for row in rows]


_SELECT_VERSIONS = """
SELECT kind, id, version, valid_from, document, published_at, published_by, reason
FROM billing.catalog_version
WHERE kind = %(kind)s AND (%(id)s::text IS NULL OR id = %(id)s)
ORDER BY id, version
"""


def versions(connection: "Connection[Any]", kind: Kind, id: str | None = None) -> list[Version]:
    """Every version of one document, or of all of a kind, by id and version. Raises ValueError for one not readable."""
    return [_version(row) for row in connection.execute(_SELECT_VERSIONS, {"kind": kind, "id": id})]


def current(connection: "Connection[Any]", kind: Kind) -> list[Version]:
    """The newest version of every document of a kind, by id."""
    return list({version.entry.id: version for version in versions(connection, kind)}.values())


def _version(row: Sequence[Any]) -> Version:
    entry = _entry(*row[:5])
    return Version(entry, from_document(entry), published_at=row[5], published_by=row[6], reason=row[7])


def _entry(kind: Kind, id: str, version: int, valid_from: datetime, document: dict[str, Any]) -> Entry:
    return Entry(kind, id, version, to_micros(valid_from), document)
