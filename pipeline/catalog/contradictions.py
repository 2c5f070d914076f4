"""Why drafts without mistakes of their own cannot be published: what they contradict of what is published, or billed.

What has begun stays: the prices of rated usage, a contract's phases, an account's months. ``back_dated`` lifts that for
open periods, which are then re-rated; an issued invoice is never touched.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from itertools import chain, combinations, product
from typing import Any, NamedTuple, TypeAlias

from psycopg import Connection

from pipeline.catalog import store
from pipeline.catalog.files import (
    AnyDraft,
    Draft,
    Drafts,
    cycle_finding,
    overlap_finding,
    overlapping,
    parent_cycles,
    same_scope,
    scope_finding,
    span,
)
from pipeline.catalog.source import Finding, one_of, suggestion
from pipeline.core.catalog import NOTICE_S
from pipeline.core.charges import PER_EVENT, check_metering
from pipeline.core.commitments import check_sold, sold
from pipeline.core.contracts import Account, Contract, Phase, phase_spans
from pipeline.core.cycles import in_words
from pipeline.core.documents import Entry, Kind, from_document, kind_of, to_document
from pipeline.core.meters import Meter
from pipeline.core.money import Micros
from pipeline.core.periods import BEGINNING, NEVER, format_instant
from pipeline.core.plans import Plan, PriceList, overridden

#: Time between publishing a price and its first event: raters know it within 2 seconds, the rest is for their clocks.
NOTICE = timedelta(seconds=NOTICE_S)

#: Newest published versions by kind and id.
Known: TypeAlias = Mapping[tuple[Kind, str], Entry]
#: From when what the drafts become counts, by kind and id.
Begins: TypeAlias = Mapping[tuple[Kind, str], Micros]

_MICROSECOND = timedelta(microseconds=1)
_SECOND_US: Micros = 1_000_000


def contradictions(
    connection: "Connection[Any]", drafts: Drafts, known: Known, begins: Begins, now: Micros, *, back_dated: bool
) -> list[Finding]:
    """Every contradiction. ``begins`` lacks drafts that are refused already."""
    findings = [*_currency_changes(drafts.plans, known), *_meters(connection, drafts, known)]
    findings += _prices(connection, drafts, known, begins, now)
    findings += _newly_shared(connection, drafts, known, now)
    if drafts.accounts:
        findings += _accounts(connection, drafts, known, now)
        findings += _contracts(connection, drafts, known, now, back_dated=back_dated)
    findings += _issued(connection, drafts, known, begins)
    return list(dict.fromkeys(findings))


def unknown_names(connection: "Connection[Any]", drafts: Drafts) -> list[Finding]:
    """What contracts and accounts name that nobody published: told at once, also where files have other mistakes."""
    return [*_agreed(connection, drafts.contracts), *_parents(connection, drafts)]


def key_of(draft: AnyDraft) -> tuple[Kind, str]:
    return kind_of(draft.item), draft.item.id


def whole_second(now: Micros, later: timedelta) -> Micros:
    """A time after now, rounded up to a whole second."""
    return -(-(now + later // _MICROSECOND) // _SECOND_US) * _SECOND_US


# Prices -------------------------------------------------------------------------------------------------------------


def _currency_changes(plans: Sequence[Draft[Plan]], known: Known) -> list[Finding]:
    return [
        draft.where.finding(
            f"expected currency {before.currency}, as in version {before.version}, since a contract has one currency, "
            f"got {draft.item.currency}: make it a plan of its own"
        )
        for draft in plans
        if isinstance(before := _before(draft, known), Plan) and before.currency != draft.item.currency
    ]


def _meters(connection: "Connection[Any]", drafts: Drafts, known: Known) -> Iterator[Finding]:
    """Meters against the plans that are not in the files: those in them were checked with them."""
    changed = {draft.item.id: draft for draft in drafts.meters if _changes(draft, known)}
    in_files = {draft.item.id for draft in drafts.plans}
    for plan in store.plans_metered_by(connection, changed) if changed else ():
        for charge in plan.charges if plan.id not in in_files else ():
            draft = changed.get(charge.meter or "")
            pools = [pool for pool in plan.pools if charge.id in pool.charges]
            if draft is None:
                continue
            try:
                check_metering(charge, draft.item, pooled=bool(pools))
            except ValueError as error:
                yield draft.where.finding(f"plan {plan.id!r}: {error}: publish the plan with it")
            for pool in pools:
                if pool.unit != draft.item.unit:
                    yield draft.where.finding(
                        f"expected unit {pool.unit}, that of pool {pool.id!r} of plan {plan.id!r}, got "
                        f"{draft.item.unit}: publish the plan with it"
                    )


def _prices(
    connection: "Connection[Any]", drafts: Drafts, known: Known, begins: Begins, now: Micros
) -> Iterator[Finding]:
    """Price lists against the plans they override, whichever of them changes."""
    plans = {draft.item.id for draft in drafts.plans} | {draft.item.plan for draft in drafts.price_lists}
    if not plans:
        return
    published = store.price_lists_of(connection, plans)
    in_files = {draft.item.id for draft in drafts.price_lists}
    newest = {version.entry.id: version.item for version in published}
    others = [
        Draft(item, drafts.all()[0].where)
        for item in newest.values()
        if isinstance(item, PriceList) and item.id not in in_files and (item.overrides or item.pools)
    ]
    for one, other in same_scope([*others, *drafts.price_lists]):
        if one.item.id not in in_files:
            yield scope_finding(other, one.item)
    for draft in drafts.price_lists:
        yield from _moved_list(draft, known)
        account = draft.item.account
        # Whose plan is new may be new as well, and comes once that is published.
        old_plan = ("plan", draft.item.plan) in known
        if account is not None and old_plan and not store.newest(connection, [("account", account)]):
            yield draft.where.finding(
                f"expected a published account, got {account!r}: `tally accounts apply` comes first"
            )
    for plan in sorted(plans):
        versions = _spans(plan, drafts.plans, store.versions(connection, "plan", plan), begins)
        lists = [
            version
            for name in sorted(newest.keys() | in_files)
            for version in _spans(name, drafts.price_lists, published, begins)
            if version.item.plan == plan
        ]
        yield from _misfits(versions, lists, now)


def _moved_list(draft: Draft[PriceList], known: Known) -> Iterator[Finding]:
    """A price list stays with its plan and its customers."""
    before = _before(draft, known)
    if isinstance(before, PriceList) and _scope(before) != _scope(draft.item):
        was = f"{_scope(before)}, as in version {before.version}"
        yield draft.where.finding(f"expected {was}, got {_scope(draft.item)}: make it another list")


def _scope(price_list: PriceList) -> str:
    whom = price_list.account or price_list.customer_segment or "the contracts that name it"
    return f"a price list of plan {price_list.plan!r} for {whom}"


class _Version(NamedTuple):
    """A plan or price list from when until when it counts; ``draft`` where it is about to be published."""

    item: Any  #: Plan in a list of plans, PriceList in one of price lists
    start_us: Micros
    end_us: Micros
    draft: AnyDraft | None


def _spans(name: str, drafts: Iterable[AnyDraft], published: Iterable[store.Version], begins: Begins) -> list[_Version]:
    """The versions of one document with the draft's, each until the next; of two from the same time the newer."""
    found: dict[Micros, tuple[Any, AnyDraft | None]] = {}
    for version in published:
        if version.entry.id == name:
            found[version.entry.valid_from_us] = (version.item, None)
    for draft in drafts:
        if draft.item.id == name and (start := begins.get(key_of(draft))) is not None:
            found[start] = (draft.item, draft)
    starts = sorted(found)
    return [
        _Version(found[start][0], start, end, found[start][1])
        for start, end in zip(starts, [*starts[1:], NEVER], strict=True)
    ]


