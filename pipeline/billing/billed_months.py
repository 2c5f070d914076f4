"""A month that was billed, as it stands: what is owed for it by today's catalog, and what documents billed of it."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any, NamedTuple

from psycopg import Connection

from pipeline.billing.close_entries import CloseEntry
from pipeline.billing.commitments import commitment_dues, promising
from pipeline.billing.invoicing_store import Invoicing, load, mark
from pipeline.billing.reckoning import Basis, item_id, item_of
from pipeline.billing.rerate import Month, price_period
from pipeline.billing.rerate import differences as entries_of
from pipeline.billing.statements import (
    AccountPeriod,
    Booked,
    Container,
    Due,
    Key,
    dues,
    fee_due,
    hold,
    read_booked,
)
from pipeline.billing.unit_credits import UnitDraw, Units
from pipeline.core.catalog import Catalog
from pipeline.core.commitments import Spend
from pipeline.core.credits import Grant
from pipeline.core.discounts import line_discounts
from pipeline.core.fees import due_in_advance
from pipeline.core.money import Minor
from pipeline.core.periods import Period, format_instant
from pipeline.core.rerating import ClosedPeriod


class NotAdjustable(ValueError):
    """A closed month cannot be billed anew as it stands: says what stands in the way, and what to do."""


class Place(NamedTuple):
    """What a document is of: a payer has one per month."""

    legal_entity: str
    currency: str


@dataclass(frozen=True, slots=True)
class Seen:
    """A payer's month as it stands: what is owed for it by today's catalog, and what was billed and still stands."""

    #: By the payer's clock.
    period: Period
    #: The accounts' billing periods that end in the month.
    periods: tuple[AccountPeriod, ...]
    #: What usage and fees come to; commitments are reckoned on it (``committed``).
    owed: Mapping[Place, Sequence[Due]]
    standing: Mapping[Place, Sequence[Booked]]
    #: Fees in advance for time after the month that are due as they were billed, with the line that bills each.
    ahead: Mapping[Place, Sequence[tuple[Due, Booked]]]
    #: Of lines that adjustments billed: the document that their matter was on at first, by the line's id.
    first_on: Mapping[int, int]
    #: The period that each due of these is owed for.
    period_of: Mapping[Key, Period]
    #: What open containers lack to stand at their closing prices.
    entries: tuple[tuple[str, CloseEntry], ...]
    containers: tuple[Container, ...]
    #: What the accounts draw from unit credits beyond what they drew before.
    units: tuple[UnitDraw, ...]
    #: The charges that each place sells in a period to an account with a commitment, used or not: it may owe for what
    #: it did not use.
    sold: Mapping[tuple[AccountPeriod, Place], frozenset[str]]

    @property
    def places(self) -> list[Place]:
        """Where something is owed, or was billed, or a commitment may add something; in order."""
        return sorted({*self.owed, *self.standing, *(place for _, place in self.sold)})

    def units_in(self, currency: str) -> tuple[UnitDraw, ...]:
        return tuple(one for one in self.units if one.currency == currency)

    def entries_in(self, currency: str) -> tuple[tuple[str, CloseEntry], ...]:
        return tuple(one for one in self.entries if one[1].terms.currency == currency)

    def standing_for(self, place: Place, owed: Iterable[Due]) -> list[Booked]:
        """What was billed and is owed, or is no longer: all but what commitments added that are not looked at."""
        used = [one for one in self.standing.get(place, ()) if one.key.kind != "commitment"]
        return [*used, *self.committed_before(place, owed)]

    def committed_before(self, place: Place, owed: Iterable[Due]) -> list[Booked]:
        """What was billed for the commitments among these."""
        keys = {due.key for due in owed}
        return [one for one in self.standing.get(place, ()) if one.key.kind == "commitment" and one.key in keys]

    def parts(self, place: Place) -> list[tuple[Period | None, list[Due], list[Booked]]]:
        """What is owed and stands, but for commitments, by the invoice that it is on, with the period of that one.

        An account that is billed alone has an invoice for each of its periods; any other payer one, here of None.
        """
        owed, standing = list(self.owed.get(place, ())), self.standing_for(place, ())
        periods = list(dict.fromkeys(of.period for of in self.periods))
        if len(periods) < 2 or len({of.account for of in self.periods}) > 1:
            return [(None, owed, standing)]
        of_contract = {key.contract: period for key, period in self.period_of.items()}

        def period_of(key: Key) -> Period:
            found = self.period_of.get(key) or of_contract.get(key.contract)
            return found or next(one for one in periods if one.start_us <= key.segment_start_us < one.end_us)

        return [
            (
                period,
                [due for due in owed if period_of(due.key) == period],
                [one for one in standing if period_of(one.key) == period],
            )
            for period in periods
        ]

    def billed_elsewhere(self, due: Due, lines: Sequence[Booked], original: int | None) -> bool:
        """Whether a fee of the month stands on another invoice, which billed it in advance as it is due."""
        if due.key.kind != "fee" or len(lines) != 1 or not lines[0].agrees(due):
            return False
        return self.document_of(lines[0]) not in (None, original)

    def billed_ahead(self, place: Place, original: int) -> list[tuple[Due, Booked]]:
        """What an invoice billed in advance: its discounts and taxes were reckoned with these, too."""
        return [pair for pair in self.ahead.get(place, ()) if self.document_of(pair[1]) == original]

    def document_of(self, booked: Booked) -> int | None:
        """The document with whose discounts and taxes a line was reckoned; None of what adjustments alone billed."""
        return self.first_on.get(booked.document_line_id) if booked.kind == "adjustment" else booked.document_id

    def is_over(self, due: Due) -> bool:
        """Whether its service period ended with the month."""
        ends = {of.account: of.period.end_us for of in self.periods}
        return due.service.end_us <= ends[due.key.account]

    def open_in(self, currency: str, closable: Collection[int]) -> tuple[int, ...]:
        """Of the open containers those that are held: usage may come to others while this is reckoned."""
        return tuple(
            one.id for one in self.containers if one.state == "open" and one.currency == currency and one.id in closable
        )


def look(
    connection: "Connection[Any]",
    catalog: Catalog,
    payer: str,
    accounts: Collection[str],
    month: Month,
    units: Units,
) -> Seen:
    """What a payer owes for a month and was billed for it, over all containers. Writes nothing. Raises as restate."""
    stands = hold(connection, catalog, accounts, month, lock=False)
    entities = load(connection, applied_until=mark(connection), on=date.max, accounts=())
    owed: defaultdict[Place, list[Due]] = defaultdict(list)
    period_of: dict[Key, Period] = {}
    lacking: list[tuple[str, CloseEntry]] = []
    drawn: list[UnitDraw] = []
    sold: defaultdict[tuple[AccountPeriod, Place], set[str]] = defaultdict(set)
    promised = promising(connection, accounts)
    ahead: list[Due] = []
    for account in accounts:
        after_us = month.period_in(catalog.accounts[account].time_zone).end_us
        ahead += (fee_due(account, fee) for fee in due_in_advance(catalog, account, after_us))
    for of, one in stands.items():
        closed = _priced(connection, catalog, of, units.there_for(one))
        lacking += [(of.account, entry) for entry in entries_of(closed, [line.stored for line in one.lines])]
        of_account = dues(catalog, one, closed)
        drawn += units.draw(one, of_account)
        for due in of_account:
            owed[_place(payer, due, entities)].append(due)
            period_of[due.key] = of.period
        for segment in closed.segments if of.account in promised else ():
            if (entity := entities.legal_entity(segment.contract.legal_entity)) is not None:
                sold[of, Place(entity.id, segment.plan.currency)] |= {charge.id for charge in segment.plan.charges}
    booked = _booked(connection, stands)
    return Seen(
        period=month.period_in(catalog.accounts[payer].time_zone),
        periods=tuple(stands),
        owed=dict(owed),
        standing=_standing(booked, stands),
        ahead=_ahead(payer, ahead, booked, entities),
        first_on=_first_on(connection, booked),
        period_of=period_of,
        entries=tuple(lacking),
        containers=tuple(container for one in stands.values() for container in one.containers),
        units=tuple(drawn),
        sold={of: frozenset(charges) for of, charges in sold.items()},
    )


def committed(
    connection: "Connection[Any]",
    catalog: Catalog,
    seen: Seen,
    place: Place,
    basis: Basis,
    pending: Mapping[str, Sequence[Spend]] | None = None,
) -> list[Due]:
    """What the accounts' spend commitments add to a month, 0 too. Raises NotAdjustable.

    ``pending``: what earlier months cost differently by now and is not written yet, by account.
    """
    found: list[Due] = []
    for of in seen.periods:
        account, period = of
        sells = seen.sold.get((of, place))
        if not sells:
            continue
        owed = [
            due
            for due in seen.owed.get(place, ())
            if due.key.account == account and period.start_us <= due.key.segment_start_us < period.end_us
        ]
        of_item = {item_id(due.key): due.key for due in owed}
        off: defaultdict[Key, Minor] = defaultdict(int)
        items = [item_of(due, basis.customer) for due in owed]
        for discount in line_discounts(items, basis.coupons, place.currency):
            off[of_item[discount.line or ""]] += discount.amount
        zone = catalog.accounts[account].time_zone
        try:
            found += commitment_dues(
                connection,
                catalog,
                account,
                zone,
                period,
                owed,
                off,
                legal_entity=place.legal_entity,
                currency=place.currency,
                sells=sells,
                pending=(pending or {}).get(account, ()),
            )
        except ValueError as error:
            raise NotAdjustable(f"{account}: {error}") from error
    return found


def _place(payer: str, due: Due, entities: Invoicing) -> Place:
    entity = entities.legal_entity(due.legal_entity)
    if entity is None:
        raise NotAdjustable(
            f"{payer} bills with legal entity {due.legal_entity!r}, which is not known: `tally invoicing apply`"
        )
    return Place(entity.id, due.currency)


def _priced(
    connection: "Connection[Any]", catalog: Catalog, of: AccountPeriod, grants: Sequence[Grant]
) -> ClosedPeriod:
    """A period at its closing prices, from its events: late ones may have come under other prices than the first."""
    try:
        closed = price_period(connection, catalog, of.account, of.period, grants=grants)
    except ValueError as error:
        raise NotAdjustable(f"{of.account}: {error}") from error
    if closed.refused:
        use, rejection = closed.refused[0]
        raise NotAdjustable(
            f"{of.account}/{use.key} of {format_instant(use.at_us)} was billed and has no price by today's catalog: "
            f"{rejection.message}. Publish what is missing, or void it"
        )
    return closed


def _booked(connection: "Connection[Any]", periods: Iterable[AccountPeriod]) -> list[Booked]:
    """What was billed for service from these periods on and still stands."""
    since_us: dict[str, int] = {}
    for account, period in periods:
        since_us[account] = min(period.start_us, since_us.get(account, period.start_us))
    return read_booked(connection, since_us)


def _standing(booked: Iterable[Booked], periods: Iterable[AccountPeriod]) -> dict[Place, list[Booked]]:
    """Of what was billed that for service in these periods, and for commitments of that time."""
    bounds: defaultdict[str, list[Period]] = defaultdict(list)
    for of in periods:
        bounds[of.account].append(of.period)
    found: defaultdict[Place, list[Booked]] = defaultdict(list)
    for one in booked:
        # A commitment's window may have begun before.
        if one.key.kind == "commitment" or any(
            period.start_us <= one.key.segment_start_us < period.end_us for period in bounds[one.key.account]
        ):
            found[Place(one.legal_entity, one.currency)].append(one)
    return found


def _ahead(
    payer: str, dues: Iterable[Due], booked: Iterable[Booked], entities: Invoicing
) -> dict[Place, list[tuple[Due, Booked]]]:
    """The fees in advance that stand as they are due; what became of others, the next invoice settles."""
    lines: defaultdict[Key, list[Booked]] = defaultdict(list)
    for one in booked:
        lines[one.key].append(one)
    found: defaultdict[Place, list[tuple[Due, Booked]]] = defaultdict(list)
    for due in dues:
        standing = lines.get(due.key, [])
        if len(standing) == 1 and standing[0].agrees(due):
            place = _place(payer, due, entities)
            if place == (standing[0].legal_entity, standing[0].currency):
                found[place].append((due, standing[0]))
    return dict(found)


# Each adjustment line links to the one that it stands in for, up to one that no adjustment billed.
_SELECT_FIRST = """
WITH RECURSIVE before AS (
    SELECT id AS last, document_id, kind, adjusts_id FROM billing.document_line WHERE id = ANY(%s)
    UNION ALL
    SELECT before.last, line.document_id, line.kind, line.adjusts_id
    FROM before JOIN billing.document_line AS line ON line.id = before.adjusts_id WHERE before.kind = 'adjustment'
)
SELECT last, document_id FROM before WHERE kind <> 'adjustment'
"""


def _first_on(connection: "Connection[Any]", booked: Iterable[Booked]) -> dict[int, int]:
    adjusted = [one.document_line_id for one in booked if one.kind == "adjustment"]
    return dict(connection.execute(_SELECT_FIRST, [adjusted]).fetchall()) if adjusted else {}
