"""Records as a rater writes them, with defaults, for tests that produce them themselves."""

from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from xxhash import xxh3_128_digest

from pipeline.infra.avro import Record

MAY = 1_777_593_600_000_000  # 2026-05-01T00:00:00Z
JUNE = 1_780_272_000_000_000  # 2026-06-01T00:00:00Z
#: A moment inside May.
NOON = MAY + 12 * 3_600_000_000
assert datetime.fromtimestamp(MAY / 1e6, UTC).isoformat() == "2026-05-01T00:00:00+00:00"
assert datetime.fromtimestamp(JUNE / 1e6, UTC).isoformat() == "2026-06-01T00:00:00+00:00"


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
        "identity": xxh3_128_digest(f"{account}/{key}".encode()),
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
        "entry": 0,
        "kind": "usage",
        "quantity": Decimal(quantity).quantize(Decimal("1e-9")),
        "quantity_before": Decimal(before).quantize(Decimal("1e-9")),
        "quantity_after": (Decimal(before) + Decimal(quantity)).quantize(Decimal("1e-9")),
        "amount": Decimal(amount).quantize(Decimal("1e-12")),
        "late": False,
    }
    return record | rest
