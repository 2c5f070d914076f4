"""Records as a rater writes them, with defaults, for tests that produce them themselves."""

from datetime import UTC, datetime
from decimal import Context, Decimal, Inexact, InvalidOperation
from typing import Any

from xxhash import xxh3_128_digest

from pipeline.infra import wire
from pipeline.infra.avro import Record

MAY = 1_777_593_600_000_000  # 2026-05-01T00:00:00Z
JUNE = 1_780_272_000_000_000  # 2026-06-01T00:00:00Z
#: A moment inside May.
NOON = MAY + 12 * 3_600_000_000
assert datetime.fromtimestamp(MAY / 1e6, UTC).isoformat() == "2026-05-01T00:00:00+00:00"
assert datetime.fromtimestamp(JUNE / 1e6, UTC).isoformat() == "2026-06-01T00:00:00+00:00"
_EXACT = Context(prec=60, traps=[Inexact, InvalidOperation])


def scaled_decimal(value: int, decimals: int) -> Decimal:
    return Decimal(f"{value}E-{decimals}")


def rated_record(
    *,
    key: str = "key",
    account: str = "acct",
    event_type: str = "llm.request",
    timestamp: int = NOON,
    subject: str = "",
    properties: dict[str, str] | None = None,
    source: str = "api-1",
    sequence: int = 1,
    quantity: Decimal | int = 1,
    before: Decimal | int = 0,
    amount: Decimal | str = "0.000003",
    **rest: Any,
) -> Record:
    """A RatedUsage record; ``rest`` replaces any of its fields by name."""
    record: Record = {
        "event": {
            "idempotency_key": key,
            "account": account,
            "event_type": event_type,
            "timestamp": timestamp,
            "subject": subject,
            "properties": {"input_tokens": "1"} if properties is None else properties,
            "source": source,
            "sequence": sequence,
        },
        "origin_topic": "usage.events",
        "origin_partition": 0,
        "origin_offset": 0,
        "origin_appended_at": timestamp // 1000,
        "identity": xxh3_128_digest(wire.text(key) + wire.text(account)),
        "catalog_offset": 4,
        "contract": f"contract-{account}",
        "plan": "basic",
        "plan_version": 1,
        "meter": "tokens",
        "meter_version": 1,
        "price_version": "basic@1",
        "charge": "input",
        "period_start": MAY,
        "period_end": JUNE,
        "segment_start": MAY,
        "cell": "",
        "currency": "USD",
        "price_class": "running",
        "entry": 0,
        "kind": "usage",
        "quantity": _EXACT.quantize(Decimal(quantity), Decimal("1e-9")),
        "quantity_before": _EXACT.quantize(Decimal(before), Decimal("1e-9")),
        "quantity_after": _EXACT.quantize(_EXACT.add(Decimal(before), Decimal(quantity)), Decimal("1e-9")),
        "amount": _EXACT.quantize(Decimal(amount), Decimal("1e-12")),
        "late": False,
    }
    return record | rest


def receipt_record(
    settings_prefix: str = "", *, partition: int = 0, first: int = 0, count: int = 0, **rest: Any
) -> Record:
    """A receipt of ``count`` records on usage.events, all rated to one row each; ``rest`` replaces any field."""
    record: Record = {
        "topic": settings_prefix + "usage.events",
        "partition": partition,
        "first_offset": first,
        "next_offset": first + count,
        "catalog_offset": 4,
        "records": count,
        "rated": count,
        "duplicates": 0,
        "parked": 0,
        "dead_lettered": 0,
        "corrections": 0,
        "rated_rows": count,
        "resolutions": [],
        "latest_event_at": NOON,
        "sequences": [],
        "worker": "rater-1",
        "generation": 1,
    }
    return record | rest


def resolution(partition: int, offset: int, outcome: str) -> Record:
    return {"origin_partition": partition, "origin_offset": offset, "outcome": outcome}


def sequences(source: str, block: int, *numbers: int) -> Record:
    bits = sum(1 << (number - block * 1000) for number in numbers)
    return {"source": source, "block": block, "bits": bits.to_bytes((bits.bit_length() + 7) // 8, "little")}


def letter_record(settings_prefix: str = "", *, partition: int = 0, offset: int = 0, **rest: Any) -> Record:
    """A letter of an event that named an unknown account; ``rest`` replaces any field."""
    record: Record = {
        "origin_topic": settings_prefix + "usage.events",
        "origin_partition": partition,
        "origin_offset": offset,
        "origin_appended_at": NOON // 1000,
        "stage": "enrich",
        "reason": "unknown_account",
        "message": "expected an account of the catalog, got 'acct-99'",
        "attempts": 1,
        "replays": 0,
        "parked_at": NOON // 1000,
        "not_before": NOON // 1000 + 1000,
        "catalog_offset": 4,
        "account": "acct-99",
        "idempotency_key": "key",
        "event_type": "llm.request",
        "event_time": NOON,
        "key": b"acct-99",
        "value": b"\0\0\0\0\1...",
    }
    return record | rest


def control_record(**fields: Any) -> Record:
    """A control total of numbers 1 to 3, all delivered unless said otherwise; ``fields`` replaces any of its fields."""
    record: Record = {
        "source": "api-1",
        "hour": NOON,
        "first_sequence": 1,
        "last_sequence": 3,
        "rejected": 0,
        "spooled": 0,
        "first_spooled": 0,
        "rejections": [],
        "closed": False,
        "said_at": NOON,
    } | fields
    emitted = record["last_sequence"] - record["first_sequence"] + 1
    return {"delivered": emitted - record["rejected"] - record["spooled"]} | record
