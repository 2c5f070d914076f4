"""A small world to rate in: a catalog, events as a producer writes them, and prices worked out another way."""

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from math import ceil, floor
from typing import Any, NamedTuple

import fastavro
import pytest

from pipeline.core.catalog import Catalog, Entry
from pipeline.core.charges import Charge, Tier
from pipeline.core.contracts import Account, Contract
from pipeline.core.corrections import Correction, HeldRow
from pipeline.core.documents import Item, kind_of, to_document
from pipeline.core.meters import Filter, Meter
from pipeline.core.money import AMOUNT_DECIMALS, QUANTITY_DECIMALS, scaled
from pipeline.core.periods import to_micros
from pipeline.core.plans import Plan
from pipeline.core.usage import ParkedRecord
from pipeline.infra.avro import EVENTS, RATED, frame, load_schemas
from pipeline.infra.resources import schemas_dir
from pipeline.infra.topics import partition_of
from pipeline.rating import compiled
from pipeline.rating.batch import Batch, Outcome, Shape, Source, process
from pipeline.rating.enrich import TermsView
from pipeline.rating.recent import each_identity

SCHEMAS = load_schemas()
PARTITIONS = 4
UNIT = 10**9
DAY_US = 86_400_000_000
DAY_MS = 86_400_000
#: 2026-03-10T12:00:00Z: when everything here arrives, unless said otherwise.
NOW_MS = 1_773_144_000_000
NOW_US = NOW_MS * 1000
EVENT_FRAME = frame(SCHEMAS.newest(EVENTS).id)
SHAPE = Shape("usage.events", PARTITIONS, {EVENT_FRAME: frame(SCHEMAS.newest(RATED).id)}, SCHEMAS)


def _plain(schema: Any) -> Any:
    """The schema without logical types: times stay integers, so that any 64-bit one can be written and read."""
    if isinstance(schema, dict):
        return {name: _plain(value) for name, value in schema.items() if name not in ("logicalType", "doc")}
    return [_plain(item) for item in schema] if isinstance(schema, list) else schema


EVENT_SCHEMA = fastavro.parse_schema(_plain(json.loads((schemas_dir() / "avro" / "usage_event.avsc").read_text())))


class Message(NamedTuple):
    """A record as a Kafka client hands it out."""

    topic: str
    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None


def usage(key: str = "k1", account: str = "acme", **fields: Any) -> dict[str, Any]:
    """A usage event; properties default to 10 tokens."""
    return {
        "idempotency_key": key,
        "account": account,
        "event_type": "completion",
        "timestamp": NOW_US,
        "subject": "",
        "properties": {"tokens": "10"},
        "source": "svc",
        "sequence": 1,
    } | fields


def body(event: Mapping[str, Any]) -> bytes:
    out = io.BytesIO()
    fastavro.schemaless_writer(out, EVENT_SCHEMA, event)
    return out.getvalue()


def framed(event: Mapping[str, Any]) -> bytes:
    return EVENT_FRAME + body(event)


HOME = partition_of(b"acme", PARTITIONS)


def message(value: bytes | Mapping[str, Any] | None, offset: int = 0, **fields: Any) -> Message:
    """A message on partition ``HOME``, keyed by its event's account where it has one."""
    key = value["account"].encode() if isinstance(value, Mapping) else b"acme"
    raw = framed(value) if isinstance(value, Mapping) else value
    return Message(SHAPE.origin_topic, HOME, offset, NOW_MS, key, raw)._replace(**fields)


def batch(records: Sequence[Any], source: Source = Source.EVENTS, now_ms: int = NOW_MS, partition: int = HOME) -> Batch:
    """A batch of records, around their own offsets."""
    first = records[0].offset if records else 0
    last = records[-1].offset if records else -1
    return Batch(source, partition, first, last + 1, list(records), now_ms)


def parked(event: Mapping[str, Any], offset: int = 0, **fields: Any) -> ParkedRecord:
    """An event that was parked at NOW, tried once, and is due."""
    one = message(event, offset)
    return ParkedRecord(
        *one,
        letter=b"letter-%d" % offset,
        letter_key=one.key,
        attempts=1,
        replays=0,
        parked_at_ms=NOW_MS,
        not_before_ms=NOW_MS,
        catalog_offset=0,
    )._replace(**fields)


def correction(of: Sequence[Mapping[str, Any]], new: Mapping[str, Any] | None = None, *, entry: int = 1) -> Correction:
    """A correction of the event behind these decoded rows, to be taken back or to say something else."""
    first = of[0]
    return Correction(
        number=7,
        entry=entry,
        reason_code="test_usage",
        actor="ada",
        decided_at_us=NOW_US,
        catalog_offset=max(row["catalog_offset"] for row in of),
        origin_topic=first["origin_topic"],
        origin_partition=first["origin_partition"],
        origin_offset=first["origin_offset"],
        origin_appended_ms=to_micros(first["origin_appended_at"]) // 1000,
        event=SCHEMAS.encode(EVENTS, first["event"]),
        rows=tuple(map(_held, of)),
        replacement=None if new is None else SCHEMAS.encode(EVENTS, new),
    )


def _held(row: Mapping[str, Any]) -> HeldRow:
    plain = ("contract", "plan", "plan_version", "meter", "meter_version", "price_version", "charge", "cell")
    return HeldRow(
        **{name: row[name] for name in (*plain, "currency", "price_class", "late")},
        period_start_us=to_micros(row["period_start"]),
        period_end_us=to_micros(row["period_end"]),
        segment_start_us=to_micros(row["segment_start"]),
        quantity=scaled(row["quantity"], QUANTITY_DECIMALS),
        amount=scaled(row["amount"], AMOUNT_DECIMALS),
    )


