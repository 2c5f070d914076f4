"""What a changed document changes, in words and numbers, and what some quantities cost before and after.

Looks at documents as they are stored, so it knows every field they have, also those added later.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Any, TypeAlias

from pipeline.core.charges import Charge, Price, compile_price
from pipeline.core.documents import Item, to_document
from pipeline.core.money import Amount, Quantity, plain, round_half_up_div
from pipeline.core.plans import Plan

#: A part of a document: a text, a flag, None, or lists and mappings of these.
Value: TypeAlias = Any

#: What names a part of a list. Parts without (tiers) are told apart by their place.
_NAMES = ("id", "charge", "pool", "property")
#: Texts that stay texts even where they look like numbers.
_TEXTS = frozenset({"id", "name", "event_type", "value", "values", "unit", "meter", "property", "references"})
#: Most quantities that one charge is shown at.
_EXAMPLES_MAX = 6


@dataclass(frozen=True, slots=True)
class Change:
    """One difference between two versions of a document."""

    #: Where, as price files are read: ``charges[input-tokens].tiers[#2].unit_price``.
    path: str
    #: What stood and stands there, as documents write it; None where nothing did. A part that came or went is whole.
    before: Value
    after: Value
    #: The change as a person says it: ``charge input-tokens, tier 2 (above 500): unit price 0.25 → 0.2 (-20 %)``.
    words: str
    #: By how much a number changed, in percent with one decimal, half up; None where there is nothing to compare.
    percent: Decimal | None = None


@dataclass(frozen=True, slots=True)
class Example:
    """What a quantity of a charge costs before and after, exact; None where the charge is not there."""

    charge: str
    quantity: Quantity
    before: Amount | None
    after: Amount | None


def changes(before: Item | None, after: Item | None) -> tuple[Change, ...]:
    """Every difference between two versions, in the order of their documents. None is a document that is not there."""
    old, new = ({} if item is None else to_document(item) for item in (before, after))
    found = _compare("", (), "", old, new)
    if before is None:  # what a new document does not do, nobody asks
        return tuple(change for change in found if change.after not in (None, False, "", [], {}))
    return tuple(found)


def charge_changes(before: Charge, after: Charge) -> tuple[Change, ...]:
    """Every difference between two versions of a charge; the words leave its id to those who show them."""
    old, new = (to_document(Plan("", 0, "", "", 0, (charge,)))["charges"][0] for charge in (before, after))
    return tuple(_compare("", (), "", old, new))


def examples(before: Iterable[Charge], after: Iterable[Charge]) -> tuple[Example, ...]:
    """What charges that differ cost where their prices turn (included units, bounds, packages) and at twice the last.

    Of charges whose price depends on a counter's quantity alone; one with a single price everywhere has no turn.
    """
    old, new = ({charge.id: charge for charge in charges} for charges in (before, after))
    found = []
    for name in new | old:
        one, other = old.get(name), new.get(name)
        if one == other:
            continue
        prices = [_price(charge) for charge in (one, other)]
        for quantity in _turns(charge for charge in (one, other) if charge is not None):
            costs = [price and price(quantity) for price in prices]
            found.append(Example(name, quantity, *costs))
    return tuple(found)


# Documents ----------------------------------------------------------------------------------------------------------


def _compare(path: str, within: tuple[str, ...], field: str, before: Value, after: Value) -> Iterator[Change]:
    """The differences of one field, which stands ``within`` named parts."""
    if before == after:
        return
    if isinstance(before, dict) and isinstance(after, dict):
        for key in after | before:
            yield from _compare(f"{path}.{key}" if path else key, within, key, before.get(key), after.get(key))
    elif _has_parts(before) or _has_parts(after):
        yield from _compare_parts(path, within, field, before or [], after or [])
    else:
        percent = None if field in _TEXTS else _percent(before, after)
        moved = f"{_shown(before, field)} → {_shown(after, field)}"
        moved += "" if percent is None else f" ({signed(percent)} %)"
        yield Change(path, before, after, _words(within, f"{_spaced(field)} {moved}"), percent)


def _compare_parts(
    path: str, within: tuple[str, ...], field: str, before: Sequence[Value], after: Sequence[Value]
) -> Iterator[Change]:
    old, new = _by_name(before), _by_name(after)
    for name in new | old:
        at = f"{path}[{name}]"
        here = (*within, f"{_singular(field)} {name.removeprefix('#')}{_reach(after if name in new else before, name)}")
        if name not in old:
            yield Change(at, None, new[name], _words(here, f"new: {_summary(new[name])}"))
        elif name not in new:
            yield Change(at, old[name], None, _words(here, f"gone: {_summary(old[name])}"))
        else:
            yield from _compare(at, here, field, old[name], new[name])
    kept = [[name for name in names if name in old and name in new] for names in (old, new)]
    if kept[0] != kept[1]:
        one, other = (", ".join(names) for names in kept)
        yield Change(path, kept[0], kept[1], _words(within, f"order of {_spaced(field)} {one} → {other}"))


def _has_parts(value: Value) -> bool:
    return isinstance(value, list) and any(isinstance(part, dict) for part in value)


def _by_name(parts: Sequence[Value]) -> dict[str, Value]:
    """A list's parts by what names them, else by their place from 1."""
    named = {}
    for place, part in enumerate(parts, 1):
        name = next((str(part[key]) for key in _NAMES if isinstance(part.get(key), str)), f"#{place}")
        named[f"#{place}" if name in named else name] = part
    return named


