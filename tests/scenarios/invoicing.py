"""What invoice stories have beside other ones: who sells and buys, months closed, and what customers get.

A section named after a kind of document is that document, line by line, with the sums below. Every document that is
issued has to be shown: one that nobody expected fails the story.

``-- invoicing:``                        an invoicing file: legal entities, customers, taxes, coupons
``-- rates: SOURCE BASE``                rates of exchange, a line each: day, currency, how much of it for one of BASE
``-- give: ACCOUNT AMOUNT EUR KIND``     credits from 2026 on: prepaid ones pay totals, promotional ones lower prices
``-- promise: ACCOUNT AMOUNT EUR WINDOW``   a spend commitment, from=DAY, until=DAY
``-- close: YYYY-MM``                    as ``tally close`` does, on the second day of the next month
``-- threshold: ACCOUNT YYYY-MM TIME``   as ``tally invoices threshold`` does at that time
``-- credit: NUMBER TIME``               as ``tally invoices credit`` does: all of it, or line=POSITION, quantity=
``-- adjust: ACCOUNT TIME``              as ``tally invoices adjust`` does: late usage that no invoice waits for
``-- void: NUMBER TIME``                 as ``tally invoices void`` does
``-- reissue: NUMBER TIME``              as ``tally invoices reissue`` does
``-- invoice: NUMBER ACCOUNT``           (or progress, credit_note, adjustment) the document, with further facts where
                                         the story is about them: state=, issued=, tax_date=, corrects=, reason=
``-- together: NUMBER NUMBER ...``       charge by charge what the documents come to
"""

from collections.abc import Mapping, Sequence
from datetime import date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, get_args
from zoneinfo import ZoneInfo

from psycopg import Connection
from psycopg.rows import dict_row

from pipeline.billing import credits
from pipeline.billing.credit_notes import Part, credit
from pipeline.billing.fx_rates import load as load_rates
from pipeline.billing.issued import find
from pipeline.billing.own_documents import bill_adjustments, payer_of, reissue
from pipeline.billing.rerate import Month
from pipeline.billing.thresholds import bill_if_reached
from pipeline.billing.voids import void
from pipeline.catalog.invoicing_files import read_invoicing_files
from pipeline.core.commitments import Commitment, Window
from pipeline.core.credits import GRANT_KINDS, GRANT_REASONS, REDUCES_BY_DEFAULT, Grant
from pipeline.core.money import AMOUNT_DECIMALS, QUANTITY_DECIMALS, minor_units, plain, scaled, to_minor
from pipeline.core.parties import DOCUMENT_KINDS
from pipeline.core.periods import parse_instant, to_datetime
from pipeline.infra.settings import Settings
from tests.billing.invoicing import apply, close

from .database import DatabaseWorld
from .story import Section, check_table, given

MONEY = ("amount", "discount", "net", "tax", "total")
_DOCUMENT = ("line", "period", "quantity", *MONEY)
_TOGETHER = ("charge", "quantity", *MONEY)

_SELECT_DOCUMENT = """
SELECT document.*, document.kind::text AS kind, document.reason_code AS reason, document.issue_date AS issued,
    document.lines_amount AS amount, document.discounts_amount AS discount, document.net_amount AS net,
    document.tax_amount AS tax, document.total_amount AS total, corrected.number AS corrects
FROM billing.document LEFT JOIN billing.document AS corrected ON corrected.id = document.corrects_id
WHERE document.id = %s
"""
_SELECT_LINES = """
SELECT line.*, line.discount_amount AS discount, line.net_amount AS net, line.tax_amount AS tax,
    line.total_amount AS total, document.number AS adjusts
FROM billing.document_line AS line LEFT JOIN billing.document_line AS original ON original.id = line.adjusts_id
LEFT JOIN billing.document ON document.id = original.document_id WHERE line.document_id = %s ORDER BY line.position
"""
_SELECT_TAXES = "SELECT * FROM billing.document_tax WHERE document_id = %s ORDER BY position"
_SELECT_DISCOUNTS = """
SELECT name, sum(amount) AS amount FROM billing.document_discount WHERE document_id = %s
GROUP BY name HAVING sum(amount) <> 0 ORDER BY min(position)
"""
_SELECT_TOGETHER = """
SELECT charge, min(currency) AS currency, sum(quantity) AS quantity, sum(amount) AS amount,
    sum(discount_amount) AS discount, sum(line.net_amount) AS net, sum(line.tax_amount) AS tax,
    sum(line.total_amount) AS total
FROM billing.document_line AS line JOIN billing.document ON document.id = document_id
WHERE document_id = ANY(%s) GROUP BY charge ORDER BY min(line.id)
"""
_SELECT_ISSUED = "SELECT number FROM billing.document WHERE state = 'issued' ORDER BY id"

