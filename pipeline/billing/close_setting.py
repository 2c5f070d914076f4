"""What a chunk's documents are made with besides what is owed: sellers, customers, taxes, coupons, money, rates."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import date, datetime
from typing import Any
from zoneinfo import ZoneInfo

from psycopg import Connection

from pipeline.billing.close_known import Known
from pipeline.billing.close_money import Money, coupon_uses
from pipeline.billing.close_payers import Group
from pipeline.billing.composing import exchanged, shown_currency
from pipeline.billing.documents import Converted, issue_date
from pipeline.billing.fx_rates import published
from pipeline.billing.invoicing_store import Invoicing, load
from pipeline.billing.reckoning import Basis, Reckoned
from pipeline.core import fx
from pipeline.core.catalog import Catalog
from pipeline.core.discounts import usable
from pipeline.core.money import Micros
from pipeline.core.periods import Period, to_datetime


@dataclass(slots=True)
class Setting:
    """As of the documents' tax dates, and each thing read once for all payers of a chunk."""

    connection: "Connection[Any]"
    known: Known
    catalog: Catalog
    #: What payers have left, while document after document is reckoned.
    money: Money
    #: The time of issue, aware.
    now: datetime
    actor: str
    _invoicing: dict[date, Invoicing] = field(default_factory=dict)
    _rates: dict[tuple[date, frozenset[str]], list[fx.Rate]] = field(default_factory=dict)
    #: In how many billing periods coupons were used, by payer.
    _used: dict[str, dict[str, int]] = field(default_factory=dict)

    def read(self, periods: Mapping[str, Iterable[Period]]) -> None:
        """Read what documents of these payers and periods are made with; before any of it is asked for."""
        payers: defaultdict[date, set[str]] = defaultdict(set)
        for payer, of in periods.items():
            for period in of:
                payers[self._tax_date(payer, period)].add(payer)
        until = self.known.run.invoicing_mark
        for day, accounts in payers.items():
            self._invoicing[day] = load(self.connection, applied_until=until, on=day, accounts=accounts)

    def basis(self, payer: str, group: Group) -> Basis:
        """Without money, which documents before this one may take. Raises ValueError, saying what nobody applied."""
        tax_date = self._tax_date(payer, group.period)
        invoicing = self._invoicing[tax_date]
        entity = invoicing.legal_entity(group.legal_entity)
        if entity is None:
            named = repr(group.legal_entity) if group.legal_entity else "one, since the contract names none"
            known = ", ".join(sorted(invoicing.legal_entities)) or "none"
            raise ValueError(
                f"expected legal entity {named} as of {tax_date}, got {known}: `tally invoicing apply` says who sells"
            )
        customer = invoicing.customers.get(payer)
        if customer is None:
            raise ValueError(
                f"expected {payer} as a customer with name and address as of {tax_date}, got none: "
                "`tally invoicing apply` says who buys"
            )
        first_day = self._day(payer, group.period.start_us)
        if payer not in self._used:
            self._used[payer] = coupon_uses(self.connection, payer) if customer.coupons else {}
        coupons = usable(customer.coupons, invoicing.coupons, self._used[payer], first_day, group.currency)
        return Basis(entity, customer, invoicing.taxes, tax_date, coupons)

    def seller(self, payer: str, period: Period, legal_entity: str) -> str:
        """The id of who sells by a contract that names this legal entity, or "", on a document of the period."""
        entity = self._invoicing[self._tax_date(payer, period)].legal_entity(legal_entity)
        return legal_entity if entity is None else entity.id

    def with_coupons_left(
        self, payer: str, group: Group, basis: Basis, taken: Mapping[str, Collection[Micros]]
    ) -> Basis:
        """Without coupons that are used up by the payer's other documents of now: ``taken`` in periods by start."""

        def used(coupon: str) -> int:
            return self._used[payer].get(coupon, 0) + len({*taken.get(coupon, ())} - {group.period.start_us})

        left = [one for one in basis.coupons if one.uses is None or used(one.id) < one.uses]
        return basis if len(left) == len(basis.coupons) else replace(basis, coupons=left)

    def converted(self, basis: Basis, reckoned: Reckoned) -> Converted | None:
        """What a document comes to in the currency it is shown in beside its own. Raises ``core.fx.NoRate``."""
        currency = reckoned.document.currency
        quote = shown_currency(basis, currency)
        if quote is None:
            return None
        day, totals = issue_date(basis.entity, self.now), reckoned.document.totals
        rates = self._rates_of(day, frozenset((currency, quote)))
        return exchanged(currency, quote, day, rates, totals.net, totals.tax)

    def _rates_of(self, day: date, currencies: frozenset[str]) -> list[fx.Rate]:
        asked = day, currencies
        if asked not in self._rates:
            until = self.known.run.invoicing_mark
            self._rates[asked] = published(self.connection, day, currencies, loaded_until=until)
        return self._rates[asked]

    def _tax_date(self, payer: str, period: Period) -> date:
        """The last day of a document's period, by the payer's clock."""
        return self._day(payer, period.end_us - 1)

    def _day(self, payer: str, at_us: Micros) -> date:
        account = self.catalog.accounts.get(payer)
        return to_datetime(at_us).astimezone(ZoneInfo(account.time_zone if account else "UTC")).date()
