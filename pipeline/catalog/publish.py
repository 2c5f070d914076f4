"""Publishing: drafts of files become immutable versions in PostgreSQL, and a place in the outbox, in one transaction.

A document that did not change gets no new version, so publishing a file again is safe. A first version counts from the
beginning unless its file says otherwise. A later version of a meter, plan or price list counts from 60 seconds after
publishing at the earliest, so that every rater knows it before the first event it prices; so does another customer
segment of an account. Accounts and contracts count as published; they may reach into the past (an account's first
contract, a renewal signed late) as long as no usage is rated there. What is back-dated beyond that, by whoever says so,
is a correction: it changes what open periods cost, once they are re-rated, and never an issued invoice.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeAlias

from psycopg import Connection
from psycopg.types.json import Jsonb

from pipeline.catalog import store
from pipeline.catalog.contradictions import NOTICE, Known, contradictions, key_of, unknown_names, whole_second
from pipeline.catalog.files import AnyDraft, Drafts
from pipeline.catalog.source import Finding
from pipeline.core.documents import DATED, Item, Kind, canonical_json, to_document
from pipeline.core.money import Micros
from pipeline.core.periods import BEGINNING, format_instant, to_datetime, to_micros
from pipeline.core.plans import PriceList
from pipeline.infra.postgres import connect
from pipeline.infra.topics import RECORD_BYTES_MAX

#: What a publication notifies, so that the relay need not poll.
CHANNEL = "tally_outbox"
#: Largest document; half of what a record of the catalog topic may hold.
DOCUMENT_BYTES_MAX = RECORD_BYTES_MAX // 2

#: The one field of an account that counts from a time on.
_DATED_FIELD = "customer_segment"

_MICROSECOND = timedelta(microseconds=1)

Outcome: TypeAlias = Literal["new", "changed", "unchanged"]


@dataclass(frozen=True, slots=True)
class Published:
    """What became of one document: its newest version, and from which event time that counts."""

    kind: Kind
    id: str
    version: int
    valid_from_us: Micros
    outcome: Outcome


class Refused(Exception):
    """Nothing was published; ``findings`` say where the files are wrong or contradict what is published."""

    def __init__(self, findings: Sequence[Finding]) -> None:
        super().__init__("\n".join(map(str, findings)))
        self.findings = tuple(sorted(findings))


def publish(
    dsn: str,
    drafts: Drafts,
    *,
    actor: str,
    reason: str = "",
    valid_from: timedelta | Micros | None = None,
    back_dated: bool = False,
) -> list[Published]:
    """Publish all drafts or none, in one transaction. Returns what became of each, in the drafts' order.

    ``valid_from`` stands in for the files' in every meter, plan and price list that is new or changed: an instant, or a
    time after publishing by the database's clock (raised to 60 seconds). ``back_dated`` lets what changed count from
    any time that no issued invoice covers: open periods are then to be re-rated.

    Raises Refused with every finding, psycopg.Error when the database does not answer.
    """
    with connect(dsn, application="publish") as connection:
        return publish_on(connection, drafts, actor=actor, reason=reason, valid_from=valid_from, back_dated=back_dated)


def publish_on(
    connection: "Connection[Any]",
    drafts: Drafts,
    *,
    actor: str,
    reason: str = "",
    valid_from: timedelta | Micros | None = None,
    back_dated: bool = False,
) -> list[Published]:
    """As ``publish``, within the caller's transaction: for what has to happen together with it, or only be tried."""
    if drafts.findings:
        raise Refused(sorted({*drafts.findings, *unknown_names(connection, drafts)}))
    # One publication at a time: versions have no holes, and the outbox's order is the order of commits.
    connection.execute("SELECT pg_advisory_xact_lock(hashtextextended('tally.publish', 0))")
    now = _database_time(connection)
    items = drafts.all()
    plans: list[tuple[Kind, str]] = [("plan", draft.item.plan) for draft in drafts.price_lists]
    known = store.newest(connection, [*map(key_of, items), *plans])
    decisions = [_decide(draft, known, now, valid_from, back_dated) for draft in items]
    findings = [decision for decision in decisions if isinstance(decision, Finding)]
    published = [decision for decision in decisions if isinstance(decision, Published)]
    begins = {(one.kind, one.id): one.valid_from_us for one in published}
    findings += contradictions(connection, drafts, known, begins, now, back_dated=back_dated)
    if findings:
        raise Refused(findings)
    _write(connection, list(zip(items, published, strict=True)), now, actor, reason)
    return published


