"""Why an event, a line, an invoice or an account's month is what it is: inputs, versions, arithmetic, links both ways.

Everything is read from what the pipeline stored; the price is worked out anew and held against the stored amount.
Answers are plain data: quantities and amounts exact decimals, times aware, UTC.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from typing import Any, TypeAlias
from uuid import UUID

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition
from psycopg import Connection
from psycopg.rows import dict_row
from xxhash import xxh3_128_digest

from pipeline.billing.close_entries import StoredLine, read_lines
from pipeline.billing.explain_documents import billed_on, document, numbered
from pipeline.billing.intake import PlainReader
from pipeline.billing.prices import LinePrice, NoPrice, Priced, Prices, read_catalog
from pipeline.billing.rated import Malformed
from pipeline.billing.rerate import Month, differences, is_line_of, periods_of, price_period
from pipeline.core.catalog import Segment
from pipeline.core.cells import cell_values
from pipeline.core.charges import Charge, Share, compile_amount, event_shares, tier_shares
from pipeline.core.explanations import Wording, explain_parts, explain_share, explain_usage
from pipeline.core.members import Member
from pipeline.core.money import (
    AMOUNT_DECIMALS,
    QUANTITY_DECIMALS,
    Amount,
    Quantity,
    amount_decimal,
    quantity_decimal,
    scaled,
)
from pipeline.core.periods import to_datetime
from pipeline.core.reasons import Rejection
from pipeline.core.rerating import ClosedLine
from pipeline.infra import wire
from pipeline.infra.avro import EVENTS, load_schemas
from pipeline.infra.kafka import passes
from pipeline.infra.postgres import connect
from pipeline.infra.settings import Settings
from pipeline.infra.topics import Topics

Explanation: TypeAlias = dict[str, Any]

#: Events named on a line's explanation; ``finance.line_events`` has all.
LINE_EVENTS_MAX = 10
#: Longest wait for one message of the broker, seconds.
_BROKER_ANSWER_S = 10.0


class Ambiguous(ValueError):
    """A key that several accounts have used, or a number that is another thing's too; the message names them."""


def explain(settings: Settings, what: str) -> Explanation | None:
    """Explain a document by its number, ``document:ID``, ``line:ID``, ``invoice:ID`` (usage collected for a period),
    ``month:ACCOUNT/YYYY-MM``, ``usage.events/PARTITION/OFFSET``, ``ACCOUNT/KEY`` or ``KEY``.

    None when there is no such thing. Raises Ambiguous for a bare key of several accounts, for a number that two legal
    entities gave or that is an event's key too; ValueError for a charge that cannot be priced.
    """
    with connect(settings.dsn, application="explain") as connection:
        if found := re.fullmatch(r"line:(\d{1,18})", what):
            return _line(connection, int(found[1]))
        if found := re.fullmatch(r"invoice:(\d{1,18})", what):
            return _invoice(connection, int(found[1]))
        if found := re.fullmatch(r"document:(\d{1,18})", what):
            return document(connection, int(found[1]))
        if found := re.fullmatch(r"month:(.+)/(\d{4}-\d{2})", what):
            return _month(connection, found[1], Month.parse(found[2]))
        prefix = re.escape(settings.topic_prefix)
        if found := re.fullmatch(rf"(?:{prefix})?usage\.events/(\d{{1,9}})/(\d{{1,18}})", what):
            return _Finder(settings, connection).at_origin(int(found[1]), int(found[2]))
        return _by_name(settings, connection, what)


def _by_name(settings: Settings, connection: "Connection[Any]", what: str) -> Explanation | None:
    """The document with this number, or the event with this key: either may be any text."""
    documents = numbered(connection, what)
    event = _Finder(settings, connection).by_key(what)
    named = [f"document:{id} (of {entity})" for id, entity in documents]
    if event is not None:
        named.append(f"{event['account']}/{event['idempotency_key']} (an event)")
    if len(named) > 1:
        raise Ambiguous(f"{len(named)} things have this name, say which: {', '.join(named)}")
    return document(connection, documents[0][0]) if documents else event


def identity(account: str, key: str) -> bytes:
    """128-bit hash that names an event, as the rater makes it."""
    return xxh3_128_digest(wire.text(key) + wire.text(account))


