"""What must hold after every step of every history (``check``), and once everything was worked off (``check_end``).

Judged from outside: from the committed records of the topics, the committed rows of the database and what is on the
disks, with prices worked out in exact fractions.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache
from typing import Any

from pipeline.core.charges import Charge
from pipeline.core.plans import Plan
from pipeline.infra.avro import CORRECTIONS, DEAD_LETTER, EVENTS, RATED, RECEIPTS, frame
from pipeline.rating.batch import RETRY_FOR_MS
from pipeline.rating.changelog import reached as processed
from pipeline.rating.correct import correction_identity
from tests.rating.world import SCHEMAS, cost
from tests.simulation.kafka import Entry
from tests.simulation.world import GROUP, PARTITIONS, SOURCES, TOPICS, World, prices

Origin = tuple[int, int]

decoded = lru_cache(maxsize=20_000)(SCHEMAS.decode)
_cost = lru_cache(maxsize=20_000)(cost)
_CHARGES = {version: {charge.id: charge for charge in prices(version, 0).charges} for version in (0, 1)}


def check(world: World) -> None:
    """Safety: nothing that is committed anywhere breaks a law."""
    _check_raters(world)
    _check_disks(world)
    _check_sinks(world)


def _committed(world: World, topic: str, partition: int, end: int | None = None) -> Iterator[Entry]:
    return world.broker.logs[topic, partition].committed(0, end)


# -- what raters committed


def _check_raters(world: World) -> None:
    for partition in range(PARTITIONS):
        rows = [decoded(entry.value, RATED) for entry in _committed(world, TOPICS.rated, partition)]
        receipts = [decoded(entry.value, RECEIPTS) for entry in _committed(world, TOPICS.receipts, partition)]
        _check_once(rows)
        _check_amounts(world, rows)
        _check_changelogs(world, partition, rows)
        _check_receipts(world, partition, receipts, rows)


def _check_once(rows: list[dict[str, Any]]) -> None:
    """Each identity is rated once, for all its charges, from one arrival; and so is each of its corrections."""
    charges: defaultdict[tuple[bytes, int], list[tuple[str, str, Origin]]] = defaultdict(list)
    for row in rows:
        origin = (row["origin_partition"], row["origin_offset"])
        charges[row["identity"], row["entry"]].append((row["charge"], row["kind"], origin))
    for (identity, entry), rated in charges.items():
        assert len(rated) == 2, f"expected one row for each of two charges, got {rated}"
        assert rated[0][0] != rated[1][0], f"rated twice for a charge: {rated}"
        assert rated[0][1:] == rated[1][1:], f"rated from two arrivals: {rated}"
        kind = "usage" if entry == 0 else "void" if entry % 2 else "correction"
        assert rated[0][1] == kind, f"expected entry {entry} of kind {kind}, got {rated}"
        assert entry == 0 or (identity, entry - 1) in charges, f"entry {entry} without the one before: {rated}"


def _check_amounts(world: World, rows: list[dict[str, Any]]) -> None:
    """Running quantities chain; amounts are what the prices make of them that the row's catalog offset knew."""
    at: dict[tuple[Any, ...], Fraction] = {}
    for row in rows:
        event = row["event"]
        counter = (event["account"], row["contract"], row["charge"], row["segment_start"])
        before, after = Fraction(row["quantity_before"]), Fraction(row["quantity_after"])
        assert before == at.get(counter, 0), f"{counter}: goes on at {before}, not at {at.get(counter, 0)}"
        tokens = Fraction(event["properties"]["tokens"])
        assert after == before + (-tokens if row["kind"] == "void" else tokens)
        known = [item for item in world.catalog[: row["catalog_offset"]] if isinstance(item, Plan)]
        happened_us = int(event["timestamp"].timestamp()) * 1_000_000
        in_force = max((p for p in known if p.valid_from_us <= happened_us), key=lambda p: (p.valid_from_us, p.version))
        assert row["plan_version"] == in_force.version, f"priced by version {row['plan_version']}, not {in_force}"
        charge = _CHARGES[in_force.version % 2][row["charge"]]
        assert Fraction(row["amount"]) == _amount(charge, before if counter in at else None, after)
        at[counter] = after


