"""Legal entities, customers, taxes and coupons as documents: what is stored and compared. Pure.

A field is written under its own name where it is not the default. Decimals and amounts of money are strings in whole
units, exact; days are ISO 8601; sets and mappings are sorted, so that equal items are equal documents.
"""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from datetime import date
from decimal import Decimal, InvalidOperation
from types import NoneType, UnionType
from typing import Any, Literal, TypeAlias, TypeVar, Union, get_args, get_origin, get_type_hints

from pipeline.core.discounts import Coupon
from pipeline.core.money import AMOUNT_DECIMALS, amount_decimal, plain, scaled
from pipeline.core.parties import Address, Branding, Customer, CustomerCoupon, Exemption, LegalEntity, Policy
from pipeline.core.tax import TaxRate

Kind: TypeAlias = Literal["legal_entity", "customer", "tax", "coupon"]


@dataclass(frozen=True, slots=True)
class TaxTable:
    """All rates there ever were of one tax of a country or region. Its id is ``DE/VAT`` or ``CA-QC/QST``."""

    id: str
    version: int
    rates: tuple[TaxRate, ...]


Item: TypeAlias = LegalEntity | Customer | TaxTable | Coupon

_CLASSES: dict[Kind, type[Item]] = {
    "legal_entity": LegalEntity,
    "customer": Customer,
    "tax": TaxTable,
    "coupon": Coupon,
}
_KINDS: dict[type[Item], Kind] = {cls: kind for kind, cls in _CLASSES.items()}
#: What stands beside the document.
_BESIDE = frozenset({"id", "account", "version", "billing_time_zone"})
#: Amounts of money, which in the types are integers like others.
_AMOUNTS = frozenset({(Customer, "threshold"), (Coupon, "amount")})

T = TypeVar("T")


def kind_of(item: Item) -> Kind:
    return _KINDS[type(item)]


def id_of(item: Item) -> str:
    """Of a customer, its account's."""
    return item.account if isinstance(item, Customer) else item.id


def to_document(item: Item) -> dict[str, Any]:
    """The item as JSON-ready data, but for its id and version and an account's time zone, which stand beside it."""
    return {name: value for name, value in _write_fields(item).items() if name not in _BESIDE}


def from_document(kind: Kind, id: str, version: int, document: Mapping[str, Any]) -> Item:
    """The item of a stored version.

    Raises ValueError where it is not exactly what this version of the program writes: an unknown field may change what
    somebody pays, so it is never passed over.
    """
    cls = _CLASSES[kind]
    key = "account" if cls is Customer else "id"
    try:
        return _read_fields(cls, {**document, key: id, "version": version})
    except (ValueError, TypeError, InvalidOperation) as error:
        raise ValueError(f"cannot read {kind} {id!r} version {version}: {error}") from error


def _write_fields(item: Any) -> dict[str, Any]:
    written = {}
    for one in fields(item):
        value = getattr(item, one.name)
        if value == one.default or (one.default_factory is not MISSING and value == one.default_factory()):
            continue
        amount = (type(item), one.name) in _AMOUNTS
        written[one.name] = plain(amount_decimal(value)) if amount else _write(value)
    return written


def _write(value: Any) -> Any:
    if is_dataclass(value):
        return _write_fields(value)
    match value:
        case Decimal():
            return plain(value)
        case date():
            return value.isoformat()
        case tuple():
            return [_write(part) for part in value]
        case frozenset():
            return sorted(value)
        case Mapping():
            return {str(key): _write(value[key]) for key in sorted(value)}
    return value


_NESTED = (Address, Branding, CustomerCoupon, Exemption, Policy, TaxRate)
#: The types of each class's fields; looked up once, since that takes longer than reading an item.
_HINTS: dict[type[Any], dict[str, Any]] = {cls: get_type_hints(cls) for cls in (*_CLASSES.values(), *_NESTED)}


def _read_fields(cls: type[T], document: Any) -> T:
    if not isinstance(document, Mapping):
        raise ValueError(f"expected the fields of {cls.__name__}, got {document!r}")
    hints = _HINTS[cls]
    if unknown := sorted(document.keys() - hints.keys()):
        raise ValueError(f"unknown fields {unknown}: written by a newer version?")
    return cls(
        **{
            name: scaled(Decimal(value), AMOUNT_DECIMALS)
            if (cls, name) in _AMOUNTS and isinstance(value, str)
            else _read(hints[name], value, name)
            for name, value in document.items()
        }
    )


def _read(hint: Any, value: Any, name: str) -> Any:
    """A value of the type that a field is declared with. Raises ValueError."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        if value is None and NoneType in inner:
            return None
        (hint,) = (one for one in inner if one is not NoneType)
        return _read(hint, value, name)
    if is_dataclass(hint):
        return _read_fields(hint, value)  # type: ignore[arg-type]
    if origin is tuple and isinstance(value, list):
        return tuple(_read(inner[0], part, name) for part in value)
    if origin is frozenset and isinstance(value, list):
        return frozenset(_read(inner[0], part, name) for part in value)
    if hint is Decimal and isinstance(value, str):
        return Decimal(value)
    if hint is date and isinstance(value, str):
        return date.fromisoformat(value)
    if origin is Literal and value in inner:
        return value
    if isinstance(origin, type) and issubclass(origin, Mapping) and isinstance(value, Mapping):
        return {_read(inner[0], key, name): _read(inner[1], part, name) for key, part in value.items()}
    if isinstance(hint, type) and type(value) is hint and hint in (str, int, bool):
        return value
    raise ValueError(f"expected {getattr(hint, '__name__', hint)} as {name}, got {value!r}")