# -- events

_ACCOUNTS = """
SELECT account FROM billing.invoice UNION SELECT account FROM billing.unrated_event WHERE account IS NOT NULL
"""


@dataclass(frozen=True, slots=True)
class _Finder:
    """Looks for an event in all the places it may be."""

    settings: Settings
    connection: "Connection[Any]"

    def by_key(self, what: str) -> Explanation | None:
        # A key may hold slashes itself, so each may be the one behind the account.
        named = {(what[:i], what[i + 1 :]) for i, character in enumerate(what) if character == "/"}
        candidates = sorted(named | {(account, what) for (account,) in self.connection.execute(_ACCOUNTS)})
        rows = _rated_rows(self.connection, candidates)
        unrated = _unrated_of(self.connection, candidates)
        found = {(row["account"], row["idempotency_key"]) for row in (*rows, *unrated)}
        if not found:
            return None
        if len(found) > 1:
            names = ", ".join(sorted(f"{account}/{key}" for account, key in found)[:10])
            raise Ambiguous(f"{len(found)} events have this key, say which: {names}")
        arrival = self._rated_arrival(rows[0]) if rows else self._unrated_arrival(unrated[0])
        return self._event(*found.pop(), arrival, rows, unrated)

    def at_origin(self, partition: int, offset: int) -> Explanation | None:
        unrated = _unrated_at(self.connection, self._events_topic, partition, offset)
        if unrated is None:
            # The event as it arrived tells its key, also that of a duplicate, of which nothing else is kept.
            message = self._read(partition, offset)
            if message is None:
                return None
            value, appended_ms = message
            event = self._decoded(value)
        else:
            value, event = unrated["value"], self._decoded(unrated["value"])
        if event is not None:
            account, key = event["account"], event["idempotency_key"]
            rows = _rated_rows(self.connection, [(account, key)])
            others = _unrated_of(self.connection, [(account, key)])
        else:
            account, key, rows = None, None, []
            others = [] if unrated is None else [unrated]
        original = next(
            (row for row in rows if (row["origin_partition"], row["origin_offset"]) == (partition, offset)), None
        )
        if original is not None:
            arrival = self._rated_arrival(original)
        elif unrated is not None:
            arrival = self._unrated_arrival(unrated)
        else:
            receipt = self._receipt(partition, offset)
            arrival = {
                "state": "not_rated_yet" if receipt is None else "duplicate" if rows else "not_written_yet",
                "origin": self._origin(partition, offset),
                "arrived_at": to_datetime(appended_ms * 1000),
                "receipt": receipt,
                "event": event,
            }
        return self._event(account, key, arrival, rows, others)

    def _event(
        self,
        account: str | None,
        key: str | None,
        arrival: Explanation,
        rows: list[Explanation],
        unrated: list[Explanation],
    ) -> Explanation:
        prices = Prices(self.connection)
        corrections = [] if not rows else _corrections(self.connection, rows)
        if arrival["state"] == "rated":
            arrival = arrival | {"state": _STATE_OF[max(rows, key=lambda row: int(row["entry"]))["kind"]]}
        return {
            "kind": "event",
            "account": account,
            "idempotency_key": key,
            **arrival,
            "corrections": corrections,
            "rows": [
                {**_priced_row(row, prices), "origin": self._origin(row["origin_partition"], row["origin_offset"])}
                for row in rows
            ],
            "unrated": [
                {**one, "origin": self._origin(one["origin_partition"], one["origin_offset"])} for one in unrated
            ],
            "quarantined": [] if account is None or key is None else _quarantined(self.connection, account, key),
        }

    def _rated_arrival(self, row: Explanation) -> Explanation:
        names = ("event_type", "event_time", "subject", "properties", "source", "sequence")
        place = row["origin_partition"], row["origin_offset"]
        return {
            "state": "rated",
            "origin": self._origin(*place),
            "arrived_at": row["arrived_at"],
            "receipt": self._receipt(*place),
            "event": {name: row[name] for name in names},
        }

    def _unrated_arrival(self, unrated: Explanation) -> Explanation:
        place = unrated["origin_partition"], unrated["origin_offset"]
        return {
            "state": unrated["state"],
            "origin": self._origin(*place),
            "arrived_at": unrated["appended_at"],
            "receipt": self._receipt(*place),
            "event": self._decoded(unrated["value"]),
        }

    @property
    def _events_topic(self) -> str:
        return Topics(self.settings.topic_prefix).events

    def _origin(self, partition: int, offset: int) -> str:
        return f"{self._events_topic}/{partition}/{offset}"

    def _receipt(self, partition: int, offset: int) -> Explanation | None:
        """The receipt that covers an offset of usage.events."""
        return _row(
            self.connection,
            """SELECT * FROM billing.receipt
            WHERE topic = %s AND partition = %s AND first_offset <= %s AND next_offset > %s
            ORDER BY first_offset DESC LIMIT 1""",
            [self._events_topic, partition, offset, offset],
        )

    def _decoded(self, value: bytes | None) -> Explanation | None:
        try:
            record = PlainReader(load_schemas(self.settings.registry_url), EVENTS).read(value or b"")
        except Malformed:
            return None
        timestamp = record.pop("timestamp")
        try:
            record["event_time"] = to_datetime(timestamp)
        except OverflowError:
            record["event_time"] = None
        return record

    def _read(self, partition: int, offset: int) -> tuple[bytes | None, int] | None:
        """Value and append time (milliseconds since 1970) of a place of usage.events; None when nothing is there."""
        consumer = Consumer(
            self.settings.kafka
            | {
                "group.id": self.settings.topic_prefix + "explain",  # required by the library, never joined
                "enable.auto.commit": False,
                "enable.partition.eof": True,
                "auto.offset.reset": "error",
            }
        )
        try:
            # Asked for a partition that does not exist, the consumer would wait for it to appear.
            topic = consumer.list_topics(self._events_topic, timeout=_BROKER_ANSWER_S).topics[self._events_topic]
            if partition not in topic.partitions:
                return None
            consumer.assign([TopicPartition(self._events_topic, partition, offset)])
            while True:
                message = consumer.poll(_BROKER_ANSWER_S)
                if message is None:
                    raise KafkaException(KafkaError(KafkaError._TIMED_OUT, "no answer"))
                error = message.error()
                if error is None:
                    return (message.value(), message.timestamp()[1]) if message.offset() == offset else None
                if error.code() in _NOT_THERE:
                    return None
                if not passes(error):
                    raise KafkaException(error)
        finally:
            consumer.close()


