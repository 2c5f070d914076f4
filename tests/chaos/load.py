"""What producers send: every event a pure function of the seed, its source and its number.

So that a killed producer goes on where it was, and the oracle knows what each source sent without having been told.
Usage is good for the most part; the rest repeats, contradicts, comes late or far too late, is of accounts nobody knows
(yet), or is no usage at all.
"""

import io
import json
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from random import Random
from typing import Any, NamedTuple

import fastavro

from pipeline.infra.resources import schemas_dir
from pipeline.infra.topics import partition_of
from pipeline.producer.usage import Usage

#: Of the first, most usage is.
ACCOUNTS = tuple(f"acct-{number:02d}" for number in range(24))
ZONES = ("UTC", "America/New_York", "Asia/Kolkata", "Pacific/Auckland")
#: In no catalog ever.
STRANGERS = tuple(f"nobody-{number}" for number in range(3))
#: A repeat repeats one of so many events before it.
_REPEATED_WITHIN = 4000
_SECOND_US, _DAY_US = 1_000_000, 86_400_000_000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

_ACCOUNT_WEIGHTS = tuple(1 / (place + 1) for place in range(len(ACCOUNTS)))
_BAD_VALUES = ("NaN", "-1", "many", "1234567890123456789", "0.1234567891", None)


def zone_of(account: str) -> str:
    """An account's billing time zone."""
    return ZONES[sum(account.encode()) % len(ZONES)]


@dataclass(frozen=True, slots=True)
class Load:
    """All that the events of a run follow from."""

    seed: int
    #: When the first event happens, microseconds since 1970 UTC.
    began_us: int
    #: Of one source.
    per_second: float
    #: The producers' sources, which repeat each other's events too.
    sources: tuple[str, ...]
    #: Events of one source.
    count: int
    #: Accounts that the catalog learns of while their usage is coming in.
    late_accounts: tuple[str, ...]
    #: Clocks run ahead by as much, at most. Beyond what the rater takes at once an event waits; its repeats may not.
    ahead_s: int

    def due(self, now_us: int) -> int:
        """How many events of a source have happened by now."""
        return min(self.count, int((now_us - self.began_us) / _SECOND_US * self.per_second))

    def usage(self, source: str, number: int) -> Usage:
        """The event a source sends as its n-th, from 1."""
        rng = Random(f"{self.seed}/{source}/{number}")
        chance = rng.random()
        if number > 1 and chance < 0.09:
            other = source if rng.random() < 0.7 else rng.choice(self.sources)
            again = self.usage(other, number - rng.randint(1, min(number - 1, _REPEATED_WITHIN)))
            if chance < 0.01:
                return self._contradicting(again)
            # The same, whatever the order of its properties.
            return replace(again, properties=dict(reversed(list(again.properties.items()))))
        return Usage(
            account=self._account(rng),
            timestamp=_EPOCH + timedelta(microseconds=self._happened(rng, number)),
            idempotency_key=f"{source}-{number}",
            subject=rng.choice(("", "user-1", "user-2")),
            **_what(rng),
        )

    def flood(self, account: str, number: int) -> Usage:
        """An event of a burst, all for an account that the catalog does not have yet."""
        rng = Random(f"{self.seed}/{account}/{number}")
        at = self.began_us + rng.randrange(_SECOND_US)
        what = _what(rng)
        return Usage(
            account=account,
            timestamp=_EPOCH + timedelta(microseconds=at),
            idempotency_key=f"{account}-{number}",
            **what,
        )

    def _account(self, rng: Random) -> str:
        chance = rng.random()
        if chance < 0.03 and self.late_accounts:
            return rng.choice(self.late_accounts)
        if chance < 0.034:
            return rng.choice(STRANGERS)
        return rng.choices(ACCOUNTS, _ACCOUNT_WEIGHTS)[0]

    def _happened(self, rng: Random, number: int) -> int:
        at = self.began_us + int((number + rng.random()) / self.per_second * _SECOND_US)
        chance = rng.random()
        if chance < 0.02:
            return at - rng.randrange(3600 * _SECOND_US, 34 * _DAY_US)  # late
        if chance < 0.024:
            return at - rng.randrange(36 * _DAY_US, 90 * _DAY_US)  # too late
        if chance < 0.028:
            return at + rng.randrange(900 * _SECOND_US, 2 * _DAY_US)  # not yet
        if chance < 0.08:
            return at + rng.randrange(self.ahead_s * _SECOND_US)
        return at

    @staticmethod
    def _contradicting(again: Usage) -> Usage:
        """The same key for other usage. Not of a late account: parked, they have no order the topic shows."""
        if again.account not in ACCOUNTS:
            return again
        return replace(again, properties={**again.properties, "input_tokens": "77", "bytes": "77"})


