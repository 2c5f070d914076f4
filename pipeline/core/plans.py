"""What a customer agrees to: a currency and the charges priced in it."""

from dataclasses import dataclass

from pipeline.core.charges import Charge
from pipeline.core.money import Micros


@dataclass(frozen=True, slots=True)
class Plan:
    """One version of a plan; it prices events from valid_from_us until a later version does."""

    id: str
    version: int
    name: str
    currency: str
    valid_from_us: Micros
    charges: tuple[Charge, ...]