#: Nothing stands at that place: it is the log's end, behind it, or before its beginning.
_NOT_THERE = (KafkaError._PARTITION_EOF, KafkaError._AUTO_OFFSET_RESET)


# Named by pipeline.billing.months: rated_usage_2026_05.
_PARTITIONS = """
SELECT relname FROM pg_inherits JOIN pg_class ON oid = inhrelid WHERE inhparent = 'billing.rated_usage'::regclass
"""


def _rated_rows(connection: "Connection[Any]", candidates: Iterable[tuple[str, str]]) -> list[Explanation]:
    """Rated rows of any of these (account, key), by charge and entry."""
    # With its month named, each probe is one step down the index that makes rows unique.
    partitions = connection.execute(_PARTITIONS)
    months = [date(int(name[-7:-3]), int(name[-2:]), 1) for (name,) in partitions]
    identities = [UUID(bytes=identity(account, key)) for account, key in candidates]
    return _rows(
        connection,
        """SELECT * FROM finance.rated_usage WHERE event_month = ANY(%s) AND identity = ANY(%s)
        ORDER BY charge, cell, entry""",
        [months, identities],
    )


def _unrated_of(connection: "Connection[Any]", candidates: list[tuple[str, str]]) -> list[Explanation]:
    storable = [(account, key) for account, key in candidates if "\0" not in account + key]
    return _rows(
        connection,
        """SELECT unrated.* FROM billing.unrated_event AS unrated
        JOIN unnest(%s::text[], %s::text[]) AS wanted (account, idempotency_key) USING (account, idempotency_key)
        ORDER BY appended_at""",
        [[account for account, _ in storable], [key for _, key in storable]],
    )


