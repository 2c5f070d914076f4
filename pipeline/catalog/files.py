"""Price files and account files: YAML to the core's types, or every mistake with its line.

Files given together are one whole: a charge may use a meter of another file among them.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import date
from decimal import Decimal
from itertools import chain, combinations
from pathlib import Path
from typing import Annotated, Any, Generic, TypeAlias, TypeVar, overload
from zoneinfo import ZoneInfo

from pydantic import BaseModel, BeforeValidator, ConfigDict

from pipeline.catalog.source import Data, Finding, Key, Source, Where, expected, one_of, read, shown, suggestion
from pipeline.core.charges import Charge, Tier
from pipeline.core.contracts import Account, Contract, overlap
from pipeline.core.meters import Filter, Meter
from pipeline.core.money import PRICE_DECIMALS, QUANTITY_DECIMALS, Micros, minor_units, parse_decimal
from pipeline.core.periods import format_instant, local_midnight, parse_instant, to_datetime
from pipeline.core.plans import Plan
from pipeline.core.reasons import Reason

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_UTC = ZoneInfo("UTC")
_NAME_MAX = 200
_TEXT_MAX = 255

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
        f"expected contracts of an account one after another, got {draft.item.id!r} ({_span(draft.item)}) "
        f"while {other.id!r} ({_span(other)}) runs"
    )


# Fields -------------------------------------------------------------------------------------------------------------


def _id(value: Data) -> str:
    if not isinstance(value, str) or not _ID.fullmatch(value):
        raise expected("an id (a letter or digit, then letters, digits and . _ : -, at most 128)", value)
    return value


def _text(what: str, most: int = _TEXT_MAX) -> Callable[[Data], str]:
    def check(value: Data) -> str:
        if not isinstance(value, str) or not value.strip() or len(value) > most:
            raise expected(f"{what}, at most {most} characters", value)
        return value

    return check


def _texts(value: Data) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(v, str) and v and len(v) <= _TEXT_MAX for v in values):
        raise expected("a word or a list of words", next((v for v in values if not isinstance(v, str)), value))
    if len(set(values)) < len(values):
        repeated = next(v for n, v in enumerate(values) if v in values[:n])
        raise expected("each value once", repeated)
    return tuple(values)


def _number(value: Data, decimals: int, *, above: int) -> int:
    what = "a number above 0" if above == 0 else "a number of 0 or more"
    number = parse_decimal(value, decimals=decimals) if isinstance(value, str) else Reason.NOT_A_NUMBER
    match number:
        case Reason.QUANTITY_TOO_PRECISE:
            raise expected(f"at most {decimals} decimals", value)
        case Reason.QUANTITY_TOO_LARGE:
            raise expected("at most 18 digits before the point", value)
        case Reason():
            raise expected(what, value)
    if number <= above:
        raise expected(what, value)
    return number


def _price(value: Data) -> Decimal:
    _number(value, PRICE_DECIMALS, above=-1)
    return Decimal(value)


def _quantity(value: Data) -> int:
    return _number(value, QUANTITY_DECIMALS, above=-1)


def _positive_quantity(value: Data) -> int:
    return _number(value, QUANTITY_DECIMALS, above=0)


def _choice(*words: str) -> Callable[[Data], Any]:
    def check(value: Data) -> str:
        if value not in words:
            hint = suggestion(value, list(words)) if isinstance(value, str) else ""
            raise expected(one_of(list(words)), value, hint if "did you mean" in hint else "")
        return str(value)

    return check


def _flag(value: Data) -> bool:
    return bool(_choice("true", "false")(value) == "true")


def _currency(value: Data) -> str:
    try:
        minor_units(str(value))
    except ValueError:
        raise expected("a currency code of ISO 4217 such as USD", value) from None
    return str(value)


def _time_zone(value: Data) -> str:
    try:
        return ZoneInfo(value if isinstance(value, str) else "").key
    except (ValueError, OSError, KeyError):  # what zoneinfo raises for a name it cannot look up, a folder, no name
        raise expected("an IANA time zone such as Europe/Berlin", value) from None


def _time(value: Data) -> date | Micros:
    """A date, or an instant in microseconds since 1970 UTC; from 1970 to 9998, where every time zone can count."""
    what = "a date such as 2026-01-31 or a time with zone such as 2026-01-31T09:00:00Z"
    if not isinstance(value, str):
        raise expected(what, value)
    try:
        time = date.fromisoformat(value) if _DATE.fullmatch(value) else parse_instant(value)
    except ValueError:
        raise expected(what, value) from None
    if not 1970 <= (time if isinstance(time, date) else to_datetime(time)).year <= 9998:
        raise expected("a year from 1970 to 9998", value)
    return time


Id = Annotated[str, BeforeValidator(_id)]
Property = Annotated[str, BeforeValidator(_text("a property's name"))]
Price = Annotated[Decimal, BeforeValidator(_price)]
Quantity = Annotated[int, BeforeValidator(_quantity)]
Flag = Annotated[bool, BeforeValidator(_flag)]
Name = Annotated[str, BeforeValidator(_text("a name", _NAME_MAX))]
Time = Annotated[date | int, BeforeValidator(_time)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _MeterModel(_Model):
    id: Id
    event_type: Annotated[str, BeforeValidator(_text("an event type", 128))]
    aggregation: Annotated[Any, BeforeValidator(_choice("sum", "count"))]
    value: Property | None = None
    unit: Annotated[str, BeforeValidator(_text("a unit such as token", 64))]
    filters: dict[str, Annotated[tuple[str, ...], BeforeValidator(_texts)]] | None = None
    allow_negative: Flag = False
    valid_from: Time | None = None


class _PlanModel(_Model):
    id: Id
    name: Name
    currency: Annotated[str, BeforeValidator(_currency)]
    valid_from: Time | None = None


class _ChargeModel(_Model):
    id: Id
    meter: Id
    model: Annotated[Any, BeforeValidator(_choice("per_unit", "graduated", "volume", "package"))]
    included: Quantity = 0
    references: Annotated[tuple[str, ...], BeforeValidator(_texts)] = ()


class _TierModel(_Model):
    up_to: Annotated[int, BeforeValidator(_positive_quantity)] | None = None
    unit_price: Price = Decimal(0)
    flat: Price = Decimal(0)


class _PerUnitModel(_ChargeModel):
    unit_price: Price


class _TieredModel(_ChargeModel):
    tiers: list[_TierModel]
    flat_on_zero: Flag = True


class _PackageModel(_ChargeModel):
    package_size: Annotated[int, BeforeValidator(_positive_quantity)]
    package_price: Price


class _UnknownModel(_ChargeModel):
    """Where the model is not one of ours, the price fields cannot be judged. Never valid."""

    unit_price: Any = None
    tiers: Any = None
    flat_on_zero: Any = None
    package_size: Any = None
    package_price: Any = None


_CHARGE_MODELS: dict[str, type[_ChargeModel]] = {
    "per_unit": _PerUnitModel,
    "graduated": _TieredModel,
    "volume": _TieredModel,
    "package": _PackageModel,
}


class _AccountModel(_Model):
    id: Id
    name: Name
    time_zone: Annotated[str, BeforeValidator(_time_zone)] = "UTC"


class _ContractModel(_Model):
    id: Id | None = None
    plan: Id
    start: Time
    end: Time | None = None


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
    meter = part.validated(_MeterModel)
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
    plan = part.validated(_PlanModel, without="charges")
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
    if isinstance(meter, str) and _ID.fullmatch(meter) and meter not in meters:
        hint = suggestion(meter, sorted(meters)) or ": give the file that defines it too"
        part.report("meter", f"expected a meter of the files given, got {meter!r}{hint}")
    _check_tiers(part)
    model = _CHARGE_MODELS.get(str(_get(part.data, "model")), _UnknownModel)
    charge = part.validated(model)
    if charge is None:
        return None
    match charge:
        case _PerUnitModel():
            own: dict[str, Any] = {"unit_price": charge.unit_price}
        case _PackageModel():
            own = {"package_size": charge.package_size, "package_price": charge.package_price}
        case _TieredModel():
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
    account = part.validated(_AccountModel, without="contracts")
    parts = part.parts("contracts")
    for contract in parts:
        model = contract.validated(_ContractModel)
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


def _span(contract: Contract) -> str:
    end = "" if contract.end_us is None else format_instant(contract.end_us)
    return f"{format_instant(contract.start_us)} to {end or 'open end'}"