def _amount(charge: Charge, before: Fraction | None, after: Fraction) -> Fraction:
    """What a row adds that moves a counter so, taking an event back too; ``before`` is None for the first."""
    if charge.model == "percentage":
        units = after - (before or 0)
        return units * Fraction(charge.rate or 0) / 100 + (1 if units > 0 else -1) * Fraction(charge.fixed)
    return _cost(charge, after) - (0 if before is None else _cost(charge, before))


def _check_changelogs(world: World, partition: int, rows: list[dict[str, Any]]) -> None:
    """They say what the rows say: who was rated and corrected, and how far each counter is."""
    seen = Counter(identity for identity, _ in _seen(world, partition))
    applied = {
        row["identity"] if row["entry"] == 0 else correction_identity(row["identity"], row["entry"])
        for row in rows
        if row["kind"] != "correction"
    }
    assert seen == Counter(dict.fromkeys(applied, 1)), "rater.seen is not what was rated"
    totals = _totals(world, partition)
    for source, topic in SOURCES.items():
        offset = world.broker.groups[GROUP].offset((topic, partition))
        assert totals.pop(processed(source), 0) == offset, f"rater.totals is not where the group is on {topic}"
    reached: dict[tuple[Any, ...], int] = {}
    for row in rows:
        key = (row["event"]["account"], row["contract"], row["charge"], row["segment_start"])
        reached[key] = int(Fraction(row["quantity_after"]) * 10**9)
    assert sorted(totals.values()) == sorted(reached.values()), "rater.totals is not what was rated"


def _check_receipts(world: World, partition: int, receipts: list[dict[str, Any]], rows: list[dict[str, Any]]) -> None:
    """They cover every offset once, up to the committed one, and count what there is."""
    at = {TOPICS.events: 0, TOPICS.retry: 0}
    for receipt in receipts:
        topic = receipt["topic"]
        assert receipt["first_offset"] == at[topic], f"{topic}: a receipt from {receipt['first_offset']}, not {at}"
        at[topic] = receipt["next_offset"]
        counted = sum(receipt[name] for name in _OUTCOMES)
        there = list(world.broker.logs[topic, partition].committed(receipt["first_offset"], receipt["next_offset"]))
        assert receipt["records"] == counted == len(there), f"a receipt counts otherwise than the log: {receipt}"
    for topic, offset in at.items():
        committed = world.broker.groups[GROUP].offset((topic, partition))
        assert committed == offset, f"{topic}: the group is at {committed}, receipts at {offset}"
    assert sum(receipt["rated_rows"] for receipt in receipts) == len(rows)


_OUTCOMES = ("rated", "duplicates", "parked", "dead_lettered", "corrections")


def _check_disks(world: World) -> None:
    """What a disk remembers is what the changelogs hold up to its positions: nothing that was not committed."""
    for path, disk in world.disks.items():
        positions, seen, totals = disk.states[-1]
        partition = int(path.rpartition("/")[2])
        ends = (0, 0) if positions is None else positions
        assert seen == dict(_seen(world, partition, ends[0])), f"{path}: identities that were not committed"
        assert totals == _totals(world, partition, ends[1]), f"{path}: quantities that were not committed"


def _seen(world: World, partition: int, end: int | None = None) -> list[tuple[bytes, bytes]]:
    """Identities and payloads of the changelog: five bytes of head, then 24 each."""
    values = [(entry.value or b"")[5:] for entry in _committed(world, TOPICS.seen, partition, end)]
    return [(value[i : i + 16], value[i + 16 : i + 24]) for value in values for i in range(0, len(value), 24)]


def _totals(world: World, partition: int, end: int | None = None) -> dict[bytes | None, int]:
    return {entry.key: int(entry.value or b"") for entry in _committed(world, TOPICS.totals, partition, end)}


# -- what sinks committed

