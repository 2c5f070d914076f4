"""Who is billed, and by which contract."""

from dataclasses import dataclass

from pipeline.core.money import Micros


@dataclass(frozen=True, slots=True)
class Account:
    """A customer. Billing periods are calendar months of its IANA time zone."""

    id: str
    version: int
    name: str
    time_zone: str


@dataclass(frozen=True, slots=True)
class Contract:
    """An account's agreement to a plan, from start_us, inclusive, to end_us, exclusive; None is open-ended."""

    id: str
    version: int
    account: str
    plan: str
    start_us: Micros
    end_us: Micros | None

    def covers(self, at_us: Micros) -> bool:
        return self.start_us <= at_us and (self.end_us is None or at_us < self.end_us)


def overlap(a: Contract, b: Contract) -> bool:
    """Whether there is an instant both contracts cover."""
    return (b.end_us is None or a.start_us < b.end_us) and (a.end_us is None or b.start_us < a.end_us)
