"""Credit notes: what an issued document billed is given back, in full, by line or by quantity. Nothing is edited.

A credit note is a document of its own with amounts below 0. It keeps the tax date and rates of what it credits, and
links to it: ``corrects_id`` to its document, ``adjusts_id`` of each line to the line it takes back. Parts are cut from
one ruler, so however an invoice is credited bit by bit, in the end every column is back to 0.

A line that a later document took back (an adjustment, a fee changed) was given back there and does not stand any more:
it is credited with that document. Crediting that one in full undoes what it took back, so the line stands again. So in
whatever order documents are credited, until nothing is left to credit, they come to 0 together.

It is money given back and changes nothing of what is owed for the usage: what comes late is an adjustment beside it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from decimal import Decimal
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

from psycopg import Connection
from psycopg.types.json import Jsonb

from pipeline.billing.alerts import update_now
from pipeline.billing.composing import (
    add_to_balance,
    converted,
    legal_entity,
)
from pipeline.billing.credits import lock_grants_of
from pipeline.billing.documents import (
    NewDocument,
    NewLine,
    ToIssue,
    discount_rows,
    issue,
    line_columns,
    tax_rows,
    totals_columns,
    write_drafts,
)
from pipeline.billing.given_back import give_back, owners
from pipeline.billing.issued import Issued, IssuedLine, read
from pipeline.billing.payments import book, end_write_off, open_amount
from pipeline.billing.reckoning import reckoned_detail
from pipeline.core.credit_notes import credit_note, credited
from pipeline.core.invoice import Document, Line, Totals
from pipeline.core.money import Minor, Quantity, minor_decimal, plain, quantity_decimal, round_half_up_div, to_minor

#: Why something is credited, as a code; the note says it in words. Values are written into tables: never rename one.
Reason: TypeAlias = Literal["billing_error", "duplicate", "service_failure", "goodwill", "returned", "price_agreed"]
REASONS: tuple[Reason, ...] = get_args(Reason)
#: Where goes what the customer has paid already: back to him, or to his next documents.
Destination: TypeAlias = Literal["refund", "balance"]


class NotCreditable(ValueError):
    """What was asked for cannot be credited: says what was expected, what came, and what to do."""


@dataclass(frozen=True, slots=True)
class Part:
    """What to credit of a line, by its position on the document: so much of its quantity, or all that is left."""

    position: int
    quantity: Quantity | None = None


class LeftOut(NamedTuple):
    """A line that was not credited, since another document took it back: its position, and that one's number."""

    position: int
    taken_back_by: str


@dataclass(frozen=True, slots=True)
class Credited:
    """A credit note that was issued; money in whole units of the currency, below 0."""

    document: int
    number: str
    corrects: str
    currency: str
    net: Decimal
    tax: Decimal
    total: Decimal
    #: What it took off the invoice, what goes to the customer's balance, and what is to be paid out. Above 0.
    taken_off: Decimal
    to_balance: Decimal
    to_refund: Decimal
    #: Lines of the document that do not stand any more, where all of it was to be credited.
    left_out: tuple[LeftOut, ...]


