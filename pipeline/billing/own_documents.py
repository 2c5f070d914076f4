"""Documents that no close makes: an adjustment that no invoice waits for, a voided invoice issued anew.

Each is made in one transaction, in the order of the close: hold containers by id, then what the payer draws on; reckon;
book; write; settle; number last.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from decimal import Decimal
from typing import Any

from psycopg import Connection
from psycopg.types.json import Jsonb

from pipeline.billing import queue
from pipeline.billing.adjustments import Adjustment, restate
from pipeline.billing.billed_months import NotAdjustable, Place, Seen, committed, look
from pipeline.billing.close_entries import CloseEntry, book_all
from pipeline.billing.close_money import Money, Wallet, read_money, read_uses_of
from pipeline.billing.composing import ToWrite, write_and_issue
from pipeline.billing.given_back import give_back
from pipeline.billing.invoicing_store import Invoicing, consolidating, load, mark
from pipeline.billing.issued import Issued, read
from pipeline.billing.late_months import as_billed, concerned, late_months, lock_open, month_of, settling
from pipeline.billing.originals import coupons_of
from pipeline.billing.prices import read_catalog
from pipeline.billing.queue import Task
from pipeline.billing.reckoning import Basis, compose, reckon
from pipeline.billing.rerate import Month
from pipeline.billing.statements import Difference, Key, differences, fee_due, key_of, read_booked
from pipeline.billing.unbilled_voids import unbilled_voids
from pipeline.billing.unit_credits import Units
from pipeline.billing.unit_credits import book as book_units
from pipeline.core.catalog import Catalog
from pipeline.core.credits import Grant
from pipeline.core.fees import due_in_advance
from pipeline.core.money import Minor, minor_decimal
from pipeline.core.periods import to_datetime


@dataclass(frozen=True, slots=True)
class Made:
    """A document that was issued; money in whole units of its currency."""

    document: int
    number: str
    kind: str
    currency: str
    total: Decimal
    payable: Decimal
    #: The documents it is about: the month's invoice, or the one that was voided.
    corrects: str | None


def payer_of(connection: "Connection[Any]", account: str, now: datetime) -> Task:
    """Who pays for an account, and whose lines are on that document. Raises LookupError for an unknown account."""
    parents = consolidating(connection, applied_until=mark(connection), on=now.date())
    found = queue.planned(connection, "", [account], consolidating=parents)  # of no month: whatever was closed
    if not found:
        raise LookupError(f"expected an account of the catalog, got {account!r}: `tally accounts list` shows them")
    return found[0]


# -- adjustments that no invoice waits for


def bill_adjustments(connection: "Connection[Any]", payer: Task, *, now: datetime, actor: str) -> list[Made]:
    """Bill a payer's closed months differently at once: a document for each month, seller and currency that changed.

    For a payer whom no invoice follows within a cycle; others find their adjustments on the next one. What comes to
    less than 0 goes into the customer's balance.

    Raises NotAdjustable, ValueError where a rate of exchange or credits do not suffice.
    """
    with connection.transaction():
        found, money = _late(connection, payer)
        known = load(connection, applied_until=mark(connection), on=now.date(), accounts=[payer.payer])
        made = [_bill(connection, known, money, one, now=now, actor=actor) for one in found]
        return [one for one in made if one is not None]


def preview_adjustments(connection: "Connection[Any]", payer: Task) -> list[Adjustment]:
    """What ``bill_adjustments``, or the next invoice, would bill. Changes nothing; raises NotAdjustable."""
    with connection.transaction(force_rollback=True):
        return _late(connection, payer)[0]


def _late(connection: "Connection[Any]", payer: Task) -> tuple[list[Adjustment], Money]:
    accounts = concerned(connection, payer.members)
    catalog = read_catalog(connection, accounts)
    opened = lock_open(connection, accounts)
    money = read_money(connection, accounts, lock=True)
    months = late_months(connection, catalog, {payer.payer: payer.members}, opened).get(payer.payer, [])
    units = Units(connection, accounts)
    found: list[Adjustment] = []
    for month in months:
        found += restate(connection, catalog, month, opened, units, earlier=found)
    return [replace(one, payer=payer.payer) for one in found], money


def _bill(
    connection: "Connection[Any]", known: Invoicing, money: Money, one: Adjustment, *, now: datetime, actor: str
) -> Made | None:
    """Issue an adjustment as a document of its own; None where nothing changed, and its containers are settled."""
    note = f"late usage of {one.month}"
    made = settle_books(connection, one, actor=actor, note=note)
    if not one.lines:
        return None
    entity, customer = known.legal_entity(one.legal_entity), known.customers.get(one.payer)
    if entity is None or customer is None:
        raise NotAdjustable(f"expected {one.payer} and its legal entity to be known today: `tally invoicing apply`")
    wallet = Wallet(one.payer, one.legal_entity, one.currency)
    grants = money.grants(wallet, sorted({row.account for _, row in one.lines}))
    basis = Basis(entity, customer, known.taxes, one.tax_date, grants=grants, balance=money.balance(wallet))
    reckoned = reckon([], basis, currency=one.currency, settled=one.lines)
    money.take(wallet, reckoned.document)
    document = compose(reckoned, basis, kind="adjustment", payer=one.payer, period=one.period, actor=actor)
    document = replace(document, corrects_id=one.original, reason_code="late_usage")
    new = ToWrite(one.payer, basis, reckoned, document, one.containers[0] if one.containers else None)
    return issue_own(connection, new, made, corrects=one.original, actor=actor, note=note, now=now)


def settle_books(connection: "Connection[Any]", one: Adjustment, *, actor: str, note: str) -> dict[Key, int]:
    """Book an adjustment's close entries and units, close its containers, give back credits its month needs no more.

    Returns the container lines that were made. The document that bills it is written in the same transaction.
    """
    ids = book_all(connection, one.entries, actor=actor, note=note)
    connection.execute(_CLOSE, [list(one.containers)])
    if one.original is not None and one.unneeded_credits:
        give_back(
            connection,
            one.original,
            one.currency,
            kind="restated",
            net=one.unneeded_credits,
            total=0,
            actor=actor,
            note=note,
        )
    made = _made(one.entries, ids)
    book_units(connection, one.units, made, actor=actor, note=note)
    return made


_CLOSE = "UPDATE billing.invoice SET state = 'issued' WHERE id = ANY(%s) AND state = 'open'"


def _made(entries: Sequence[tuple[str, CloseEntry]], ids: Sequence[int]) -> dict[Key, int]:
    return {
        key_of(account, entry.terms): id
        for (account, entry), id in zip(entries, ids, strict=True)
        if entry.line_id is None
    }


# -- issued anew


class NotReissuable(ValueError):
    """The document cannot be issued anew: says what was expected, what came, and what to do."""


def reissue(connection: "Connection[Any]", id: int, *, note: str, now: datetime, actor: str) -> Made:
    """Issue a voided invoice anew: the same month, by what is known now of prices, customer, seller and taxes.

    It goes to who paid then, for the accounts that were billed with him then, whoever pays for them by now; what their
    later invoices billed meanwhile stays there. Late usage of the month that has come since is on it, too, and so are
    adjustments of earlier months that were on the voided one; of a voided adjustment there are these only. It keeps the
    tax date. True-ups billed since come out anew with it where they do not fit what it bills any more.

    Raises NoDocument, NotReissuable, NotAdjustable, ValueError for what cannot be reckoned.
    """
    with connection.transaction():
        voided = read(connection, id)
        payer = voided.account
        accounts = concerned(connection, {*payer_of(connection, payer, now).members, *_accounts_on(voided)})
        catalog = read_catalog(connection, accounts)
        opened = lock_open(connection, accounts)
        money = read_money(connection, accounts, lock=True)
        _check_reissuable(connection, read(connection, id))  # whoever voids it, or issues it anew, held the money first
        units = Units(connection, accounts)
        place = Place(voided.legal_entity, voided.currency)
        wallet = Wallet(payer, *place)
        grants = money.grants(wallet, accounts)
        basis = _basis_now(connection, catalog, payer, place, voided, grants, money.balance(wallet))
        left: list[Difference] = []
        made: dict[Key, int] = {}
        container: int | None = None
        own: set[tuple[str, Month]] = set()
        adjusted = _adjusted(catalog, voided)
        if voided.kind == "invoice":
            month = month_of(catalog, voided.account, to_datetime(voided.period.end_us))
            members = _billed_then(connection, catalog, voided, accounts, month)
            seen = look(connection, catalog, payer, members, month, units)
            left = _left(connection, catalog, seen, members, place, basis, voided)
            container = next((one.id for one in seen.containers if one.currency == place.currency), None)
            if not _owes_others(seen, place):
                entries = seen.entries_in(place.currency)
                made = _made(entries, book_all(connection, entries, actor=actor, note=note))
                book_units(connection, seen.units_in(place.currency), made, actor=actor, note=note)
                connection.execute(_CLOSE, [list(seen.open_in(place.currency, {one.id for one in opened}))])
            own = {(account, month) for account in members}
        anew = adjusted | _trued_up_since(connection, catalog, voided, adjusted | own)
        late = as_billed(connection, catalog, {payer: accounts}, anew)
        found: list[Adjustment] = []
        earlier: list[Adjustment] = []
        for one_month in late.get(payer, ()):
            of_month = restate(connection, catalog, one_month, opened, units, earlier=found)
            found += of_month
            earlier += _of_seller(of_month, place)
        if not left and not any(one.lines for one in earlier):
            raise NotReissuable(
                f"expected something to bill instead of {voided.number}, got nothing: it was billed since, or is no "
                f"longer owed (`tally invoices list --account {payer}`)"
            )
        for one in earlier:
            made |= settle_books(connection, one, actor=actor, note=note)
        reckoned = reckon(
            left,
            basis,
            currency=voided.currency,
            uses=read_uses_of(connection, left, basis.grants) if basis.grants else {},
            settled=[line for one in earlier for line in one.lines],
        )
        document = compose(reckoned, basis, kind=voided.kind, payer=payer, period=voided.period, actor=actor)
        document = replace(document, corrects_id=id, reason_code="reissue", note=note)
        new = ToWrite(payer, basis, reckoned, document, container)
        return issue_own(connection, new, made, corrects=id, actor=actor, note=note, now=now)


_SELECT_REISSUE = """
SELECT number FROM billing.document WHERE corrects_id = %s AND reason_code = 'reissue' AND state <> 'void'
"""


def _check_reissuable(connection: "Connection[Any]", voided: Issued) -> None:
    if voided.kind not in ("invoice", "adjustment") or voided.state != "void":
        raise NotReissuable(f"expected a void invoice, got {voided.kind} {voided.number}, which is {voided.state}")
    again = connection.execute(_SELECT_REISSUE, [voided.id]).fetchone()
    if again is not None:
        raise NotReissuable(f"{voided.number} was issued anew before, as {again[0] or 'a draft'}")


def _accounts_on(voided: Issued) -> set[str]:
    """Who pays a document, and whose lines are on it."""
    return {voided.account, *(line.row.account for line in voided.lines)}


def _billed_then(
    connection: "Connection[Any]", catalog: Catalog, voided: Issued, accounts: Sequence[str], month: Month
) -> tuple[str, ...]:
    """The accounts that a month's invoice was for. Some may have left its payer by now, others have come to him."""
    asked = {(account, month) for account in accounts}
    found = as_billed(connection, catalog, {voided.account: accounts}, asked).get(voided.account, ())
    members = next((late.accounts for late in found if late.payer == voided.account), None)
    if members is None:
        raise NotReissuable(
            f"expected all invoices of {voided.account} for {month} to be issued, got one that waits: "
            "`tally invoices issue` it first"
        )
    return members