def _what(rng: Random) -> dict[str, Any]:
    chance = rng.random()
    if chance < 0.005:
        return {"event_type": "unheard.of", "properties": {"input_tokens": "1"}}
    if chance < 0.25:
        return {"event_type": "api.call", "properties": {"bytes": str(rng.randrange(10_000_000))}}
    properties: dict[str, str | None] = {
        "input_tokens": str(rng.randrange(5000)),
        "output_tokens": f"{rng.randrange(800)}.{rng.randrange(10**9):09d}",
        "model": rng.choice(("small", "large", "tiny")),
    }
    if chance < 0.26:
        properties[rng.choice(("input_tokens", "output_tokens"))] = rng.choice(_BAD_VALUES)
    return {
        "event_type": "llm.request",
        "properties": {name: value for name, value in properties.items() if value is not None},
    }


# -- What no UsageProducer would send ----------------------------------------------------------------------------------


class Raw(NamedTuple):
    """A message, where it is put, and why it is refused. None: it is good usage, only put in the wrong place."""

    key: bytes
    value: bytes | None
    partition: int
    reason: str | None


def _without_logical_types(schema: Any) -> Any:
    if isinstance(schema, dict):
        return {name: _without_logical_types(value) for name, value in schema.items() if name != "logicalType"}
    return [_without_logical_types(item) for item in schema] if isinstance(schema, list) else schema


#: Times stay integers.
EVENT_SCHEMA = fastavro.parse_schema(
    _without_logical_types(json.loads((schemas_dir() / "avro" / "usage_event.avsc").read_text()))
)
_IDS = {entry["file"]: entry["id"] for entry in json.loads((schemas_dir() / "avro" / "ids.json").read_text())}
EVENT_FRAME = b"\0" + int(_IDS["usage_event.avsc"]).to_bytes(4, "big")


def raw(load: Load, number: int, now_us: int, partitions: int) -> Raw:
    """The n-th message that is no usage, or usage in a wrong place."""
    rng = Random(f"{load.seed}/raw/{number}")
    account = rng.choice(ACCOUNTS)
    event = {
        "idempotency_key": f"raw-{number}",
        "account": account,
        "event_type": "api.call",
        "timestamp": now_us,
        "subject": "",
        "properties": {"bytes": str(rng.randrange(1000))},
        "source": "",
        "sequence": 0,
    }
    home = partition_of(account.encode(), partitions)
    elsewhere = (home + 1) % partitions
    good = EVENT_FRAME + body(event)
    digest = sha256(b"%d" % number).digest()
    return rng.choice(
        (
            lambda: Raw(account.encode(), None, home, "undecodable"),
            lambda: Raw(account.encode(), b"\xff" + digest, home, "undecodable"),
            lambda: Raw(account.encode(), good[: rng.randrange(5, len(good))], home, "undecodable"),
            lambda: Raw(account.encode(), good + digest, home, "undecodable"),
            lambda: Raw(account.encode(), b"\0\0\x0f\x42\x40" + good[5:], home, "unknown_schema"),
            lambda: Raw(account.encode(), _framed(event, idempotency_key=""), home, "key_empty"),
            lambda: Raw(
                account.encode(), _framed(event, idempotency_key="k" * 300 + str(number)), home, "key_too_long"
            ),
            lambda: Raw(account.encode(), _framed(event, event_type=""), home, "event_type_invalid"),
            lambda: Raw(account.encode(), _framed(event, sequence=-number), home, "wrong_shape"),
            lambda: Raw(account.encode(), _framed(event, subject=f"\0{number}"), home, "wrong_shape"),
            lambda: Raw(account.encode(), good, elsewhere, None),
            lambda: Raw(b"another key", good, home, None),
        )
    )()


def _framed(event: dict[str, Any], **changes: Any) -> bytes:
    return EVENT_FRAME + body(event | changes)


def body(event: dict[str, Any]) -> bytes:
    out = io.BytesIO()
    fastavro.schemaless_writer(out, EVENT_SCHEMA, event)
    return out.getvalue()