def _unrated_at(connection: "Connection[Any]", topic: str, partition: int, offset: int) -> Explanation | None:
    return _row(
        connection,
        """SELECT * FROM billing.unrated_event
        WHERE origin_topic = %s AND origin_partition = %s AND origin_offset = %s""",
        [topic, partition, offset],
    )


def _quarantined(connection: "Connection[Any]", account: str, key: str) -> list[Explanation]:
    return _rows(
        connection,
        """SELECT reason, rated_topic AS topic, rated_partition AS partition, rated_offset AS offset, charge, at
        FROM billing.quarantine WHERE identity = %s ORDER BY id""",
        [UUID(bytes=identity(account, key))],
    )


#: What an event is by the kind of its last entry.
_STATE_OF = {"usage": "rated", "void": "voided", "correction": "replaced"}


def _corrections(connection: "Connection[Any]", rows: Sequence[Explanation]) -> list[Explanation]:
    """What was decided about a rated event, by whom and why, and what it did: its rows, and what the event says since.

    ``rows`` are all of the event. One on its way, or refused, has none.
    """
    decided = _rows(
        connection,
        """SELECT number, action, entry, reason_code, note, actor AS decided_by, decided_at, backfill, state
        FROM billing.correction_state WHERE identity = %s ORDER BY number""",
        [rows[0]["identity"]],
    )
    by_entry: defaultdict[int, list[Explanation]] = defaultdict(list)
    for row in rows:
        by_entry[row["entry"]].append(row)
    told = []
    for one in decided:
        taken, added = by_entry.get(one["entry"], []), by_entry.get(one["entry"] + 1, [])
        added = [row for row in added if row["kind"] == "correction"]
        before, after = (_said(side[0]) if side else {} for side in (taken, added))
        changed = {name: {"from": before.get(name), "to": to} for name, to in after.items() if before.get(name) != to}
        done = [
            {
                "charge": row["charge"],
                "cell": row["cell"],
                "kind": row["kind"],
                "entry": row["entry"],
                "quantity": row["quantity"],
                "amount": row["exact_amount"],
                "currency": row["currency"],
                "line": f"line:{row['line_id']}",
            }
            for row in (*taken, *added)
        ]
        told.append(one | {"changed": changed, "rows": done})
    return told


def _said(row: Explanation) -> dict[str, str]:
    return {"event_type": row["event_type"], "subject": row["subject"], **row["properties"]}


# -- arithmetic of an event


def _priced_row(row: Explanation, prices: Prices) -> Explanation:
    names = (
        "charge cell entry kind contract plan plan_version price_version price_class meter meter_version quantity "
        "quantity_before quantity_after currency period_start period_end segment_start late catalog_offset "
        "rated_partition rated_offset"
    )
    return {
        **{name: row[name] for name in names.split()},
        "amount": row["exact_amount"],
        "arithmetic": _of_row(prices, row),
        "line": f"line:{row['line_id']}",
        "invoice": f"invoice:{row['invoice_id']}",
    }


def _of_row(prices: Prices, row: Explanation) -> Explanation | None:
    """How the event's amount came about; None where the catalog has no price."""
    try:
        found = prices.find(Priced.of(row))
    except NoPrice:
        return None
    charge = found.charge
    told: Explanation = {"model": charge.model, "price_class": row["price_class"], "note": None}
    if row["price_class"] == "period":
        return told | {"how": "provisional", "note": _PROVISIONAL}
    amount = scaled(row["exact_amount"], AMOUNT_DECIMALS)
    if row["price_class"] == "per_event":
        told |= _own_price(found, row)
    else:
        told |= _difference(found, row, amount)
    told["proved"] = told["difference"] == amount_decimal(amount)
    if not told["proved"] and (found.segment is None or found.segment.shortens(charge)):
        told["note"] = _CHANGED_SINCE
    return told


_PROVISIONAL = "Provisional: what this charge costs depends on the whole period, so the close prices all of it at once."
_CHANGED_SINCE = "Other prices, or another share of the period, hold there since: the close books the difference."


