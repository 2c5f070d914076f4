"""Price files and account files: YAML to the core's types, or every mistake with its line.

Files given together are one whole: a charge may use a meter of another file among them. Where they name event types
with their properties, every property a meter or charge uses has to be among them; that is all these are for.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from itertools import chain, combinations
from pathlib import Path
from typing import Generic, TypeAlias, TypeVar, cast, overload
from zoneinfo import ZoneInfo

from pipeline.catalog.charges import Properties, check_properties, ids_of, read_charge, read_override, read_pools
from pipeline.catalog.fields import ID
from pipeline.catalog.models import (
    AccountModel,
    ContractModel,
    CycleModel,
    EventTypeModel,
    MeterModel,
    PhaseModel,
    PlanModel,
    PoolOverrideModel,
    PriceListModel,
)
from pipeline.catalog.source import (
    Data,
    Finding,
    Part,
    Source,
    Where,
    get,
    one_of,
    read,
    report_repeats,
    shown,
    suggestion,
    uncollected,
)
from pipeline.core.contracts import Account, Contract, Phase, overlap
from pipeline.core.cycles import MONTHLY, Cycle, anchored
from pipeline.core.expressions import compile_expression
from pipeline.core.meters import Conversion, Filter, Meter, Operator, Rounding
from pipeline.core.meters import faults as meter_faults
from pipeline.core.money import Micros
from pipeline.core.periods import format_instant, local_midnight, to_datetime
from pipeline.core.plans import Override, Plan, PoolOverride, PriceList

_UTC = ZoneInfo("UTC")

T = TypeVar("T", Account, Contract, Meter, Plan, PriceList)


@dataclass(frozen=True, slots=True)
class Draft(Generic[T]):
    """An item as a file has it, not published yet: its version is 0, its valid_from what the file says or None."""

    item: T
    where: Where
    valid_from_us: Micros | None = None
    #: Where a contract or price list names its plan.
    plan_where: Where | None = None


AnyDraft: TypeAlias = Draft[Account] | Draft[Contract] | Draft[Meter] | Draft[Plan] | Draft[PriceList]


@dataclass(slots=True)
class Drafts:
    """What some files hold. Only without findings is it whole; in file order, each kind after those it refers to."""

    accounts: list[Draft[Account]] = field(default_factory=list)
    contracts: list[Draft[Contract]] = field(default_factory=list)
    meters: list[Draft[Meter]] = field(default_factory=list)
    plans: list[Draft[Plan]] = field(default_factory=list)
    price_lists: list[Draft[PriceList]] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    #: Ids of all accounts of the files, of those with mistakes too.
    named_accounts: set[str] = field(default_factory=set)

    def all(self) -> list[AnyDraft]:
        return [*self.accounts, *self.contracts, *self.meters, *self.plans, *self.price_lists]


@uncollected()
def read_price_files(paths: Sequence[Path]) -> Drafts:
    """What price files hold. Raises OSError when a file cannot be read; all else is a finding."""
    drafts, sources = Drafts(), [read(path) for path in paths]
    for source in sources:
        _check_sections(source, ("event_types", "meters", "plans", "price_lists"))
    event_types, meters, plans, price_lists = (
        [part for source in sources for part in Part(source, (), source.data).parts(key)]
        for key in ("event_types", "meters", "plans", "price_lists")
    )
    types = [(get(part.data, "id"), part.validated(EventTypeModel)) for part in event_types]
    properties = {name: None if model is None else model.properties for name, model in types if isinstance(name, str)}
    for part in meters:
        _read_meter(part, properties, drafts)
    known_meters = _known(meters, [draft.item for draft in drafts.meters])
    read_plans = [(part, _read_plan(part, known_meters, properties, drafts)) for part in plans]
    known_plans = {plan.id: (part, plan) for part, plan in read_plans if plan is not None}
    for part in price_lists:
        _read_price_list(part, known_plans, known_meters, drafts)
    for parts in (event_types, meters, plans, price_lists):
        report_repeats([(part, get(part.data, "id")) for part in parts])
    for one, other in same_scope(drafts.price_lists):
        drafts.findings.append(scope_finding(other, one.item))
    return _finished(drafts, sources)


@uncollected()
def read_account_files(paths: Sequence[Path]) -> Drafts:
    """Accounts and their contracts. Raises OSError when a file cannot be read; all else is a finding."""
    drafts, sources = Drafts(), [read(path) for path in paths]
    for source in sources:
        _check_sections(source, ("accounts",))
    accounts = [part for source in sources for part in Part(source, (), source.data).parts("accounts")]
    contracts = [_read_account(part, drafts) for part in accounts]
    drafts.named_accounts = {name for part in accounts if isinstance(name := get(part.data, "id"), str)}
    report_repeats([(part, get(part.data, "id")) for part in accounts])
    report_repeats(list(chain.from_iterable(contracts)))
    _check_aliases(accounts)
    for circle in parent_cycles({draft.item.id: draft.item.parent for draft in drafts.accounts}):
        where = next(part.where("parent") for part in accounts if get(part.data, "id") == circle[0])
        drafts.findings.append(cycle_finding(where, circle))
    return _finished(drafts, sources)


def overlapping(contracts: Iterable[Draft[Contract]]) -> list[tuple[Draft[Contract], Draft[Contract]]]:
    """Pairs of contracts of one account that cover a common time."""
    by_account: dict[str, list[Draft[Contract]]] = {}
    for draft in contracts:
        by_account.setdefault(draft.item.account, []).append(draft)
    return [
        (one, other)
        for drafts in by_account.values()
        for one, other in combinations(drafts, 2)
        if one.item.id != other.item.id and overlap(one.item, other.item)
    ]


def same_scope(price_lists: Iterable[Draft[PriceList]]) -> list[tuple[Draft[PriceList], Draft[PriceList]]]:
    """Pairs of price lists that override the same plan for the same customers, so that neither would go before."""
    first: dict[tuple[str, str | None, str | None], Draft[PriceList]] = {}
    found = []
    for draft in price_lists:
        item = draft.item
        if item.customer_segment is None and item.account is None:
            continue
        known = first.setdefault((item.plan, item.customer_segment, item.account), draft)
        if known.item.id != item.id:
            found.append((known, draft))
    return found


def scope_finding(draft: Draft[PriceList], other: PriceList) -> Finding:
    whom = f"account {other.account!r}" if other.account else f"customer segment {other.customer_segment!r}"
    return draft.where.finding(
        f"expected one price list of plan {other.plan!r} for {whom}, got {draft.item.id!r} beside {other.id!r}: "
        "put their charges into one"
    )


def overlap_finding(draft: Draft[Contract], other: Contract, event_types: Sequence[str]) -> Finding:
    return draft.where.finding(
        f"expected one contract of an account at a time to charge {one_of(event_types, 'and')}, got {draft.item.id!r} "
        f"({span(draft.item)}) while {other.id!r} ({span(other)}) does"
    )


# Items --------------------------------------------------------------------------------------------------------------


def _check_sections(source: Source, allowed: Sequence[str]) -> None:
    """A file has some of the keys allowed and no others."""
    if isinstance(source.data, dict):
        for other in source.data.keys() - set(allowed):
            command = _COMMAND_FOR.get(other)
            hint = f": that belongs to `{command}`" if command else suggestion(other, list(allowed))
            source.report((other,), f"unknown key {other!r}{hint}", key=True)
        if not source.data.keys() & set(allowed):
            source.report((), f"expected {one_of(allowed)}, got none of them")
    elif not source.findings:
        source.report((), f"expected a mapping with {one_of(allowed)}, got {shown(source.data)}")


_COMMAND_FOR = {
    "accounts": "tally accounts apply",
    "event_types": "tally plans publish",
    "meters": "tally plans publish",
    "plans": "tally plans publish",
    "price_lists": "tally plans publish",
}


def _read_meter(part: Part, properties: Properties, drafts: Drafts) -> None:
    meter = part.validated(MeterModel)
    if meter is None:
        return
    item = Meter(
        id=meter.id,
        version=0,
        event_type=meter.event_type,
        aggregation=meter.aggregation,
        value=meter.value,
        unit=meter.unit,
        filters=tuple(
            Filter(name, values, cast(Operator, operator))
            for name, conditions in sorted((meter.filters or {}).items())
            for operator, values in conditions
        ),
        allow_negative=meter.allow_negative,
        valid_from_us=0,
        expression=meter.expression,
        convert=None if meter.convert is None else Conversion(**dict(meter.convert)),
        rounding=None if meter.rounding is None else Rounding(**dict(meter.rounding)),
        derived_per=meter.derived_per,
        level=meter.level,
        time_unit=meter.time_unit,
        carries_over=meter.carries_over,
        dimensions=meter.dimensions,
    )
    faults = meter_faults(item)
    for fault in faults:
        part.report(fault.field, fault.message)
    if properties and item.event_type not in properties:
        hint = suggestion(item.event_type, sorted(properties))
        part.report("event_type", f"expected a type of event_types, got {item.event_type!r}{hint}")
    expressed = compile_expression(item.expression).names if item.expression and not faults else ()
    used = [("value", item.value), *(("expression", name) for name in sorted(expressed))]
    used += [("filters", name) for name in meter.filters or {}] + [("dimensions", name) for name in item.dimensions]
    check_properties(part, used, properties.get(item.event_type))
    drafts.meters.append(Draft(item, part.where("id"), _instant(meter.valid_from)))


def _read_plan(part: Part, meters: Mapping[str, Meter | None], properties: Properties, drafts: Drafts) -> Plan | None:
    """Also returns the plan as far as it can be read, for what refers to it; None without an id."""
    plan = part.validated(PlanModel, without=("charges", "pools"))
    if isinstance(part.data, dict) and part.data.get("charges") in (None, []):
        part.report("charges", "expected at least one charge, got nothing")
    parts = part.parts("charges")
    charges = {charge.id: charge for one in parts if (charge := read_charge(one, meters, properties)) is not None}
    report_repeats([(charge, get(charge.data, "id")) for charge in parts])
    priced = (tuple(charges.values()), read_pools(part, charges, meters))
    if plan is None:
        name = get(part.data, "id")
        return Plan(name, 0, "", "", 0, *priced) if isinstance(name, str) else None
    item = Plan(plan.id, 0, plan.name, plan.currency, 0, *priced, plan.prorate, plan.trial_days, plan.prorate_by)
    drafts.plans.append(Draft(item, part.where("id"), _instant(plan.valid_from)))
    return item


def _read_price_list(
    part: Part, plans: Mapping[str, tuple[Part, Plan]], meters: Mapping[str, Meter | None], drafts: Drafts
) -> None:
    model = part.validated(PriceListModel, without=("charges", "pools"))
    if model is not None and model.customer_segment is not None and model.account is not None:
        part.report("account", "expected a customer_segment or an account, got both: make it two price lists")
    name = get(part.data, "plan")
    if isinstance(name, str) and ID.fullmatch(name) and name not in plans:
        hint = suggestion(name, sorted(plans)) or ": give the file that defines it too"
        part.report("plan", f"expected a plan of the files given, got {name!r}{hint}")
    overrides: list[Override] = []
    pools: list[PoolOverride] = []
    if name in plans:
        plan_part, plan = plans[name]
        if model is not None and plan.currency and model.currency != plan.currency:
            part.report("currency", f"expected {plan.currency}, the currency of plan {plan.id!r}, got {model.currency}")
        places, named = part.parts("charges"), ids_of(plan_part, "charges")
        report_repeats([(place, get(place.data, "id")) for place in places])
        overrides = [one for place in places if (one := read_override(place, plan, named, meters)) is not None]
        pools = _read_pool_overrides(part, plan, ids_of(plan_part, "pools"))
    if model is None:
        return
    item = PriceList(
        model.id,
        0,
        model.name,
        model.plan,
        model.currency,
        0,
        tuple(overrides),
        tuple(pools),
        model.customer_segment,
        model.account,
    )
    drafts.price_lists.append(Draft(item, part.where("id"), _instant(model.valid_from), part.where("plan")))


def _read_pool_overrides(part: Part, plan: Plan, named: set[str]) -> list[PoolOverride]:
    """What a price list changes of its plan's pools, each once."""
    places = part.parts("pools")
    report_repeats([(place, get(place.data, "id")) for place in places])
    found = []
    for place in places:
        pool = place.validated(PoolOverrideModel)
        if pool is not None and pool.id not in named:
            hint = suggestion(pool.id, sorted(named)) if named else ": it has none"
            place.report("id", f"expected a pool of plan {plan.id!r}, got {pool.id!r}{hint}")
        if pool is not None:
            found.append(PoolOverride(pool.id, pool.included))
    return found


