"""Words, numbers and days as a reader of a language expects them. Numbers stay exact: nothing is rounded for show."""

import copy
import decimal
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date, datetime
from decimal import Decimal
from functools import lru_cache
from types import MappingProxyType
from zoneinfo import ZoneInfo

from babel import Locale, UnknownLocaleError
from babel.dates import format_date, format_datetime, format_interval
from babel.numbers import NumberPattern

from pipeline.core.money import AMOUNT_DECIMALS, PRICE_DECIMALS, minor_units, plain
from pipeline.documents.texts import TEXTS

#: Babel computes in the current decimal context; this many digits hold every amount and quantity, so none is rounded.
_DIGITS = 60
_MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True, slots=True)
class Language:
    """A language with its words and the number and date formats of its region."""

    locale: Locale
    texts: Mapping[str, str] = field(repr=False)

    @property
    def tag(self) -> str:
        """As in BCP 47: de, en-GB."""
        return str(self.locale).replace("_", "-")

    def say(self, key: str, **values: str) -> str:
        """The words under ``key``, filled in. Raises KeyError for a key that no language has."""
        return self.texts[key].format(**values)

    def money(self, amount: Decimal, currency: str) -> str:
        """With the currency's sign and all decimals of its smallest unit: ``€1,234.50``, ``¥1,235``."""
        digits = minor_units(currency)
        return self._currency(amount, currency, (digits, digits))

    def price(self, amount: Decimal, currency: str) -> str:
        """As ``money``, with as many further decimals as the price has: ``€0.000003``."""
        return self._currency(amount, currency, (minor_units(currency), PRICE_DECIMALS))

    def amount(self, amount: Decimal, currency: str, decimals: int | None = None) -> str:
        """Without the currency's sign, for columns; ``decimals`` beyond those of its smallest unit where given."""
        digits = minor_units(currency) if decimals is None else decimals
        return self._plain(amount, (digits, digits))

    def exact(self, amount: Decimal, currency: str) -> str:
        """Without the currency's sign, with every decimal it has and at least those of its smallest unit."""
        return self._plain(amount, (minor_units(currency), AMOUNT_DECIMALS))

    def number(self, number: Decimal) -> str:
        """Exact, without trailing zeros, thousands set apart."""
        return self._plain(Decimal(plain(number)), (0, PRICE_DECIMALS))

    def percent(self, percent: Decimal) -> str:
        """``19 %`` of 19."""
        pattern = _with_decimals(self.locale.percent_formats[None], (0, PRICE_DECIMALS))
        with decimal.localcontext(prec=_DIGITS):
            return _minus(pattern.apply(Decimal(f"{plain(percent)}E-2"), self.locale))

    def day(self, day: date) -> str:
        """Written out: ``1 November 2026``."""
        return format_date(day, "long", locale=self.locale)

    def short_day(self, day: date) -> str:
        """For lines: ``1 Nov 2026``."""
        return format_date(day, "medium", locale=self.locale)

    def span(self, first: date, last: date) -> str:
        """Days from first to last: ``1 – 31 Oct 2026``."""
        return self.short_day(first) if first == last else format_interval(first, last, "yMMMd", locale=self.locale)

    def instant(self, at: datetime, zone: str) -> str:
        """Day and time in a time zone, to the second."""
        day, clock = self.locale.date_formats["medium"], self.locale.time_formats["medium"]
        return format_datetime(at, f"{day} {clock}", tzinfo=ZoneInfo(zone), locale=self.locale)

    def _currency(self, amount: Decimal, currency: str, decimals: tuple[int, int]) -> str:
        pattern = _with_decimals(self.locale.currency_formats["standard"], decimals)
        with decimal.localcontext(prec=_DIGITS):
            return _minus(pattern.apply(amount + 0, self.locale, currency=currency, currency_digits=False))

    def _plain(self, number: Decimal, decimals: tuple[int, int]) -> str:
        pattern = _with_decimals(self.locale.decimal_formats[None], decimals)
        with decimal.localcontext(prec=_DIGITS):
            return _minus(pattern.apply(number + 0, self.locale))  # no minus before 0


@lru_cache(maxsize=256)
def _with_decimals(pattern: NumberPattern, decimals: tuple[int, int]) -> NumberPattern:
    """The pattern with other least and most decimals: ISO 4217's for money, where CLDR's differ for some currencies."""
    changed = copy.copy(pattern)
    changed.frac_prec = decimals
    return changed


def _minus(text: str) -> str:
    return text.replace("-", _MINUS)


def language(tag: str, words: Mapping[str, Mapping[str, str]] = MappingProxyType({})) -> Language:
    """The language of a tag such as ``de`` or ``en-GB``, with a brand's own ``words`` over Tally's.

    A language without words prints in English, whole: half a document in each would help nobody.
    """
    try:
        locale = Locale.parse(tag, sep="-")
    except (ValueError, UnknownLocaleError):
        locale = Locale("en")
    if locale.language not in TEXTS and locale.language not in words:
        locale = Locale("en")
    base = TEXTS.get(locale.language, TEXTS["en"])
    return Language(locale, MappingProxyType({**base, **words.get(locale.language, {})}))