def credit(
    connection: "Connection[Any]",
    id: int,
    parts: Sequence[Part] | None,
    *,
    reason: Reason,
    note: str,
    to: Destination,
    actor: str,
    now: datetime,
) -> Credited:
    """Issue a credit note on an invoice, adjustment or progress bill; ``parts`` None: on all of it that still stands.

    In one transaction: 1. hold the credits that it drew and the payer's balance, then the document; 2. reckon the note
    from what earlier ones left; 3. write and issue it; 4. take it off what is open on the document, send what was paid
    to ``to``, and give back applied balance and prepaid credits as what they were.

    Dates and the number are the legal entity's at ``now``. Raises NoDocument, NotCreditable.
    """
    with connection.transaction():
        # Step 1.
        accounts = {read(connection, id).account, *owners(connection, id)}
        lock_grants_of(connection, accounts)
        original = read(connection, id, lock=True)
        _check(original)
        # Step 2.
        earlier = _earlier(connection, original)
        taken_back = _taken_back(connection, original)
        if parts is None:
            cuts, left_out = _standing(original, earlier, taken_back), _left_out(original, taken_back)
        else:
            cuts, left_out = _chosen(original, earlier, taken_back, parts), ()
        reckoned = credit_note(original.document, [cut.credit for cut in cuts], earlier.totals)
        # Step 3.
        new = _new_document(original, cuts, reckoned, left_out, reason=reason, note=note, actor=actor)
        (note_id,) = write_drafts(connection, [new])
        entity = legal_entity(connection, original.legal_entity, now)
        draft = ToIssue(note_id, "credit_note", entity, converted(original, earlier.totals, reckoned.totals))
        (number,) = issue(connection, [draft], now=now, actor=actor)
        # Step 4.
        taken_off, paid = _settle(connection, original, note_id, number.text, reckoned.totals, to, actor=actor, now=now)
        balance = -reckoned.totals.balance + (paid if to == "balance" else 0)
        add_to_balance(connection, original, note_id, "credit_note", balance, actor=actor, note=number.text)
        give_back(
            connection,
            original.id,
            original.currency,
            kind="credited",
            net=_net_credits(connection, cuts, original.currency),
            total=-reckoned.totals.credits,
            actor=actor,
            note=f"credit note {number.text}",
            credited=_by_account(reckoned),
        )
        detail = {"number": number.text, "corrects": original.number, "reason": reason, "note": note, "to": to}
        connection.execute(_AUDIT, [actor, "document.credit", f"document:{id}", Jsonb(detail)])
        for account in sorted(accounts):
            update_now(connection, account)
    currency, totals = original.currency, reckoned.totals
    return Credited(
        document=note_id,
        number=number.text,
        corrects=original.number,
        currency=currency,
        net=minor_decimal(totals.net, currency),
        tax=minor_decimal(totals.tax, currency),
        total=minor_decimal(totals.total, currency),
        taken_off=minor_decimal(taken_off, currency),
        to_balance=minor_decimal(balance, currency),
        to_refund=minor_decimal(paid if to == "refund" else 0, currency),
        left_out=left_out,
    )


_AUDIT = "INSERT INTO billing.audit (actor, action, target, detail) VALUES (%s, %s, %s, %s)"


def _check(original: Issued) -> None:
    if original.kind == "credit_note":
        raise NotCreditable(f"expected an invoice, got credit note {original.number}: void it instead")
    if original.state != "issued":
        raise NotCreditable(f"expected an issued document, got {original.number}, which is {original.state}")


# -- what is credited


class _Earlier(NamedTuple):
    """What earlier credit notes gave back: of each line how much of its quantity (1 where it has none), and in all."""

    quantities: Mapping[int, int]
    totals: tuple[Totals, ...]


_SELECT_EARLIER = """
SELECT id FROM billing.document WHERE corrects_id = %s AND kind = 'credit_note' AND state = 'issued' ORDER BY id
"""


def _earlier(connection: "Connection[Any]", original: Issued) -> _Earlier:
    notes = [read(connection, id) for (id,) in connection.execute(_SELECT_EARLIER, [original.id]).fetchall()]
    quantities: dict[int, int] = {}
    for one in notes:
        for line in one.lines:
            assert line.row.adjusts_id is not None, "each line of a credit note takes one back"
            credited = quantities.get(line.row.adjusts_id, 0) + (abs(line.row.quantity) or 1)
            quantities[line.row.adjusts_id] = credited
    return _Earlier(quantities, tuple(one.totals for one in notes))


class _Cut(NamedTuple):
    """``part/whole`` of a line, after ``before/whole`` of it."""

    of: IssuedLine
    part: int
    whole: int
    before: int

    @property
    def credit(self) -> Line:
        """The line that credits it."""
        return credited(self.of.line, str(self.of.id), self.part, self.whole, before=self.before)


