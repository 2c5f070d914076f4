"""Price changes under four eyes: one person proposes, another approves, and what is approved is published at once.

A proposal holds whole documents and the versions they were held against. It can be approved while these are still the
newest, so what the second person looked at is what happens. The decision, the versions and the outbox commit together.

What is enforced, here and by a trigger in PostgreSQL: an approver goes by another name than the proposer, a proposal is
decided once, and its record never changes. That a name is really the person's is only recorded: Tally does not know yet
who somebody is, and whoever may write to its database can write what they like.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal, TypeAlias

from psycopg import Connection, Cursor
from psycopg.types.json import Jsonb

from pipeline.catalog import store
from pipeline.catalog.files import Draft, Drafts
from pipeline.catalog.publish import Published, publish_on
from pipeline.catalog.source import Where
from pipeline.core.catalog import NOTICE_S
from pipeline.core.documents import Entry, Item, Kind, from_document, to_document
from pipeline.core.meters import Meter
from pipeline.core.money import Micros
from pipeline.core.periods import format_instant, to_datetime, to_micros
from pipeline.core.plans import Plan, PriceList
from pipeline.infra.postgres import connect

Verdict: TypeAlias = Literal["approved", "rejected"]


class ProposalError(Exception):
    """A proposal that cannot be made or decided.

    NoSuchProposal  there is none of this id
    AlreadyDecided  somebody decided it before
    SamePerson      its proposer cannot approve it
    Outdated        a document has a newer version than the one it was held against
    NothingEarlier  there is no other version to go back to
    NoReason        it changes something and does not say why
    """


class NoSuchProposal(ProposalError):
    """There is none of this id."""


class AlreadyDecided(ProposalError):
    """Somebody decided it before."""


class SamePerson(ProposalError):
    """Its proposer cannot approve it."""


class Outdated(ProposalError):
    """A document has a newer version than the one it was held against."""


class NothingEarlier(ProposalError):
    """There is no other version to go back to."""


class NoReason(ProposalError):
    """It changes something and does not say why."""


@dataclass(frozen=True, slots=True)
class Proposed:
    """A document as it is to become, and the version it was held against (None: a new document)."""

    kind: Kind
    id: str
    before: Item | None
    after: Item
    #: From which event time its file asks it to count, in microseconds since 1970 UTC; None leaves it to publishing.
    valid_from_us: Micros | None
    where: Where


@dataclass(frozen=True, slots=True)
class Decision:
    """What became of a proposal: who decided, when (UTC), why."""

    verdict: Verdict
    decided_at: datetime
    decided_by: str
    reason: str


@dataclass(frozen=True, slots=True)
class Proposal:
    """A price change somebody proposed, when (UTC) and why; open until its decision."""

    id: int
    proposed_at: datetime
    proposed_by: str
    reason: str
    #: From when all of it is to count: an instant, a time after approval, or None for what its documents say.
    valid_from: timedelta | Micros | None
    #: Whether that may be a time before its approval: a correction of open periods.
    back_dated: bool
    documents: tuple[Proposed, ...]
    decision: Decision | None


_SELECT_PRICED = "SELECT EXISTS (SELECT FROM billing.catalog_version WHERE kind NOT IN ('account', 'contract'))"


def needs_approval(dsn: str) -> bool:
    """Whether any price is published yet: the first publication, into an empty catalog, changes nobody's bill.

    Raises psycopg.Error without a database.
    """
    with connect(dsn, application="approvals") as connection:
        return bool(_one(connection.execute(_SELECT_PRICED))[0])


_INSERT_PROPOSAL = """
INSERT INTO billing.proposal (proposed_by, reason, valid_from, valid_after, back_dated)
VALUES (%s, %s, %s, %s, %s) RETURNING id
"""
_INSERT_DOCUMENT = """
INSERT INTO billing.proposal_document
    (proposal_id, kind, id, version_before, document, valid_from, file, line, path)
VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s)
"""


def propose(
    dsn: str,
    drafts: Drafts,
    *,
    actor: str,
    reason: str,
    valid_from: timedelta | Micros | None = None,
    back_dated: bool = False,
) -> Proposal | list[Published]:
    """Put what these drafts change to a second person; or, when they change nothing, say what is published already.

    ``valid_from`` and ``back_dated`` as for ``publish``; a time after publishing counts from the approval.

    Raises publish.Refused with every finding if it could not be published now, NoReason for a change without one,
    psycopg.Error without a database.
    """
    with connect(dsn, application="approvals") as connection:
        with connection.transaction(force_rollback=True):  # what is wrong today need not wait for the second person
            published = publish_on(
                connection, drafts, actor=actor, reason=reason, valid_from=valid_from, back_dated=back_dated
            )
        changing = [
            (draft, one) for draft, one in zip(drafts.all(), published, strict=True) if one.outcome != "unchanged"
        ]
        if not changing:
            return published
        if not reason.strip():
            raise NoReason("expected a reason for the change, since it stays on record, got none: --reason")
        instant = to_datetime(valid_from) if isinstance(valid_from, int) else None
        after = valid_from if isinstance(valid_from, timedelta) else None
        (proposal,) = _one(connection.execute(_INSERT_PROPOSAL, [actor, reason, instant, after, back_dated]))
        rows = [
            (
                proposal,
                one.kind,
                one.id,
                None if one.outcome == "new" else one.version - 1,
                Jsonb(to_document(draft.item)),
                None if draft.valid_from_us is None else to_datetime(draft.valid_from_us),
                draft.where.file,
                draft.where.line,
                draft.where.path,
            )
            for draft, one in changing
        ]
        with connection.cursor() as cursor:
            cursor.executemany(_INSERT_DOCUMENT, rows)
        _audit(connection, actor, "proposal.made", proposal, reason, [(one.kind, one.id) for _, one in changing])
        return proposals(connection, only=proposal)[0]


_INSERT_VERSION = "INSERT INTO billing.proposal_version (proposal_id, kind, id, version) VALUES (%s, %s, %s, %s)"


def approve(dsn: str, proposal: int, *, actor: str, reason: str = "") -> list[Published]:
    """Publish a proposal as its second person. Returns what became of each document.

    The versions are published in the proposer's name and for the proposer's reason; the approver stands beside them.

    Raises NoSuchProposal, AlreadyDecided, SamePerson, Outdated; publish.Refused if it can no longer be published (its
    valid_from has passed, for one); psycopg.Error without a database.
    """
    with connect(dsn, application="approvals") as connection:
        found = _decide(connection, proposal, "approved", actor, reason)
        published = publish_on(
            connection,
            _drafts(found),
            actor=found.proposed_by,
            reason=found.reason,
            valid_from=found.valid_from,
            back_dated=found.back_dated,
        )
        held_against = {
            (document.kind, document.id): document.before.version if document.before else 0
            for document in found.documents
        }
        for one in published:
            newest = one.version if one.outcome == "unchanged" else one.version - 1
            if newest != held_against[one.kind, one.id]:
                raise Outdated(
                    f"expected version {held_against[one.kind, one.id]} of {one.kind} {one.id!r} to be the newest, as "
                    f"when {found.proposed_by} proposed this, got version {newest}: reject it and propose it anew"
                )
        with connection.cursor() as cursor:
            cursor.executemany(_INSERT_VERSION, [(proposal, one.kind, one.id, one.version) for one in published])
        return published


def reject(dsn: str, proposal: int, *, actor: str, reason: str) -> None:
    """Decide that a proposal will not be published; also the proposer may. Raises NoSuchProposal, AlreadyDecided."""
    with connect(dsn, application="approvals") as connection:
        _decide(connection, proposal, "rejected", actor, reason)


_SELECT_PROPOSALS = """
SELECT proposal.id, proposed_at, proposed_by, proposal.reason, valid_from, valid_after, back_dated,
    verdict::text, decided_at, decided_by, decision.reason
FROM billing.proposal LEFT JOIN billing.proposal_decision AS decision ON decision.proposal_id = proposal.id
WHERE %(only)s::bigint IS NULL OR proposal.id = %(only)s
ORDER BY proposal.id DESC
"""
_SELECT_DOCUMENTS = """
SELECT document.proposal_id, document.kind::text, document.id, document.document, document.valid_from,
    document.file, document.line, document.path, before.version, before.valid_from, before.document
FROM billing.proposal_document AS document
LEFT JOIN billing.catalog_version AS before
    ON before.kind = document.kind AND before.id = document.id AND before.version = document.version_before
