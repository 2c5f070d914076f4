"""What a document bills, before any of it is discounted, rounded or taxed. Pure data."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from pipeline.core.credits import Owed
from pipeline.core.money import Amount, Micros

LineKind: TypeAlias = Literal["usage", "fee", "minimum", "commitment", "adjustment", "progress"]


@dataclass(frozen=True, slots=True)
class Limits:
    """A charge's maximum and minimum (1e-12) over all items of one ``group``; they hold after line discounts."""

    group: str
    maximum: Amount | None = None
    minimum: Amount | None = None

    def applied(self, amount: Amount) -> Amount:
        if self.maximum is not None:
            amount = min(amount, self.maximum)
        return amount if self.minimum is None else max(amount, self.minimum)


@dataclass(frozen=True, slots=True)
class Item:
    """One per line to be: a container line, a fee, a commitment."""

    #: Unique in the document. A tie of a rounding goes to the lowest, so it must not depend on chance.
    id: str
    #: Exact (1e-12), as it was priced: the charge's maximum and minimum are in it.
    amount: Amount
    kind: LineKind = "usage"
    plan: str = ""
    charge: str = ""
    #: Key of its taxes among the treatments.
    tax_category: str = "standard"
    #: Where the charge has a maximum or minimum: these, and the price (1e-12) before they were applied.
    limits: Limits | None = None
    gross: Amount = 0
    #: When it was used, for credits: amounts by event time, in proportion to which the line is spread. Empty: all of it
    #: at ``at_us``. Their line and charge are not looked at.
    uses: tuple[Owed, ...] = ()
    at_us: Micros = 0
    #: Whose it is, of a document for several accounts: credits may pay for one of them only.
    account: str = ""
