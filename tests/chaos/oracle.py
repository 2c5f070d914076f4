"""What ought to have become of every event, from the order on ``usage.events`` alone, and where that is not so.

The oracle reads the topic as a plain consumer does, decodes with fastavro, and knows the rules from the documentation:
it uses none of the pipeline's decoding, deduplication, terms or prices, and never looks at its topics or state. What
the pipeline did is then read from PostgreSQL, where finance would see it.
"""

import io
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

import fastavro
import psycopg

from tests.chaos.load import EVENT_FRAME, EVENT_SCHEMA, Load
from tests.chaos.prices import PriceList, cost, measure

_AGE_MAX_US, _AHEAD_MAX_US = 35 * 86_400_000_000, 300_000_000

RATED, DUPLICATE, PARKED, DEAD = "rated", "duplicate", "parked", "dead_lettered"


class Place(NamedTuple):
    """Where an event arrived on ``usage.events``."""

    partition: int
    offset: int


class Arrival(NamedTuple):
    place: Place
    appended_ms: int
    value: bytes | None


class Identity(NamedTuple):
    account: str
    key: str


class Line(NamedTuple):
    """An invoice line: one charge of one account in one month under one version of the plan."""

    account: str
    charge: str
    version: int
    period_start_us: int


#: Quantity by charge.
Quantities = Mapping[str, Fraction]


@dataclass(slots=True)
class Expected:
    """The state each event has to be in, with its reason where that is a refusal; and what is billed."""

    states: dict[Place, tuple[str, str]] = field(default_factory=dict)
    rated: dict[Place, Quantities] = field(default_factory=dict)
    #: Repeats whose first was parked: any one of them is rated, the others are duplicates.
    any_one: dict[Identity, tuple[frozenset[Place], Quantities]] = field(default_factory=dict)
    lines: dict[Line, tuple[Fraction, int]] = field(default_factory=dict)
    names: dict[Place, Identity] = field(default_factory=dict)
    #: By source: which numbers arrived.
    arrived: defaultdict[str, set[int]] = field(default_factory=lambda: defaultdict(set))

    @property
    def outcomes(self) -> Counter[str]:
        counts = Counter(state for state, _ in self.states.values())
        for places, _ in self.any_one.values():
            counts[RATED] += 1
            counts[DUPLICATE] += len(places) - 1
        return counts


@dataclass(frozen=True, slots=True)
class Known:
    """What the oracle is told: agreements and what was sent; nothing of what became of it."""

    prices: PriceList
    #: Time zone of every account that was in the catalog before the load began, and of those that came later.
    first_accounts: Mapping[str, str]
    later_accounts: Mapping[str, str]
    #: Messages that are no usage: the reason each is refused for.
    refused: Mapping[bytes | None, str]


def expect(arrivals: Iterable[Arrival], known: Known) -> Expected:
    """Judge every event, each partition's in order of offset."""
    expected = Expected()
    first: dict[Identity, int] = {}
    waiting: defaultdict[Identity, list[tuple[Place, int, dict[str, Any]]]] = defaultdict(list)
    for place, appended_ms, value in arrivals:
        if value in known.refused:
            expected.states[place] = DEAD, known.refused[value]
            continue
        assert value is not None and value.startswith(EVENT_FRAME), f"{place}: not of this load: {value!r}"
        event: Any = fastavro.schemaless_reader(io.BytesIO(value[len(EVENT_FRAME) :]), EVENT_SCHEMA, None)
        identity = expected.names[place] = Identity(event["account"], event["idempotency_key"])
        if event["sequence"]:
            expected.arrived[event["source"].partition("/")[0]].add(event["sequence"])
        ahead_us = event["timestamp"] - appended_ms * 1000
        if ahead_us < -_AGE_MAX_US or ahead_us > _AHEAD_MAX_US:
            expected.states[place] = DEAD, "too_old" if ahead_us < 0 else "in_the_future"
            continue
        # With its quantities it is the same event only when all of this is the same. Transport does not count.
        payload = hash(
            (event["event_type"], event["timestamp"], event["subject"], frozenset(event["properties"].items()))
        )
        if identity.account not in known.first_accounts or identity.key.startswith("raw-"):
            waiting[identity].append((place, payload, event))
        elif (rated_as := first.get(identity)) is not None:
            same = payload == rated_as
            expected.states[place] = (DUPLICATE, "") if same else (DEAD, "conflicting_duplicate")
        else:
            found = measure(known.prices.at(event["timestamp"]), event["event_type"], event["properties"])
            if isinstance(found, str):
                expected.states[place] = DEAD, found
                continue
            first[identity] = payload
            expected.states[place] = RATED, ""
            expected.rated[place] = found
            _add(expected, event, found, known)
    for identity, events in waiting.items():
        _settle(expected, identity, events, known)
    return expected