# A reversal is credited as a whole or not at all.
_SELECT_TAKEN_BACK = """
SELECT line.id, coalesce(later.number, 'a reviewed ' || later.kind) FROM billing.document_line AS line
JOIN billing.document_line AS reversal ON reversal.adjusts_id = line.id AND reversal.role = 'reversal'
JOIN billing.document AS later ON later.id = reversal.document_id
WHERE line.document_id = %s AND later.state IN ('reviewed', 'issued') AND later.kind <> 'credit_note' AND NOT EXISTS (
    SELECT FROM billing.document_line AS undoing JOIN billing.document AS note ON note.id = undoing.document_id
    WHERE undoing.adjusts_id = reversal.id AND note.kind = 'credit_note' AND note.state = 'issued'
)
"""


def _taken_back(connection: "Connection[Any]", original: Issued) -> dict[int, str]:
    """Lines that do not stand any more, by id, with the number of the document that took each back."""
    return dict(connection.execute(_SELECT_TAKEN_BACK, [original.id]).fetchall())


def _left_out(original: Issued, taken_back: Mapping[int, str]) -> tuple[LeftOut, ...]:
    return tuple(LeftOut(one.position, taken_back[one.id]) for one in original.lines if one.id in taken_back)


def _standing(original: Issued, earlier: _Earlier, taken_back: Mapping[int, str]) -> list[_Cut]:
    """All that is left of the lines that still stand.

    What the document took back of others is undone with the line that stands in for it. Where such lines were credited
    before, it may be that nothing of the sum is left: then what was taken back stays so, and nothing is charged.
    """
    gone = {_about(one) for one in original.lines if one.id in taken_back}
    cuts = [
        _Cut(one, size - before, size, before)
        for one in original.lines
        if one.id not in taken_back and not (one.row.role == "reversal" and _about(one) in gone)
        if (size := _size(one)) > (before := earlier.quantities.get(one.id, 0))
    ]
    if original.totals.total > 0 and sum(cut.credit.total for cut in cuts) > 0:
        cuts = [cut for cut in cuts if cut.of.row.role == "new"]
    if not cuts:
        by = ", ".join(sorted(set(taken_back.values())))
        why = (
            f"of which {by} took back what was not credited: credit that one, then this one again"
            if by
            else "which is credited in full"
        )
        raise NotCreditable(f"expected something left to credit, got {original.number}, {why}")
    return cuts


def _about(one: IssuedLine) -> tuple[object, ...]:
    """What a line is about: the same of a line, of what takes it back and of what stands in for it."""
    row = one.row
    return row.account, row.contract, row.price_version, row.charge, row.cell, row.segment_start_us


def _size(one: IssuedLine) -> int:
    return abs(one.row.quantity) or 1


def _chosen(original: Issued, earlier: _Earlier, taken_back: Mapping[int, str], parts: Sequence[Part]) -> list[_Cut]:
    by_position = {line.position: line for line in original.lines}
    cuts = []
    for one in parts:
        line = by_position.pop(one.position, None)
        if line is None:
            raise NotCreditable(
                f"expected each line of {original.number} at most once, by its position 1 to {len(original.lines)}, "
                f"got {one.position}"
            )
        name = f"line {line.position} of {original.number}"
        if line.id in taken_back:
            number = taken_back[line.id]
            raise NotCreditable(f"expected a line that stands, got {name}, which {number} took back: credit that one")
        if line.row.role == "reversal":
            raise NotCreditable(
                f"expected a line that bills something, got {name}, which takes back what an earlier document billed: "
                f"it is undone when all of {original.number} is credited"
            )
        size, before = _size(line), earlier.quantities.get(line.id, 0)
        left = size - before
        wanted = left if one.quantity is None else one.quantity
        if not 0 < wanted <= left or (one.quantity is not None and not line.row.quantity):
            raise NotCreditable(_too_much(original, line, one, left))
        cuts.append(_Cut(line, wanted, size, before))
    return cuts


def _too_much(original: Issued, line: IssuedLine, asked: Part, left: int) -> str:
    name = f"line {line.position} of {original.number}"
    if left == 0:
        return f"expected a line with something left to credit, got {name}, which is credited in full"
    if not line.row.quantity:
        return f"{name} has no quantity: credit all of it"
    quantity = plain(quantity_decimal(asked.quantity or 0))
    unit = f" {line.row.unit}" if line.row.unit else ""
    return f"expected more than 0 and up to {plain(quantity_decimal(left))}{unit}, left of {name}, got {quantity}"


