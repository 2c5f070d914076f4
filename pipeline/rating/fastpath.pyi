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

def accept_plain(
    records: list[Record],
    start: int,
    frames: dict[bytes, bytes],
    homes: dict[bytes, int],
    partition: int,
    own_only: bool,
    limits: tuple[int, ...],
    events: list[Event],
    arrived: list[tuple[bytes, int]],
) -> int: ...
def enrich_plain(
    events: list[Event],
    start: int,
    spans: dict[tuple[bytes, bytes], list[Any]],
    known: list[tuple[Event, Any]],
) -> int: ...
def sequence_blocks(arrived: list[tuple[bytes, int]], block_size: int) -> dict[tuple[bytes, int], int]: ...
def rate_plain(
    known: list[tuple[Event, Any]],
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
def identities(events: list[Event]) -> list[bytes]: ...
def latest_us(events: list[Event]) -> int: ...
def remember(seen: dict[bytes, bytes], events: list[Event]) -> None: ...
def seen_block(events: list[Event], rated_ms: int) -> bytes | None: ...
