"""A document in words: the data its template prints, text by text, in the reader's language.

The template lays out and decides nothing; what stands on a page is decided here. A credit note's amounts are turned
around: it says what is given back.
"""

import re
from collections.abc import Iterable, Iterator
from decimal import Decimal
from typing import Any

from pipeline.core.money import minor_units, plain
from pipeline.core.parties import Address
from pipeline.core.tax import REVERSE_CHARGE_NOTE
from pipeline.documents.brand import Brand
from pipeline.documents.language import Language
from pipeline.documents.model import Discount, Document, Line, Notice, Part, Party, Reference, Tax

#: A unit that ends in a word, which has a plural in English: token, GB-second; not GB, kWh.
_WORD = re.compile(r"(.*[ -])?[a-z]{3,}")
#: Values of a reference that stand under a line; the annex has all that are stored.
_REFERENCES_ON_LINE = 3
#: Countries that write the postcode after the city, in its line and in a line of its own.
_CITY_REGION_POSTCODE = {"US", "CA", "AU", "IN"}
_POSTCODE_LAST = {"GB", "IE"}
_DOT = " · "
_NONE = "\N{EN DASH}"


def page(document: Document, brand: Brand, language: Language, logo: str | None = None) -> dict[str, Any]:
    """What the template prints; ``logo`` is the name of its file. Raises ValueError for a currency ISO 4217 lacks."""
    return _Page(document, brand, language, logo).data()


def address_lines(address: Address, language: Language) -> list[str]:
    """An address as it is written in its country, the country's name in the reader's language."""
    code, city = address.country, address.city
    if code in _CITY_REGION_POSTCODE:
        lines = [_joined([city, f"{address.region} {address.postal_code}".strip()], ", ")]
    elif code in _POSTCODE_LAST:
        lines = [city, address.region, address.postal_code]
    else:
        lines = [f"{address.postal_code} {city}".strip(), address.region]
    return [line for line in [*address.lines, *lines, language.locale.territories.get(code, code)] if line]