_CORRECTION = frame(SCHEMAS.newest(CORRECTIONS).id)


def _check_sinks(world: World) -> None:
    tables = world.store.tables
    rows: list[tuple[int, int]] = []
    receipts: list[dict[str, Any]] = []
    letters: list[tuple[str, int, int, dict[str, Any]]] = []
    for (topic, partition), position in tables["position"].items():
        assert position <= world.broker.logs[topic, partition].stable_end, f"{topic} {partition}: behind an open end"
        below = _committed(world, topic, partition, position)
        if topic == TOPICS.rated:
            rows += ((partition, entry.offset) for entry in below)
        elif topic == TOPICS.receipts:
            receipts += (decoded(entry.value, RECEIPTS) for entry in below)
        else:
            for entry in below:
                if not (entry.value or b"").startswith(_CORRECTION):
                    letters.append((topic, partition, entry.offset, decoded(entry.value, DEAD_LETTER)))

    billed = [(row["rated_partition"], row["rated_offset"]) for row in tables["rated"].values()]
    assert Counter(billed) == Counter(rows), "what is billed is not what was rated up to the sink's positions"
    assert tables["quarantine"] == {}, f"messages that should not be there: {tables['quarantine']}"
    sums: Counter[tuple[int, str]] = Counter()
    for row in tables["rated"].values():
        events = -1 if row["kind"] == "void" else 1
        for name, value in (("quantity", row["quantity"]), ("amount", row["amount"]), ("events", events)):
            sums[row["line_id"], name] += value
    ids = {line["id"] for line in tables["line"].values()}
    assert {number for number, _ in sums} <= ids, "rows that stand on no line"
    for line in tables["line"].values():
        model = _CHARGES[line["plan_version"] % 2][line["charge"]].model
        assert line == world.closed_lines.get(line["id"], line), f"a line of a closed invoice has changed: {line}"
        assert line["price_class"] == ("per_event" if model == "percentage" else "running")
        for name in ("quantity", "amount", "events"):
            assert line[name] == sums[line["id"], name], f"{name} of a line is not the sum of its rows: {line}"

    covered = Counter((receipt["topic"], receipt["partition"], receipt["first_offset"]) for receipt in receipts)
    assert Counter(tables["receipt"].keys()) == covered, "receipts in the database are not those of the topic"
    arrived: defaultdict[tuple[str, int], int] = defaultdict(int)
    for receipt in receipts:
        for one in receipt["sequences"]:
            arrived[one["source"], one["block"]] |= int.from_bytes(one["bits"], "little")
    assert tables["sequence"] == arrived, "the sequence numbers that arrived are not those of the receipts"
    assert {key[1:]: row["state"] for key, row in tables["unrated"].items()} == _states(letters, receipts)


def _states(letters: list[tuple[str, int, int, dict[str, Any]]], receipts: list[dict[str, Any]]) -> dict[Origin, str]:
    """The state of every event that was not rated at first sight: rated, else duplicate, else what its letter says."""
    newest: dict[Origin, tuple[Any, ...]] = {}
    for topic, partition, offset, letter in letters:
        origin = (letter["origin_partition"], letter["origin_offset"])
        dead = topic == TOPICS.dead_letter
        newest[origin] = max(
            newest.get(origin, (-1,)), (letter["replays"], letter["attempts"], dead, partition, offset)
        )
    states = {origin: "dead_lettered" if rank[2] else "parked" for origin, rank in newest.items()}
    for wanted in ("duplicate", "rated"):
        for receipt in receipts:
            for one in receipt["resolutions"]:
                if one["outcome"] == wanted:
                    states[one["origin_partition"], one["origin_offset"]] = wanted
    return states


# -- at the end