def _misfits(plans: Sequence[_Version], lists: Sequence[_Version], now: Micros) -> Iterator[Finding]:
    """Overrides of what their plan lacks, or that leave it without a price, at any time from now on."""
    for plan in plans:
        fitting = []
        for version in lists:
            messages = _misfit(plan.item, [version.item])
            if not messages:
                fitting.append(version)
            elif draft := _draft_among([version, plan], now):
                yield from (draft.where.finding(message) for message in messages)
        # What each of two lists leaves with a price, both together may not.
        by_strength = [[version for version in fitting if _strength(version.item) == level] for level in range(3)]
        pairs = chain.from_iterable(product(weaker, stronger) for weaker, stronger in combinations(by_strength, 2))
        for weaker, stronger in pairs:
            meet = _common_charges(weaker.item, stronger.item)
            if meet and (draft := _draft_among([stronger, weaker, plan], now)):
                for message in _misfit(plan.item, [weaker.item, stronger.item]):
                    yield draft.where.finding(message)


def _draft_among(versions: Sequence[_Version], now: Micros) -> AnyDraft | None:
    """The first draft among the versions, if there is a time to come that has them all."""
    start, end = max(version.start_us for version in versions), min(version.end_us for version in versions)
    drafts = (version.draft for version in versions if version.draft is not None)
    return next(drafts, None) if max(start, now) < end else None


