"""What a document says, as one frozen value: every output (PDF, e-invoice, JSON, CSV) is made of this and nothing else.

Money is ``Decimal`` in whole units of the document's currency, signed as stored: a credit note's amounts are below 0.
Days are those of the seller's time zone; a period's last day belongs to it. Instants are UTC.
"""

from dataclasses import dataclass, field
from datetime import date, datetime
from decimal import Decimal
from typing import Literal, TypeAlias

from pipeline.core.parties import Address, Branding, DocumentKind, Policy

State: TypeAlias = Literal["draft", "reviewed", "issued", "void"]
LineKind: TypeAlias = Literal["usage", "fee", "minimum", "commitment", "adjustment", "progress"]
#: How a tax came to be what it is: charged; shifted to the buyer; exempt; not this country's.
Treatment: TypeAlias = Literal["standard", "reverse_charge", "exempt", "outside_scope"]


@dataclass(frozen=True, slots=True)
class Party:
    """Seller or buyer, as it was when the document was made. What is empty is not printed."""

    id: str
    name: str
    address: Address
    vat_number: str = ""
    #: Number in a company register, with the register's name.
    registration: str = ""
    email: str = ""
    phone: str = ""
    website: str = ""


@dataclass(frozen=True, slots=True)
class Bank:
    """Where to pay."""

    iban: str = ""
    bic: str = ""
    name: str = ""


@dataclass(frozen=True, slots=True)
class Span:
    """Days from ``first`` to ``last``, both included."""

    first: date
    last: date


@dataclass(frozen=True, slots=True)
class DocumentReference:
    """Another document, as a person finds it."""

    number: str
    kind: DocumentKind
    issue_date: date | None


@dataclass(frozen=True, slots=True)
class LineReference:
    """A line of another document."""

    number: str
    position: int


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a line's price: a tier, free units, a fee (``core.explanations.Part``, without its English words)."""

    kind: str
    over: Decimal
    up_to: Decimal
    quantity: Decimal
    packages: int | None
    events: int | None
    unit_price: Decimal
    flat: Decimal
    amount: Decimal


@dataclass(frozen=True, slots=True)
class Discount:
    """A coupon or net credit; ``amount`` above 0 takes off. ``line``: position of the line it is on, else the whole.

    ``after_tax``: it lowers what is left to pay, not what is taxed, and is part of ``Totals.credits``.
    """

    name: str
    amount: Decimal
    line: int | None = None
    after_tax: bool = False


@dataclass(frozen=True, slots=True)
class Tax:
    """A tax at one rate, of a document or of one line; ``percent`` 19 is 19 %."""

    name: str
    treatment: Treatment
    percent: Decimal
    base: Decimal
    amount: Decimal
    #: What the law wants said about it.
    note: str = ""


@dataclass(frozen=True, slots=True)
class Reference:
    """A property of the events behind a line that finance wants to see, with its first distinct values."""

    name: str
    values: tuple[str, ...]
    #: Whether there were others.
    more: bool = False


@dataclass(frozen=True, slots=True)
class Usage:
    """The events behind a line."""

    events: int
    late_events: int
    first_at: datetime | None
    last_at: datetime | None
    references: tuple[Reference, ...] = ()


@dataclass(frozen=True, slots=True)
class Line:
    """One line. ``exact`` is its amount before the one rounding that makes ``amount``; ``net`` is what tax is on."""

    id: int
    position: int
    kind: LineKind
    name: str
    span: Span
    quantity: Decimal
    unit: str
    exact: Decimal
    amount: Decimal
    discount: Decimal
    net: Decimal
    tax: Decimal
    total: Decimal
    taxes: tuple[Tax, ...]
    #: Whose usage or fee it is; of a consolidated invoice the child.
    account: str
    charge: str
    description: str = ""
    contract: str = ""
    plan: str = ""
    plan_version: int = 0
    price_version: str = ""
    meter: str = ""
    #: Dimensions with their values.
    cell: tuple[tuple[str, str], ...] = ()
    #: Days (or other units) of a segment shorter than its period, and of the period: (15, 31, "day").
    share: tuple[int, int, str] | None = None
    parts: tuple[Part, ...] = ()
    usage: Usage | None = None
    #: The line of an earlier document that this one takes back (``reversal``) or stands in for.
    adjusts: LineReference | None = None
    reversal: bool = False


@dataclass(frozen=True, slots=True)
class Totals:
    """The header: every column the sum of the lines'. payable = total - credits - balance."""

    lines: Decimal
    discounts: Decimal
    net: Decimal
    tax: Decimal
    total: Decimal
    credits: Decimal
    balance: Decimal
    payable: Decimal


@dataclass(frozen=True, slots=True)
class Exchange:
    """The finished document in a second currency; ``rate`` is its units for one of the document's."""

    currency: str
    rate: Decimal
    day: date
    source: str
    net: Decimal
    tax: Decimal
    total: Decimal


@dataclass(frozen=True, slots=True)
class Notice:
    """What changed since the customer's last invoice."""

    kind: Literal["price_changed", "meter_changed", "plan_changed", "text"]
    name: str = ""
    since: date | None = None
    #: Unit prices; None where the price is no single number.
    before: Decimal | None = None
    after: Decimal | None = None
    unit: str = ""
    text: str = ""


@dataclass(frozen=True, slots=True)
class Document:
    """An invoice, credit note, adjustment or bill within a period."""

    id: int
    kind: DocumentKind
    state: State
    #: Empty until it is issued.
    number: str
    issue_date: date | None
    tax_date: date
    due_date: date | None
    span: Span
    currency: str
    #: A language tag such as de or en-GB.
    language: str
    seller: Party
    buyer: Party
    lines: tuple[Line, ...]
    taxes: tuple[Tax, ...]
    totals: Totals
    time_zone: str = "UTC"
    bank: Bank = Bank()
    purchase_order: str = ""
    #: The buyer's own reference, as a cost centre or a German Leitweg-ID.
    buyer_reference: str = ""
    discounts: tuple[Discount, ...] = ()
    exchange: Exchange | None = None
    corrects: DocumentReference | None = None
    reason: str = ""
    note: str = ""
    terms: str = ""
    policy: Policy = field(default_factory=Policy)
    #: Colours, where no brand folder has others.
    branding: Branding = field(default_factory=Branding)
    #: The logo that its legal entity applied, with its media type.
    logo: tuple[str, bytes] | None = None
    notices: tuple[Notice, ...] = ()
    #: Display names of the accounts whose lines it holds, where there are several.
    accounts: tuple[tuple[str, str], ...] = ()
    #: What credits of these accounts' own pay of the total, by account; part of ``Totals.credits``.
    own_credits: tuple[tuple[str, Decimal], ...] = ()

    @property
    def is_credit(self) -> bool:
        """Whether it gives money back, so that it is printed with its amounts turned around."""
        return self.kind == "credit_note"