def _adjusted(catalog: Catalog, voided: Issued) -> set[tuple[str, Month]]:
    """The accounts' months whose adjustments were on a document: of all their periods that the lines may be of."""
    return {
        (line.row.account, month_of(catalog, line.row.account, to_datetime(period.end_us)))
        for line in voided.lines
        if line.row.kind == "adjustment"
        for period in catalog.periods_at(line.row.account, line.row.segment_start_us)
    }


def _left(
    connection: "Connection[Any]",
    catalog: Catalog,
    seen: Seen,
    accounts: Sequence[str],
    place: Place,
    basis: Basis,
    voided: Issued,
) -> list[Difference]:
    """What a seller has to bill of a month, with what it bills ahead, and to take back what the voided invoice did.

    A fee that was not billed ahead while the invoice was void was billed with its own period, which settles it.
    """
    standing = {one.key for one in seen.standing.get(place, ())}
    booked = read_booked(connection, dict.fromkeys(accounts, seen.period.start_us))
    since = {one.key for one in booked if one.service.end_us > seen.period.end_us} - standing
    taken_back = {line.row.adjusts_id for line in voided.lines if line.row.kind != "adjustment"}
    again = [one for one in booked if one.document_line_id in taken_back and one.key not in standing]
    ahead = [
        due
        for account in accounts
        for fee in due_in_advance(catalog, account, seen.period.end_us)
        if fee.segment.contract.legal_entity in ("", place.legal_entity) and fee.segment.plan.currency == place.currency
        if (due := fee_due(account, fee)).key not in since
    ]
    adding = [
        due
        for due in committed(connection, catalog, seen, place, basis)
        # What a later invoice settled of a window that goes on stays settled.
        if seen.is_over(due) or all(one.tax_date <= basis.tax_date for one in seen.committed_before(place, [due]))
    ]
    owed = [*seen.owed.get(place, ()), *adding, *ahead]
    return differences(owed, [*seen.standing_for(place, owed), *again])


