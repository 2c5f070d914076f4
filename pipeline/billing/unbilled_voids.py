"""Voided documents that are billed nowhere since. Their months are closed, so no close would find them by itself."""

from collections.abc import Collection
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from typing import Any

from psycopg import Connection

from pipeline.billing.months import next_month
from pipeline.billing.rerate import Month


@dataclass(frozen=True, slots=True)
class UnbilledVoid:
    """A voided invoice or adjustment of which something is billed nowhere since."""

    document: int
    number: str
    account: str
    #: In whole units of the currency, with tax.
    total: Decimal
    currency: str
    tax_date: date

    @property
    def month(self) -> Month:
        """The month it billed: its tax date is the last day of its period, by the payer's clock."""
        return Month(self.tax_date.year, self.tax_date.month)

    @property
    def todo(self) -> str:
        return f"`tally invoices reissue {self.number}`"

    def as_json(self) -> dict[str, Any]:
        return {
            "document": self.document,
            "number": self.number,
            "account": self.account,
            "month": str(self.month),
            "total": str(self.total),
            "currency": self.currency,
            "todo": self.todo,
        }


_SELECT = """
SELECT document_id, number, account, total_amount, currency, tax_date FROM billing.unbilled_void AS void
WHERE tax_date < %(before)s AND (%(accounts)s::text[] IS NULL OR account = ANY(%(accounts)s) OR EXISTS (
    SELECT FROM billing.document_line AS line
    WHERE line.document_id = void.document_id AND line.account = ANY(%(accounts)s)
))
ORDER BY tax_date, document_id
"""


def unbilled_voids(
    connection: "Connection[Any]", *, until: Month, accounts: Collection[str] = ()
) -> list[UnbilledVoid]:
    """Those of a month and of months before, the earliest first; only those with these accounts on them, if any."""
    asked = {"before": next_month(date(until.year, until.month, 1)), "accounts": sorted(accounts) or None}
    return [UnbilledVoid(*row) for row in connection.execute(_SELECT, asked)]