def _new_document(
    original: Issued,
    cuts: Sequence[_Cut],
    reckoned: Document,
    left_out: Sequence[LeftOut],
    *,
    reason: Reason,
    note: str,
    actor: str,
) -> NewDocument:
    corrects = {
        "id": original.id,
        "kind": original.kind,
        "number": original.number,
        "issue_date": original.issue_date.isoformat(),
        "left_out": [one._asdict() for one in left_out],
    }
    return NewDocument(
        kind="credit_note",
        legal_entity=original.legal_entity,
        account=original.account,
        currency=original.currency,
        period=original.period,
        tax_date=original.tax_date,
        **totals_columns(reckoned.totals),
        lines=tuple(_credit_line(original, cut, line) for cut, line in zip(cuts, reckoned.lines, strict=True)),
        taxes=tax_rows(reckoned),
        discounts=discount_rows(reckoned),
        created_by=actor,
        content={**original.content, "corrects": corrects, "notices": []},
        corrects_id=original.id,
        reason_code=reason,
        note=note,
    )


def _credit_line(original: Issued, cut: _Cut, line: Line) -> NewLine:
    row = cut.of.row
    quantity = cut.part if row.quantity else 0
    adjusts = {"number": original.number, "position": cut.of.position, "issue_date": original.issue_date.isoformat()}
    return replace(
        row,
        quantity=-quantity if row.quantity > 0 else quantity,
        **line_columns(line),
        adjusts_id=cut.of.id,
        role="reversal",
        detail={
            **row.detail,
            **reckoned_detail(line, original.currency),
            "adjusts": adjusts,
            # The parts of the price are those of the whole line.
            **({"parts": []} if cut.part < cut.whole else {}),
        },
    )


# -- where it goes


def _settle(
    connection: "Connection[Any]",
    original: Issued,
    note_id: int,
    number: str,
    totals: Totals,
    to: Destination,
    *,
    actor: str,
    now: datetime,
) -> tuple[Minor, Minor]:
    """Take the note off what is open on the document, then off what was written off; return that, and what the customer
    had paid of the rest."""
    note = read(connection, note_id)
    credited = -totals.payable
    left = open_amount(connection, original)
    left += end_write_off(connection, original, credited - left, at=now, reference=number, actor=actor)
    taken_off = max(min(credited, left), 0)
    if taken_off:
        book(connection, original, "credit_note", taken_off, at=now, reference=number, actor=actor)
        book(connection, note, "credit_note", -taken_off, at=now, reference=original.number, actor=actor)
    paid = max(credited - taken_off, 0)
    if paid and to == "balance":
        book(connection, note, "balance", -paid, at=now, reference=original.number, actor=actor)
    return taken_off, paid


def _by_account(note: Document) -> dict[str, Minor]:
    """What is credited of each account's lines, with tax."""
    found: dict[str, Minor] = {}
    for line in note.lines:
        found[line.account] = found.get(line.account, 0) - line.total
    return found


_SELECT_NET_CREDITS = """
SELECT document_line_id, grant_id, amount FROM billing.document_discount
WHERE document_line_id = ANY(%s) AND grant_id IS NOT NULL
"""


def _net_credits(connection: "Connection[Any]", cuts: Sequence[_Cut], currency: str) -> dict[int, Minor]:
    """What of each grant's net credits is in what is given back; cut as the lines are, so that parts add up."""
    by_line = {cut.of.id: cut for cut in cuts}
    shares: dict[int, Minor] = {}
    for line, grant, amount in connection.execute(_SELECT_NET_CREDITS, [list(by_line)]).fetchall():
        cut, cents = by_line[line], to_minor(amount, currency)
        upto, before = (round_half_up_div(cents * part, cut.whole) for part in (cut.before + cut.part, cut.before))
        shares[grant] = shares.get(grant, 0) + upto - before
    return shares