def _strength(price_list: PriceList) -> int:
    """Which of two price lists of an account wins: of its customer segment, its own, its contract's phase's."""
    return 0 if price_list.customer_segment is not None else 1 if price_list.account is not None else 2


def _common_charges(one: PriceList, other: PriceList) -> bool:
    return not {override.charge for override in one.overrides}.isdisjoint(o.charge for o in other.overrides)


def _misfit(plan: Plan, price_lists: Sequence[PriceList]) -> list[str]:
    """What is wrong where these price lists override a plan together."""
    charges, pools = {charge.id for charge in plan.charges}, {pool.id for pool in plan.pools}
    of_plan = f"plan {plan.id!r}" + (f" version {plan.version}" if plan.version else "")
    names = " and ".join(repr(price_list.id) for price_list in price_lists)
    lacking = [
        *(f"charge {one.charge!r}" for each in price_lists for one in each.overrides if one.charge not in charges),
        *(f"pool {one.pool!r}" for each in price_lists for one in each.pools if one.pool not in pools),
    ]
    found = [f"expected {what} in {of_plan}, since price list {names} overrides it" for what in lacking]
    try:
        priced, _ = overridden(plan, price_lists)
    except ValueError as error:
        return [*found, f"expected {of_plan} to have a price under price list {names}: {error}"]
    pooled = {name for pool in plan.pools for name in pool.charges}
    for charge in priced:
        if charge.id in pooled and charge.model in PER_EVENT:
            what = f"charge {charge.id!r} of {of_plan}, which draws from a pool"
            found.append(f"expected a price by quantity of {what}, got {charge.model} by price list {names}")
    return found


# Accounts and contracts -----------------------------------------------------------------------------------------------


def _accounts(connection: "Connection[Any]", drafts: Drafts, known: Known, now: Micros) -> Iterator[Finding]:
    published = store.contracts_of(connection, [draft.item.id for draft in drafts.accounts])
    begun = {contract.account for contract in published if contract.start_us <= now}
    for draft in drafts.accounts:
        before = _before(draft, known)
        if isinstance(before, Account) and before.id in begun and before.time_zone != draft.item.time_zone:
            yield draft.where.finding(
                f"expected time_zone {before.time_zone}, since a contract has begun and other months would overlap "
                f"billed ones, got {draft.item.time_zone}"
            )
    yield from _relations(connection, drafts)


def _relations(connection: "Connection[Any]", drafts: Drafts) -> Iterator[Finding]:
    """Parents are accounts and not below their children; a name stands for one account."""
    yield from _parents(connection, drafts)
    drafted = {draft.item.id: draft for draft in drafts.accounts}
    related = [account for account in store.related_accounts(connection, drafted) if account.id not in drafted]
    parents = {account.id: account.parent for account in (*related, *(draft.item for draft in drafts.accounts))}
    aliases = {alias for draft in drafts.accounts for alias in draft.item.aliases}
    there = _published_accounts(connection, aliases)
    owners = {alias: account.id for account in related for alias in account.aliases}
    for draft in drafts.accounts:
        account = draft.item
        for name in (account.id, *account.aliases):
            owner = owners.get(name) or (name if name in there - drafted.keys() else None)
            if owner is not None and owner != account.id:
                yield draft.where.finding(f"expected a name of no other account, got {name!r}, a name of {owner!r}")
    for circle in parent_cycles(parents):
        first = next((drafted[name] for name in circle if name in drafted), None)
        if first is not None:
            yield cycle_finding(first.where, circle)


def _parents(connection: "Connection[Any]", drafts: Drafts) -> Iterator[Finding]:
    """A parent is an account, published or of the files."""
    parents = {draft.item.parent for draft in drafts.accounts if draft.item.parent is not None}
    there = drafts.named_accounts | _published_accounts(connection, parents - drafts.named_accounts)
    for draft in drafts.accounts:
        if draft.item.parent is not None and draft.item.parent not in there:
            yield draft.where.finding(f"expected an account as parent, got {draft.item.parent!r}: add it to the file")


