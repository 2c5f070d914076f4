"""The text form of a dimension cell: what stands as ``cell`` in rated rows, on invoice lines, and in names of counters.

A cell is the values of a charge's dimensions for one event, in the charge's order (``Charge.by``); an absent property
is the empty value. Its text is the values joined by commas: ``large,eu``. A comma or backslash within a value stands
behind a backslash, a control character as ``\\xNN``, so that every cell has one text and every text one cell.
"""

import re
from collections.abc import Sequence

#: Longest text of a cell, bytes of UTF-8: it stands in unique indexes of rows and lines, whose entries are bounded.
CELL_BYTES_MAX = 400

_SPECIAL = re.compile(r"[\\,\x00-\x1f\x7f]")
_ESCAPED = re.compile(r"\\(?:x([0-9a-f]{2})|(.))")
_PART = re.compile(r"(?:[^\\,]|\\.)*")


def cell_text(values: Sequence[str]) -> str:
    """The text of a cell; empty for a charge without dimensions."""
    return ",".join(_SPECIAL.sub(_escape, value) for value in values)


def cell_values(text: str, dimensions: int) -> tuple[str, ...]:
    """The values of a cell of so many dimensions. Raises ValueError for what is no text of such a cell."""
    parts: list[str] = []
    at = 0
    while len(parts) < dimensions and (part := _PART.match(text, at)):
        parts.append(_ESCAPED.sub(_unescape, part.group()))
        at = part.end() + 1
    if cell_text(parts) != text or len(parts) != dimensions:
        raise ValueError(f"expected the text of a cell of {dimensions} dimensions, got {text!r}")
    return tuple(parts)


def _escape(found: re.Match[str]) -> str:
    character = found.group()
    return f"\\{character}" if character in "\\," else f"\\x{ord(character):02x}"


def _unescape(found: re.Match[str]) -> str:
    code, character = found.groups()
    return chr(int(code, 16)) if code else character
