"""What a run is closed with, the same for all of its payers and workers: read once, however many there are."""

from dataclasses import dataclass
from typing import Any

from psycopg import Connection

from pipeline.billing.prices import read_prices
from pipeline.billing.queue import Run
from pipeline.billing.rerate import Month
from pipeline.billing.statements import PublishedMeter
from pipeline.core.catalog import Catalog
from pipeline.core.periods import to_micros


@dataclass(frozen=True, slots=True)
class Known:
    """The run, its month, and what was published when it began."""

    run: Run
    month: Month
    #: Meters, plans and price lists as they stood when the run began; accounts are added chunk by chunk.
    prices: Catalog
    meters: tuple[PublishedMeter, ...]


_SELECT_METERS = """
SELECT id, valid_from, published_at FROM billing.catalog_version WHERE kind = 'meter'
"""


def read_known(connection: "Connection[Any]", run: Run) -> Known:
    """What a run is closed with. Raises ValueError for a version this program cannot read."""
    prices = Catalog.empty().extend(read_prices(connection, until=run.catalog_seq), 0)
    meters = tuple(
        PublishedMeter(id, to_micros(valid_from), to_micros(published_at))
        for id, valid_from, published_at in connection.execute(_SELECT_METERS)
    )
    return Known(run, Month.parse(run.month), prices, meters)