def _published_accounts(connection: "Connection[Any]", names: Collection[str]) -> set[str]:
    """Which of these names are ids of published accounts."""
    keys: list[tuple[Kind, str]] = [("account", name) for name in sorted(names)]
    return {name for _, name in store.newest(connection, keys)} if keys else set()


def _contracts(
    connection: "Connection[Any]", drafts: Drafts, known: Known, now: Micros, *, back_dated: bool
) -> Iterator[Finding]:
    yield from _agreed(connection, drafts.contracts)
    for draft in drafts.contracts:
        yield from _begun(draft, known, now, back_dated=back_dated)
    yield from _sellers(connection, drafts.contracts, known, now)
    accounts = [draft.item.id for draft in drafts.accounts]
    published = {contract.id: contract for contract in store.contracts_of(connection, accounts)}
    holding = published | {draft.item.id: draft.item for draft in drafts.contracts}
    changed = [draft for draft in drafts.contracts if _changes(draft, known)]
    rated = store.rated_usage(connection, accounts) if changed else {}
    yield from _other_periods(changed, published, holding, rated)
    if not back_dated:
        yield from _back_dated(changed, known, holding, rated, now)
    in_files = {draft.item.id for draft in drafts.contracts}
    others = [
        Draft(contract, drafts.accounts[0].where) for contract in published.values() if contract.id not in in_files
    ]
    yield from _overlaps(connection, [*others, *drafts.contracts], in_files)
    yield from _promised(connection, changed, holding.values(), drafts.plans)


def _plans(connection: "Connection[Any]", names: Collection[str]) -> dict[str, Plan]:
    """The newest version of each of these plans that has one."""
    entries = store.newest(connection, [("plan", name) for name in sorted(names)]).values()
    return {plan.id: plan for entry in entries if isinstance(plan := from_document(entry), Plan)}


def _promised(
    connection: "Connection[Any]",
    changed: Sequence[Draft[Contract]],
    contracts: Collection[Contract],
    plans: Sequence[Draft[Plan]],
) -> Iterator[Finding]:
    """Contracts that a spend commitment of their account cannot count together."""
    where = {draft.item.account: draft.where for draft in changed}
    promised = store.commitments_of(connection, where) if where else []
    if not promised:
        return
    known = _plans(connection, {phase.plan for contract in contracts for phase in contract.phases})
    known |= {draft.item.id: draft.item for draft in plans}
    for account, currency, commitment in promised:
        try:
            of_account = [contract for contract in contracts if contract.account == account]
            check_sold(commitment, currency, sold(of_account, lambda name, _: known.get(name)))
        except ValueError as error:
            yield where[account].finding(str(error))


#: The event types that plans charge, by plan.
EventTypes: TypeAlias = Mapping[str, Collection[str]]


def _overlaps(
    connection: "Connection[Any]", contracts: Sequence[Draft[Contract]], in_files: Collection[str]
) -> Iterator[Finding]:
    """Contracts of an account at the same time each charge other types of events: an event is one contract's."""
    pairs = [(one, other) for one, other in overlapping(contracts) if other.item.id in in_files]
    names = {phase.plan for pair in pairs for draft in pair for phase in draft.item.phases}
    charged = _event_types(connection, _plans(connection, names).values())
    for one, other in pairs:
        if both := _charged_twice(one.item, other.item, charged):
            yield overlap_finding(other, one.item, both)


def _newly_shared(connection: "Connection[Any]", drafts: Drafts, known: Known, now: Micros) -> Iterator[Finding]:
    """Plans that begin to charge events which another contract charges that some account has beside one on them."""
    types = {draft.item.id: draft.item.event_type for draft in drafts.meters}
    plans = {draft.item.id: draft for draft in drafts.plans}
    before = _event_types(connection, [plan for one in plans.values() if isinstance(plan := _before(one, known), Plan)])
    after = _event_types(connection, [draft.item for draft in plans.values()], types)
    gained = {name: set(after[name]) - set(charged) for name, charged in before.items()}
    wider = [name for name, new in gained.items() if new]
    contracts = store.contracts_beside(connection, wider) if wider else []
    names = {phase.plan for contract in contracts for phase in contract.phases}
    charged = _event_types(connection, _plans(connection, names - plans.keys()).values()) | after
    for one, other in overlapping([Draft(contract, drafts.plans[0].where) for contract in contracts]):
        both = _charged_twice(one.item, other.item, charged, now)
        for name in wider:
            here = any(phase.plan == name for draft in (one, other) for phase in draft.item.phases)
            if here and (shared := sorted(gained[name].intersection(both))):
                yield plans[name].where.finding(
                    f"expected no charge of {one_of(shared, 'and')} in plan {name!r}, since account "
                    f"{one.item.account!r} has {one.item.id!r} and {other.item.id!r} at a time: both would charge it"
                )


