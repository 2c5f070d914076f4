"""A payer on the way through a close: what it is asked for, what was found of it, and its documents."""

from dataclasses import dataclass, field
from typing import NamedTuple

from pipeline.billing.close_entries import CloseEntry
from pipeline.billing.documents import Converted, NewDocument
from pipeline.billing.queue import Task
from pipeline.billing.reckoning import Basis, Reckoned
from pipeline.billing.unit_credits import UnitDraw
from pipeline.core.money import Minor
from pipeline.core.periods import Period


class Group(NamedTuple):
    """What makes one document of a payer: one seller, one currency, one period."""

    legal_entity: str
    currency: str
    period: Period


@dataclass(frozen=True, slots=True)
class Prepared:
    """A document that was reckoned, and what it is issued with."""

    payer: str
    basis: Basis
    reckoned: Reckoned
    document: NewDocument
    shown_as: Converted | None
    #: A container of it, for credits that pay the whole document.
    container: int | None


@dataclass(slots=True)
class Payer:
    """A payer on the way to its documents. With a problem nothing of it is written."""

    task: Task
    #: What the containers lack to stand at their closing prices, by account.
    entries: list[tuple[str, CloseEntry]] = field(default_factory=list)
    #: Open containers, to be closed with it.
    containers: list[int] = field(default_factory=list)
    #: Periods that were closed before, and that wait to be issued.
    closed: int = 0
    reviewed: int = 0
    documents: list[Prepared] = field(default_factory=list)
    #: Earlier invoices whose months need less of their net credits now, with these: by grant, in smallest units.
    unneeded: list[tuple[int, str, dict[int, Minor]]] = field(default_factory=list)
    #: What its accounts draw from unit credits.
    units: list[UnitDraw] = field(default_factory=list)
    problem: str | None = None

    @property
    def waits(self) -> bool:
        """Whether its documents wait for somebody to look at them: then nothing else of it is written."""
        return any(one.basis.entity.review for one in self.documents)
