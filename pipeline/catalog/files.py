"""Price files and account files: YAML to the core's types, or every mistake with its line.

Files given together are one whole: a charge may use a meter of another file among them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import date
from itertools import chain, combinations
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar, overload
from zoneinfo import ZoneInfo

from pydantic import BaseModel

from pipeline.catalog.models import (
    CHARGE_MODELS,
    ID,
    AccountModel,
    ContractModel,
    MeterModel,
    PackageModel,
    PerUnitModel,
    PlanModel,
    TieredModel,
    UnknownModel,
)
from pipeline.catalog.source import Data, Finding, Key, Source, Where, one_of, read, shown, suggestion
from pipeline.core.charges import Charge, Tier
from pipeline.core.contracts import Account, Contract, overlap
from pipeline.core.meters import Filter, Meter
from pipeline.core.money import Micros, parse_decimal
from pipeline.core.periods import format_instant, local_midnight
from pipeline.core.plans import Plan
from pipeline.core.reasons import Reason

_UTC = ZoneInfo("UTC")

T = TypeVar("T", Account, Contract, Meter, Plan)
M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Draft(Generic[T]):
    """An item as a file has it, not published yet: its version is 0, its valid_from what the file says or None."""

    item: T
    where: Where
    valid_from_us: Micros | None = None
    #: Where a contract names its plan.
    plan_where: Where | None = None


AnyDraft: TypeAlias = Draft[Account] | Draft[Contract] | Draft[Meter] | Draft[Plan]


@dataclass(slots=True)
class Drafts:
    """What some files hold. Only without findings is it whole; in file order, meters before the plans that use them."""

    accounts: list[Draft[Account]] = field(default_factory=list)
    contracts: list[Draft[Contract]] = field(default_factory=list)
    meters: list[Draft[Meter]] = field(default_factory=list)
    plans: list[Draft[Plan]] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def all(self) -> list[AnyDraft]:
        return [*self.accounts, *self.contracts, *self.meters, *self.plans]


def read_price_files(paths: Sequence[Path]) -> Drafts:
    """Meters and plans of price files. Raises OSError when a file cannot be read; all else is a finding."""
    drafts, sources = Drafts(), [read(path) for path in paths]
    meters = [part for source in sources for part in _section(source, "meters", ("meters", "plans"))]
    plans = [part for source in sources for part in _section(source, "plans")]
    for part in meters:
        _read_meter(part, drafts)
    names = {name for part in meters if isinstance(name := _get(part.data, "id"), str)}
    for part in plans:
        _read_plan(part, names, drafts)
    for parts in (meters, plans):
        _report_repeats([(part, _get(part.data, "id")) for part in parts])
    return _finished(drafts, sources)


def read_account_files(paths: Sequence[Path]) -> Drafts:
    """Accounts and their contracts. Raises OSError when a file cannot be read; all else is a finding."""
    drafts, sources = Drafts(), [read(path) for path in paths]
    accounts = [part for source in sources for part in _section(source, "accounts", ("accounts",))]
    contracts = [_read_account(part, drafts) for part in accounts]
    _report_repeats([(part, _get(part.data, "id")) for part in accounts])
    _report_repeats(list(chain.from_iterable(contracts)))
    for one, other in overlapping(drafts.contracts):
        drafts.findings.append(overlap_finding(other, one.item))
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


def overlap_finding(draft: Draft[Contract], other: Contract) -> Finding:
    return draft.where.finding(
        f"expected contracts of an account one after another, got {draft.item.id!r} ({span(draft.item)}) "
        f"while {other.id!r} ({span(other)}) runs"
    )


# Items --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Part:
    """An element of a file, with its place."""

    source: Source
    path: Key
    data: Data

    def report(self, key: str, message: str) -> None:
        self.source.report((*self.path, key), message)

    def where(self, key: str) -> Where:
        return self.source.where((*self.path, key))

    def parts(self, key: str) -> list["_Part"]:
        path = (*self.path, key)
        return [_Part(self.source, at, data) for at, data in self.source.parts(path, _get(self.data, key))]

    def validated(self, model: type[M], *, without: str = "") -> M | None:
        """The data as a model; the part under the key ``without`` is judged elsewhere."""
        data = self.data
        if isinstance(data, dict) and without:
            data = {key: part for key, part in data.items() if key != without}
        return self.source.validated(model, self.path, data)


def _section(source: Source, key: str, allowed: tuple[str, ...] = ()) -> list[_Part]:
    """The elements under a key of the file; with ``allowed``, any other key of the file is reported."""
    if allowed and isinstance(source.data, dict):
        for other in source.data.keys() - set(allowed):
            command = _COMMAND_FOR.get(other)
            hint = f": that belongs to `{command}`" if command else suggestion(other, list(allowed))
            source.report((other,), f"unknown key {other!r}{hint}", key=True)
        if not source.data.keys() & set(allowed):
            source.report((), f"expected {one_of(list(allowed))}, got neither")
    elif allowed and not source.findings:
        source.report((), f"expected a mapping with {one_of(list(allowed))}, got {shown(source.data)}")
    return _Part(source, (), source.data).parts(key)


_COMMAND_FOR = {
    "accounts": "tally accounts apply",
    "meters": "tally plans publish",
    "plans": "tally plans publish",
}


def _read_meter(part: _Part, drafts: Drafts) -> None:
    aggregation, value = _get(part.data, "aggregation"), _get(part.data, "value")
    if aggregation == "sum" and value is None:
        part.report("value", "expected the property to sum, got nothing")
    if aggregation == "count" and value is not None:
        part.report("value", f"expected no value, since a count looks at none, got {shown(value)}")
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
        filters=tuple(Filter(name, values) for name, values in sorted((meter.filters or {}).items())),
        allow_negative=meter.allow_negative,
        valid_from_us=0,
    )
    drafts.meters.append(Draft(item, part.where("id"), _instant(meter.valid_from)))


def _read_plan(part: _Part, meters: set[str], drafts: Drafts) -> None:
    plan = part.validated(PlanModel, without="charges")
    if isinstance(part.data, dict) and part.data.get("charges") in (None, []):
        part.report("charges", "expected at least one charge, got nothing")
    parts = part.parts("charges")
    charges = [_read_charge(charge, meters) for charge in parts]
    _report_repeats([(charge, _get(charge.data, "id")) for charge in parts])
    if plan is not None:
        item = Plan(plan.id, 0, plan.name, plan.currency, 0, tuple(charge for charge in charges if charge is not None))
        drafts.plans.append(Draft(item, part.where("id"), _instant(plan.valid_from)))


def _read_charge(part: _Part, meters: set[str]) -> Charge | None:
    meter = _get(part.data, "meter")
    if isinstance(meter, str) and ID.fullmatch(meter) and meter not in meters:
        hint = suggestion(meter, sorted(meters)) or ": give the file that defines it too"
        part.report("meter", f"expected a meter of the files given, got {meter!r}{hint}")
    _check_tiers(part)
    model = CHARGE_MODELS.get(str(_get(part.data, "model")), UnknownModel)
    charge = part.validated(model)
    if charge is None:
        return None
    match charge:
        case PerUnitModel():
            own: dict[str, Any] = {"unit_price": charge.unit_price}
        case PackageModel():
            own = {"package_size": charge.package_size, "package_price": charge.package_price}
        case TieredModel():
            tiers = tuple(Tier(tier.up_to, tier.unit_price, tier.flat) for tier in charge.tiers)
            own = {"tiers": tiers, "flat_on_zero": charge.flat_on_zero}
    return Charge(charge.id, charge.meter, charge.model, included=charge.included, references=charge.references, **own)


def _check_tiers(part: _Part) -> None:
    """Bounds ascend and only the last tier has none. Bounds that are no numbers are reported with their fields."""
    tiers = _get(part.data, "tiers")
    if tiers == []:
        part.report("tiers", "expected at least one tier, got an empty list")
    if not isinstance(tiers, list):
        return
    lower, lower_text = 0, "0"
    for tier in part.parts("tiers"):
        if not isinstance(tier.data, dict):
            continue
        bound = tier.data.get("up_to")
        if "unit_price" not in tier.data and "flat" not in tier.data:
            tier.source.report(tier.path, "expected a unit_price, a flat or both, got neither")
        if tier.path[-1] == len(tiers) - 1:
            if bound is not None:
                tier.report("up_to", f"expected no bound on the last tier (what would lie beyond?), got {shown(bound)}")
        elif bound is None:
            tier.report("up_to", "expected a bound, since only the last tier goes on for ever, got nothing")
        number = parse_decimal(bound) if isinstance(bound, str) else Reason.NOT_A_NUMBER
        if not isinstance(number, Reason) and number > 0:
            if number <= lower:
                tier.report("up_to", f"expected more than {lower_text}, where the tier before ends, got {shown(bound)}")
            lower, lower_text = number, str(bound)


def _read_account(part: _Part, drafts: Drafts) -> list[tuple[_Part, Data]]:
    """Also returns the account's contracts with their ids, for finding repeated ones."""
    account = part.validated(AccountModel, without="contracts")
    parts = part.parts("contracts")
    for contract in parts:
        model = contract.validated(ContractModel)
        if model is None or account is None:
            continue
        zone = ZoneInfo(account.time_zone)
        start, end = _instant(model.start, zone), _instant(model.end, zone)
        if end is not None and end <= start:
            contract.report("end", f"expected an end after the start, got {shown(contract.data['end'])}")
            continue
        item = Contract(model.id or _default_id(account.id), 0, account.id, model.plan, start, end)
        drafts.contracts.append(Draft(item, contract.where("id"), plan_where=contract.where("plan")))
    if account is not None:
        drafts.accounts.append(Draft(Account(account.id, 0, account.name, account.time_zone), part.where("id")))
    name = _default_id(_get(part.data, "id"))
    return [(contract, _get(contract.data, "id") or name) for contract in parts]


def _default_id(account: Data) -> str:
    """The id of a contract that the file gives none: an account usually has one."""
    return f"{account}-main"


def _report_repeats(parts: list[tuple[_Part, Data]]) -> None:
    first: dict[str, Where] = {}
    for part, name in parts:
        if not isinstance(name, str):
            continue
        where = part.where("id")
        known = first.setdefault(name, where)
        if known is not where:
            part.report("id", f"expected each id once, got {name!r} again after {known.file}:{known.line}")


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


def _get(data: Data, key: str) -> Data:
    return data.get(key) if isinstance(data, dict) else None


def span(contract: Contract) -> str:
    """A contract's time as people read it."""
    end = "" if contract.end_us is None else format_instant(contract.end_us)
    return f"{format_instant(contract.start_us)} to {end or 'open end'}"
