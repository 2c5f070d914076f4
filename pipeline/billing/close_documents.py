"""From what is left to bill of a payer to its documents, reckoned and composed: one for each seller, currency, period.

A document bills what its contracts owe, then what their commitments add, then, on the last one of a seller and
currency, what closed months are billed differently. Credits, balances and coupons are taken document by document.
"""

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from pipeline.billing.adjustments import Adjustment, spent_beside
from pipeline.billing.close_money import Wallet, read_uses_of
from pipeline.billing.close_owed import Draft, Owed
from pipeline.billing.close_payers import Group, Prepared
from pipeline.billing.close_setting import Setting
from pipeline.billing.commitments import commitment_dues
from pipeline.billing.documents import NewLine
from pipeline.billing.notices import notices_of
from pipeline.billing.queue import Task
from pipeline.billing.reckoning import Basis, compose, item_id, item_of, reckon
from pipeline.billing.statements import Booked, Difference, Due, Key, differences
from pipeline.core.catalog import Catalog
from pipeline.core.commitments import Spend
from pipeline.core.discounts import line_discounts
from pipeline.core.invoice import Line
from pipeline.core.money import Micros, Minor
from pipeline.core.periods import Period


def prepare(setting: Setting, draft: Draft) -> None:
    """Reckon a payer's documents, in the order of their groups. Raises ValueError, saying what to settle."""
    payer, task = draft.payer.task.payer, draft.payer.task
    bases = _by_seller(setting, draft)
    settled: defaultdict[Group, list[tuple[Line, NewLine]]] = defaultdict(list)
    for one in draft.adjustments:
        settled[_group_for(setting, one, draft, bases)] += one.lines
    taken: defaultdict[str, set[Micros]] = defaultdict(set)  # periods that coupons were used in, by their start
    for group in sorted(bases, key=_order):
        basis = setting.with_coupons_left(payer, group, bases[group], taken)
        left = [*draft.groups.get(group, ()), *_commitments(setting, draft, group, basis)]
        if not left and not settled[group]:
            continue
        wallet = Wallet(payer, basis.entity.id, group.currency)
        members = {*task.members, *(row.account for _, row in settled[group])}
        grants = setting.money.grants(wallet, sorted(members))
        basis = replace(basis, grants=grants, balance=setting.money.balance(wallet))
        uses = read_uses_of(setting.connection, left, basis.grants) if basis.grants else None
        reckoned = reckon(left, basis, currency=group.currency, uses=uses, settled=settled[group])
        setting.money.take(wallet, reckoned.document)
        for discount in reckoned.document.discounts:
            if not discount.restates:
                taken[discount.coupon].add(group.period.start_us)
        document = compose(
            reckoned,
            basis,
            kind="invoice" if left else "adjustment",
            payer=payer,
            period=group.period,
            actor=setting.actor,
            run_id=setting.known.run.id or None,
            content={**_names(setting.catalog, task), **_notices(setting.catalog, draft)},
        )
        shown_as = setting.converted(basis, reckoned)
        container = draft.containers.get(group)
        draft.payer.documents.append(Prepared(payer, basis, reckoned, document, shown_as, container))


def _order(group: Group) -> tuple[str, str, Micros, Micros]:
    return group.legal_entity, group.currency, group.period.end_us, group.period.start_us


def _by_seller(setting: Setting, draft: Draft) -> dict[Group, Basis]:
    """Sort what is left to bill by its sellers, who are known now; what another one billed is for him to take back.

    A contract may name no seller where there is one only, and may have gone over from one to the other.
    """
    payer = draft.payer.task.payer
    bases: dict[Group, Basis] = {}
    groups: defaultdict[Group, list[Difference]] = defaultdict(list)
    containers: dict[Group, int] = {}
    for group, left in draft.groups.items():
        basis = setting.basis(payer, group)
        own = group._replace(legal_entity=basis.entity.id)
        bases[own] = basis
        groups[own] += ()
        places = {own}
        for one in left:
            mine = tuple(line for line in one.taken_back if line.legal_entity == own.legal_entity)
            if mine or one.due:
                groups[own].append(Difference(mine, one.due))
            for line in one.taken_back:
                if line.legal_entity != own.legal_entity:
                    place = own._replace(legal_entity=line.legal_entity)
                    places.add(place)
                    groups[place].append(Difference((line,), None))
        if group in draft.containers:
            containers |= dict.fromkeys(places, draft.containers[group])
    draft.groups, draft.containers = dict(groups), containers
    return {group: bases.get(group) or setting.basis(payer, group) for group in groups}


