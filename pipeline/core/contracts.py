"""Who is billed, and by which contract."""

from dataclasses import dataclass
from typing import NamedTuple

from pipeline.core.cycles import MONTHLY, Cycle
from pipeline.core.money import Micros
from pipeline.core.periods import NEVER


@dataclass(frozen=True, slots=True)
class Account:
    """A customer. Billing periods are those of its contracts' cycles, in its IANA time zone.

    Its newest version counts for all times, but for ``customer_segment``: that counts from the version's valid_from.
    Usage carries the account's id; ``aliases`` are its names in other systems, for people and for what sends usage.
    """

    id: str
    version: int
    name: str
    time_zone: str
    #: Which price lists hold besides those of the account's own: "education", "startup".
    customer_segment: str | None = None
    #: The account this one belongs to. Prices do not pass from one to the other.
    parent: str | None = None
    aliases: tuple[str, ...] = ()
    #: From when ``customer_segment`` counts, by event time.
    valid_from_us: Micros = 0


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of a contract, from start_us until the next phase or the contract's end: a step of a ramp."""

    start_us: Micros
    plan: str
    #: A price list for this phase, over those of the customer segment and the account.
    price_list: str | None = None
    #: Calendar days, in the billing time zone, at the phase's start in which everything is free. None: as many as the
    #: plan grants where the phase is the contract's first, else none.
    trial_days: int | None = None


@dataclass(frozen=True, slots=True)
class Contract:
    """An account's agreement to a plan, from start_us, inclusive, to end_us, exclusive; None is open-ended."""

    id: str
    version: int
    account: str
    #: The plan of the first phase.
    plan: str
    start_us: Micros
    end_us: Micros | None
    price_list: str | None = None
    trial_days: int | None = None
    #: Who sells: the company of ours that invoices. One per contract; "" where there is only one.
    legal_entity: str = ""
    #: The phases after the first, by ascending start, all within the contract.
    later_phases: tuple[Phase, ...] = ()
    #: Its billing periods (``cycles.period_at`` with the account's time zone); fixed once the contract has begun.
    cycle: Cycle = MONTHLY

    @property
    def phases(self) -> tuple[Phase, ...]:
        """Every phase, the first included."""
        return (Phase(self.start_us, self.plan, self.price_list, self.trial_days), *self.later_phases)

    def covers(self, at_us: Micros) -> bool:
        return self.meets(at_us, at_us + 1)

    def meets(self, start_us: Micros, end_us: Micros) -> bool:
        """Whether it covers an instant of ``[start_us, end_us)``."""
        return self.start_us < end_us and (self.end_us is None or start_us < self.end_us)


class PhaseSpan(NamedTuple):
    """The plan of a phase, and from when until when; the end is after every instant where the contract has none."""

    plan: str
    start_us: Micros
    end_us: Micros


def phase_spans(contract: Contract) -> tuple[PhaseSpan, ...]:
    """The contract's phases with their ends, in order."""
    phases = contract.phases
    ends = [*(phase.start_us for phase in phases[1:]), NEVER if contract.end_us is None else contract.end_us]
    return tuple(PhaseSpan(phase.plan, phase.start_us, end) for phase, end in zip(phases, ends, strict=True))


def overlap(a: Contract, b: Contract) -> bool:
    """Whether there is an instant both contracts cover."""
    return (b.end_us is None or a.start_us < b.end_us) and (a.end_us is None or b.start_us < a.end_us)