def _read_account(part: Part, drafts: Drafts) -> list[tuple[Part, Data]]:
    """Also returns the account's contracts with their ids, for finding repeated ones."""
    account = part.validated(AccountModel, without=("contracts",))
    parts = part.parts("contracts")
    for contract in parts:
        model = contract.validated(ContractModel, without=("phases",))
        phases = [(phase, phase.validated(PhaseModel)) for phase in contract.parts("phases")]
        if model is None:
            continue
        zone = ZoneInfo(account.time_zone) if account is not None else _UTC
        start, end = _instant(model.start, zone), _instant(model.end, zone)
        backwards = end is not None and end <= start
        if backwards:
            contract.report("end", f"expected an end after the start, got {shown(contract.data['end'])}")
        later = _later_phases(phases, model.plan, start, None if backwards else end, zone)
        if account is None or backwards:
            continue
        item = Contract(
            model.id or _default_id(account.id),
            0,
            account.id,
            model.plan,
            start,
            end,
            price_list=model.price_list,
            trial_days=model.trial_days,
            legal_entity=model.legal_entity or "",
            later_phases=later,
            cycle=_cycle(model.cycle, start, zone),
        )
        drafts.contracts.append(Draft(item, contract.where("id"), plan_where=contract.where("plan")))
    if account is not None:
        customer = Account(
            account.id, 0, account.name, account.time_zone, account.customer_segment, account.parent, account.aliases
        )
        begin = _instant(account.valid_from, ZoneInfo(account.time_zone))
        drafts.accounts.append(Draft(customer, part.where("id"), begin))
    name = _default_id(get(part.data, "id"))
    return [(contract, get(contract.data, "id") or name) for contract in parts]