def check_end(world: World) -> None:
    """Liveness: everything is worked off, and every arrival is in the one state it ought to be in."""
    for partition in range(PARTITIONS):
        for topic in (TOPICS.events, TOPICS.retry):
            done = world.broker.groups[GROUP].offset((topic, partition))
            left = list(world.broker.logs[topic, partition].committed(done))
            assert topic == TOPICS.retry or not left, f"{topic} {partition}: {len(left)} events were left behind"
        for topic in (TOPICS.rated, TOPICS.receipts, TOPICS.retry, TOPICS.dead_letter):
            log = world.broker.logs[topic, partition]
            at = world.store.tables["position"].get((topic, partition), 0)
            assert not list(log.committed(at)), f"{topic} {partition}: the sink stands at {at} of {log.end}"

    states = _end_states(world)
    published = {item.account for item in world.catalog if hasattr(item, "account")}
    expired = world.broker.now_ms - world.started_ms > RETRY_FOR_MS
    by_identity: defaultdict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    for origin, event in _arrivals(world):
        state = states.pop(origin)
        if event is None:
            assert state == "dead_lettered", f"junk at {origin} is {state}"
        elif event["account"] not in published:
            assert state == "parked" or (expired and state == "dead_lettered"), f"{event} is {state}"
        else:
            by_identity[event["account"], event["idempotency_key"]].append((event["properties"]["tokens"], state))
    assert states == {}, f"states of what never arrived: {states}"
    for identity, arrivals in by_identity.items():
        rated = [tokens for tokens, state in arrivals if state == "rated"]
        ratable = [tokens for tokens, _ in arrivals if tokens != "many"]
        # Parked for longer than a week before its account came, it waits for a person.
        given_up = expired and identity[0] in world.late and all(state == "dead_lettered" for _, state in arrivals)
        assert len(rated) == bool(ratable and not given_up), f"{identity} is rated {len(rated)} times: {arrivals}"
        for tokens, state in arrivals:
            allowed = {"rated", "duplicate"} if rated == [tokens] else {"dead_lettered"}
            if expired and identity[0] in world.late:
                allowed |= {"dead_lettered"}
            assert state in allowed, f"{identity} with {tokens} is {state}: {arrivals}"
    voided = {
        (row["identity"].bytes, int(row["entry"]))
        for row in world.store.tables["rated"].values()
        if row["kind"] == "void"
    }
    assert voided == world.corrections.keys(), "what was taken back is not what was to be corrected"
    _check_counts(world)


def _arrivals(world: World) -> Iterator[tuple[Origin, dict[str, Any] | None]]:
    for partition in range(PARTITIONS):
        for entry in _committed(world, TOPICS.events, partition):
            junk = entry.value is None or entry.value.startswith(b"\xff")
            yield (partition, entry.offset), None if junk else decoded(entry.value, EVENTS)


def _end_states(world: World) -> dict[Origin, str]:
    """The state of every arrival, as the database has it: what is neither unrated nor billed was a duplicate."""
    unrated = {key[1:]: row["state"] for key, row in world.store.tables["unrated"].items()}
    billed = {(int(row["origin_partition"]), int(row["origin_offset"])) for row in world.store.tables["rated"].values()}
    states: dict[Origin, str] = {}
    for origin, _ in _arrivals(world):
        states[origin] = unrated.get(origin) or ("rated" if origin in billed else "duplicate")
        assert (states[origin] == "rated") == (origin in billed), f"{origin} is {states[origin]}, and not billed so"
    return states | {origin: state for origin, state in unrated.items() if origin not in states}


def _check_counts(world: World) -> None:
    """Law 8: arrivals = rated + duplicate + parked + dead-lettered, from receipts and unrated events alone."""
    counts: Counter[str] = Counter()
    for (topic, *_), row in world.store.tables["receipt"].items():
        if topic == TOPICS.events:
            counts += Counter(
                dict(zip(("records", "rated", "duplicate", "parked", "dead_lettered"), row[5:10], strict=True))
            )
    came = Counter(row["state"] for row in world.store.tables["unrated"].values())
    unrated = counts["parked"] + counts["dead_lettered"]
    assert counts["records"] == sum(1 for _ in _arrivals(world))
    assert came.total() == unrated, f"{unrated} events were not rated at first sight, {came.total()} have a state"