def _difference(found: LinePrice, row: Explanation, amount: Amount) -> Explanation:
    """The event's amount as price(after) - price(before), part by part."""
    charge, wording = found.charge, _wording(found, row)
    before, after = (scaled(row[name], QUANTITY_DECIMALS) for name in ("quantity_before", "quantity_after"))
    shares_after = _shares(charge, after, wording.cell)
    # A counter without an event yet is absent and costs 0, where a counter at 0 may already owe a flat fee (law 3).
    absent = before == 0 and amount == sum(share.amount for share in shares_after)
    shares_before = [] if absent else _shares(charge, before, wording.cell)
    sides = {"before": (before, shares_before), "after": (after, shares_after)}
    told: Explanation = {
        name: {
            "quantity": quantity_decimal(quantity),
            "cost": amount_decimal(sum(share.amount for share in shares)),
            "parts": _parts(shares, wording),
        }
        for name, (quantity, shares) in sides.items()
    }
    cost_after, cost_before = (sum(share.amount for share in shares) for shares in (shares_after, shares_before))
    return {"how": "difference", **told, "difference": amount_decimal(cost_after - cost_before)}


def _own_price(found: LinePrice, row: Explanation) -> Explanation:
    """What the event costs by itself; taken back where it is void."""
    charge = found.charge
    sign = -1 if row["kind"] == "void" else 1
    brought = 0
    if charge.model == "dynamic":
        properties = {name.encode(): value.encode() for name, value in row["properties"].items()}
        given = compile_amount(charge)(properties)
        assert not isinstance(given, Rejection), "a rated event brought its amount"
        brought = given
    member = Member(0, "", sign * scaled(row["quantity"], QUANTITY_DECIMALS), "", "", brought)
    shares = event_shares(charge, [member])
    difference = sign * sum(share.amount for share in shares)
    return {"how": "event", "parts": _parts(shares, _wording(found, row)), "difference": amount_decimal(difference)}


def _shares(charge: Charge, quantity: Quantity, cell: tuple[str, ...]) -> list[Share]:
    try:
        return tier_shares(charge, quantity, cell)
    except ValueError:  # beyond a last tier that parks: a later version of the price does not reach there
        return []


def _wording(found: LinePrice, row: Explanation) -> Wording:
    """``row`` has a cell and a currency."""
    charge, segment = found.charge, found.segment
    share = "" if segment is None else explain_share(segment)
    unit = found.meter.unit if found.meter else "unit"
    cell = cell_values(row["cell"], len(charge.by)) if charge.by else ()
    return Wording(charge, unit, row["currency"], cell, share)


def _parts(shares: Iterable[Share], wording: Wording, subject: str = "") -> list[Explanation]:
    """Parts as data; ``subject`` where each has a counter of its own."""
    named = {"subject": subject} if wording.charge.per_subject else {}
    return [named | asdict(part) for part in explain_parts(shares, wording)]


# -- lines and invoices


def _line(connection: "Connection[Any]", line_id: int) -> Explanation | None:
    line = _row(connection, "SELECT * FROM finance.invoice_lines WHERE line_id = %s", [line_id])
    if line is None:
        return None
    events = _rows(
        connection,
        """SELECT idempotency_key, event_time, kind, quantity, quantity_before, quantity_after, exact_amount AS amount,
            origin
        FROM finance.line_events WHERE line_id = %s ORDER BY event_time, idempotency_key, entry LIMIT %s""",
        [line_id, LINE_EVENTS_MAX],
    )
    entries = _rows(
        connection,
        """SELECT entry_id, reasons, quantity_before, quantity_after, quantity, exact_amount AS amount, booked_at,
            booked_by, note
        FROM finance.close_entries WHERE line_id = %s ORDER BY entry_id""",
        [line_id],
    )
    booked = sum((scaled(entry["amount"], AMOUNT_DECIMALS) for entry in entries), 0)
    return {
        "kind": "line",
        **line,
        "invoice": f"invoice:{line['invoice_id']}",
        "rows_amount": amount_decimal(scaled(line["exact_amount"], AMOUNT_DECIMALS) - booked),
        "entries_amount": amount_decimal(booked),
        "entries": entries,
        "documents": billed_on(connection, [line_id]),
        "arithmetic": _of_line(connection, line),
        "first_events": [event | {"event": f"{line['account']}/{event['idempotency_key']}"} for event in events],
    }