class _Page:
    """The sections of one document, each a method; ``data`` shows them in the order of the page."""

    def __init__(self, document: Document, brand: Brand, language: Language, logo: str | None) -> None:
        self.document = document
        self.brand = brand
        self.logo = logo
        self.language = language
        self.say = language.say
        self.sign = -1 if document.is_credit else 1
        self.inclusive = document.policy.prices == "inclusive"

    def data(self) -> dict[str, Any]:
        document = self.document
        return {
            "look": self._look(),
            "title": self.say(document.kind),
            "stamp": self.say(document.state) if document.state != "issued" else None,
            "number": document.number,
            "seller": document.seller.name,
            "from": self._party(document.seller) | {"label": self.say("from")},
            "to": self._party(document.buyer) | {"label": self.say("to")},
            "facts": self._facts(),
            "headline": self._headline(),
            "notices": {"title": self.say("notices"), "texts": [*map(self._notice, document.notices)]},
            "columns": self._columns(),
            "groups": self._groups(),
            "totals": [*self._totals()],
            "tax_notes": [note for note in dict.fromkeys(map(self._tax_note, document.taxes)) if note],
            "exchange": self._exchange(),
            "remarks": [*self._remarks()],
            "payment": self._payment(),
            "annex": self._annex(),
            "footer": self._footer(),
            "page": self.say("page", page="{page}", pages="{pages}"),  # filled in by the template
        }

    # -- how it looks

    def _look(self) -> dict[str, Any]:
        brand, branding = self.brand, self.document.branding
        day = self.document.issue_date or self.document.tax_date
        return {
            "primary": brand.primary or branding.primary,
            "accent": brand.accent or branding.accent,
            "logo": self.logo,
            "logo_height": brand.logo_height,
            "paper": brand.paper,
            "font": brand.font,
            "language": self.language.locale.language,
            "region": self.language.locale.territory,
            "date": [day.year, day.month, day.day],
        }

    # -- the head

    def _party(self, party: Party) -> dict[str, Any]:
        facts = [(self.say("vat_number"), party.vat_number), ("", party.registration), ("", party.email)]
        return {
            "name": party.name,
            "lines": address_lines(party.address, self.language),
            "facts": [f"{label} {value}".strip() for label, value in facts if value],
        }

    def _facts(self) -> list[tuple[str, str]]:
        document, say, language = self.document, self.say, self.language
        facts = [
            ("issue_date", language.day(document.issue_date) if document.issue_date else ""),
            ("tax_date", language.day(document.tax_date) if document.tax_date != document.issue_date else ""),
            (
                "due_date",
                language.day(document.due_date)
                if document.due_date and self._owed() and document.state != "void"
                else "",
            ),
            ("period", language.span(document.span.first, document.span.last)),
            ("account", document.buyer.id),
            ("purchase_order", document.purchase_order),
            ("buyer_reference", document.buyer_reference),
            (f"corrects.{document.kind}", self._corrects()),
            ("reason", language.texts.get(f"reason.{document.reason}", document.reason.replace("_", " "))),
        ]
        return [(say(key), value) for key, value in facts if value]

    def _corrects(self) -> str:
        other = self.document.corrects
        if other is None:
            return ""
        if other.issue_date is None:
            return other.number
        day = self.language.short_day(other.issue_date).replace(" ", "\N{NO-BREAK SPACE}")
        return self.say("dated", number=other.number, date=day)

    def _owed(self) -> bool:
        return not self.document.is_credit and self.document.totals.payable > 0

    def _headline(self) -> dict[str, str]:
        document = self.document
        if document.is_credit:
            return {"amount": self._money(document.totals.total), "text": self.say("amount_credited")}
        if document.state == "void":
            return {"amount": self._money(document.totals.payable), "text": self.say("void")}
        if self._owed():
            due = document.due_date
            text = self.say("due_line", date=self.language.day(due)) if due else self.say("amount_due")
            return {"amount": self._money(document.totals.payable), "text": text}
        text = self.say("carried_on") if document.totals.balance < 0 else self.say("nothing_due")
        amount = -document.totals.balance if document.totals.balance < 0 else Decimal(0)
        return {"amount": self._money(amount), "text": text}

    def _notice(self, notice: Notice) -> str:
        language = self.language
        words = {"name": notice.name, "date": language.day(notice.since) if notice.since else ""}
        match notice.kind:
            case "text":
                return notice.text
            case "price_changed" if notice.before is not None and notice.after is not None:
                prices = {
                    "before": self._per_unit(notice.before, notice),
                    "after": self._per_unit(notice.after, notice),
                }
                said = self.say("price_changed", **words, **prices)
            case "price_changed":
                said = self.say("price_changed_plain", **words)
            case _:
                said = self.say(notice.kind, **words)
        return _joined([said, notice.text], ". ")

    def _per_unit(self, price: Decimal, notice: Notice) -> str:
        shown = self.language.price(price, self.document.currency)
        return self.say("per_unit", price=shown, unit=notice.unit) if notice.unit else shown

    # -- the lines

    def _columns(self) -> list[str]:
        amount = "amount_inclusive" if self.inclusive else "amount"
        return [*map(self.say, ("description", "quantity", "unit_price", "tax_rate")), self.say(amount)]

    def _groups(self) -> list[dict[str, Any]]:
        """Lines by account where there are several; corrections of earlier documents after all others."""
        document = self.document
        names = dict(document.accounts)
        accounts = list(dict.fromkeys(line.account for line in document.lines if line.adjusts is None))
        groups = []
        for account in accounts:
            lines = [line for line in document.lines if line.account == account and line.adjusts is None]
            title = names.get(account, account) if len(accounts) > 1 or account != document.buyer.id else ""
            groups.append(self._group(title, lines, summed=len(accounts) > 1))
        adjusting = [line for line in document.lines if line.adjusts is not None]
        if adjusting:
            title = "" if document.kind in ("credit_note", "adjustment") else self.say("adjustments")
            groups.append(self._group(title, adjusting, summed=bool(title and groups)))
        return groups

    def _group(self, title: str, lines: list[Line], *, summed: bool) -> dict[str, Any]:
        total = sum((line.amount for line in lines), Decimal(0))
        subtotal = [self.say("subtotal_of", name=title), self._amount(total)] if summed else None
        return {"title": title, "lines": [*map(self._line, lines)], "subtotal": subtotal}

    def _line(self, line: Line) -> dict[str, Any]:
        parts, price = self._parts(line), self._unit_price(line)
        return {
            "position": str(line.position),
            "name": line.name,
            "notes": [note for note in self._notes(line) if note],
            "quantity": self.language.number(line.quantity * self.sign) if line.quantity else "",
            "unit": self._unit(line.unit, line.quantity) if line.quantity else "",
            "price": "" if parts else price,
            "tax": _joined([self._rate(tax) for tax in line.taxes], " + ") or _NONE,
            "amount": self._amount(line.amount),
            "parts": parts,
            "discounts": [self._discount(one) for one in self.document.discounts if one.line == line.position],
        }

    def _notes(self, line: Line) -> Iterator[str]:
        language = self.language
        where = [value for _, value in line.cell]
        if line.span != self.document.span:
            where.append(language.span(line.span.first, line.span.last))
        if line.share:
            part, whole, unit = line.share
            words = {"part": language.number(Decimal(part)), "whole": language.number(Decimal(whole))}
            where.append(self.say("share", **words, unit=self._share_unit(unit)))
        yield _joined(where, _DOT)
        yield line.description
        if line.adjusts:
            key = "reversal_line" if line.reversal else "adjusts_line"
            yield self.say(key, position=str(line.adjusts.position), number=line.adjusts.number)
        for reference in line.usage.references if line.usage else ():
            yield self._reference(reference, _REFERENCES_ON_LINE)

    def _share_unit(self, unit: str) -> str:
        plural = f"{unit}s".removesuffix("ss") if unit.endswith("s") else f"{unit}s"
        return self.language.texts.get(plural, unit)

    def _reference(self, reference: Reference, most: int) -> str:
        text = ", ".join(reference.values[:most])
        more = reference.more or len(reference.values) > most
        return f"{reference.name}: {text}" + (f" {self.say('and_more')}" if more else "")

    def _unit(self, unit: str, quantity: Decimal) -> str:
        plural = self.language.locale.language == "en" and quantity not in (1, -1) and _WORD.fullmatch(unit)
        return f"{unit}s" if plural and not unit.endswith("s") else unit

    def _unit_price(self, line: Line) -> str:
        """The price of a unit, where it is one number: of a line with one part, or of a fee."""
        priced = [part for part in line.parts if part.kind in ("usage", "fee") and part.amount]
        if len(priced) == 1 and not priced[0].flat and priced[0].packages is None:
            return self._price(priced[0].unit_price, line)
        if not line.parts and line.quantity and line.kind == "fee" and not line.exact % line.quantity:
            return self._price(line.exact / line.quantity, line)
        return ""

    def _price(self, price: Decimal, line: Line) -> str:
        """A price per unit of money is a share of it: 0.012 per USD is 1.2 %."""
        if line.unit == self.document.currency:
            return self.language.percent(Decimal(f"{plain(price)}E2"))
        return self.language.price(price, self.document.currency)

    def _rate(self, tax: Tax) -> str:
        return self.language.percent(tax.percent) if tax.treatment == "standard" else _NONE

    def _discount(self, discount: Discount) -> tuple[str, str]:
        return discount.name or self.say("discount"), self._amount(-discount.amount)

    # -- the parts of a price

    def _parts(self, line: Line) -> list[dict[str, str]]:
        """Nothing where one price says it all; amounts of one line have as many decimals, so that they align."""
        if not line.parts or (len(line.parts) == 1 and self._unit_price(line)):
            return []
        decimals = max(minor_units(self.document.currency), *(_decimals(part.amount) for part in line.parts))
        whole = len([part for part in line.parts if part.kind == "usage"]) == 1
        return [
            {
                "label": self._part_label(part, whole=whole),
                "quantity": self._part_quantity(part),
                "price": self._part_price(part, line),
                "amount": self.language.amount(part.amount * self.sign, self.document.currency, decimals),
            }
            for part in line.parts
        ]

    def _part_label(self, part: Part, *, whole: bool) -> str:
        number = self.language.number
        over, up_to = number(part.over), number(part.up_to)
        match part.kind:
            case "usage" if not part.quantity:
                return self.say("part.flat")
            case "usage" if part.packages is not None:
                label = self.say("part.packages")
            case "usage" if whole and not part.over:
                label = self.say("part.all")
            case "usage" if not part.over:
                label = self.say("part.first", up_to=up_to)
            case "usage":
                label = self.say("part.range", over=over, up_to=up_to)
            case "events":
                label = self.say("part.events", count=number(Decimal(part.events or 0)))
            case kind:
                label = self.say(f"part.{kind}")
        if part.flat and part.kind == "usage":
            return f"{label} + {self.say('part.flat')} {self.language.price(part.flat, self.document.currency)}"
        return label

    def _part_quantity(self, part: Part) -> str:
        if part.kind in ("minimum", "maximum"):
            return ""
        if part.packages is not None:
            return self.language.number(Decimal(part.packages))
        return self.language.number(part.quantity) if part.quantity else ""

    def _part_price(self, part: Part, line: Line) -> str:
        if part.kind in ("pool", "included", "credits"):
            return self.say("free")
        if part.kind == "events":
            return self.language.percent(Decimal(f"{plain(part.unit_price)}E2"))
        return self._price(part.unit_price, line) if part.unit_price else ""

    # -- the foot

    def _totals(self) -> Iterator[dict[str, Any]]:
        document, say, totals = self.document, self.say, self.document.totals
        yield self._total(say("lines_total_inclusive" if self.inclusive else "lines_total"), totals.lines)
        on_lines = sum((one.amount for one in document.discounts if one.line is not None), Decimal(0))
        if on_lines:
            yield self._total(say("line_discounts"), -on_lines)
        on_whole = [one for one in document.discounts if one.line is None and not one.after_tax]
        yield from map(self._discounted, on_whole)
        # A credit note's lines have their shares of the discounts, which stand by name on the invoice alone.
        if unnamed := totals.discounts - on_lines - sum(one.amount for one in on_whole):
            yield self._total(say("discount"), -unnamed)
        if not self.inclusive:
            if totals.discounts:
                yield self._total(say("net"), totals.net)
            yield from map(self._tax, document.taxes)
        yield self._total(say("total_inclusive" if self.inclusive else "total"), totals.total, "total")
        if self.inclusive:
            yield from map(self._tax, document.taxes)
        after_tax = [one for one in document.discounts if one.after_tax]
        yield from map(self._discounted, after_tax)
        own = dict(document.own_credits)
        for account, amount in own.items():
            yield self._total(f"{say('credits')}: {dict(document.accounts).get(account, account)}", -amount)
        if credits := totals.credits - sum(one.amount for one in after_tax) - sum(own.values()):
            yield self._total(say("credits"), -credits)
        if totals.balance:
            yield self._total(say("balance" if totals.balance * self.sign > 0 else "balance_on"), -totals.balance)
        yield self._total(say("amount_credited" if document.is_credit else "amount_due"), totals.payable, "due")

    def _discounted(self, discount: Discount) -> dict[str, Any]:
        return self._total(discount.name or self.say("discount"), -discount.amount)

    def _total(self, label: str, amount: Decimal, weight: str = "") -> dict[str, Any]:
        return {"label": label, "amount": self._money(amount), "weight": weight}

    def _tax(self, tax: Tax) -> dict[str, Any]:
        base = self._money(tax.base)
        if tax.treatment != "standard":
            return self._total(self.say("tax_none", name=self.say(tax.treatment), base=base), tax.amount)
        key = "tax_on_inclusive" if self.inclusive else "tax_on"
        name = self.language.texts.get(f"tax.{tax.name}", tax.name)
        label = self.say(key, name=name, percent=self.language.percent(tax.percent), base=base)
        return self._total(label, tax.amount, "part" if self.inclusive else "")

    def _tax_note(self, tax: Tax) -> str:
        """What the law wants said, in the reader's language where it is what Tally says by itself."""
        return self.say("reverse_charge_note") if tax.note == REVERSE_CHARGE_NOTE else tax.note

    def _exchange(self) -> dict[str, Any] | None:
        exchange = self.document.exchange
        if exchange is None:
            return None
        language, currency = self.language, exchange.currency
        rate = self.say(
            "exchange_rate",
            base=self.document.currency,
            rate=language.number(exchange.rate),
            currency=currency,
            source=exchange.source,
            date=language.short_day(exchange.day),
        )
        amounts = (("net", exchange.net), ("tax", exchange.tax), ("total", exchange.total))
        return {
            "title": self.say("exchange", currency=currency),
            "rate": rate,
            "rows": [
                (self.say(f"exchange_{key}"), language.money(amount * self.sign, currency)) for key, amount in amounts
            ],
        }

    def _remarks(self) -> Iterator[tuple[str, str]]:
        """Titles and texts under the totals."""
        terms = "" if self.document.is_credit else self.document.terms  # how to pay: a credit note asks for nothing
        for key, text in (("note", self.document.note), ("terms", terms)):
            if text:
                yield self.say(key), text

    def _payment(self) -> dict[str, Any] | None:
        document, bank = self.document, self.document.bank
        if not self._owed() or not bank.iban or document.state != "issued":
            return None
        rows = [
            ("beneficiary", document.seller.name),
            ("iban", " ".join(re.findall(".{1,4}", bank.iban.replace(" ", "")))),
            ("bic", bank.bic),
            ("bank", bank.name),
            ("payment_reference", document.number),
        ]
        return {"title": self.say("payment"), "rows": [(self.say(key), value) for key, value in rows if value]}

    # -- the annex

    def _annex(self) -> dict[str, Any] | None:
        document, say = self.document, self.say
        lines = [line for line in document.lines if line.usage is not None and line.usage.events]
        if not self.brand.annex or not lines:
            return None
        link = self.brand.detail_url.format(number=document.number, id=document.id) if self.brand.detail_url else ""
        columns = ("description", "events", "first_event", "last_event", "exact", "rounding")
        return {
            "title": say("annex.credit_note" if document.is_credit else "annex"),
            "intro": say("annex_intro", zone=document.time_zone),
            "columns": [*map(say, columns)],
            "rows": [*map(self._usage, lines)],
            "link": {"label": say("detail"), "url": link} if link else None,
            "how": {"title": say("how"), "texts": [*self._how()]},
        }

    def _usage(self, line: Line) -> dict[str, Any]:
        usage, language = line.usage, self.language
        assert usage is not None, "only lines with usage have a row in the annex"
        first, last = (
            language.instant(at, self.document.time_zone) if at else "" for at in (usage.first_at, usage.last_at)
        )
        late = self.say("late_events", count=language.number(Decimal(usage.late_events))) if usage.late_events else ""
        references = [self._reference(one, len(one.values)) for one in usage.references]
        return {
            "position": str(line.position),
            "name": _joined([line.name, *(value for _, value in line.cell)], _DOT),
            "notes": [note for note in (late, *references) if note],
            "events": language.number(Decimal(usage.events)),
            "first": first,
            "last": last,
            "exact": language.exact(Decimal(plain(line.exact)) * self.sign, self.document.currency),
            "rounding": language.exact(Decimal(plain(line.amount - line.exact)) * self.sign, self.document.currency),
        }

    def _how(self) -> Iterator[str]:
        policy, say = self.document.policy, self.say
        yield say("how.rounding", currency=self.document.currency)
        yield say("how.order")
        yield say(f"how.tax.{policy.tax_rounding}")
        if policy.coupons == "after_tax":
            yield say("how.coupons.after_tax")
        if self.inclusive:
            yield say("how.inclusive")

    def _footer(self) -> list[str]:
        if self.brand.footer:
            return list(self.brand.footer)
        seller = self.document.seller
        vat = f"{self.say('vat_number')} {seller.vat_number}" if seller.vat_number else ""
        address = _joined(address_lines(seller.address, self.language), ", ")
        return [
            line
            for line in (
                _joined([seller.name, address], _DOT),
                _joined([vat, seller.registration, seller.email, seller.website], _DOT),
            )
            if line
        ]

    # -- money

    def _money(self, amount: Decimal) -> str:
        return self.language.money(amount * self.sign, self.document.currency)

    def _amount(self, amount: Decimal) -> str:
        return self.language.amount(amount * self.sign, self.document.currency)


def _joined(texts: Iterable[str], between: str) -> str:
    return between.join(text for text in texts if text)


def _decimals(number: Decimal) -> int:
    """Decimals that are not trailing zeros."""
    return len(plain(number).partition(".")[2])