def _later_phases(
    phases: Iterable[tuple[Part, PhaseModel | None]], plan: str, start: Micros, end: Micros | None, zone: ZoneInfo
) -> tuple[Phase, ...]:
    """A contract's phases after the first, one after another within it; one that names no plan keeps the one before."""
    found: list[Phase] = []
    before = start
    for part, model in phases:
        if model is None:
            continue
        begins = _instant(model.start, zone)
        if begins <= before or (end is not None and begins >= end):
            until = "" if end is None else f" and before {format_instant(end)}"
            got = shown(part.data["start"])
            part.report("start", f"expected a start after {format_instant(before)}{until}, got {got}")
        plan, before = model.plan or plan, begins
        found.append(Phase(begins, plan, model.price_list, model.trial_days))
    return tuple(found)


def _cycle(model: CycleModel | None, start: Micros, zone: ZoneInfo) -> Cycle:
    """A contract's billing cycle; by the calendar unless it is anchored to a day."""
    if model is None:
        return MONTHLY
    anchor = to_datetime(start).astimezone(zone) if model.anchor == "start" else model.anchor
    return anchored(model.every, anchor.month, anchor.day) if isinstance(anchor, date) else Cycle(model.every)


def _check_aliases(accounts: Iterable[Part]) -> None:
    """A name stands for one account, be it the account's id or an alias."""
    names: dict[str, Where] = {}
    parts = list(accounts)
    for part in parts:
        if isinstance(name := get(part.data, "id"), str):
            names.setdefault(name, part.where("id"))
    for part in parts:
        aliases = get(part.data, "aliases")
        for alias in aliases if isinstance(aliases, list) else [aliases]:
            where = part.where("aliases")
            if isinstance(alias, str) and (known := names.setdefault(alias, where)) is not where:
                got = f"{alias!r}, as on {known.file}:{known.line}"
                part.report("aliases", f"expected a name of no other account, got {got}")