def _event_types(
    connection: "Connection[Any]", plans: Iterable[Plan], types: Mapping[str, str] | None = None
) -> dict[str, Collection[str]]:
    """The event types each of these plans charges, by the meters' newest versions, or by ``types`` of meters."""
    known, plans = dict(types or {}), list(plans)
    meters = {charge.meter for plan in plans for charge in plan.charges if charge.meter is not None} - known.keys()
    entries = store.newest(connection, [("meter", name) for name in sorted(meters)]).values() if meters else ()
    known |= {meter.id: meter.event_type for entry in entries if isinstance(meter := from_document(entry), Meter)}
    return {plan.id: {known[charge.meter] for charge in plan.charges if charge.meter in known} for plan in plans}


def _charged_twice(one: Contract, other: Contract, charged: EventTypes, from_us: Micros = BEGINNING) -> list[str]:
    """The event types that two contracts would both charge at a time from ``from_us`` on."""
    both: set[str] = set()
    for left, right in product(phase_spans(one), phase_spans(other)):
        if max(left.start_us, right.start_us, from_us) < min(left.end_us, right.end_us):
            both.update(set(charged.get(left.plan, ())).intersection(charged.get(right.plan, ())))
    return sorted(both)


def _agreed(connection: "Connection[Any]", contracts: Sequence[Draft[Contract]]) -> Iterator[Finding]:
    """The plans and price lists of contracts."""
    names = {phase.plan for draft in contracts for phase in draft.item.phases}
    currencies = {name: plan.currency for name, plan in _plans(connection, names).items()}
    all_plans = store.ids(connection, "plan") if names - currencies.keys() else []
    price_lists = {
        version.entry.id: version.item
        for version in store.price_lists_of(connection, names)
        if isinstance(version.item, PriceList)
    }
    for draft in contracts:
        yield from _phases(draft, currencies, price_lists, all_plans)


def _phases(
    draft: Draft[Contract], currencies: Mapping[str, str], price_lists: Mapping[str, PriceList], plans: list[str]
) -> Iterator[Finding]:
    """Plans are published and all of one currency, price lists are of their phase's plan and for whoever names them."""
    contract, where = draft.item, draft.plan_where or draft.where
    for name in dict.fromkeys(phase.plan for phase in contract.phases):
        if name not in currencies:
            hint = suggestion(name, plans) if plans else ": `tally plans publish` comes first"
            yield where.finding(f"expected a published plan, got {name!r}{hint}")
    used = dict.fromkeys(currencies[phase.plan] for phase in contract.phases if phase.plan in currencies)
    if len(used) > 1:
        yield where.finding(
            f"expected plans of one currency, since a contract has one, got {' and '.join(used)}: make it two contracts"
        )
    for phase in contract.phases:
        if phase.price_list is None:
            continue
        found = price_lists.get(phase.price_list)
        if found is None or found.plan != phase.plan:
            fitting = sorted(name for name, other in price_lists.items() if other.plan == phase.plan)
            hint = suggestion(phase.price_list, fitting) if fitting else ": `tally plans publish` comes first"
            yield where.finding(f"expected a price list of plan {phase.plan!r}, got {phase.price_list!r}{hint}")
        elif found.customer_segment is not None or found.account is not None:
            whom = found.account or found.customer_segment
            yield where.finding(f"expected a price list for the contracts that name it, got {found.id!r}, for {whom}")