Row = Mapping[str, Any]


class InvoicingWorld(DatabaseWorld):
    """A world in PostgreSQL in which months are closed; its connection commits by itself."""

    def __init__(self, folder: Path, settings: Settings, connection: "Connection[Any]") -> None:
        super().__init__(folder, settings)
        self._file = folder / "invoicing.yaml"
        self._connection = connection
        self._shown: set[str] = set()

    def happen(self, section: Section) -> None:
        match section.kind, section.rest.split():
            case "invoicing", []:
                self._apply("\n".join(section.body))
            case "rates", [source, base]:
                self._load_rates(source, base, section.body)
            case "give", [account, amount, currency, kind]:
                self._give(account, amount, currency, kind)
            case "promise", [account, amount, currency, window, *rest]:
                self._promise(account, amount, currency, window, given(rest))
            case "close", [month]:
                close(self._connection, self.settings, Month.parse(month))
            case "threshold", [account, month, time]:
                self._bill_if_reached(account, month, _time(time))
            case "adjust", [account, time]:
                payer = payer_of(self._connection, account, _time(time))
                bill_adjustments(self._connection, payer, now=_time(time), actor="story")
            case "void", [number, time]:
                self._void(number, _time(time))
            case "reissue", [number, time]:
                id = find(self._connection, number)
                reissue(self._connection, id, note="", now=_time(time), actor="story")
            case "credit", [number, time, *rest]:
                self._credit(number, _time(time), given(rest))
            case kind, [number, account, *rest] if kind in DOCUMENT_KINDS:
                facts = {"kind": kind, "account": account, **given(rest)}
                check_table(section, _DOCUMENT, self._document(number, facts))
            case "together", numbers:
                check_table(section, _TOGETHER, self._together(numbers))
            case _:
                super().happen(section)

    def untold(self) -> list[str]:
        """Documents that were issued and that the story has not shown."""
        return [row["number"] for row in self._select(_SELECT_ISSUED) if row["number"] not in self._shown]

    def _select(self, statement: str, *values: Any) -> Sequence[Row]:
        return self._connection.cursor(row_factory=dict_row).execute(statement, values).fetchall()

    # -- what happens

    def _apply(self, text: str) -> None:
        self._file.write_text(text)
        drafts = read_invoicing_files([self._file])
        assert not drafts.findings, "\n".join(map(str, drafts.findings))
        apply(self._connection, *(draft.item for draft in drafts.items))

    def _load_rates(self, source: str, base: str, lines: Sequence[str]) -> None:
        words = [line.split() for line in lines if line.strip()]
        rates = [(date.fromisoformat(day), currency, Decimal(rate)) for day, currency, rate in words]
        load_rates(self._connection, source, base, rates, actor="story")

    def _give(self, account: str, amount: str, currency: str, name: str) -> None:
        (kind,) = (known for known in GRANT_KINDS if known == name)
        start_us = parse_instant("2026-01-01T00:00:00Z")
        grant = Grant("", scaled(Decimal(amount), AMOUNT_DECIMALS), start_us, None, kind, REDUCES_BY_DEFAULT[kind])
        asked, reason = credits.Asked(account, currency, grant), min(GRANT_REASONS[kind])
        self._approve(credits.request_grant(self._connection, asked, reason=reason, note="", actor="story"))

    def _promise(self, account: str, amount: str, currency: str, name: str, days: Mapping[str, str]) -> None:
        (window,) = (known for known in get_args(Window) if known == name)
        start_us, end_us = (parse_instant(f"{days[day]}T00:00:00Z") for day in ("from", "until"))
        promised = Commitment("", scaled(Decimal(amount), AMOUNT_DECIMALS), start_us, end_us, window)
        self._approve(credits.request_commitment(self._connection, account, currency, promised, note="", actor="story"))

    def _approve(self, request: int) -> None:
        credits.decide(self._connection, request, "approved", actor="another")

    def _bill_if_reached(self, account: str, month: str, now: datetime) -> None:
        payer = payer_of(self._connection, account, now)
        bill_if_reached(self._connection, payer, Month.parse(month), now=now, actor="story")

    def _credit(self, number: str, now: datetime, part: Mapping[str, str]) -> None:
        quantity = scaled(Decimal(part["quantity"]), QUANTITY_DECIMALS) if "quantity" in part else None
        parts = [Part(int(part["line"]), quantity)] if "line" in part else None
        original = find(self._connection, number)
        credit(self._connection, original, parts, reason="goodwill", note="", to="refund", actor="story", now=now)

    def _void(self, number: str, now: datetime) -> None:
        id = find(self._connection, number)
        void(self._connection, id, reason="wrong_details", note="", actor="story", now=now)

    # -- what comes of it

    def _document(self, number: str, facts: Mapping[str, str]) -> list[tuple[str, ...]]:
        id = find(self._connection, number)
        (document,) = self._select(_SELECT_DOCUMENT, id)
        lines = self._select(_SELECT_LINES, id)
        self._shown.add(number)
        found = {name: str(document[name]) for name in facts}
        assert found == facts, f"{number}: expected {facts}, got {found}"
        for name in MONEY:
            assert sum(line[name] for line in lines) == document[name], f"{number}: {name} of its lines, of its header"
        discounts, taxes = self._select(_SELECT_DISCOUNTS, id), self._select(_SELECT_TAXES, id)
        return [*(self._line(document, line) for line in lines), *_sums(document, discounts, taxes)]

    def _line(self, document: Row, line: Row) -> tuple[str, ...]:
        name = f"{line['charge']}[{line['cell']}]" if line["cell"] else line["charge"]
        if line["account"] != document["account"]:
            name = f"{line['account']}: {name}"
        # What comes late of a charge that was not billed yet has the invoice, but no line to link to.
        number = line["adjusts"] or line["detail"].get("adjusts", {}).get("number")
        if line["role"] == "reversal":
            name += f", {number} taken back"
        elif line["kind"] == "adjustment":
            name += f", {number} anew"
        zone = ZoneInfo(self.catalog.accounts[line["account"]].time_zone)
        first, last = line["period_start"], line["period_end"] - timedelta(microseconds=1)
        period = " - ".join(f"{day.day} {day:%b}" for day in (first.astimezone(zone), last.astimezone(zone)))
        return (name, period, plain(line["quantity"]), *_money(document["currency"], line))

    def _together(self, numbers: Sequence[str]) -> list[tuple[str, ...]]:
        rows = self._select(_SELECT_TOGETHER, [find(self._connection, number) for number in numbers])
        return [(row["charge"], plain(row["quantity"]), *_money(row["currency"], row)) for row in rows]


