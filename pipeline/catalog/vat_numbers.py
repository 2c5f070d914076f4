"""VAT numbers: written one way, their form and check digits looked at by python-stdnum.

That a number has the right form does not say that it was given to anybody: for reverse charge the seller has to ask the
register of the EU (VIES) as well, and keep its answer.
"""

import re

from stdnum import exceptions, get_cc_module
from stdnum.eu import vat as eu_vat

#: Countries whose prefix is not their ISO 3166 code. Northern Ireland is EU territory for goods, and has its own.
PREFIXES = {"GR": ("EL",), "GB": ("GB", "XI")}

_FORM = re.compile(r"[A-Z]{2}[A-Z0-9]{2,18}")
#: People group the digits for reading.
_SEPARATORS = re.compile(r"[\s./-]+")


def checked(text: str, country: str) -> str:
    """The number without separators, with the prefix of its country.

    Raises ValueError, which says what was expected, for one of another country (ISO 3166-1) and for one that cannot be.
    Of countries that python-stdnum does not know only the letters and digits are looked at.
    """
    number = _SEPARATORS.sub("", text).upper()
    prefixes = PREFIXES.get(country, (country,))
    if not number.startswith(prefixes):
        raise ValueError(f"a VAT number that begins with {' or '.join(prefixes)}, as the address is in {country}")
    if not _FORM.fullmatch(number):
        raise ValueError(f"a VAT number of {prefixes[0]} and letters and digits")
    try:
        return _validated(number, country)
    except exceptions.InvalidChecksum:
        raise ValueError("a VAT number with the right check digits: one of them was mistyped") from None
    except exceptions.ValidationError:
        raise ValueError(f"a VAT number as {country} writes them, {prefixes[0]} in front") from None


def _validated(number: str, country: str) -> str:
    """Raises stdnum.exceptions.ValidationError."""
    prefix, rest = number[:2], number[2:]
    if prefix == "EL" or prefix.lower() in eu_vat.MEMBER_STATES:
        return str(eu_vat.validate(number))
    module = get_cc_module(country, "vat")
    if module is None:
        return number
    # Outside the EU some numbers have the country in them (CHE…), most do not.
    return number if module.is_valid(number) else prefix + str(module.validate(rest)).removeprefix(prefix)