def _group_for(setting: Setting, one: Adjustment, draft: Draft, bases: dict[Group, Basis]) -> Group:
    """The last document with an adjustment's seller and currency; where there is none, one of its own."""
    same = [group for group in bases if (group.legal_entity, group.currency) == (one.legal_entity, one.currency)]
    if same:
        return max(same, key=_order)
    assert draft.period is not None, "set before anything is owed"
    group = Group(one.legal_entity, one.currency, draft.period)
    bases[group] = setting.basis(draft.payer.task.payer, group)
    return group


# What commitments add -------------------------------------------------------------------------------------------------


def _commitments(setting: Setting, draft: Draft, group: Group, basis: Basis) -> list[Difference]:
    """What the commitments of the payer's accounts add to a document: to that of who sells what they count."""

    def is_here(legal_entity: str, currency: str) -> bool:
        seller = setting.seller(draft.payer.task.payer, group.period, legal_entity)
        return (seller, currency) == (group.legal_entity, group.currency)

    found: list[Difference] = []
    for owed, booked in draft.promising:
        for period in owed.periods:
            if len(draft.payer.task.members) == 1 and period != group.period:
                continue
            sells = {
                charge.id
                for of, segment in owed.segments
                if of == period and is_here(segment.contract.legal_entity, segment.plan.currency)
                for charge in segment.plan.charges
            }
            if not sells:
                continue
            spent = [
                due
                for of, due in owed.dues
                if of == period and due.service.end_us <= period.end_us and is_here(due.legal_entity, due.currency)
            ]
            late = spent_beside(draft.restated, group.currency).get(owed.account, ())
            found += _added(setting, owed, period, spent, sells, booked, late, group, basis)
    return found


def _added(
    setting: Setting,
    owed: Owed,
    period: Period,
    spent: Sequence[Due],
    sells: Collection[str],
    booked: Sequence[Booked],
    late: Sequence[Spend],
    group: Group,
    basis: Basis,
) -> list[Difference]:
    """What an account's commitments add to what it spent in a period, less what was booked of it.

    ``late``: what months before cost differently by now.
    """
    of_item = {item_id(due.key): due.key for due in spent}
    off: defaultdict[Key, Minor] = defaultdict(int)
    items = [item_of(due, basis.customer) for due in spent]
    for one in line_discounts(items, basis.coupons, group.currency):
        off[of_item[one.line or ""]] += one.amount
    adding = commitment_dues(
        setting.connection,
        setting.catalog,
        owed.account,
        setting.catalog.accounts[owed.account].time_zone,
        period,
        spent,
        off,
        legal_entity=group.legal_entity,
        currency=group.currency,
        sells=sells,
        pending=late,
    )
    keys = {due.key for due in adding}
    return differences(adding, [line for line in booked if line.key in keys])


# What a document says besides -----------------------------------------------------------------------------------------


def _notices(catalog: Catalog, draft: Draft) -> dict[str, Any]:
    """What has changed for the accounts on a document since the one before."""
    found = [notice for account, periods in draft.periods.items() for notice in notices_of(catalog, account, periods)]
    unique = [notice for number, notice in enumerate(found) if notice not in found[:number]]
    return {"notices": unique} if unique else {}


def _names(catalog: Catalog, task: Task) -> dict[str, Any]:
    """Of a consolidated document, the names of the accounts on it."""
    if len(task.members) == 1:
        return {}
    return {"accounts": {one: catalog.accounts[one].name for one in task.members}}