def _sums(document: Row, discounts: Sequence[Row], taxes: Sequence[Row]) -> list[tuple[str, ...]]:
    """What stands below the lines: the total, what is in it, and what is left to pay where that is not the total."""
    currency = document["currency"]

    def row(name: str, **amounts: Decimal) -> tuple[str, ...]:
        return (name, "-", "-", *_money(currency, amounts))

    rows = [row("total", **{name: document[name] for name in MONEY})]
    rows += [row(f"of it {one['name'] or 'credits'}", discount=one["amount"]) for one in discounts]
    for one in taxes:
        why = "" if one["treatment"] == "standard" else f", {one['treatment'].replace('_', ' ')}"
        name = f"of it {one['tax']} {plain(one['percent'])} %{why}"
        rows.append(row(name, net=one["base_amount"], tax=one["tax_amount"]))
    if document["credits_amount"]:
        rows.append(row("taken off the total", total=-document["credits_amount"]))
    for account, paid in document["content"].get("credits", {}).items():
        rows.append(row(f"of it {account}'s credits", total=-Decimal(paid)))
    if document["balance_amount"]:
        name = "balance from before" if document["balance_amount"] > 0 else "balance for the next"
        rows.append(row(name, total=-document["balance_amount"]))
    if document["payable_amount"] != document["total"]:
        rows.append(row("to be paid", total=document["payable_amount"]))
    if document["fx_currency"]:
        name = (
            f"in {document['fx_currency']}: {plain(document['fx_rate'])}, {document['fx_source']} {document['fx_date']}"
        )
        shown = {name: document[f"fx_{name}_amount"] for name in ("net", "tax", "total")}
        rows.append((name, "-", "-", *_money(document["fx_currency"], shown)))
    return rows


def _money(currency: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    """The cells of the columns of money, with the currency's decimals; ``-`` where the row has none."""
    digits = minor_units(currency)
    # From the smallest unit, which refuses what is finer: nothing is rounded for the table only.
    whole = {name: Decimal(to_minor(row[name], currency)).scaleb(-digits) for name in MONEY if name in row}
    return tuple(f"{whole[name]:.{digits}f}" if name in whole else "-" for name in MONEY)


def _time(text: str) -> datetime:
    return to_datetime(parse_instant(text))