def _of_line(connection: "Connection[Any]", line: Explanation) -> Explanation | None:
    """The price of the line's counters from their whole usage; None where the catalog has no price.

    A counter has a line for each version of its meter, and its running quantity goes through all of them: only together
    they cost what the quantity costs. Where the sum of the quantity does not tell the price, all events are priced.
    """
    lines = _rows(
        connection,
        """SELECT line_id, meter_version, quantity, exact_amount FROM finance.invoice_lines
        WHERE account = %(account)s AND contract = %(contract)s AND charge = %(charge)s AND cell = %(cell)s
            AND segment_start = %(segment_start)s AND plan = %(plan)s AND plan_version = %(plan_version)s
            AND price_version = %(price_version)s
        ORDER BY first_event_at, line_id""",
        line,
    )
    prices = Prices(connection)
    try:
        found = prices.find(Priced.of(line))
    except NoPrice:
        return None
    charge, wording = found.charge, _wording(found, line)
    quantity = sum(scaled(one["quantity"], QUANTITY_DECIMALS) for one in lines)
    amount = sum(scaled(one["exact_amount"], AMOUNT_DECIMALS) for one in lines)
    parts: list[Explanation] | None = None
    if line["price_class"] == "running" and not charge.per_subject:
        shares = _shares(charge, quantity, wording.cell)
        if sum(share.amount for share in shares) == amount or found.segment is None:
            parts = _parts(shares, wording)
    if parts is None:
        parts = _closing_parts(connection, prices, line, found, wording)
    cost = sum(scaled(part["amount"], AMOUNT_DECIMALS) for part in parts)
    proved = cost == amount
    return {
        "model": charge.model,
        "price_class": line["price_class"],
        "lines": [
            {
                "line": f"line:{one['line_id']}",
                "meter_version": one["meter_version"],
                "quantity": one["quantity"],
                "amount": one["exact_amount"],
            }
            for one in lines
        ],
        "quantity": quantity_decimal(quantity),
        "amount": amount_decimal(amount),
        "parts": parts,
        "cost": amount_decimal(cost),
        "proved": proved,
        "note": None if proved else _why_not(line, found),
    }


def _why_not(line: Explanation, found: LinePrice) -> str | None:
    if found.segment is None:
        return "Other prices hold for its events by now: `tally rerate` moves them to a line of their own."
    if line["price_class"] == "period" or found.charge.minimum is not None or found.segment.shortens(found.charge):
        return "This is the closing price as of now; until the close, or `tally rerate`, the line holds an estimate."
    return None


def _closing_parts(
    connection: "Connection[Any]", prices: Prices, line: Explanation, found: LinePrice, wording: Wording
) -> list[Explanation]:
    """The parts of the line's closing price, counter by counter; none for prices that no longer hold."""
    if found.segment is None:
        return []
    catalog = prices.catalog([line["account"]])
    closed = price_period(connection, catalog, line["account"], found.segment.period)
    wanted = (line["contract"], found.segment.start_us, line["charge"], line["cell"])
    for one in closed.lines:
        if (one.segment.contract.id, one.segment.start_us, one.charge.id, one.cell) == wanted:
            return [
                part
                for counter, closing in one.closings.items()
                for part in _parts(closing.parts, wording, counter.subject)
            ]
    return []


# -- an account's month


def _month(connection: "Connection[Any]", account: str, month: Month) -> Explanation | None:
    """The account's periods that end in the month at their closing prices, line by line, and what lines hold so far.

    Where none does, those the month is in the midst of.
    """
    catalog = read_catalog(connection, [account])
    if account not in catalog.accounts:
        return None
    within = month.period_in(catalog.accounts[account].time_zone)
    ending = periods_of(connection, catalog, account, month)
    periods = ending or catalog.periods_at(account, within.end_us - 1) or (within,)
    priced = [price_period(connection, catalog, account, period) for period in periods]
    held = [read_lines(connection, account, period) for period in periods]
    missing = [entry for pair in zip(priced, held, strict=True) for entry in differences(*pair)]
    segments = [segment for closed in priced for segment in closed.segments]
    lines = [line for closed in priced for line in closed.lines]
    stored = [line for found in held for line in found]
    currencies = sorted({segment.plan.currency for segment in segments} | {one.terms.currency for one in stored})
    return {
        "kind": "month",
        "account": account,
        "month": str(month),
        "period_start": to_datetime(min(period.start_us for period in periods)),
        "period_end": to_datetime(max(period.end_us for period in periods)),
        "segments": [_segment(segment) for segment in segments],
        "lines": [_month_line(one, stored) for one in lines if one.amount or one.events],
        "refused": [
            {"event": f"{account}/{use.key}", "event_time": to_datetime(use.at_us), "problem": rejection.message}
            for closed in priced
            for use, rejection in closed.refused
        ],
        "totals": [
            {
                "currency": currency,
                "amount": amount_decimal(sum(one.amount for one in lines if one.segment.plan.currency == currency)),
                "held": amount_decimal(sum(one.amount for one in stored if one.terms.currency == currency)),
                "to_book": amount_decimal(sum(one.amount for one in missing if one.terms.currency == currency)),
            }
            for currency in currencies
        ],
    }