def _begun(draft: Draft[Contract], known: Known, now: Micros, *, back_dated: bool) -> Iterator[Finding]:
    """What of a contract has begun stays as it is."""
    contract, where = draft.item, draft.plan_where or draft.where
    before = _before(draft, known)
    if not isinstance(before, Contract):
        return
    if before.account != contract.account:
        yield draft.where.finding(f"expected a new id, got {contract.id!r}, a contract of {before.account!r}")
        return
    if before.start_us > now:
        return
    if before.cycle != contract.cycle:
        yield where.finding(
            f"expected a cycle of {in_words(before.cycle)}, since {contract.id!r} has begun and other periods would "
            f"overlap billed ones, got {in_words(contract.cycle)}: end it and add another after it"
        )
    if back_dated:
        return
    if (before.plan, before.start_us) != (contract.plan, contract.start_us):
        yield where.finding(
            f"expected plan {before.plan!r} from {format_instant(before.start_us)}, since {contract.id!r} has begun, "
            f"got {contract.plan!r} from {format_instant(contract.start_us)}: end it and add another after it"
        )
        return
    earliest = whole_second(now, NOTICE)
    was, is_ = (_until(phases, earliest) for phases in (before.phases, contract.phases))
    if was != is_:
        yield where.finding(
            f"expected the phases of {contract.id!r} up to {format_instant(earliest)} as they were "
            f"({_said(was)}), got {_said(is_)}: begin a new phase after it"
        )


def _sellers(
    connection: "Connection[Any]", contracts: Sequence[Draft[Contract]], known: Known, now: Micros
) -> Iterator[Finding]:
    """A contract that has begun keeps its legal entity.

    One that names none is sold by the only legal entity there is, and by nobody once there are two: it may name one
    then, the one that issued its documents if there are any.
    """
    naming: list[Draft[Contract]] = []
    for draft in contracts:
        contract, before = draft.item, _before(draft, known)
        if not isinstance(before, Contract) or before.account != contract.account or before.start_us > now:
            continue
        if before.legal_entity and before.legal_entity != contract.legal_entity:
            yield (draft.plan_where or draft.where).finding(
                f"expected legal_entity {before.legal_entity}, since {contract.id!r} has begun and its invoices are "
                f"that company's, got {contract.legal_entity or 'none'}: end it and add another after it"
            )
        elif before.legal_entity != contract.legal_entity:
            naming.append(draft)
    if not naming:
        return
    applied = store.legal_entities(connection)
    issued_by = store.sellers(connection, [draft.item for draft in naming])
    for draft in naming:
        name, where, issuers = draft.item.legal_entity, draft.plan_where or draft.where, issued_by.get(draft.item.id)
        if name not in applied:
            # It could not be changed again.
            hint = suggestion(name, applied) if applied else ": `tally invoicing apply` comes first"
            yield where.finding(f"expected a legal entity that is applied, got {name!r}{hint}")
        elif issuers is not None and issuers != {name}:
            yield where.finding(
                f"expected legal_entity {one_of(sorted(issuers), 'and')}, since {draft.item.id!r} has documents of "
                f"that company, got {name}: end it and add another after it"
            )


def _until(phases: Iterable[Phase], end_us: Micros) -> tuple[Phase, ...]:
    return tuple(phase for phase in phases if phase.start_us < end_us)


def _said(phases: Iterable[Phase]) -> str:
    """Phases as a message names them: ``plus with list vip from 2026-01-01T00:00:00Z, 14 days of trial``."""
    return "; ".join(
        f"{phase.plan}"
        + (f" with list {phase.price_list}" if phase.price_list else "")
        + f" from {format_instant(phase.start_us)}"
        + (f", {phase.trial_days} days of trial" if phase.trial_days is not None else "")
        for phase in phases
    )


def _other_periods(
    contracts: Sequence[Draft[Contract]],
    published: Mapping[str, Contract],
    holding: Mapping[str, Contract],
    rated: Mapping[str, Sequence[store.RatedUsage]],
) -> Iterator[Finding]:
    """Contracts that would take over usage whose invoice has another period: back-dating moves none between these."""
    for draft in contracts:
        contract = draft.item
        for usage in rated.get(contract.account, ()):
            was = published.get(usage.contract)
            meets = contract.meets(usage.first_us, usage.last_us + 1)
            if was is not None and meets and not _keeps(holding, usage) and was.cycle != contract.cycle:
                yield draft.where.finding(
                    f"expected a cycle of {in_words(was.cycle)}, since usage of {usage.contract!r} from "
                    f"{format_instant(usage.first_us)} to {format_instant(usage.last_us)} is on invoices of its "
                    f"periods, got {in_words(contract.cycle)}: begin after it"
                )


