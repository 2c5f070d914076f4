"""Another system's bills, to hold prices against before they go live: a CSV file, compared line by line.

Columns ``account`` and ``amount``, and ``charge`` where the bills have a line per charge; others are passed over. Rows
of the same account and charge are added up: a bill may split what is one charge here.
"""

import csv
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from pipeline.core.money import AMOUNT_DECIMALS, Amount, parse_decimal
from pipeline.core.reasons import Reason

#: Account and charge; charge "" where bills have one amount per account.
BillKey: TypeAlias = tuple[str, str]
Verdict: TypeAlias = Literal["equal", "differs", "only here", "only there"]


class BadBills(ValueError):
    """A file that is no list of bills; the message has every mistake with its line."""


@dataclass(frozen=True, slots=True)
class Bills:
    """What another system billed: amounts in 1e-12 of whatever currency it billed in."""

    by_charge: bool
    amounts: Mapping[BillKey, Amount]


@dataclass(frozen=True, slots=True)
class BillLine:
    """An amount here and there; None where there is no such line."""

    account: str
    charge: str
    here: Amount | None
    there: Amount | None

    @property
    def difference(self) -> Amount:
        return (self.here or 0) - (self.there or 0)

    @property
    def verdict(self) -> Verdict:
        if self.here is None:
            return "only there"
        if self.there is None:
            return "only here"
        return "equal" if self.here == self.there else "differs"


def read_bills(path: Path) -> Bills:
    """The bills of a CSV file in UTF-8 with a header. Raises BadBills, OSError when it cannot be read."""
    mistakes: list[str] = []
    amounts: defaultdict[BillKey, Amount] = defaultdict(int)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            columns = reader.fieldnames or []
            if missing := [name for name in ("account", "amount") if name not in columns]:
                got = ", ".join(columns) or "an empty file"
                raise BadBills(f"{path}:1: expected columns account and amount, got {got}: add {' and '.join(missing)}")
            for row in reader:
                amount = parse_decimal(row["amount"] or "", decimals=AMOUNT_DECIMALS)
                if not row["account"]:
                    mistakes.append(f"{path}:{reader.line_num}: expected an account, got none")
                elif isinstance(amount, Reason):
                    what = f"a number with at most {AMOUNT_DECIMALS} decimals as amount"
                    mistakes.append(f"{path}:{reader.line_num}: expected {what}, got {row['amount']!r}")
                else:
                    amounts[row["account"], row.get("charge") or ""] += amount
        except (csv.Error, UnicodeDecodeError) as error:
            mistakes.append(f"{path}:{reader.line_num + 1}: expected CSV in UTF-8, got {error}")
    if mistakes:
        raise BadBills("\n".join(mistakes))
    return Bills("charge" in columns, dict(amounts))


def compare_bills(here: Mapping[BillKey, Amount], bills: Bills) -> list[BillLine]:
    """Every line of either side, by account and charge. ``here`` is by charge; where the bills are not, it is added up.

    A line of nothing here that the bills lack is left out: nobody bills a charge that was not used.
    """
    ours: Mapping[BillKey, Amount] = here
    if not bills.by_charge:
        sums: defaultdict[BillKey, Amount] = defaultdict(int)
        for (account, _), amount in here.items():
            sums[account, ""] += amount
        ours = sums
    return [
        BillLine(*key, ours.get(key), bills.amounts.get(key))
        for key in sorted(ours.keys() | bills.amounts.keys())
        if ours.get(key) or key in bills.amounts
    ]
