"""Writing what was reckoned of payers: close entries, documents as drafts, money, containers, and the audit trail."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from psycopg import Connection
from psycopg.types.json import Jsonb

from pipeline.billing.close_entries import book_all
from pipeline.billing.close_money import settle
from pipeline.billing.close_payers import Payer, Prepared
from pipeline.billing.composing import with_lines
from pipeline.billing.documents import delete_drafts, write_drafts
from pipeline.billing.given_back import give_back
from pipeline.billing.numbers import Number
from pipeline.billing.queue import Done, Outcome, Run
from pipeline.billing.rerate import Month
from pipeline.billing.statements import Key, key_of
from pipeline.billing.unit_credits import book as book_units
from pipeline.core.money import minor_decimal


def book_entries(connection: "Connection[Any]", payers: Iterable[Payer], run: Run, actor: str) -> dict[Key, int]:
    """Book what the containers lack; return the lines that were made for it, of each key the last version's."""
    entries = [entry for payer in payers for entry in payer.entries]
    ids = book_all(connection, entries, actor=actor, note=f"close of {run.month}")
    return {
        key_of(account, entry.terms): id
        for id, (account, entry) in zip(ids, entries, strict=True)
        if entry.line_id is None
    }


_SELECT_DRAFTS = """
SELECT document.id FROM billing.document JOIN billing.close_run AS run ON run.id = document.run_id
WHERE document.account = ANY(%s) AND run.month = %s AND document.state = 'draft'
"""


def _take_back_drafts(connection: "Connection[Any]", payers: Iterable[Payer], month: Month) -> None:
    """Delete the drafts that an earlier run of the month made: these documents stand in for them."""
    names = [payer.task.payer for payer in payers]
    delete_drafts(connection, [id for (id,) in connection.execute(_SELECT_DRAFTS, [names, str(month)])])


def write(
    connection: "Connection[Any]", payers: Sequence[Payer], made: Mapping[Key, int], month: Month
) -> list[tuple[int, Prepared]]:
    """Write payers' documents as drafts, in the place of earlier drafts of the month; each with its id."""
    _take_back_drafts(connection, payers, month)
    prepared = [one for payer in payers for one in payer.documents]
    ids = write_drafts(connection, [with_lines(one.document, made) for one in prepared])
    return list(zip(ids, prepared, strict=True))


def settle_money(
    connection: "Connection[Any]",
    payers: Iterable[Payer],
    documents: Sequence[tuple[int, Prepared]],
    made: Mapping[Key, int],
    run: Run,
    actor: str,
) -> None:
    """Book what documents draw and carry forward, and give back what earlier months need less of their credits now."""
    note = f"close of {run.month}"
    settle(connection, documents, made, actor=actor, note=note)
    for payer in payers:
        book_units(connection, payer.units, made, actor=actor, note=note)
        for original, currency, net in payer.unneeded:
            give_back(connection, original, currency, kind="restated", net=net, total=0, actor=actor, note=note)


_MOVE_CONTAINERS = """
UPDATE billing.invoice SET state = %s::billing.invoice_state WHERE id = ANY(%s) AND state IN ('open', 'draft')
"""


def move_containers(connection: "Connection[Any]", ids: Sequence[int], state: Literal["reviewed", "issued"]) -> None:
    """Close open containers, which are held: what comes now is for a supplement."""
    moved = connection.execute(_MOVE_CONTAINERS, [state, list(ids)]).rowcount
    if moved != len(ids):
        raise AssertionError(f"expected {len(ids)} open containers, which are held, got {moved}")


def done_of(payer: Payer) -> Done:
    name, documents = payer.task.payer, len(payer.documents)
    if payer.problem is not None:
        return Done(name, None, problem=payer.problem)
    outcome: Outcome
    if documents:
        outcome = "drafted" if payer.waits else "issued"
    elif payer.reviewed:
        outcome = "reviewed"
    elif payer.containers:
        outcome = "nothing"
    else:
        outcome = "closed" if payer.closed else "no_contract"
    return Done(name, outcome, documents)


_INSERT_AUDIT = """
INSERT INTO billing.audit (actor, action, target, detail)
SELECT %s, 'document.issued', target, detail FROM unnest(%s::text[], %s::jsonb[]) AS issued (target, detail)
"""


def audit(
    connection: "Connection[Any]",
    issued: Sequence[tuple[int, Prepared]],
    numbers: Sequence[Number],
    run: Run,
    actor: str,
) -> None:
    if not issued:
        return
    details = [
        Jsonb(
            {
                "document": id,
                "run": run.id,
                "account": one.payer,
                "legal_entity": one.basis.entity.id,
                "currency": one.document.currency,
                "total": str(minor_decimal(one.document.total_amount, one.document.currency)),
            }
        )
        for id, one in issued
    ]
    connection.execute(_INSERT_AUDIT, [actor, [number.text for number in numbers], details])