def _settle(
    expected: Expected, identity: Identity, events: list[tuple[Place, int, dict[str, Any]]], known: Known
) -> None:
    """Events that were parked: nobody knew their account, or they stood in a wrong place."""
    assert len({payload for _, payload, _ in events}) == 1, f"{identity} was parked with different payloads"
    places, event = [place for place, _, _ in events], events[0][2]
    if identity.account not in known.first_accounts and identity.account not in known.later_accounts:
        expected.states.update(dict.fromkeys(places, (PARKED, "unknown_account")))
        return
    found = measure(known.prices.at(event["timestamp"]), event["event_type"], event["properties"])
    if isinstance(found, str):
        expected.states.update(dict.fromkeys(places, (DEAD, found)))
        return
    _add(expected, event, found, known)
    if len(places) == 1:
        expected.states[places[0]] = RATED, ""
        expected.rated[places[0]] = found
    else:
        expected.any_one[identity] = frozenset(places), found


def _add(expected: Expected, event: dict[str, Any], found: Quantities, known: Known) -> None:
    account = event["account"]
    zone = known.first_accounts.get(account) or known.later_accounts[account]
    start, version = _month(event["timestamp"] // 1_000_000, zone), known.prices.at(event["timestamp"])
    for charge, quantity in found.items():
        line = Line(account, charge, version.number, start)
        before, events = expected.lines.get(line, (Fraction(0), 0))
        expected.lines[line] = before + quantity, events + 1


def _month(at_s: int, zone: str) -> int:
    """Start of the month an instant lies in where the account is, microseconds since 1970 UTC."""
    local = datetime.fromtimestamp(at_s, ZoneInfo(zone))
    return _month_start(local.year, local.month, zone)


@lru_cache
def _month_start(year: int, month: int, zone: str) -> int:
    return int(datetime(year, month, 1, tzinfo=ZoneInfo(zone)).timestamp()) * 1_000_000


# -- What became of it -------------------------------------------------------------------------------------------------


def differences(
    expected: Expected, known: Known, load: Load, connection: "psycopg.Connection[Any]", topic: str
) -> Iterator[str]:
    """Every difference between what ought to be and what PostgreSQL has, one line each. ``topic``: usage.events."""
    yield from _lost(expected, load)
    yield from _wrong_states(expected, connection, topic)
    yield from _wrong_duplicates(expected, connection, topic)
    yield from _wrong_lines(expected, known, connection)


def _lost(expected: Expected, load: Load) -> Iterator[str]:
    for source in load.sources:
        if missing := sorted(set(range(1, load.count + 1)) - expected.arrived[source]):
            yield f"{source}: {len(missing)} of {load.count} events never arrived, the first is number {missing[0]}"


_ROWS = "SELECT origin_partition, origin_offset, charge, quantity, account, idempotency_key FROM billing.rated_usage"
_UNRATED = """
SELECT origin_partition, origin_offset, state::text, coalesce(reason, '') FROM billing.unrated_event
WHERE origin_topic = %s
"""


def _wrong_states(expected: Expected, connection: "psycopg.Connection[Any]", topic: str) -> Iterator[str]:
    rows: defaultdict[Place, dict[str, Fraction]] = defaultdict(dict)
    with connection.cursor("rows") as cursor:
        cursor.itersize = 20_000
        for partition, offset, charge, quantity, account, key in cursor.execute(_ROWS):
            place = Place(partition, offset)
            if charge in rows[place]:
                yield f"{_named(expected, place)}: two rows for {charge}"
            rows[place][charge] = Fraction(quantity)
            if expected.names.get(place) != (account, key):
                yield f"{_named(expected, place)}: its row for {charge} is of {account}/{key}"
    unrated = {
        Place(partition, offset): (state, "" if state in (RATED, DUPLICATE) else reason)
        for partition, offset, state, reason in connection.execute(_UNRATED, [topic])
    }

    def found(place: Place) -> tuple[str, str]:
        """A repeat of a rated event is dropped at once and leaves no trace but a count."""
        default = (RATED, "") if place in rows else (DUPLICATE, "")
        return unrated.get(place, default)

    for place, state in expected.states.items():
        if (is_now := found(place)) != state:
            yield f"{_named(expected, place)}: expected {_said(state)}, is {_said(is_now)}"
        if state[0] == RATED and rows.get(place) != expected.rated[place]:
            yield f"{_named(expected, place)}: expected {_shown(expected.rated[place])}, got {_shown(rows.get(place))}"
        if state[0] != RATED and place in rows:
            yield f"{_named(expected, place)}: expected {_said(state)}, but it is billed {_shown(rows[place])}"
    for identity, (places, quantities) in expected.any_one.items():
        states = Counter(found(place)[0] for place in places)
        billed = [dict(rows[place]) for place in places if place in rows]
        if states != Counter({RATED: 1, DUPLICATE: len(places) - 1}) or billed != [quantities]:
            yield f"{'/'.join(identity)} at {sorted(places)}: expected one rated and no more, got {dict(states)}"
    known_places = expected.states.keys() | {place for places, _ in expected.any_one.values() for place in places}
    for place in (rows.keys() | unrated.keys()) - known_places:
        yield f"{_named(expected, place)}: became {found(place)[0]}, but no such event arrived"


_DUPLICATES = """
SELECT coalesce(sum(duplicates), 0) + (
    SELECT count(*) FROM billing.unrated_event WHERE state = 'duplicate' AND origin_topic = %(topic)s
) FROM billing.receipt WHERE topic = %(topic)s
"""


def _wrong_duplicates(expected: Expected, connection: "psycopg.Connection[Any]", topic: str) -> Iterator[str]:
    row = connection.execute(_DUPLICATES, {"topic": topic}).fetchone()
    wanted, counted = expected.outcomes[DUPLICATE], row[0] if row else None
    if counted != wanted:
        yield f"expected {wanted} duplicates, receipts tell of {counted}"


_LINES = """
SELECT account, charge, plan_version, extract(epoch FROM period_start)::bigint * 1000000, segment_start, quantity,
    exact_amount, events
FROM finance.invoice_lines
"""


def _wrong_lines(expected: Expected, known: Known, connection: "psycopg.Connection[Any]") -> Iterator[str]:
    left = dict(expected.lines)
    for account, charge, number, period_us, segment, quantity, amount, events in connection.execute(_LINES):
        line = Line(account, charge, number, period_us)
        wanted, count = left.pop(line, (None, 0))
        if wanted is None:
            yield f"{line}: not expected, holds {amount} for {quantity}"
            continue
        version = known.prices.numbered(number)
        price = cost(next(one for one in version.charges if one["id"] == charge), wanted)
        start_us = max(period_us, version.valid_from_us)
        if (Fraction(quantity), Fraction(amount), events) != (wanted, price, count):
            yield (
                f"{line}: expected {_decimal(price)} for {_decimal(wanted)} in {count} events, "
                f"got {amount} for {quantity} in {events}"
            )
        if int(segment.timestamp() * 1_000_000) != start_us:
            yield f"{line}: expected to count from {datetime.fromtimestamp(start_us / 1e6, UTC)}, got {segment}"
    for line, (wanted, count) in left.items():
        yield f"{line}: expected {_decimal(wanted)} in {count} events, got no such line"


def _named(expected: Expected, place: Place) -> str:
    name = expected.names.get(place)
    return f"{place.partition}/{place.offset}{f' ({name.account}/{name.key})' if name else ''}"


def _said(state: tuple[str, str]) -> str:
    return " ".join(state).rstrip()


def _shown(quantities: Quantities | None) -> str:
    return ", ".join(f"{charge} {_decimal(quantity)}" for charge, quantity in (quantities or {}).items()) or "no row"


def _decimal(value: Fraction) -> Decimal:
    return Decimal(value.numerator) / Decimal(value.denominator)