def _keeps(holding: Mapping[str, Contract], usage: store.RatedUsage) -> bool:
    """Whether usage stays with the contract it was rated under."""
    contract = holding.get(usage.contract)
    return contract is not None and contract.covers(usage.first_us) and contract.covers(usage.last_us)


def _back_dated(
    contracts: Sequence[Draft[Contract]],
    known: Known,
    holding: Mapping[str, Contract],
    rated: Mapping[str, Sequence[store.RatedUsage]],
    now: Micros,
) -> Iterator[Finding]:
    """Contracts that would change what covers usage that is rated: it keeps its price, so that is a correction."""
    for draft in contracts:
        contract, before, end_us = draft.item, _before(draft, known), draft.item.end_us
        usages = rated.get(contract.account, ())
        if not isinstance(before, Contract) or before.start_us > now:
            for usage in usages:
                if contract.meets(usage.first_us, usage.last_us + 1) and not _keeps(holding, usage):
                    yield draft.where.finding(
                        f"expected a time without rated usage, since that keeps its price, got {contract.id!r} "
                        f"({span(contract)}) while {usage.contract!r} has usage rated from "
                        f"{format_instant(usage.first_us)} to {format_instant(usage.last_us)}: begin after it, or "
                        "--back-dated and then `tally rerate`"
                    )
        elif end_us is not None and (before.end_us is None or end_us < before.end_us):
            for usage in usages:
                # Usage may be rated and not written yet, so all of the past is closed to an earlier end; and raters
                # have to know it before the first event it concerns.
                earliest = max(whole_second(now, NOTICE), whole_second(usage.last_us + 1, timedelta()))
                if usage.contract == contract.id and end_us < earliest:
                    yield draft.where.finding(
                        f"expected an end of {format_instant(earliest)} or later, since {contract.id!r} has rated "
                        f"usage, which keeps its price, got {format_instant(end_us)}: end it later, or --back-dated "
                        "and then `tally rerate`"
                    )


# Issued invoices ------------------------------------------------------------------------------------------------------


def _issued(connection: "Connection[Any]", drafts: Drafts, known: Known, begins: Begins) -> Iterator[Finding]:
    """Versions that would have priced what stands on an issued invoice: that is corrected by an adjustment alone."""
    for draft in drafts.all():
        if not _changes(draft, known):
            continue
        kind, name = key_of(draft)
        start = begins.get((kind, name))
        match draft.item:
            case Contract() as contract:
                start = _first_difference(_before(draft, known), contract)
                scope = {"account": contract.account}
            case Account(customer_segment=segment) if _segment(_before(draft, known)) != segment:
                scope = {"account": name}
            case PriceList() as price_list:
                scope = {"plan": price_list.plan, **({"account": price_list.account} if price_list.account else {})}
            case Meter() | Plan():
                scope = {kind: name}
            case _:
                continue
        found = None if start is None else store.issued(connection, start, **scope)
        if found is not None and start is not None:
            yield draft.where.finding(
                f"expected a time after {format_instant(found.end_us)}, where the invoice of {found.account!r} that is "
                f"issued ends, since an issued invoice never changes, got {format_instant(start)}: begin later"
            )


def _segment(before: object) -> str | None:
    return before.customer_segment if isinstance(before, Account) else None


def _first_difference(before: object, after: Contract) -> Micros | None:
    """From when on a contract prices otherwise than its version before, if it does."""
    if not isinstance(before, Contract) or (before.start_us, before.cycle) != (after.start_us, after.cycle):
        starts = [item.start_us for item in (before, after) if isinstance(item, Contract)]
        return min(starts)
    times = {phase.start_us for phase in set(before.phases) ^ set(after.phases)}
    times |= {end for end in {before.end_us, after.end_us} if end is not None and before.end_us != after.end_us}
    return min(times, default=None)


# Pieces ---------------------------------------------------------------------------------------------------------------


def _changes(draft: AnyDraft, known: Known) -> bool:
    """Whether a draft says anything else than its newest version."""
    newest = known.get(key_of(draft))
    return newest is None or to_document(draft.item) != newest.document


def _before(draft: AnyDraft, known: Known) -> object:
    """The newest published version of a draft's document, or None."""
    entry = known.get(key_of(draft))
    return None if entry is None else from_document(entry)