# Words --------------------------------------------------------------------------------------------------------------


def _words(within: tuple[str, ...], what: str) -> str:
    return f"{', '.join(within)}: {what}" if within else what


def _reach(parts: Sequence[Value], name: str) -> str:
    """Which units a tier is for: it has no other name that people know it by."""
    if not name.startswith("#") or "up_to" not in parts[int(name[1:]) - 1]:
        return ""
    bounds = ["0", *(_shown(part["up_to"]) for part in parts)]
    lower, upper = bounds[int(name[1:]) - 1], parts[int(name[1:]) - 1]["up_to"]
    return f" (above {lower})" if upper is None else f" ({lower} to {_shown(upper)})"


def _summary(part: Value) -> str:
    """A part in one line: its fields that hold anything, the names left out."""
    if not isinstance(part, dict):
        return _shown(part)
    fields = [(key, value) for key, value in part.items() if key not in _NAMES[:3] and _says_something(part, key)]
    return ", ".join(f"{_spaced(key)} {_shown(value, key)}" for key, value in fields)


def _says_something(part: Value, field: str) -> bool:
    """Whether a part that came or went is another for what this field holds."""
    value = part[field]
    if field == "flat_on_zero":
        return bool(part.get("tiers"))
    return value not in (None, [], {}, "") and not (field in ("included", "flat") and value == "0")


def _shown(value: Value, field: str = "") -> str:
    match value:
        case None | "" | []:
            return "none"
        case bool():
            return "yes" if value else "no"
        case list():
            return ", ".join(f"({_summary(part)})" if isinstance(part, dict) else _shown(part, field) for part in value)
        case dict():
            return _summary(value)
    number = None if field in _TEXTS else _number(value)
    return str(value) if number is None else f"{number:,f}"


def percent_of(before: Decimal | int, after: Decimal | int) -> Decimal | None:
    """By how much a number changed, in percent with one decimal, half up; None where it was 0."""
    if not before:
        return None
    change = (Fraction(after) / Fraction(before) - 1) * 1000
    return Decimal(f"{round_half_up_div(change.numerator, change.denominator)}E-1")


def signed(percent: Decimal) -> str:
    """``+12.5``, ``-3``."""
    return ("+" if percent > 0 else "") + plain(percent)


def _percent(before: Value, after: Value) -> Decimal | None:
    old, new = _number(before), _number(after)
    return None if old is None or new is None else percent_of(old, new)


def _number(value: Value) -> Decimal | None:
    if not isinstance(value, str | int) or isinstance(value, bool):
        return None
    try:
        number = Decimal(value)
    except InvalidOperation:
        return None
    return number if number.is_finite() else None


def _spaced(field: str) -> str:
    return field.replace("_", " ")


def _singular(field: str) -> str:
    return _spaced(field).removesuffix("s")


# Examples -----------------------------------------------------------------------------------------------------------


def _price(charge: Charge | None) -> Price | None:
    """The charge as a function of its quantity, where it is one."""
    if charge is None:
        return None
    try:
        return compile_price(charge)
    except ValueError:
        return None


def _turns(charges: Iterable[Charge]) -> list[Quantity]:
    """The quantities where the price of any of these charges turns, and twice the last; none where none turns."""
    turns: set[Quantity] = set()
    for charge in charges:
        bounds = [tier.up_to for tier in charge.tiers if tier.up_to is not None]
        turns |= {charge.included, *(charge.included + bound for bound in bounds)}
        if charge.package_size is not None:
            turns.add(charge.included + charge.package_size)
    ascending = sorted(turns - {0})
    return [*ascending[: _EXAMPLES_MAX - 1], 2 * ascending[-1]] if ascending else []
