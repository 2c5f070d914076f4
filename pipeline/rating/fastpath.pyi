from collections.abc import Callable
from typing import Any

from pipeline.core.charges import Lines, Price
from pipeline.core.meters import Measure, Properties
from pipeline.core.money import Amount, Quantity
from pipeline.core.reasons import Rejection
from pipeline.core.usage import Event, Record

class PlainNumber:
    def __init__(self, key: bytes, exact: Measure) -> None: ...
    def __call__(self, properties: Properties) -> Quantity | Rejection | None: ...

class PlainLines:
    def __init__(self, lines: Lines, exact: Price) -> None: ...
    def __call__(self, quantity: Quantity) -> Amount: ...

class Priced:
    counter: bytes
    constant: bytes
    measure: Measure
    price: Price
    memo: tuple[int | None, int, bytes]
    def __init__(self, counter: bytes, constant: bytes, measure: Measure, price: Price) -> None: ...

class Arrivals:
    def __init__(self, block_size: int) -> None: ...
    def add(self, source: bytes, sequence: int) -> None: ...
    def blocks(self) -> dict[tuple[bytes, int], int]: ...

class Recent:
    def __len__(self) -> int: ...
    def add(self, entries: bytes) -> None: ...
    def find(self, identities: bytes) -> list[bytes | None] | None: ...
    def entries(self) -> bytes: ...

def accept_plain(
    records: list[Record],
    start: int,
    frames: dict[bytes, bytes],
    homes: dict[bytes, int],
    partition: int,
    own_only: bool,
    latest_us: int,
    limits: tuple[int, ...],
    events: list[Event],
    arrivals: Arrivals,
) -> int: ...
def enrich_plain(
    events: list[Event],
    start: int,
    spans: dict[bytes, dict[bytes, list[Any]]],
    known: list[Event],
    terms_of: list[Any],
) -> int: ...
def rate_plain(
    known: list[Event],
    terms_of: list[Any],
    start: int,
    totals: dict[bytes, int],
    quantity_of: Callable[[bytes], int | None],
    frames: dict[bytes, bytes],
    origin: bytes,
    catalog_offset: bytes,
    fits: int,
    kinds: tuple[type, type, type],
    rows: list[tuple[bytes, bytes]],
    events: list[Event],
) -> int: ...
def identities(events: list[Event]) -> bytes: ...
def entries(events: list[Event]) -> bytes: ...
def has_repeats(identities: bytes) -> bool: ...
def latest_us(events: list[Event]) -> int: ...
def latest_arrival_ms(events: list[Event]) -> int: ...