def _segment(segment: Segment) -> Explanation:
    return {
        "start": to_datetime(segment.start_us),
        "end": to_datetime(segment.end_us),
        "share": explain_share(segment) or "the whole period",
        "contract": segment.contract.id,
        "plan": segment.plan.id,
        "plan_name": segment.plan.name,
        "price_version": segment.price_version,
        "trial": segment.trial,
        "pools": [
            {"pool": pool.id, "unit": pool.unit, "included": quantity_decimal(pool.included)} for pool in segment.pools
        ],
    }


def _month_line(line: ClosedLine, stored: Iterable[StoredLine]) -> Explanation:
    segment = line.segment
    row = {"cell": line.cell, "currency": segment.plan.currency}
    wording = _wording(LinePrice(line.charge, line.meter, segment), row)
    return {
        "charge": line.charge.id,
        "cell": line.cell,
        "model": line.charge.model,
        "price_class": line.price_class,
        "price_version": segment.price_version,
        "segment_start": to_datetime(segment.start_us),
        "meter": line.charge.meter,
        "unit": wording.unit,
        "events": line.events,
        "quantity": quantity_decimal(line.quantity),
        "usage": explain_usage(quantity_decimal(line.quantity), wording.unit, line.events),
        "lines": [f"line:{one.id}" for one in stored if is_line_of(one, line)],
        "parts": [
            part
            for counter, closing in line.closings.items()
            for part in _parts(closing.parts, wording, counter.subject)
        ],
        "amount": amount_decimal(line.amount),
        "currency": segment.plan.currency,
    }


# -- invoices


def _invoice(connection: "Connection[Any]", invoice_id: int) -> Explanation | None:
    invoice = _row(connection, "SELECT *, state::text AS state FROM billing.invoice WHERE id = %s", [invoice_id])
    if invoice is None:
        return None
    lines = _rows(
        connection,
        """SELECT line_id, charge, cell, contract, plan, plan_version, segment_start, quantity, events, exact_amount,
            rounded_amount, rounding_difference
        FROM finance.invoice_lines WHERE invoice_id = %s ORDER BY charge, cell, segment_start""",
        [invoice_id],
    )
    totals = _row(
        connection,
        """SELECT coalesce(sum(exact_amount), 0) AS exact_amount, coalesce(sum(rounded_amount), 0) AS rounded_amount
        FROM finance.invoice_lines WHERE invoice_id = %s""",
        [invoice_id],
    )
    billed = billed_on(connection, [line["line_id"] for line in lines])
    names = ("document", "number", "document_kind", "document_state")
    documents = {one["document_id"]: {name: one[name] for name in names} for one in billed}
    return {
        "kind": "invoice",
        **invoice,
        "documents": [documents[id] for id in sorted(documents)],
        "lines": [line | {"line": f"line:{line['line_id']}"} for line in lines],
        **(totals or {}),
    }


def _rows(
    connection: "Connection[Any]", statement: str, parameters: Sequence[Any] | Mapping[str, Any]
) -> list[Explanation]:
    with connection.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(statement, parameters).fetchall()


def _row(connection: "Connection[Any]", statement: str, parameters: list[Any]) -> Explanation | None:
    rows = _rows(connection, statement, parameters)
    return rows[0] if rows else None
