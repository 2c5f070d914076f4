"""Numbers of documents: gapless per legal entity, series and year, and never given twice.

A number is given in the transaction that issues its document, as its last step: the row of the range stays locked from
then to the commit, so whoever comes next waits that long, and what is rolled back gives its numbers back.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from psycopg import Connection

from pipeline.core.parties import NUMBER_PATTERN_DEFAULT, DocumentKind, LegalEntity


class Range(NamedTuple):
    """What is numbered from 1 without holes. ``series`` is the pattern: kinds that share one share its numbers."""

    legal_entity: str
    series: str
    #: 0 where the pattern does not name the year: then numbers go on over the years.
    year: int


@dataclass(frozen=True, slots=True)
class Number:
    """A document's number, its place in its range, from 1."""

    range: Range
    serial: int

    @property
    def text(self) -> str:
        return self.range.series.format(year=self.range.year, serial=self.serial)


def range_of(entity: LegalEntity, kind: DocumentKind, year: int) -> Range:
    """The range a legal entity numbers a kind of document in; ``year`` is the issue date's, by its own calendar."""
    patterns = entity.number_patterns
    series = patterns.get(kind) or patterns.get("invoice") or NUMBER_PATTERN_DEFAULT
    return Range(entity.id, series, year if "{year" in series else 0)


# Sorted by the caller, so that two closes wait for each other in one order.
_TAKE = """
INSERT INTO billing.number_range AS range (legal_entity, series, year, last)
SELECT * FROM unnest(%s::text[], %s::text[], %s::integer[], %s::bigint[])
ON CONFLICT (legal_entity, series, year) DO UPDATE SET last = range.last + excluded.last
RETURNING legal_entity, series, year, last
"""


def take(connection: "Connection[Any]", wanted: Sequence[Range]) -> list[Number]:
    """The next number of each range, in the order they are wanted in. Holds the ranges until the transaction ends."""
    counts: defaultdict[Range, int] = defaultdict(int)
    for one in wanted:
        counts[one] += 1
    ordered = sorted(counts)
    columns = [list(column) for column in zip(*((*one, counts[one]) for one in ordered), strict=True)]
    if not columns:
        return []
    taken = connection.execute(_TAKE, columns)
    following = {Range(*key): last - counts[Range(*key)] for *key, last in taken}
    numbers = []
    for one in wanted:
        following[one] += 1
        numbers.append(Number(one, following[one]))
    return numbers