def _trued_up_since(
    connection: "Connection[Any]", catalog: Catalog, voided: Issued, changed: Collection[tuple[str, Month]]
) -> set[tuple[str, Month]]:
    """The accounts' later months at whose end a commitment was settled that these months count toward.

    Not those of an invoice that is itself void and to be issued anew: it settles them then.
    """
    later = settling(connection, catalog, changed) - set(changed)
    if not later:
        return later
    last = max((month for _, month in later), key=lambda month: (month.year, month.month))
    voids = unbilled_voids(connection, until=last, accounts=[voided.account])
    waiting = {one.month for one in voids if one.account == voided.account}
    return {(account, month) for account, month in later if month not in waiting}


def _owes_others(seen: Seen, place: Place) -> bool:
    """Whether another seller has something to bill of the same containers: then these are his to close."""
    return any(
        differences(owed, seen.standing_for(other, owed))
        for other, owed in seen.owed.items()
        if other.currency == place.currency and other != place
    )


def _of_seller(found: Sequence[Adjustment], place: Place) -> list[Adjustment]:
    """A seller's part of a month's adjustments; with the containers, unless another one has something to bill of them.

    These are then closed with that one's next document.
    """
    same = [one for one in found if one.currency == place.currency]
    mine = [one for one in same if one.legal_entity == place.legal_entity]
    shared = any(one.lines for one in same if one.legal_entity != place.legal_entity)
    entries = () if shared else tuple(entry for one in same for entry in one.entries)
    containers = () if shared else tuple(id for one in same for id in one.containers)
    units = () if shared else tuple(draw for one in same for draw in one.units)
    return [replace(one, entries=entries, containers=containers, units=units) for one in mine]


