"""The catalog's items as documents: what is stored, sent and compared. Numbers are strings, exact; times ISO 8601."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any, Literal, TypeAlias, TypeVar, cast
from zoneinfo import ZoneInfo

from pipeline.core.charges import Charge, Tier, compile_price
from pipeline.core.contracts import Account, Contract
from pipeline.core.meters import Filter, Meter, compile_measure
from pipeline.core.money import (
    QUANTITY_DECIMALS,
    Micros,
    Quantity,
    minor_units,
    plain,
    quantity_decimal,
    scaled,
)
from pipeline.core.periods import format_instant, parse_instant
from pipeline.core.plans import Plan

Kind: TypeAlias = Literal["account", "contract", "meter", "plan"]
Document: TypeAlias = Mapping[str, Any]
Item: TypeAlias = Account | Contract | Meter | Plan


@dataclass(frozen=True, slots=True)
class Entry:
    """One version of a document. The document is JSON; numbers of quantity and money are strings, exact."""

    kind: Kind
    id: str
    version: int
    valid_from_us: Micros
    document: Document


def canonical_json(document: Document) -> str:
    """The document as text: equal documents, equal text."""
    return json.dumps(document, ensure_ascii=False, separators=(",", ":"), sort_keys=True)


def from_document(entry: Entry) -> Item:
    """The account, contract, meter or plan an entry holds.

    Raises ValueError where it is not exactly what this version of the program writes: an unknown field may change a
    price, so it is never passed over.
    """
    try:
        fields = _Fields(entry.document)
        item = _read(entry, fields)
        fields.end()
        _check(item)
    except (ValueError, KeyError, TypeError, InvalidOperation) as error:
        what = f"no field {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"cannot read {entry.kind} {entry.id!r} version {entry.version}: {what}") from error
    return item


def to_document(item: Item) -> dict[str, Any]:
    """The item as JSON-ready data: equal items, equal data. Id, version and valid_from stand beside it in the entry."""
    match item:
        case Account():
            return {"name": item.name, "time_zone": item.time_zone}
        case Contract():
            end = None if item.end_us is None else format_instant(item.end_us)
            return {"account": item.account, "plan": item.plan, "start": format_instant(item.start_us), "end": end}
        case Meter():
            return {
                "event_type": item.event_type,
                "aggregation": item.aggregation,
                "value": item.value,
                "unit": item.unit,
                "filters": [{"property": f.property, "values": list(f.values)} for f in item.filters],
                "allow_negative": item.allow_negative,
            }
        case Plan():
            return {
                "name": item.name,
                "currency": item.currency,
                "charges": [_charge_document(charge) for charge in item.charges],
            }


def kind_of(item: Item) -> Kind:
    match item:
        case Account():
            return "account"
        case Contract():
            return "contract"
        case Meter():
            return "meter"
        case Plan():
            return "plan"


def _charge_document(charge: Charge) -> dict[str, Any]:
    return {
        "id": charge.id,
        "meter": charge.meter,
        "model": charge.model,
        "unit_price": _price_text(charge.unit_price),
        "tiers": [
            {"up_to": _quantity_text(t.up_to), "unit_price": plain(t.unit_price), "flat": plain(t.flat)}
            for t in charge.tiers
        ],
        "package_size": _quantity_text(charge.package_size),
        "package_price": _price_text(charge.package_price),
        "included": _quantity_text(charge.included),
        "references": list(charge.references),
        "flat_on_zero": charge.flat_on_zero,
    }


def _check(item: Item) -> None:
    """Raise ValueError or KeyError now for what could not be used later, while an event is rated."""
    match item:
        case Account():
            ZoneInfo(item.time_zone)
        case Meter():
            compile_measure(item)
        case Plan():
            minor_units(item.currency)
            for charge in item.charges:
                compile_price(charge)


class _Fields:
    """Takes the fields of a document one by one and refuses what is left over."""

    def __init__(self, document: Document) -> None:
        self._left = dict(document)

    def text(self, name: str) -> str:
        return _expect(self._left.pop(name), str, name)

    def optional_text(self, name: str) -> str | None:
        value = self._left.pop(name)
        return None if value is None else _expect(value, str, name)

    def flag(self, name: str) -> bool:
        return _expect(self._left.pop(name), bool, name)

    def texts(self, name: str) -> tuple[str, ...]:
        return tuple(_expect(value, str, name) for value in _expect(self._left.pop(name), list, name))

    def parts(self, name: str) -> list["_Fields"]:
        return [_Fields(_expect(part, dict, name)) for part in _expect(self._left.pop(name), list, name)]

    def price(self, name: str) -> Decimal | None:
        text = self.optional_text(name)
        return None if text is None else Decimal(text)

    def quantity(self, name: str) -> Quantity | None:
        text = self.optional_text(name)
        return None if text is None else scaled(Decimal(text), QUANTITY_DECIMALS)

    def end(self) -> None:
        if self._left:
            raise ValueError(f"unknown fields {sorted(self._left)}: written by a newer version?")


T = TypeVar("T")


def _expect(value: object, expected: type[T], name: str) -> T:
    if not isinstance(value, expected):
        raise ValueError(f"expected {expected.__name__} as {name}, got {value!r}")
    return value


def _read_account(entry: Entry, fields: _Fields) -> Account:
    return Account(entry.id, entry.version, fields.text("name"), fields.text("time_zone"))


def _read_contract(entry: Entry, fields: _Fields) -> Contract:
    end = fields.optional_text("end")
    return Contract(
        entry.id,
        entry.version,
        fields.text("account"),
        fields.text("plan"),
        parse_instant(fields.text("start")),
        None if end is None else parse_instant(end),
    )


def _read_meter(entry: Entry, fields: _Fields) -> Meter:
    aggregation = fields.text("aggregation")
    if aggregation not in ("sum", "count"):
        raise ValueError(f"expected aggregation sum or count, got {aggregation!r}")
    filters = []
    for part in fields.parts("filters"):
        filters.append(Filter(part.text("property"), part.texts("values")))
        part.end()
    return Meter(
        entry.id,
        entry.version,
        fields.text("event_type"),
        cast(Literal["sum", "count"], aggregation),
        fields.optional_text("value"),
        fields.text("unit"),
        tuple(filters),
        fields.flag("allow_negative"),
        entry.valid_from_us,
    )


def _read_plan(entry: Entry, fields: _Fields) -> Plan:
    charges = []
    for part in fields.parts("charges"):
        charges.append(_read_charge(part))
        part.end()
    return Plan(
        entry.id, entry.version, fields.text("name"), fields.text("currency"), entry.valid_from_us, tuple(charges)
    )


def _read_charge(fields: _Fields) -> Charge:
    model = fields.text("model")
    if model not in ("per_unit", "graduated", "volume", "package"):
        raise ValueError(f"expected model per_unit, graduated, volume or package, got {model!r}")
    tiers = []
    for part in fields.parts("tiers"):
        up_to = part.quantity("up_to")
        tiers.append(Tier(up_to, Decimal(part.text("unit_price")), Decimal(part.text("flat"))))
        part.end()
    return Charge(
        id=fields.text("id"),
        meter=fields.text("meter"),
        model=cast(Literal["per_unit", "graduated", "volume", "package"], model),
        unit_price=fields.price("unit_price"),
        tiers=tuple(tiers),
        package_size=fields.quantity("package_size"),
        package_price=fields.price("package_price"),
        included=scaled(Decimal(fields.text("included")), QUANTITY_DECIMALS),
        references=fields.texts("references"),
        flat_on_zero=fields.flag("flat_on_zero"),
    )


def _read(entry: Entry, fields: _Fields) -> Item:
    match entry.kind:
        case "account":
            return _read_account(entry, fields)
        case "contract":
            return _read_contract(entry, fields)
        case "meter":
            return _read_meter(entry, fields)
        case "plan":
            return _read_plan(entry, fields)


def _quantity_text(quantity: Quantity | None) -> str | None:
    return None if quantity is None else plain(quantity_decimal(quantity))


def _price_text(price: Decimal | None) -> str | None:
    return None if price is None else plain(price)
