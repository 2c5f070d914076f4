"""Applying invoicing files: what is new or changed becomes a version in PostgreSQL, all in one transaction.

What did not change gets no new version, so applying a file again is safe. A version with a ``valid_from`` counts for
documents with a tax date from that day on; one without stands for all days, and so takes the place of those before it.
Nothing that was issued changes: a document keeps what it was made with.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any, Literal, NamedTuple, TypeAlias

from psycopg import Connection
from psycopg.types.json import Jsonb

from pipeline.catalog.invoicing_files import Draft, Drafts
from pipeline.catalog.publish import Refused
from pipeline.catalog.source import Finding, suggestion
from pipeline.core.invoicing_documents import Kind, id_of, kind_of, to_document

Outcome: TypeAlias = Literal["new", "changed", "unchanged"]

#: What a version without a ``valid_from`` counts from.
ALWAYS = date(1970, 1, 1)


@dataclass(frozen=True, slots=True)
class Applied:
    """What became of one item: its newest version, and from which tax date on that counts."""

    kind: Kind
    id: str
    version: int
    valid_from: date
    outcome: Outcome


class _Stored(NamedTuple):
    version: int
    valid_from: date
    document: dict[str, Any]


_NEWEST = """
SELECT DISTINCT ON (stored.kind, stored.id)
    stored.kind, stored.id, stored.version, stored.valid_from, stored.document
FROM unnest(%s::text[], %s::text[]) AS wanted (kind, id)
JOIN billing.invoicing_version AS stored USING (kind, id)
ORDER BY stored.kind, stored.id, stored.version DESC
"""
_ASSET = "INSERT INTO billing.asset (sha256, media_type, content) VALUES (%s, %s, %s) ON CONFLICT DO NOTHING"
_VERSIONS = "COPY billing.invoicing_version (kind, id, version, valid_from, document, applied_by, reason) FROM STDIN"
_AUDITS = "COPY billing.audit (actor, action, target, detail) FROM STDIN"


def apply(
    connection: "Connection[Any]", drafts: Drafts, *, actor: str, reason: str = "", dry_run: bool = False
) -> list[Applied]:
    """Apply all drafts or none, in one transaction; ``dry_run`` only tells. Returns what became of each, in order.

    Raises ``pipeline.catalog.publish.Refused`` with every finding: those of the files, names that nobody knows, and
    versions that would count before one that is planned.
    """
    if drafts.findings:
        raise Refused(drafts.findings)
    with connection.transaction(force_rollback=dry_run):
        connection.execute("SELECT billing.lock_invoicing()")
        keys = [(kind_of(draft.item), id_of(draft.item)) for draft in drafts.items]
        rows = connection.execute(_NEWEST, [[kind for kind, _ in keys], [id for _, id in keys]])
        known = {(kind, id): _Stored(*rest) for kind, id, *rest in rows.fetchall()}
        findings = _unknown_names(connection, drafts.items)
        applied: list[Applied] = []
        for draft, key in zip(drafts.items, keys, strict=True):
            decided = _decide(draft, *key, known.get(key))
            (findings if isinstance(decided, Finding) else applied).append(decided)  # type: ignore[arg-type]
        if findings:
            raise Refused(findings)
        _write(connection, drafts, applied, actor, reason)
    return applied


def _decide(draft: Draft, kind: Kind, id: str, newest: _Stored | None) -> Applied | Finding:
    begins = draft.valid_from or ALWAYS
    if newest is None:
        return Applied(kind, id, 1, begins, "new")
    if newest.valid_from == begins and newest.document == to_document(draft.item):
        return Applied(kind, id, newest.version, begins, "unchanged")
    if draft.valid_from is not None and draft.valid_from < newest.valid_from:
        return draft.where.finding(
            f"expected valid_from {newest.valid_from}, from when version {newest.version} counts, or later, or none to "
            f"stand in for all versions, got {draft.valid_from}"
        )
    return Applied(kind, id, newest.version + 1, begins, "changed")


_KNOWN = {
    "account": "SELECT DISTINCT id FROM billing.catalog_version WHERE kind = 'account' AND id = ANY(%s)",
    "coupon": "SELECT DISTINCT id FROM billing.invoicing_version WHERE kind = 'coupon' AND id = ANY(%s)",
    "plan": "SELECT DISTINCT id FROM billing.catalog_version WHERE kind = 'plan' AND id = ANY(%s)",
    "charge": """
        SELECT DISTINCT charge ->> 'id' FROM billing.catalog_version
        CROSS JOIN LATERAL jsonb_array_elements(document -> 'charges') AS charge
        WHERE kind = 'plan' AND charge ->> 'id' = ANY(%s)
    """,
}
_ALL = {
    "account": "SELECT DISTINCT id FROM billing.catalog_version WHERE kind = 'account' LIMIT 10000",
    "coupon": "SELECT DISTINCT id FROM billing.invoicing_version WHERE kind = 'coupon'",
    "plan": "SELECT DISTINCT id FROM billing.catalog_version WHERE kind = 'plan'",
    "charge": """
        SELECT DISTINCT charge ->> 'id' FROM billing.catalog_version
        CROSS JOIN LATERAL jsonb_array_elements(document -> 'charges') AS charge WHERE kind = 'plan'
    """,
}
_MAKES = {
    "account": "`tally accounts apply` first",
    "coupon": "give the file that defines it too",
    "plan": "`tally plans publish` first",
    "charge": "`tally plans publish` first",
}


def _unknown_names(connection: "Connection[Any]", items: Iterable[Draft]) -> list[Finding]:
    """Accounts, coupons, plans and charges that are named and nobody ever made: misspelt, they would do nothing."""
    drafts = list(items)
    findings = []
    for kind, what in _MAKES.items():
        named = [(name, where) for draft in drafts for named, name, where in draft.names if named == kind]
        made = {id_of(draft.item) for draft in drafts if kind_of(draft.item) == kind}
        asked = sorted({name for name, _ in named} - made)
        made.update(id for (id,) in connection.execute(_KNOWN[kind], [asked]))
        unknown = [(name, where) for name, where in named if name not in made]
        if not unknown:
            continue
        made.update(id for (id,) in connection.execute(_ALL[kind]))
        for name, where in unknown:
            hint = suggestion(name, sorted(made))
            hint = hint if "did you mean" in hint else f": {what}"
            an = "an" if kind == "account" else "a"
            findings.append(where.finding(f"expected {an} {kind} that there is, got {name!r}{hint}"))
    return findings


def _write(connection: "Connection[Any]", drafts: Drafts, applied: Sequence[Applied], actor: str, reason: str) -> None:
    changes = [pair for pair in zip(drafts.items, applied, strict=True) if pair[1].outcome != "unchanged"]
    with connection.cursor() as cursor:
        cursor.executemany(_ASSET, [(one.sha256, one.media_type, one.content) for one in drafts.assets.values()])
        with cursor.copy(_VERSIONS) as copy:
            for draft, one in changes:
                document = Jsonb(to_document(draft.item))
                copy.write_row((one.kind, one.id, one.version, one.valid_from, document, actor, reason))
        with cursor.copy(_AUDITS) as copy:
            for draft, one in changes:
                detail = {"valid_from": str(one.valid_from), "file": draft.where.file, "reason": reason}
                target = f"{one.kind}/{one.id}/{one.version}"
                copy.write_row((actor, f"{one.kind}.apply", target, Jsonb(detail)))