def parent_cycles(parents: Mapping[str, str | None]) -> list[tuple[str, ...]]:
    """Accounts that are their own ancestors: each circle once, from its first id on."""
    circles = set()
    for account in parents:
        way: list[str] = []
        at: str | None = account
        while at is not None and at not in way:
            way.append(at)
            at = parents.get(at)
        if at is not None:
            circle = way[way.index(at) :]
            first = circle.index(min(circle))
            circles.add((*circle[first:], *circle[:first]))
    return sorted(circles)


def cycle_finding(where: Where, circle: Sequence[str]) -> Finding:
    return where.finding(f"expected a parent that is not below the account, got {' under '.join([*circle, circle[0]])}")


def _known(parts: Iterable["Part"], items: Iterable[T]) -> dict[str, T | None]:
    """What the files define, by id; None for what has mistakes in it."""
    names = {name: None for part in parts if isinstance(name := get(part.data, "id"), str)}
    return {**names, **{item.id: item for item in items}}


def _default_id(account: Data) -> str:
    """The id of a contract that the file gives none: an account usually has one."""
    return f"{account}-main"


def _finished(drafts: Drafts, sources: list[Source]) -> Drafts:
    drafts.findings = sorted({*drafts.findings, *(finding for source in sources for finding in source.findings)})
    return drafts


@overload
def _instant(value: date | Micros, zone: ZoneInfo = ...) -> Micros: ...
@overload
def _instant(value: date | Micros | None, zone: ZoneInfo = ...) -> Micros | None: ...
def _instant(value: date | Micros | None, zone: ZoneInfo = _UTC) -> Micros | None:
    """An instant; a date is its midnight in the zone."""
    return local_midnight(value.year, value.month, value.day, zone) if isinstance(value, date) else value


def span(contract: Contract) -> str:
    """A contract's time as people read it."""
    end = "" if contract.end_us is None else format_instant(contract.end_us)
    return f"{format_instant(contract.start_us)} to {end or 'open end'}"
