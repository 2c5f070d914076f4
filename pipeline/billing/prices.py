"""The published prices, to hold what was rated against."""

from typing import Any

from psycopg import Connection

from pipeline.core.charges import Charge, Price, compile_price
from pipeline.core.documents import Entry, from_document
from pipeline.core.periods import to_micros
from pipeline.core.plans import Plan


class NoPrice(LookupError):
    """The catalog does not tell what a charge of a plan version costs; the message says why."""


_SELECT_PLAN = (
    "SELECT valid_from, document FROM billing.catalog_version WHERE kind = 'plan' AND id = %s AND version = %s"
)


class Prices:
    """Charges and their prices by plan, version and charge id; each plan version is read once."""

    def __init__(self, connection: "Connection[Any]") -> None:
        self._connection = connection
        self._plans: dict[tuple[str, int], Plan | str] = {}
        self._prices: dict[tuple[str, int, str], Price] = {}

    def charge(self, plan: str, version: int, charge: str) -> Charge:
        """Raises NoPrice when the catalog has no such plan version, none this program can read, or no such charge."""
        if (plan, version) not in self._plans:
            self._plans[plan, version] = self._read(plan, version)
        found = self._plans[plan, version]
        if isinstance(found, str):
            raise NoPrice(found)
        for one in found.charges:
            if one.id == charge:
                return one
        raise NoPrice(f"plan {plan} version {version} has no charge {charge}")

    def price(self, plan: str, version: int, charge: str) -> Price:
        """From a counter's quantity to its exact cost. Raises NoPrice as ``charge`` does."""
        key = (plan, version, charge)
        if key not in self._prices:
            self._prices[key] = compile_price(self.charge(*key))
        return self._prices[key]

    def _read(self, plan: str, version: int) -> Plan | str:
        """The plan version, or why there is none."""
        row = self._connection.execute(_SELECT_PLAN, [plan, version]).fetchone()
        if row is None:
            return f"plan {plan} version {version} is not in the catalog"
        valid_from, document = row
        try:
            item = from_document(Entry("plan", plan, version, to_micros(valid_from), document))
        except ValueError as error:
            return str(error)
        assert isinstance(item, Plan), "an entry of kind plan holds a plan"
        return item
