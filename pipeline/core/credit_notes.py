"""Taking back what a document billed: reversed lines, credits for parts of lines, credit notes. Pure.

Amounts of what takes back are below 0 in every column, so a document and credit notes on all of it sum to 0 in each.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from pipeline.core.invoice import Document, Line, Totals, settled_discounts, tax_totals, totals_of
from pipeline.core.money import Minor, round_half_up_div
from pipeline.core.tax import LineTax


def reversal(line: Line, id: str) -> Line:
    """The line that takes another one back in every column, under an id of its own."""
    return credited(line, id, 1, 1)


def credited(line: Line, id: str, numerator: int, denominator: int, *, before: int = 0) -> Line:
    """The credit for ``numerator / denominator`` of a line, of which ``before / denominator`` was credited before.

    Each amount is cut from one ruler: what is credited so far is rounded half up, and a credit is the difference. So
    credits for parts that make up the line take back exactly the line. Net, taxes and discounts are cut, the rest
    follows from these. A quantity of a line's quantity is such a part, and so is an amount of its amount.

    Raises ValueError for a part that is not above 0, or beyond what is left of the line.
    """
    if not (before >= 0 and numerator > 0 and before + numerator <= denominator):
        raise ValueError(
            f"expected a credit above 0 up to {denominator - before}/{denominator} of line {line.id}, "
            f"got {numerator}/{denominator}"
        )

    def cut(amount: Minor) -> Minor:
        since = round_half_up_div(amount * before, denominator)
        return since - round_half_up_div(amount * (before + numerator), denominator)

    taxes = tuple(LineTax(part.tax, cut(part.base), cut(part.amount)) for part in line.taxes)
    discounts = tuple(replace(part, amount=cut(part.amount)) for part in line.discounts)
    net, tax = cut(line.net), sum(part.amount for part in taxes)
    discount = sum(part.amount for part in discounts if not part.after_tax)
    inclusive = line.amount - line.discount != line.net
    return replace(
        line,
        id=id,
        exact=cut(line.exact),
        amount=(net + tax if inclusive else net) + discount,
        discount=discount,
        net=net,
        tax=tax,
        total=net + tax,
        taxes=taxes,
        discounts=discounts,
    )


def credit_note(original: Document, lines: Sequence[Line], earlier: Iterable[Totals] = ()) -> Document:
    """The document of credit lines on an issued one, after ``earlier`` credit notes on it (their headers).

    What it gives back comes off what was payable first, then goes back to the balance, then to the credits that had
    paid the total; to which of these is not decided here. What is beyond the original, of which other lines were below
    0, is payable to the customer too. Of an original below 0, which had put what it gave into the balance, it is taken
    out again.

    Its payable, below 0 unless lines below 0 are credited, is refunded, put into the balance, or no longer asked for
    where it was not paid yet.
    """
    before = sum(note.total for note in earlier)
    after = before + sum(line.total for line in lines)
    credits_before, balance_before = _given_back(original.totals, before)
    credits, balance = _given_back(original.totals, after)
    return Document(
        currency=original.currency,
        lines=tuple(lines),
        taxes=tax_totals(lines),
        # What coupons paid after tax is given back last, of the credits.
        discounts=tuple(one for one in settled_discounts(lines) if not one.after_tax),
        draws=(),
        totals=totals_of(lines, credits=credits - credits_before, balance=balance - balance_before),
        balance_after=original.balance_after,
    )


def _given_back(was: Totals, total: Minor) -> tuple[Minor, Minor]:
    """What of credit notes of so much in all, below 0, is credits and what is balance."""
    if was.total <= 0:
        return 0, total
    if was.credits < 0:  # coupons that lines taken back had been paid by: owed again with what is left of the total
        return round_half_up_div(was.credits * total, was.total), -min(max(-total - was.payable, 0), was.balance)
    beyond_payable = max(-total - was.payable, 0)
    balance = min(beyond_payable, was.balance)
    credits = min(beyond_payable - balance, was.credits)
    return -credits, -balance