WHERE document.proposal_id = ANY(%s)
ORDER BY document.kind, document.id
"""


def proposals(connection: "Connection[Any]", *, only: int | None = None) -> list[Proposal]:
    """Every proposal, the newest first, or one of them.

    Raises NoSuchProposal for one that is not there, ValueError for a document this program cannot read.
    """
    rows = connection.execute(_SELECT_PROPOSALS, {"only": only}).fetchall()
    if only is not None and not rows:
        raise NoSuchProposal(f"expected a proposal, got {only}: `tally plans proposals` lists them")
    documents: dict[int, list[Proposed]] = {row[0]: [] for row in rows}
    for proposal, kind, name, document, valid_from, file, line, path, *before in connection.execute(
        _SELECT_DOCUMENTS, [list(documents)]
    ):
        version, before_from, before_document = before
        documents[proposal].append(
            Proposed(
                kind,
                name,
                None
                if version is None
                else from_document(Entry(kind, name, version, to_micros(before_from), before_document)),
                from_document(Entry(kind, name, 0, 0, document)),
                None if valid_from is None else to_micros(valid_from),
                Where(file, line, path),
            )
        )
    return [
        Proposal(
            id=row[0],
            proposed_at=row[1],
            proposed_by=row[2],
            reason=row[3],
            valid_from=row[5] if row[4] is None else to_micros(row[4]),
            back_dated=row[6],
            documents=tuple(documents[row[0]]),
            decision=None if row[7] is None else Decision(*row[7:]),
        )
        for row in rows
    ]


_SELECT_APPROVERS = """
SELECT version, decided_by FROM billing.proposal_version JOIN billing.proposal_decision USING (proposal_id)
WHERE kind = %s AND id = %s
"""


def approvers(connection: "Connection[Any]", kind: Kind, id: str) -> dict[int, str]:
    """Who approved each version of a document, of those that a second person approved."""
    return dict(connection.execute(_SELECT_APPROVERS, [kind, id]).fetchall())


def earlier(connection: "Connection[Any]", documents: Sequence[tuple[Kind, str]], *, version: int | None) -> Drafts:
    """Drafts that say again what these documents said before: in this version, or in the one before the newest.

    In place of a version that does not count yet they count from the same time, so that it never will. Raises
    NothingEarlier for a document without such a version.
    """
    drafts = Drafts()
    for kind, name in documents:
        known = store.versions(connection, kind, name)
        wanted = len(known) - 1 if version is None else version
        if not 1 <= wanted < len(known):
            what = f"version {wanted} of {kind} {name!r}" if version else f"an earlier version of {kind} {name!r}"
            there = f"{len(known)} version{'s' * (len(known) != 1)}"
            raise NothingEarlier(f"expected {what} to go back to, got a {kind} of {there}: `tally plans show {name}`")
        planned, now = known[-1].entry.valid_from_us, to_micros(_one(connection.execute("SELECT now()"))[0])
        instead = planned if planned >= now + NOTICE_S * 1_000_000 else None
        _add(drafts, known[wanted - 1].item, Where(f"{kind}/{name}/{wanted}", 1, ""), instead)
    return drafts


# Pieces -------------------------------------------------------------------------------------------------------------

_INSERT_DECISION = """
INSERT INTO billing.proposal_decision (proposal_id, verdict, decided_by, reason) VALUES (%s, %s, %s, %s)
ON CONFLICT (proposal_id) DO NOTHING RETURNING proposal_id
"""


def _decide(connection: "Connection[Any]", proposal: int, verdict: Verdict, actor: str, reason: str) -> Proposal:
    """Record the decision, and return the proposal as it was decided on."""
    found = proposals(connection, only=proposal)[0]
    if verdict == "approved" and _same_person(actor, found.proposed_by):
        raise SamePerson(f"expected another person than its proposer {found.proposed_by} to approve it, got {actor}")
    if connection.execute(_INSERT_DECISION, [proposal, verdict, actor, reason]).fetchone() is None:
        decision = proposals(connection, only=proposal)[0].decision
        assert decision is not None, "what another transaction decided is visible once it holds ours up no more"
        raise AlreadyDecided(
            f"expected an open proposal, got {proposal}, {decision.verdict} by {decision.decided_by} at "
            f"{format_instant(to_micros(decision.decided_at))}"
        )
    keys = [(document.kind, document.id) for document in found.documents]
    _audit(connection, actor, f"proposal.{verdict}", proposal, reason, keys)
    return found


def _same_person(one: str, other: str) -> bool:
    return one.strip().lower() == other.strip().lower()


def _drafts(proposal: Proposal) -> Drafts:
    drafts = Drafts()
    for document in proposal.documents:
        _add(drafts, document.after, document.where, document.valid_from_us)
    return drafts


def _add(drafts: Drafts, item: Item, where: Where, valid_from_us: Micros | None) -> None:
    match item:
        case Meter():
            drafts.meters.append(Draft(item, where, valid_from_us))
        case Plan():
            drafts.plans.append(Draft(item, where, valid_from_us))
        case PriceList():
            drafts.price_lists.append(Draft(item, where, valid_from_us))
        case _:
            raise ValueError(f"expected a meter, plan or price list in a proposal, got {item!r}")


_INSERT_AUDIT = "INSERT INTO billing.audit (actor, action, target, detail) VALUES (%s, %s, %s, %s)"


def _audit(
    connection: "Connection[Any]", actor: str, action: str, proposal: int, reason: str, keys: Iterable[tuple[Kind, str]]
) -> None:
    detail = {"reason": reason, "documents": [f"{kind}/{name}" for kind, name in keys]}
    connection.execute(_INSERT_AUDIT, [actor, action, f"proposal/{proposal}", Jsonb(detail)])


def _one(cursor: "Cursor[Any]") -> Any:
    row = cursor.fetchone()
    assert row is not None, "the statement gives one row"
    return row