def _decide(
    draft: AnyDraft, known: Known, now: Micros, override: timedelta | Micros | None, back_dated: bool
) -> Published | Finding:
    """Which version a draft becomes and from when it counts, or why it cannot."""
    kind, name = key_of(draft)
    newest, document = known.get((kind, name)), to_document(draft.item)
    if (size := len(canonical_json(document).encode())) > DOCUMENT_BYTES_MAX:
        return draft.where.finding(f"expected at most {DOCUMENT_BYTES_MAX} bytes as JSON, got {size}: split it")
    if newest is not None and document == newest.document:
        if draft.valid_from_us not in (None, newest.valid_from_us):
            return draft.where.finding(
                f"expected valid_from {format_instant(newest.valid_from_us)}, since version {newest.version} has the "
                f"same content and a published version never moves, got {format_instant(draft.valid_from_us or 0)}"
            )
        return Published(kind, name, newest.version, newest.valid_from_us, "unchanged")
    version = newest.version + 1 if newest else 1
    outcome: Outcome = "changed" if newest else "new"
    if kind == "contract":
        return Published(kind, name, version, BEGINNING, outcome)
    asked = draft.valid_from_us
    if override is not None and kind in DATED:
        asked = override if isinstance(override, int) else whole_second(now, max(override, NOTICE))
    if newest is None and not _changes_prices(draft.item, known):
        return Published(kind, name, version, BEGINNING if asked is None else asked, outcome)
    if newest is not None and kind == "account" and document.get(_DATED_FIELD) == newest.document.get(_DATED_FIELD):
        if asked not in (None, newest.valid_from_us):
            return draft.where.finding(
                f"expected no valid_from, since of an account only a change of {_DATED_FIELD} counts from a time on, "
                f"got {format_instant(asked)}"
            )
        return Published(kind, name, version, newest.valid_from_us, outcome)
    earliest = whole_second(now, NOTICE)
    begin = earliest if asked is None else asked
    if begin < now + NOTICE // _MICROSECOND and not back_dated:
        same = newest is not None and begin == newest.valid_from_us
        still = f", still that of version {version - 1}, though the content changed" * same
        return draft.where.finding(
            f"expected valid_from {format_instant(earliest)} (60 seconds after publishing) or later, or none to begin "
            f"then, got {format_instant(begin)}{still}; what is to correct the past is published with --back-dated"
        )
    if newest is not None and begin < newest.valid_from_us and not back_dated:
        return draft.where.finding(
            f"expected valid_from {format_instant(newest.valid_from_us)}, to replace version {newest.version} planned "
            f"for then, or later, got {format_instant(begin)}"
        )
    return Published(kind, name, version, begin, outcome)


def _changes_prices(item: Item, known: Known) -> bool:
    """Whether a new document changes what somebody pays already: a list for customers of a plan that is published."""
    if not isinstance(item, PriceList) or (item.customer_segment is None and item.account is None):
        return False
    return ("plan", item.plan) in known


_INSERT_VERSION = """
INSERT INTO billing.catalog_version (kind, id, version, valid_from, document, published_at, published_by, reason)
VALUES (%s, %s, %s, %s, %s, %s, %s, %s)
"""
_INSERT_OUTBOX = "INSERT INTO billing.outbox (kind, id, version) VALUES (%s, %s, %s)"
_INSERT_AUDIT = "INSERT INTO billing.audit (actor, action, target, detail) VALUES (%s, %s, %s, %s)"


def _write(
    connection: "Connection[Any]",
    decided: Sequence[tuple[AnyDraft, Published]],
    now: Micros,
    actor: str,
    reason: str,
) -> None:
    versions, audits = [], []
    for draft, new in decided:
        if new.outcome == "unchanged":
            continue
        key = (new.kind, new.id, new.version)
        document = Jsonb(to_document(draft.item))
        versions.append((*key, to_datetime(new.valid_from_us), document, to_datetime(now), actor, reason))
        detail = {"valid_from": format_instant(new.valid_from_us), "file": draft.where.file, "reason": reason}
        audits.append((actor, f"{new.kind}.publish", f"{new.kind}/{new.id}/{new.version}", Jsonb(detail)))
    if versions:
        with connection.cursor() as cursor:
            cursor.executemany(_INSERT_VERSION, versions)
            cursor.executemany(_INSERT_OUTBOX, [row[:3] for row in versions])
            cursor.executemany(_INSERT_AUDIT, audits)
            cursor.execute("SELECT pg_notify(%s, '')", [CHANNEL])


def _database_time(connection: "Connection[Any]") -> Micros:
    """Now, by the clock of the one database, after any wait for the lock."""
    row = connection.execute("SELECT clock_timestamp()").fetchone()
    if row is None:
        raise AssertionError("a SELECT without FROM has one row")
    return to_micros(row[0])
