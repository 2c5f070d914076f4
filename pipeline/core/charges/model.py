"""What a charge is: dumb data. Units: prices, fees and limits are Decimals in whole units of the plan's currency."""

from dataclasses import dataclass
from decimal import Decimal
from typing import Literal, TypeAlias

from pipeline.core.money import QUANTITY_ONE, Quantity

Model: TypeAlias = Literal[
    "per_unit",
    "graduated",
    "volume",
    "package",
    "stairstep",
    "block",
    "graduated_percentage",
    "matrix",
    "percentage",
    "dynamic",
    "flat",
]
#: Models that price each event by itself.
PER_EVENT: frozenset[Model] = frozenset({"percentage", "dynamic"})
#: When an amount is final (law 3): a running quantity's price, one event's own price, or only at the close.
ChargeClass: TypeAlias = Literal["running", "per_event", "period"]
Bound: TypeAlias = Literal["inclusive", "exclusive"]
Beyond: TypeAlias = Literal["last_tier", "park"]

#: The tax category of a charge that names none.
STANDARD = "standard"


@dataclass(frozen=True, slots=True)
class Tier:
    """Units up to a cumulative total (after included units; None: no bound, last tier only) and what they cost.

    ``unit_price``: currency per unit of the meter, per block in a block charge. ``flat``: currency, once the tier is
    reached; the price of the whole step in a stairstep. ``rate``: per cent of the quantity, graduated_percentage only.
    ``cap``: currency, the most this tier costs, its flat fee included; None: no cap.
    """

    up_to: Quantity | None
    unit_price: Decimal = Decimal(0)
    flat: Decimal = Decimal(0)
    rate: Decimal | None = None
    cap: Decimal | None = None


@dataclass(frozen=True, slots=True)
class Cell:
    """A matrix price: the values of the charge's ``by`` dimensions in their order ("" = absent), and the unit price."""

    values: tuple[str, ...]
    unit_price: Decimal


@dataclass(frozen=True, slots=True)
class Charge:
    """How a plan prices one meter. Prices are in whole units of the plan's currency, per whole unit of the meter.

    Which price fields are set follows from the model (table in ``pipeline.core.charges``). All of them:

    id               names the charge within its plan
    meter            id of the meter it counts; None for flat only
    model            one of ``Model``
    unit_price       per_unit, matrix (the default cell), flat (per ``quantity``): currency per unit, up to 18 decimals
    tiers            graduated, volume, stairstep, block, graduated_percentage
    package_size     package, block (the block's size): units of 1e-9, above 0
    package_price    package: currency per package begun
    included         free units before the first priced one, of each counter: 1e-9; not for per-event models, flat
    references       event properties whose distinct values finance sees on the invoice line
    flat_on_zero     tiered: the first tier's flat fee is due before any unit beyond the included ones
    by               event properties (dimensions) whose values split the charge into cells, each its own counter
    per_subject      each subject is its own counter
    cells            matrix: prices by ``by``'s values; what no cell names costs ``unit_price``
    rate             percentage: per cent of the quantity (1.2 = 1.2 %), which is an amount in the plan's currency
    fixed            percentage: currency per event
    free_events      percentage: the first so many events of the period are free; None: not limited by count
    free_amount      percentage: events are free up to this sum of their quantities: 1e-9; None: not limited by amount
    event_minimum    percentage, dynamic: least a charged event costs, currency
    event_maximum    percentage, dynamic: most an event costs, currency
    multiplier       dynamic: the event's own amount is multiplied by this
    amount_property  dynamic: event property with the amount in the plan's currency, at most 12 decimals
    minimum          currency; what the charge costs at least per period. Booked by the close only
    maximum          currency; what the charge costs at most in a segment
    beyond           a last tier with a bound: beyond it, go on at the ``last_tier``'s price or ``park`` the event;
                     None where the last tier has no bound
    bound            whether a total of exactly ``up_to`` is still in the tier (inclusive) or in the next one
    min_packages     package, block: at least so many are charged, used or not
    in_advance       flat: invoiced for the period to come. The amount is the same
    quantity         flat: how many (seats) ``unit_price`` is paid for: 1e-9
    per_level        per_unit, graduated: each level of a time-weighted meter is priced as a quantity, for its share of
                     the period; a tier's flat fee once, whole. Else its mean over the time is priced
    prorate          flat fee and minimum: a segment shorter than its period pays its share of the time; else whole
    name             what invoices call it; "" is its id
    tax_category     which tax rates hold for it: a word of the tax table
    """

    id: str
    meter: str | None
    model: Model
    unit_price: Decimal | None = None
    tiers: tuple[Tier, ...] = ()
    package_size: Quantity | None = None
    package_price: Decimal | None = None
    included: Quantity = 0
    references: tuple[str, ...] = ()
    flat_on_zero: bool = True
    by: tuple[str, ...] = ()
    per_subject: bool = False
    cells: tuple[Cell, ...] = ()
    rate: Decimal | None = None
    fixed: Decimal = Decimal(0)
    free_events: int | None = None
    free_amount: Quantity | None = None
    event_minimum: Decimal | None = None
    event_maximum: Decimal | None = None
    multiplier: Decimal = Decimal(1)
    amount_property: str | None = None
    minimum: Decimal | None = None
    maximum: Decimal | None = None
    beyond: Beyond | None = None
    bound: Bound = "inclusive"
    min_packages: int = 0
    in_advance: bool = False
    quantity: Quantity = QUANTITY_ONE
    per_level: bool = False
    prorate: bool = True
    name: str = ""
    tax_category: str = STANDARD

    @property
    def title(self) -> str:
        """What people read: its name, or its id where it has none."""
        return self.name or self.id

    @property
    def split(self) -> bool:
        """Whether it has a counter per cell or subject."""
        return bool(self.by) or self.per_subject
