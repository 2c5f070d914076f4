"""The catalog's items as documents: what is stored, sent and compared. Numbers are strings, exact; times ISO 8601.

Each class has one table of its fields, which writes and reads. A field that came later is written only where it is not
the default: documents from before stay readable, and what did not change stays equal.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from decimal import Decimal, InvalidOperation
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar, get_args
from zoneinfo import ZoneInfo

from pipeline.core.charges import Beyond, Bound, Cell, Charge, Model, Tier, check_charge
from pipeline.core.contracts import Account, Contract, Phase
from pipeline.core.cycles import Cycle, Every, check_cycle
from pipeline.core.meters import (
    Aggregation,
    Conversion,
    Filter,
    Meter,
    Operator,
    Rounding,
    RoundingMode,
    TimeUnit,
    compile_measure,
)
from pipeline.core.money import QUANTITY_DECIMALS, Micros, minor_units, plain, quantity_decimal, scaled
from pipeline.core.periods import format_instant, parse_instant
from pipeline.core.plans import Override, Plan, Pool, PoolOverride, PriceList, Prorate, ProrateBy

Kind: TypeAlias = Literal["account", "contract", "meter", "plan", "price_list"]
Document: TypeAlias = Mapping[str, Any]
Item: TypeAlias = Account | Contract | Meter | Plan | PriceList

#: Kinds whose versions count from a time on, by event time; of the others the newest version counts.
DATED: tuple[Kind, ...] = ("meter", "plan", "price_list")


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
    """The item an entry holds.

    Raises ValueError where it is not exactly what this version of the program writes: an unknown field may change a
    price, so it is never passed over.
    """
    cls = _CLASSES[entry.kind]
    dated = {} if cls is Contract else {"valid_from_us": entry.valid_from_us}
    try:
        item: Item = _read(cls, entry.document, id=entry.id, version=entry.version, **dated)
        _check(item)
    except (ValueError, KeyError, TypeError, InvalidOperation) as error:
        what = f"no field {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"cannot read {entry.kind} {entry.id!r} version {entry.version}: {what}") from error
    return item


def to_document(item: Item) -> dict[str, Any]:
    """The item as JSON-ready data: equal items, equal data. Id, version and valid_from stand beside it in the entry."""
    return _write(item)


def kind_of(item: Item) -> Kind:
    return _KINDS[type(item)]


def _check(item: Item) -> None:
    """Raise ValueError or KeyError now for what could not be used later, while an event is rated."""
    match item:
        case Account():
            ZoneInfo(item.time_zone)
        case Contract():
            check_cycle(item.cycle)
        case Meter():
            compile_measure(item)
        case Plan():
            minor_units(item.currency)
            for charge in item.charges:
                check_charge(charge)
        case PriceList():
            minor_units(item.currency)


# Fields: how a value stands in a document, and how it is read from there --------------------------------------------


class _Field(NamedTuple):
    """A field of a document. ``read`` gets its value and name; it raises ValueError for what it cannot take."""

    attribute: str
    write: Callable[[Any], Any]
    read: Callable[[Any, str], Any]
    #: Written whatever its value, and missed where absent; else absent is the default of the class.
    always: bool = False

    def required(self) -> "_Field":
        return self._replace(always=True)


T = TypeVar("T")


def _expect(value: object, expected: type[T], name: str) -> T:
    if not isinstance(value, expected):
        raise ValueError(f"expected {expected.__name__} as {name}, got {value!r}")
    return value


def _same(value: T) -> T:
    return value


def _text(attribute: str) -> _Field:
    return _Field(attribute, _same, lambda value, name: _expect(value, str, name))


def _flag(attribute: str) -> _Field:
    return _Field(attribute, _same, lambda value, name: _expect(value, bool, name))


def _count(attribute: str) -> _Field:
    return _optional(_Field(attribute, _same, lambda value, name: _expect(value, int, name)))


def _word(attribute: str, words: Any) -> _Field:
    """One of the words of a Literal."""
    known: tuple[str, ...] = get_args(words)

    def read(value: Any, name: str) -> str:
        if value not in known:
            raise ValueError(f"expected {name} {' or '.join([', '.join(known[:-1]), known[-1]])}, got {value!r}")
        return str(value)

    return _Field(attribute, _same, read)


def _texts(attribute: str) -> _Field:
    return _Field(
        attribute,
        list,
        lambda value, name: tuple(_expect(part, str, name) for part in _expect(value, list, name)),
    )


def _price(attribute: str) -> _Field:
    return _optional(_Field(attribute, plain, lambda value, name: Decimal(_expect(value, str, name))))


def _quantity(attribute: str) -> _Field:
    return _optional(
        _Field(
            attribute,
            lambda quantity: plain(quantity_decimal(quantity)),
            lambda value, name: scaled(Decimal(_expect(value, str, name)), QUANTITY_DECIMALS),
        )
    )


def _instant(attribute: str) -> _Field:
    return _Field(attribute, format_instant, lambda value, name: parse_instant(_expect(value, str, name)))


def _write(item: Any) -> dict[str, Any]:
    defaults, document = _DEFAULTS[type(item)], {}
    for name, field in _TABLES[type(item)].items():
        value = getattr(item, field.attribute)
        if field.always or value != defaults[field.attribute]:
            document[name] = field.write(value)
    return document


def _read(cls: type[T], document: Document, **known: Any) -> T:
    left = dict(document)
    for name, field in _TABLES[cls].items():
        if name in left or field.always:
            known[field.attribute] = field.read(left.pop(name), name)
    if left:
        raise ValueError(f"unknown fields {sorted(left)}: written by a newer version?")
    return cls(**known)


def _items(attribute: str, cls: type[Any]) -> _Field:
    """A list of nested documents."""
    return _Field(
        attribute,
        lambda items: [_write(item) for item in items],
        lambda value, name: tuple(_read(cls, _expect(part, dict, name)) for part in _expect(value, list, name)),
    )


def _item(attribute: str, cls: type[Any]) -> _Field:
    """One nested document, or none."""
    return _optional(_Field(attribute, _write, lambda value, name: _read(cls, _expect(value, dict, name))))


def _optional(field: _Field) -> _Field:
    """The field where null stands for None."""
    return field._replace(
        write=lambda value: None if value is None else field.write(value),
        read=lambda value, name: None if value is None else field.read(value, name),
    )


def _write_override(override: Override) -> dict[str, Any]:
    table = _TABLES[Charge]
    return {"charge": override.charge, **{name: table[name].write(value) for name, value in override.changes}}


def _read_override(value: Any, name: str) -> Override:
    left = dict(_expect(value, dict, name))
    charge = _expect(left.pop("charge"), str, "charge")
    table = {name: field for name, field in _TABLES[Charge].items() if name not in ("id", "meter")}
    if unknown := sorted(left.keys() - table.keys()):
        raise ValueError(f"unknown fields {unknown}: written by a newer version?")
    return Override(charge, tuple(sorted((name, table[name].read(part, name)) for name, part in left.items())))


# Tables: the fields of each class, by their names in the document ---------------------------------------------------

_TABLES: dict[type[Any], dict[str, _Field]] = {
    Account: {
        "name": _text("name").required(),
        "time_zone": _text("time_zone").required(),
        "customer_segment": _optional(_text("customer_segment")),
        "parent": _optional(_text("parent")),
        "aliases": _texts("aliases"),
    },
    Phase: {
        "start": _instant("start_us").required(),
        "plan": _text("plan").required(),
        "price_list": _optional(_text("price_list")),
        "trial_days": _count("trial_days"),
    },
    Cycle: {
        "every": _word("every", Every).required(),
        "day": _count("day").required(),
        "month": _count("month").required(),
    },
    Contract: {
        "account": _text("account").required(),
        "plan": _text("plan").required(),
        "start": _instant("start_us").required(),
        "end": _optional(_instant("end_us")).required(),
        "price_list": _optional(_text("price_list")),
        "trial_days": _count("trial_days"),
        "legal_entity": _text("legal_entity"),
        "later_phases": _items("later_phases", Phase),
        "cycle": _item("cycle", Cycle),
    },
    Filter: {
        "property": _text("property").required(),
        "values": _texts("values").required(),
        "operator": _word("operator", Operator),
    },
    Conversion: {
        "multiply": _price("multiply"),
        "divide": _price("divide"),
    },
    Rounding: {
        "mode": _word("mode", RoundingMode).required(),
        "step": _quantity("step"),
    },
    Meter: {
        "event_type": _text("event_type").required(),
        "aggregation": _word("aggregation", Aggregation).required(),
        "value": _optional(_text("value")).required(),
        "unit": _text("unit").required(),
        "filters": _items("filters", Filter).required(),
        "allow_negative": _flag("allow_negative").required(),
        "expression": _optional(_text("expression")),
        "convert": _item("convert", Conversion),
        "rounding": _item("rounding", Rounding),
        "derived_per": _word("derived_per", Literal["event", "total"]),
        "level": _word("level", Literal["set", "add"]),
        "time_unit": _optional(_word("time_unit", TimeUnit)),
        "carries_over": _flag("carries_over"),
        "dimensions": _texts("dimensions"),
    },
    Tier: {
        "up_to": _quantity("up_to").required(),
        "unit_price": _price("unit_price").required(),
        "flat": _price("flat").required(),
        "rate": _price("rate"),
        "cap": _price("cap"),
    },
    Cell: {
        "values": _texts("values").required(),
        "unit_price": _price("unit_price").required(),
    },
    Charge: {
        "id": _text("id").required(),
        "meter": _optional(_text("meter")).required(),
        "model": _word("model", Model).required(),
        "unit_price": _price("unit_price").required(),
        "tiers": _items("tiers", Tier).required(),
        "package_size": _quantity("package_size").required(),
        "package_price": _price("package_price").required(),
        "included": _quantity("included").required(),
        "references": _texts("references").required(),
        "flat_on_zero": _flag("flat_on_zero").required(),
        "by": _texts("by"),
        "per_subject": _flag("per_subject"),
        "cells": _items("cells", Cell),
        "rate": _price("rate"),
        "fixed": _price("fixed"),
        "free_events": _count("free_events"),
        "free_amount": _quantity("free_amount"),
        "event_minimum": _price("event_minimum"),
        "event_maximum": _price("event_maximum"),
        "multiplier": _price("multiplier"),
        "amount_property": _optional(_text("amount_property")),
        "minimum": _price("minimum"),
        "maximum": _price("maximum"),
        "beyond": _optional(_word("beyond", Beyond)),
        "bound": _word("bound", Bound),
        "min_packages": _count("min_packages"),
        "in_advance": _flag("in_advance"),
        "quantity": _quantity("quantity"),
        "per_level": _flag("per_level"),
        "prorate": _flag("prorate"),
        "name": _text("name"),
        "tax_category": _text("tax_category"),
    },
    Pool: {
        "id": _text("id").required(),
        "unit": _text("unit").required(),
        "included": _quantity("included").required(),
        "charges": _texts("charges").required(),
    },
    Plan: {
        "name": _text("name").required(),
        "currency": _text("currency").required(),
        "charges": _items("charges", Charge).required(),
        "pools": _items("pools", Pool),
        "prorate": _word("prorate", Prorate),
        "trial_days": _count("trial_days"),
        "prorate_by": _word("prorate_by", ProrateBy),
    },
    PoolOverride: {
        "pool": _text("pool").required(),
        "included": _quantity("included").required(),
    },
    PriceList: {
        "name": _text("name").required(),
        "plan": _text("plan").required(),
        "currency": _text("currency").required(),
        "overrides": _Field(
            "overrides",
            lambda overrides: [_write_override(override) for override in overrides],
            lambda value, name: tuple(_read_override(part, name) for part in _expect(value, list, name)),
        ).required(),
        "pools": _items("pools", PoolOverride),
        "customer_segment": _optional(_text("customer_segment")),
        "account": _optional(_text("account")),
    },
}
_CLASSES: dict[Kind, type[Item]] = {
    "account": Account,
    "contract": Contract,
    "meter": Meter,
    "plan": Plan,
    "price_list": PriceList,
}
_KINDS: dict[type[Item], Kind] = {cls: kind for kind, cls in _CLASSES.items()}
_DEFAULTS = {cls: {field.name: field.default for field in fields(cls)} for cls in _TABLES}