# -- catalog


def meter(id: str = "tokens", event_type: str = "completion", **fields: Any) -> Meter:
    return Meter(
        **{
            "id": id,
            "version": 1,
            "event_type": event_type,
            "aggregation": "sum",
            "value": "tokens",
            "unit": "token",
            "filters": (),
            "allow_negative": False,
            "valid_from_us": 0,
        }
        | fields
    )


def plan(*charges: Charge, id: str = "basic", version: int = 1, valid_from_us: int = 0) -> Plan:
    return Plan(id, version, "Basic", "USD", valid_from_us, charges)


def per_unit(price: str = "0.01", id: str = "c", meter: str = "tokens") -> Charge:
    return Charge(id=id, meter=meter, model="per_unit", unit_price=Decimal(price))


def account(id: str = "acme", time_zone: str = "UTC") -> Account:
    return Account(id, 1, id, time_zone)


def contract(account: str = "acme", id: str | None = None, start_us: int = 0, end_us: int | None = None) -> Contract:
    return Contract(id or f"{account}-main", 1, account, "basic", start_us, end_us)


def entries(items: Iterable[Item]) -> list[Entry]:
    return [
        Entry(kind_of(item), item.id, item.version, getattr(item, "valid_from_us", 0), to_document(item))
        for item in items
    ]


def view(*items: Item, offset: int = 7) -> TermsView:
    """A catalog of these, or the plainest one: acme, one contract, one meter, one charge."""
    chosen: Sequence[Item] = items or (meter(), plan(per_unit()), account(), contract())
    return TermsView(Catalog.empty().extend(entries(chosen), offset))


def without_fastpath(patch: pytest.MonkeyPatch) -> None:
    """As if Tally had been installed without a C compiler."""
    patch.setattr(compiled, "fastpath", None)


# -- state and results


@dataclass
class Memory:
    """A partition's state in dictionaries."""

    seen: dict[bytes, bytes] = field(default_factory=dict)
    totals: dict[bytes, int] = field(default_factory=dict)

    def known(self, identities: bytes) -> list[bytes | None]:
        return [self.seen.get(identity) for identity in each_identity(identities)]

    def quantity(self, counter: bytes) -> int | None:
        return self.totals.get(counter)

    def apply(self, outcome: Outcome) -> None:
        self.seen.update(outcome.seen)
        self.totals.update(outcome.totals)


def run(records: Sequence[Any], terms: TermsView | None = None, state: Memory | None = None, **options: Any) -> Outcome:
    """``process`` one batch of these records."""
    return process(batch(records, **options), state or Memory(), terms or view(), SHAPE)


def rows(outcome: Outcome) -> list[dict[str, Any]]:
    """The rated rows, decoded by fastavro."""
    return [SCHEMAS.decode(value, RATED) for _, value in outcome.rows]


def reasons(outcome: Outcome) -> list[str]:
    return [refused.rejection.reason.value for refused in outcome.dead]


# -- prices, worked out another way: exact fractions, straight from the price list


def cost(charge: Charge, quantity: Fraction) -> Fraction:
    """What a cumulative quantity costs, rounded half up to 12 decimals. Nothing of the product's pricing is used."""
    units = max(quantity - Fraction(charge.included, UNIT), Fraction(0))
    total = Fraction(0)
    if charge.model == "per_unit":
        total = units * Fraction(charge.unit_price or 0)
    elif charge.model == "package":
        total = ceil(units / Fraction(charge.package_size or 1, UNIT)) * Fraction(charge.package_price or 0)
    elif charge.model == "graduated":
        below = Fraction(0)
        for number, tier in enumerate(charge.tiers):
            top = units if tier.up_to is None else min(units, Fraction(tier.up_to, UNIT))
            if top > below or (number == 0 and charge.flat_on_zero):
                total += Fraction(tier.flat) + (top - below) * Fraction(tier.unit_price)
            below = max(below, top)
    else:
        tier = next(t for t in charge.tiers if t.up_to is None or units <= Fraction(t.up_to, UNIT))
        if units > 0 or charge.flat_on_zero:
            total = Fraction(tier.flat) + units * Fraction(tier.unit_price)
    return Fraction(floor(total * 10**12 + Fraction(1, 2)), 10**12)


EVERY_MODEL = (
    Charge(
        id="graduated",
        meter="tokens",
        model="graduated",
        tiers=(
            Tier(100 * UNIT, Decimal("0.0031"), Decimal("0.5")),
            Tier(250 * UNIT, Decimal("0.0025"), Decimal("0.01")),
            Tier(None, Decimal("0.000000000000000007")),
        ),
        included=3 * UNIT,
    ),
    Charge(
        id="volume",
        meter="tokens",
        model="volume",
        tiers=(Tier(120 * UNIT, Decimal("0.3")), Tier(None, Decimal("0.1"), Decimal("1.5"))),
    ),
    Charge(
        id="package",
        meter="tokens",
        model="package",
        package_size=7 * UNIT,
        package_price=Decimal("0.333333333333333333"),
    ),
    per_unit("0.000000000000123456", id="unit", meter="calls"),
)
EVERY_METER = (
    meter(),
    meter("calls", aggregation="count", value=None, filters=(Filter("model", ("small", "large")),)),
)