def _basis_now(
    connection: "Connection[Any]",
    catalog: Catalog,
    payer: str,
    place: Place,
    voided: Issued,
    grants: Sequence[Grant],
    balance: Minor,
) -> Basis:
    """What is known now, as of the tax date that the voided document had."""
    known = load(connection, applied_until=mark(connection), on=voided.tax_date, accounts=[payer])
    entity, customer = known.legal_entity(place.legal_entity), known.customers.get(payer)
    if entity is None or customer is None:
        raise NotReissuable(f"expected {payer} and {place.legal_entity} to be known: `tally invoicing apply`")
    start, zone = to_datetime(voided.period.start_us), catalog.accounts[payer].time_zone
    return Basis(
        entity,
        customer,
        known.taxes,
        voided.tax_date,
        coupons=coupons_of(connection, payer, start, zone, known, customer, place.currency),
        grants=grants,
        balance=balance,
    )


def issue_own(
    connection: "Connection[Any]",
    new: ToWrite,
    made: dict[Key, int],
    *,
    corrects: int | None,
    actor: str,
    note: str,
    now: datetime,
) -> Made:
    id, number = write_and_issue(connection, new, made=made, actor=actor, note=note, now=now)
    document = new.document
    of = None if corrects is None else connection.execute(_SELECT_NUMBER, [corrects]).fetchone()
    detail = {"number": number, "corrects": of and of[0], "note": note}
    connection.execute(_AUDIT, [actor, f"document.{document.kind}", f"document:{id}", Jsonb(detail)])
    return Made(
        document=id,
        number=number,
        kind=document.kind,
        currency=document.currency,
        total=minor_decimal(document.total_amount, document.currency),
        payable=minor_decimal(document.payable_amount, document.currency),
        corrects=None if of is None else str(of[0]),
    )


_SELECT_NUMBER = "SELECT number FROM billing.document WHERE id = %s"
_AUDIT = "INSERT INTO billing.audit (actor, action, target, detail) VALUES (%s, %s, %s, %s)"
