"""PostgreSQL in memory, as far as the sink asks it: read committed, row locks, one answer per statement of the sink.

The sink's own code runs unchanged over ``Session``, which stands in for its connection and knows every statement by
the constant it is. ``test_store.py`` holds the answers against a real server.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any
from uuid import UUID

from psycopg import Error, OperationalError
from psycopg.errors import DeadlockDetected, UniqueViolation

from pipeline.billing import commit, lines, receipts, sink, unrated
from pipeline.billing.rated import PRICE_CLASSES
from pipeline.billing.receipts import Receipt
from tests.simulation.tasks import pause

Key = tuple[str, Any]
Rows = list[tuple[Any, ...]]

_LINE = lines._LINE_COLUMNS.split(", ")
_ROW = commit._COLUMNS.split(", ")
_QUANTITIES = ("quantity", "quantity_before", "quantity_after")
#: Columns of a stored receipt.
RECEIPT = (*receipts._KEY, *receipts._REST)


class Store:
    """What is committed, and who holds which row. Tables by name: their rows by primary key."""

    def __init__(self) -> None:
        self.tables: dict[str, dict[Any, Any]] = {
            name: {}
            for name in ("position", "invoice", "line", "rated", "receipt", "sequence", "unrated", "quarantine")
        }
        self.locks: dict[Key, Session] = {}
        self.commits = 0
        #: What the next commit meets: ``lost`` (rolled back, the connection gone) or ``late`` (done, but gone too).
        self.fault: str | None = None
        self._ids = 0

    def next_id(self) -> int:
        self._ids += 1
        return self._ids


class Session:
    """A connection. One transaction at a time; outside of one every statement is its own."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._writes: dict[Key, Any] = {}
        self._in_transaction = False
        self._staged: list[dict[str, Any]] = []
        self._waits_for: Session | None = None
        self._found: Rows = []
        self._gone = False
        self._answers: dict[str, Callable[[Any], Rows]] = {
            commit._MOVE_POSITIONS: self._move_positions,
            commit._INSERT_STAGED: self._insert_staged,
            commit._ADD_TO_LINES: self._add_to_lines,
            commit._CONFLICTS: self._conflicts,
            commit._BILLED: self._billed,
            commit._QUARANTINE: self._quarantine,
            lines._SELECT_REFERENCES: lambda _: [],  # no plan here has reference properties
            lines._CREATE_INVOICES: self._create_invoices,
            lines._SELECT_INVOICES: self._select_invoices,
            lines._LOCK_INVOICES: self._lock_invoices,
            lines._CREATE_LINES: self._create_lines,
            lines._SELECT_LINES: self._select_lines,
            lines._SET_PRICE_CLASSES: self._set_price_classes,
            receipts._INSERT: self._insert_receipt,
            receipts._SAME: self._same_receipt,
            sink._READ_POSITIONS: self._read_positions,
            sink._INSERT_POSITION: self._insert_position,
            unrated._MERGE_LETTER: self._merge_letter,
            unrated._MERGE_RESOLUTION: self._merge_resolution,
        }

    # -- as psycopg has it

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._roll_back()
        self._gone = True

    def execute(self, statement: str, parameters: Any = (), *, prepare: bool | None = None) -> "Session":
        if statement.startswith("CREATE TEMPORARY TABLE"):
            return self
        pause("statement")
        if self._gone:
            raise OperationalError("the connection is closed")
        try:
            self._found = self._answers[statement](parameters)
        except KeyError:
            if statement in self._answers:
                raise
            raise AssertionError(f"the simulation has no answer to: {statement}") from None
        if not self._in_transaction:
            self._commit()
        return self

    def executemany(self, statement: str, many: Sequence[Any]) -> None:
        for parameters in many:
            self.execute(statement, parameters)

    def fetchone(self) -> tuple[Any, ...] | None:
        return self._found[0] if self._found else None

    def fetchall(self) -> Rows:
        return self._found

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return iter(self._found)

    def cursor(self) -> "nullcontext[Session]":
        return nullcontext(self)

    def pipeline(self) -> "nullcontext[None]":
        return nullcontext()

    @contextmanager
    def copy(self, statement: str) -> "Iterator[Session]":
        assert statement in (commit._COPY, commit._STAGE)
        pause("copy")
        self._copied: list[dict[str, Any]] = []
        yield self
        if statement == commit._STAGE:
            self._staged += self._copied
        elif not all(self._insert("rated", self._row_key(row), row) for row in self._copied):
            raise UniqueViolation("a row is there already")

    def write(self, text: str) -> None:
        for row in text.splitlines():
            fields = dict(zip(_ROW, row.split("\t"), strict=True))
            assert "\\" not in row, "escapes are not simulated"
            self._copied.append(
                fields
                | {name: int(fields[name]) for name in ("line_id", "rated_partition", "rated_offset", "entry")}
                | {name: int(fields[name].removesuffix("e-9")) for name in _QUANTITIES}
                | {"identity": UUID(hex=fields["identity"]), "amount": int(fields["amount"].removesuffix("e-12"))}
            )

    @contextmanager
    def transaction(self) -> Iterator[None]:
        if self._in_transaction:  # a savepoint
            writes = dict(self._writes)
            try:
                yield
            except Error:
                self._writes = writes
                raise
            return
        self._in_transaction = True
        try:
            yield
            pause("commit")
            fault, self._store.fault = self._store.fault, None
            if fault == "lost":
                raise OperationalError("the connection was lost")
            self._commit()
        finally:
            self._roll_back()
            self._in_transaction = False
        if fault == "late":
            self._gone = True
            raise OperationalError("the connection was lost")
        pause("answered")

    # -- transactions

    def _commit(self) -> None:
        if self._writes:
            for (table, key), value in self._writes.items():
                self._store.tables[table][key] = value
            self._store.commits += 1
        self._roll_back()

    def _roll_back(self) -> None:
        self._writes.clear()
        self._staged.clear()
        locks = self._store.locks
        for key in [key for key, owner in locks.items() if owner is self]:
            del locks[key]

    def _lock(self, table: str, key: Any) -> None:
        """Wait for whoever holds the row. Raises DeadlockDetected when that one waits for us."""
        locks = self._store.locks
        while (owner := locks.get((table, key), self)) is not self:
            other: Session | None = owner
            while other is not None:
                if other is self:
                    raise DeadlockDetected("deadlock detected")
                other = other._waits_for
            self._waits_for = owner
            try:
                pause("lock", waits=True)
            finally:
                self._waits_for = None
        locks[table, key] = self

    def _read(self, table: str, key: Any) -> Any:
        return self._writes.get((table, key), self._store.tables[table].get(key))

    def _rows(self, table: str) -> dict[Any, Any]:
        return self._store.tables[table] | {key: value for (name, key), value in self._writes.items() if name == table}

    def _put(self, table: str, key: Any, value: Any) -> None:
        self._lock(table, key)
        self._writes[table, key] = value

    def _insert(self, table: str, key: Any, value: Any) -> bool:
        """ON CONFLICT DO NOTHING: was it inserted?"""
        self._lock(table, key)
        if self._read(table, key) is not None:
            return False
        self._writes[table, key] = value
        return True

    # -- positions

    def _read_positions(self, parameters: Any) -> Rows:
        places = list(zip(*parameters, strict=True))
        return [(*place, at) for place in places if (at := self._read("position", place)) is not None]

    def _insert_position(self, parameters: Any) -> Rows:
        topic, partition, beginning = parameters
        return [(beginning,)] if self._insert("position", (topic, partition), beginning) else []

    def _move_positions(self, parameters: Any) -> Rows:
        moved = []
        for topic, partition, expected, following in zip(*parameters, strict=True):
            place = (topic, partition)
            self._lock("position", place)
            if self._read("position", place) == expected:
                self._put("position", place, following)
                moved.append(place)
        return moved

    # -- invoices and lines

    def _create_invoices(self, parameters: Any) -> Rows:
        for key in zip(*parameters, strict=True):
            self._insert("invoice", key, {"id": self._store.next_id(), "state": "open"})
        return []

    def _select_invoices(self, parameters: Any) -> Rows:
        found = []
        for at, period in enumerate(zip(*parameters, strict=True), 1):
            of_period = [(key[4], value) for key, value in self._rows("invoice").items() if key[:4] == period]
            if of_period:
                supplement, last = max(of_period, key=lambda one: one[0])
                found.append((at, last["id"], supplement, last["state"] == "open"))
        return found

    def _lock_invoices(self, parameters: Any) -> Rows:
        wanted = set(parameters[0])
        found = sorted((value["id"], key) for key, value in self._rows("invoice").items() if value["id"] in wanted)
        for _, key in found:
            self._lock("invoice", key)
        return [(number,) for number, key in found if self._read("invoice", key)["state"] == "open"]

    def _create_lines(self, parameters: Any) -> Rows:
        for key in zip(*parameters, strict=True):
            empty = {"id": self._store.next_id(), "price_class": "running", "quantity": 0, "amount": 0, "events": 0}
            self._insert("line", key, dict(zip(_LINE, key, strict=True)) | empty)
        return []

    def _select_lines(self, parameters: Any) -> Rows:
        return [(self._read("line", key)["id"],) for key in zip(*parameters, strict=True)]

    def _set_price_classes(self, parameters: Any) -> Rows:
        by_id = {line["id"]: (key, line) for key, line in self._rows("line").items()}
        for line_id, price_class in zip(*parameters, strict=True):
            key, line = by_id[line_id]
            if PRICE_CLASSES.index(line["price_class"]) < PRICE_CLASSES.index(price_class):
                self._put("line", key, line | {"price_class": price_class})
        return []

    # -- rows

    @staticmethod
    def _row_key(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row[name] for name in ("event_month", "identity", "charge", "cell", "entry"))

    def _insert_staged(self, _: Any) -> Rows:
        inserted = [row for row in self._staged if self._insert("rated", self._row_key(row), row)]
        return [(row["rated_partition"], row["rated_offset"]) for row in inserted]

    def _add_to_lines(self, parameters: Any) -> Rows:
        by_id = {line["id"]: (key, line) for key, line in self._rows("line").items()}
        for line_id, quantity, amount, events, *_ in zip(*parameters, strict=True):
            key, line = by_id[line_id]
            more = (int(quantity.removesuffix("e-9")), int(amount.removesuffix("e-12")), events)
            sums = {name: line[name] + add for name, add in zip(_SUMS, more, strict=True)}
            self._put("line", key, line | sums)
        return []

    def _conflicts(self, _: Any) -> Rows:
        places = ("rated_partition", "rated_offset")
        return [
            (row["rated_partition"], row["rated_offset"])
            for row in self._staged
            if any(row[name] != self._read("rated", self._row_key(row))[name] for name in places)
        ]

    def _billed(self, parameters: Any) -> Rows:
        found = []
        for month, identity, charge, cell, entry, partition, offset in zip(*parameters, strict=True):
            row = self._read("rated", (month.isoformat(), identity, charge, cell, entry))
            if row is not None:
                same = (row["rated_partition"], row["rated_offset"]) == (partition, offset)
                found.append((partition, offset, same))
        return found

    def _quarantine(self, parameters: Any) -> Rows:
        return [
            (reason,)
            for reason, topic, partition, offset, *rest in zip(*parameters, strict=True)
            if self._insert("quarantine", (topic, partition, offset), (reason, *rest))
        ]

    # -- accounting

    def _insert_receipt(self, values: Any) -> Rows:
        row = tuple(values[name] for name in RECEIPT)
        return [row[2:3]] if self._insert("receipt", row[:3], row) else []

    def _same_receipt(self, values: Any) -> Rows:
        row = tuple(values[name] for name in RECEIPT)
        return [(1,)] if self._read("receipt", row[:3]) == row else []

    def merge_sequence(self, source: str, block: int, bits: int) -> None:
        self._lock("sequence", (source, block))
        self._put("sequence", (source, block), (self._read("sequence", (source, block)) or 0) | bits)

    def _merge_letter(self, letter: Any) -> Rows:
        key = (letter["origin_topic"], letter["origin_partition"], letter["origin_offset"])
        self._lock("unrated", key)
        stored = self._read("unrated", key)
        if stored is None:
            self._put("unrated", key, letter)
        elif stored["letter_topic"] is None or _rank(letter) > _rank(stored):
            settled = stored["state"] in ("rated", "duplicate")
            self._put("unrated", key, letter | ({"state": stored["state"]} if settled else {}))
        return []

    def _merge_resolution(self, parameters: Any) -> Rows:
        *key, state = parameters
        self._lock("unrated", tuple(key))
        stored = self._read("unrated", tuple(key))
        if stored is None:
            self._put("unrated", tuple(key), {"state": state, "letter_topic": None})
        elif stored["state"] not in ("rated", state):
            self._put("unrated", tuple(key), stored | {"state": state})
        return []


_SUMS = ("quantity", "amount", "events")


def _rank(letter: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(letter[name] for name in unrated._RANK)


def write_sequences(session: Session, written: Sequence[Receipt], *_: object, **options: object) -> None:
    """In the place of ``pipeline.billing.sequences``, whose folding and marks no law here depends on: the bit maps."""
    blocks: dict[tuple[str, int], int] = {}
    for receipt in written:
        for one in receipt.record["sequences"]:
            place = (one["source"], one["block"])
            blocks[place] = blocks.get(place, 0) | int.from_bytes(one["bits"], "little")
    for place, bits in sorted(blocks.items()):
        pause("statement")
        session.merge_sequence(*place, bits)
