"""Publishing: drafts of files become immutable versions in PostgreSQL, and a place in the outbox, in one transaction.

A document that did not change gets no new version, so publishing a file again is safe. A first version counts from the
beginning unless its file says otherwise. A later version of a meter or plan counts from 60 seconds after publishing at
the earliest, so that every rater knows it before the first event it prices; anything earlier is a correction, not a
publication. Accounts and contracts count as published; they may reach into the past (an account's first contract, a
renewal signed late) as long as no usage is rated there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeAlias

from psycopg import Connection
from psycopg.types.json import Jsonb

from pipeline.catalog import store
from pipeline.catalog.files import AnyDraft, Draft, Drafts, overlap_finding, overlapping, span
from pipeline.catalog.source import Finding, suggestion
from pipeline.core.catalog import NOTICE_S
from pipeline.core.contracts import Account, Contract
from pipeline.core.documents import Entry, Kind, canonical_json, from_document, kind_of, to_document
from pipeline.core.meters import Meter
from pipeline.core.money import Micros
from pipeline.core.periods import BEGINNING, format_instant, to_datetime, to_micros
from pipeline.core.plans import Plan
from pipeline.infra.postgres import connect
from pipeline.infra.topics import RECORD_BYTES_MAX

#: What a publication notifies, so that the relay need not poll.
CHANNEL = "tally_outbox"
#: Time between publishing a price and its first event: raters know it within 2 seconds, the rest is for their clocks.
NOTICE = timedelta(seconds=NOTICE_S)

#: Largest document; half of what a record of the catalog topic may hold.
DOCUMENT_BYTES_MAX = RECORD_BYTES_MAX // 2

_MICROSECOND = timedelta(microseconds=1)
_SECOND_US: Micros = 1_000_000

Outcome: TypeAlias = Literal["new", "changed", "unchanged"]
_Known: TypeAlias = Mapping[tuple[Kind, str], Entry]


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
    dsn: str, drafts: Drafts, *, actor: str, reason: str = "", valid_from: timedelta | Micros | None = None
) -> list[Published]:
    """Publish all drafts or none, in one transaction. Returns what became of each, in the drafts' order.

    ``valid_from`` stands in for the files' in every meter and plan that is new or changed: an instant, or a time after
    publishing by the database's clock (raised to 60 seconds).

    Raises Refused with every finding, psycopg.Error when the database does not answer.
    """
    if drafts.findings:
        raise Refused(drafts.findings)
    with connect(dsn, application="publish") as connection:
        # One publication at a time: versions have no holes, and the outbox's order is the order of commits.
        connection.execute("SELECT pg_advisory_xact_lock(hashtextextended('tally.publish', 0))")
        now = _database_time(connection)
        items = drafts.all()
        known = store.newest(connection, [_key(draft) for draft in items])
        decisions = [_decide(draft, known.get(_key(draft)), now, valid_from) for draft in items]
        findings = [decision for decision in decisions if isinstance(decision, Finding)]
        findings += _currency_changes(drafts.plans, known)
        findings += _account_contradictions(connection, drafts, known, now)
        if findings:
            raise Refused(findings)
        published = [decision for decision in decisions if isinstance(decision, Published)]
        _write(connection, list(zip(items, published, strict=True)), now, actor, reason)
        return published


def _decide(
    draft: AnyDraft, newest: Entry | None, now: Micros, override: timedelta | Micros | None
) -> Published | Finding:
    """Which version a draft becomes and from when it counts, or why it cannot."""
    kind, name = _key(draft)
    document = to_document(draft.item)
    if (size := len(canonical_json(document).encode())) > DOCUMENT_BYTES_MAX:
        return draft.where.finding(f"expected at most {DOCUMENT_BYTES_MAX} bytes as JSON, got {size}: split it")
    if newest is not None and document == newest.document:
        if draft.valid_from_us not in (None, newest.valid_from_us):
            return draft.where.finding(
                f"expected valid_from {format_instant(newest.valid_from_us)}, since version {newest.version} has the "
                f"same content and a published version never moves, got {format_instant(draft.valid_from_us or 0)}"
            )
        return Published(kind, name, newest.version, newest.valid_from_us, "unchanged")
    if not isinstance(draft.item, Meter | Plan):
        return Published(kind, name, newest.version + 1 if newest else 1, BEGINNING, "changed" if newest else "new")
    asked = draft.valid_from_us
    if override is not None:
        asked = override if isinstance(override, int) else _whole_second(now, max(override, NOTICE))
    if newest is None:
        return Published(kind, name, 1, BEGINNING if asked is None else asked, "new")
    earliest = _whole_second(now, NOTICE)
    begin = earliest if asked is None else asked
    if begin < now + NOTICE // _MICROSECOND:
        still = f", still that of version {newest.version}, though the content changed" * (
            begin == newest.valid_from_us
        )
        return draft.where.finding(
            f"expected valid_from {format_instant(earliest)} (60 seconds after publishing) or later, or none to begin "
            f"then, got {format_instant(begin)}{still}"
        )
    if begin < newest.valid_from_us:
        return draft.where.finding(
            f"expected valid_from {format_instant(newest.valid_from_us)}, to replace version {newest.version} planned "
            f"for then, or later, got {format_instant(begin)}"
        )
    return Published(kind, name, newest.version + 1, begin, "changed")


def _currency_changes(plans: Sequence[Draft[Plan]], known: _Known) -> list[Finding]:
    return [
        draft.where.finding(
            f"expected currency {before.currency}, as in version {before.version}, since a contract has one currency, "
            f"got {draft.item.currency}: make it a plan of its own"
        )
        for draft in plans
        if isinstance(before := _before(draft, known), Plan) and before.currency != draft.item.currency
    ]


def _account_contradictions(connection: "Connection[Any]", drafts: Drafts, known: _Known, now: Micros) -> list[Finding]:
    """What would pull the ground from under periods and contracts that have begun."""
    if not drafts.accounts:
        return []
    plans = store.ids(connection, "plan")
    published = store.contracts_of(connection, [draft.item.id for draft in drafts.accounts])
    begun = {contract.account for contract in published if contract.start_us <= now}
    findings = []
    for account in drafts.accounts:
        before = _before(account, known)
        if isinstance(before, Account) and before.id in begun and before.time_zone != account.item.time_zone:
            findings.append(
                account.where.finding(
                    f"expected time_zone {before.time_zone}, since a contract has begun and other months would overlap "
                    f"billed ones, got {account.item.time_zone}"
                )
            )
    for draft in drafts.contracts:
        contract, at_plan = draft.item, draft.plan_where or draft.where
        if contract.plan not in plans:
            hint = suggestion(contract.plan, plans) if plans else ": `tally plans publish` comes first"
            findings.append(at_plan.finding(f"expected a published plan, got {contract.plan!r}{hint}"))
        match _before(draft, known):
            case Contract(account=owner) if owner != contract.account:
                findings.append(draft.where.finding(f"expected a new id, got {contract.id!r}, a contract of {owner!r}"))
            case Contract(plan=plan, start_us=start) if start <= now and (plan, start) != (
                contract.plan,
                contract.start_us,
            ):
                findings.append(
                    at_plan.finding(
                        f"expected plan {plan!r} from {format_instant(start)}, since {contract.id!r} has begun, got "
                        f"{contract.plan!r} from {format_instant(contract.start_us)}: end it and add another after it"
                    )
                )
    rated = store.rated_usage(connection, [draft.item.id for draft in drafts.accounts])
    findings += _back_dated([draft for draft in drafts.contracts if _changes(draft, known)], known, rated, now)
    in_files = {draft.item.id for draft in drafts.contracts}
    others = [Draft(contract, drafts.accounts[0].where) for contract in published if contract.id not in in_files]
    findings += [
        overlap_finding(other, one.item)
        for one, other in overlapping([*others, *drafts.contracts])
        if one.item.id not in in_files
    ]
    return findings


def _back_dated(
    contracts: Sequence[Draft[Contract]], known: _Known, rated: Mapping[str, Sequence[store.RatedUsage]], now: Micros
) -> list[Finding]:
    """Contracts that would change what covers usage that is rated: it keeps its price, so that is a correction."""
    findings = []
    for draft in contracts:
        contract, before, end_us = draft.item, _before(draft, known), draft.item.end_us
        usages = rated.get(contract.account, ())
        if not isinstance(before, Contract) or before.start_us > now:
            findings += [
                draft.where.finding(
                    f"expected a time without rated usage, since that keeps its price, got {contract.id!r} "
                    f"({span(contract)}) while {usage.contract!r} has usage rated from "
                    f"{format_instant(usage.first_us)} to {format_instant(usage.last_us)}: begin after it; "
                    "rating usage again is not possible yet"
                )
                for usage in usages
                if contract.start_us <= usage.last_us and (end_us is None or usage.first_us < end_us)
            ]
        elif end_us is not None and (before.end_us is None or end_us < before.end_us):
            for usage in usages:
                # Usage may be rated and not written yet, so all of the past is closed to an earlier end; and raters
                # have to know it before the first event it concerns.
                earliest = max(_whole_second(now, NOTICE), _whole_second(usage.last_us + 1, timedelta()))
                if usage.contract == contract.id and end_us < earliest:
                    findings.append(
                        draft.where.finding(
                            f"expected an end of {format_instant(earliest)} or later, since {contract.id!r} has rated "
                            f"usage, which keeps its price, got {format_instant(end_us)}: end it later; rating usage "
                            "again is not possible yet"
                        )
                    )
    return findings


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


def _whole_second(now: Micros, later: timedelta) -> Micros:
    """A time after now, rounded up to a whole second."""
    return -(-(now + later // _MICROSECOND) // _SECOND_US) * _SECOND_US


def _key(draft: AnyDraft) -> tuple[Kind, str]:
    return kind_of(draft.item), draft.item.id


def _changes(draft: AnyDraft, known: _Known) -> bool:
    """Whether a draft says anything else than its newest version."""
    newest = known.get(_key(draft))
    return newest is None or to_document(draft.item) != newest.document


def _before(draft: AnyDraft, known: _Known) -> object:
    """The newest published version of a draft's document, or None."""
    entry = known.get(_key(draft))
    return None if entry is None else from_document(entry)
