"""A billing story as a text file: what was agreed, what was used, and the bill that must come of it.

A story opens with its title and what it is about. Then sections follow, each opened by a line ``-- kind: rest``, and
happen in their order:

``-- prices: from TIME``           a price file, published so that its changes count from then (the first: from ever)
``-- accounts:``                   an accounts file
``-- events: arriving TIME``       a line each: time, ACCOUNT/KEY, event type, subject (``-``: none), properties.
                                   Without ``arriving`` each event arrives when it happens.
``-- void: ACCOUNT/KEY``           the event is taken back, as ``tally usage void`` does
``-- rerate: ACCOUNT YYYY-MM``     what lines lack is booked, as ``tally rerate`` does
``-- bill: ACCOUNT YYYY-MM``       the lines as they stand, a table of which every cell must be so
``-- grant: ID AMOUNT ...``        credits, with kind=, from=, until=, priority= where they are not the default
``-- credits: ACCOUNT YYYY-MM``    what the month draws of each grant: every draw, and what is left
``-- commitment: AMOUNT ...``      a monthly spend commitment, with from=, until=, factor=
``-- settled: ACCOUNT YYYY-MM``    what the commitment makes of the month

Usage goes through the rater's own ``process``, byte for byte; bills through the core's closing prices. A story can be
told to a database too: then rows, bookings and bills are PostgreSQL's. Stories of invoices know more (``invoicing``).
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from difflib import ndiff
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.billing.close_entries import Cause, CloseEntry, StoredLine
from pipeline.billing.rated import Row, Terms, reader
from pipeline.billing.rerate import Month, differences
from pipeline.catalog.files import AnyDraft, Drafts, read_account_files, read_price_files
from pipeline.core.catalog import Catalog
from pipeline.core.commitments import Commitment, Spend, settle_windows
from pipeline.core.corrections import Correction, HeldRow
from pipeline.core.credits import GRANT_KINDS, PRIORITY_DEFAULT, Grant, Owed, draw, minor_step, spread
from pipeline.core.documents import Entry, kind_of, to_document
from pipeline.core.money import AMOUNT_DECIMALS, amount_decimal, plain, quantity_decimal, round_half_up_div, scaled
from pipeline.core.periods import Period, format_instant, parse_instant
from pipeline.core.rerating import Use, carried_event_types, close_period, first_moment
from pipeline.infra.avro import CORRECTIONS, EVENTS
from pipeline.infra.topics import partition_of
from pipeline.rating.batch import Source, process
from pipeline.rating.correct import CorrectionRecord
from pipeline.rating.enrich import TermsView
from tests.rating.world import EVENT_FRAME, PARTITIONS, SCHEMAS, SHAPE, Memory, Message, batch, body

_SECTION = re.compile(r"-- (\w+):(?: (.*))?")
_NUMBER = re.compile(r"-?[\d.]*")
_BILL = ("charge", "priced by", "from", "quantity", "rows", "booked", "amount", "why")
_CREDITS = ("grant", "pays for", "amount")
_SETTLED = ("window", "committed", "spent", "within", "overage", "true-up", "total")


class Section(NamedTuple):
    kind: str
    rest: str
    body: tuple[str, ...]
    line: int  #: of the file, where it opens


class Story(NamedTuple):
    title: str
    sections: tuple[Section, ...]


def read_story(path: Path) -> Story:
    lines = path.read_text().splitlines()
    opens = [(number, found) for number, line in enumerate(lines) if (found := _SECTION.fullmatch(line))]
    ends = [number for number, _ in opens[1:]] + [len(lines)]
    sections = tuple(
        Section(found[1], found[2] or "", tuple(lines[start + 1 : end]), start + 1)
        for (start, found), end in zip(opens, ends, strict=True)
    )
    return Story(lines[0], sections)


@dataclass(slots=True)
class Event:
    """What was sent, and the rows it holds now."""

    use: Use
    framed: bytes
    appended_ms: int
    offset: int
    held: list[Row] = field(default_factory=list)
    entries: int = 0


class World:
    """What stands after the sections so far: the catalog, the rater's state, rows and close entries."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read_row = reader(SCHEMAS).read
        self.versions: list[Entry] = []
        self._view = TermsView(Catalog.empty())
        self.memory = Memory()
        self.events: dict[tuple[str, str], Event] = {}
        self.rows: list[Row] = []
        self.booked: list[tuple[str, CloseEntry]] = []
        self.grants: list[Grant] = []
        self.commitment: Commitment | None = None

    # -- what happens

    def publish(self, text: str, kind: str, valid_from: str | None) -> None:
        file = self._folder / f"{kind}.yaml"
        file.write_text(text)
        drafts: Drafts = (read_price_files if kind == "prices" else read_account_files)([file])
        assert not drafts.findings, "\n".join(map(str, drafts.findings))
        at = None if valid_from is None else parse_instant(valid_from)
        for draft in drafts.all():
            self._publish(draft, at)

    def _publish(self, draft: AnyDraft, at: int | None) -> None:
        item: Any = draft.item
        kind, document = kind_of(item), to_document(item)
        before = [entry for entry in self.versions if (entry.kind, entry.id) == (kind, item.id)]
        if before and before[-1].document == document:
            return
        start = at if before and at is not None else draft.valid_from_us or 0
        self.versions.append(Entry(kind, item.id, len(before) + 1, start, document))

    def use(self, lines: Iterable[str], arriving: str | None) -> None:
        for line in filter(str.strip, lines):
            time, name, event_type, subject, *given = line.split()
            account, key = name.split("/", 1)
            at_us = parse_instant(time)
            properties = dict(one.split("=", 1) for one in given)
            appended_ms = (at_us if arriving is None else parse_instant(arriving)) // 1000
            subject = "" if subject == "-" else subject
            sent = {
                "idempotency_key": key,
                "account": account,
                "event_type": event_type,
                "timestamp": at_us,
                "subject": subject,
                "properties": properties,
                "source": "story",
                "sequence": 0,
            }
            framed = EVENT_FRAME + body(sent)
            encoded = {name.encode(): value.encode() for name, value in properties.items()}
            event = Event(Use(event_type, at_us, key, subject, encoded), framed, appended_ms, len(self.events))
            self.events[account, key] = event
            home = partition_of(account.encode(), PARTITIONS)
            record = Message(SHAPE.origin_topic, home, event.offset, appended_ms, account.encode(), framed)
            self._process([record], Source.EVENTS, home)

    def void(self, account: str, key: str) -> None:
        self._correct(account, key, None)

    def replace(self, account: str, key: str, **properties: str) -> None:
        """The event is rated anew with these properties, as ``tally usage replace`` does."""
        sent: Any = SCHEMAS.decode(self.events[account, key].framed, EVENTS)
        sent["properties"] |= properties
        self._correct(account, key, SCHEMAS.encode(EVENTS, sent))

    def _correct(self, account: str, key: str, replacement: bytes | None) -> None:
        event = self.events[account, key]
        home = partition_of(account.encode(), PARTITIONS)
        said = Correction(
            number=1,
            entry=event.entries,
            catalog_offset=self.view.offset,
            reason_code="other",
            actor="story",
            decided_at_us=event.use.at_us,
            origin_topic=SHAPE.origin_topic,
            origin_partition=home,
            origin_offset=event.offset,
            origin_appended_ms=event.appended_ms,
            event=event.framed,
            rows=tuple(map(_held, event.held)),
            replacement=replacement,
        )
        value = SCHEMAS.encode(CORRECTIONS, said.to_record())
        self._process(
            [CorrectionRecord(event.offset, event.appended_ms, account.encode(), value, said)], Source.RETRY, home
        )

    def _process(self, records: Sequence[Any], source: Source, partition: int) -> None:
        now_ms = records[0].timestamp
        outcome = process(batch(records, source, now_ms=now_ms, partition=partition), self.memory, self.view, SHAPE)
        refused = [one.rejection for one in (*outcome.dead, *outcome.parked)]
        assert not refused, refused
        self.memory.apply(outcome)
        rows = [self._read_row(value) for _, value in outcome.rows]
        assert rows, "rated nothing: was the event sent before?"
        self.rows += rows
        event = self.events[rows[0].head.account, rows[0].head.idempotency_key]
        event.held = [row for row in rows if row.kind != "void"]
        event.entries = max(row.entry for row in rows) + 1

    def happen(self, section: Section) -> None:
        """What worlds of another kind know more. Raises AssertionError."""
        raise AssertionError(f"line {section.line}: no such section: -- {section.kind}: {section.rest}")

    # -- what comes of it

    @property
    def view(self) -> TermsView:
        if self._view.offset != len(self.versions):
            self._view = TermsView(self._view.catalog.extend(self.versions[self._view.offset :], len(self.versions)))
        return self._view

    @property
    def catalog(self) -> Catalog:
        return self.view.catalog

    def rerate(self, account: str, month: str) -> None:
        self.booked += [(account, entry) for entry in self.missing(account, month)]

    def missing(self, account: str, month: str) -> list[CloseEntry]:
        """What would have to be booked."""
        return [entry for period in self.periods(account, month) for entry in self._missing(account, period)]

    def _missing(self, account: str, period: Period) -> list[CloseEntry]:
        catalog = self.catalog
        counting = [event for (owner, _), event in self.events.items() if owner == account and event.held]
        uses = [event.use for event in counting if _period_of(event.held[0].terms) == period]
        types, before_us = carried_event_types(catalog, account, period), first_moment(catalog, account, period)
        earlier = [event.use for event in counting if event.use.at_us < before_us and event.use.event_type in types]
        closed = close_period(catalog, account, period, uses, earlier)
        assert not closed.refused, closed.refused
        return differences(closed, self.lines_of(account, period))

    def periods(self, account: str, month: str) -> tuple[Period, ...]:
        """The account's billing periods that end in the month."""
        catalog = self.catalog
        return catalog.periods_ending(account, Month.parse(month).period_in(catalog.accounts[account].time_zone))

    def lines(self, account: str, month: str) -> list[StoredLine]:
        return [line for period in self.periods(account, month) for line in self.lines_of(account, period)]

    def lines_of(self, account: str, period: Period) -> list[StoredLine]:
        """The account's lines of a period, as the sink and the bookings would have them."""
        sums: dict[tuple[Any, ...], StoredLine] = {}
        moved = {_key(entry.terms) for _, entry in self.booked if Cause.BACK_DATED in entry.reasons}
        moves = [(row.terms, row.quantity_after - row.quantity_before, row.amount) for row in self._rows_of(account)]
        moves += [(entry.terms, entry.quantity, entry.amount) for owner, entry in self.booked if owner == account]
        for terms, quantity, amount in moves:
            if _period_of(terms) == period:
                line = sums.setdefault(
                    _key(terms), StoredLine(len(sums) + 1, terms, "open", 0, 0, _key(terms) in moved)
                )
                sums[_key(terms)] = replace(line, quantity=line.quantity + quantity, amount=line.amount + amount)
        return list(sums.values())

    def _rows_of(self, account: str) -> list[Row]:
        return [row for row in self.rows if row.head.account == account]

    def bill(self, account: str, month: str) -> list[tuple[str, ...]]:
        """A row per line that stands for something, then the sum; columns as ``_BILL``."""
        booked: defaultdict[tuple[Any, ...], int] = defaultdict(int)
        why: defaultdict[tuple[Any, ...], list[str]] = defaultdict(list)
        for owner, entry in self.booked:
            if owner == account:
                booked[_key(entry.terms)] += entry.amount
                why[_key(entry.terms)] += [reason.value for reason in entry.reasons]
        table = []
        lines = self.lines(account, month)
        for line in sorted(lines, key=lambda one: (one.terms.segment_start_us, one.terms.charge, one.terms.cell)):
            key, terms = _key(line.terms), line.terms
            table.append(
                (
                    f"{terms.charge}[{terms.cell}]" if terms.cell else terms.charge,
                    terms.price_version,
                    format_instant(terms.segment_start_us)[:10],
                    plain(quantity_decimal(line.quantity)),
                    _amount(line.amount - booked[key]),
                    _amount(booked[key]),
                    _amount(line.amount),
                    ",".join(dict.fromkeys(why[key])) or "-",
                )
            )
        total = sum(line.amount for line in lines)
        return [*table, ("total", "-", "-", "-", "-", "-", _amount(total), "-")]

    def credits(self, account: str, month: str) -> list[tuple[str, ...]]:
        """What each event and line draws, grant by grant; then every grant's balance, and what nobody pays."""
        step = minor_step(self.lines(account, month)[0].terms.currency)
        owed: list[Owed] = []
        for line in self.lines(account, month):
            parts = [
                Owed(row.head.timestamp_us, row.head.idempotency_key, line.terms.charge, line.terms.charge, row.amount)
                for row in self._rows_of(account)
                if _key(row.terms) == _key(line.terms)
            ]
            owed += spread(round_half_up_div(line.amount, step) * step, parts, step=step)
        drawn = draw(self.grants, owed)
        table = [(one.grant, one.line, _amount(one.amount)) for one in drawn.draws]
        table += [("nobody", line, _amount(amount)) for line, amount in drawn.uncovered.items()]
        return [*table, *((grant, "left", _amount(left)) for grant, left in drawn.left.items())]

    def settled(self, account: str, month: str) -> list[tuple[str, ...]]:
        assert self.commitment is not None, "no commitment so far"
        time_zone = self.catalog.accounts[account].time_zone
        period = Month.parse(month).period_in(time_zone)
        spends = [Spend(row.head.timestamp_us, row.terms.charge, row.amount) for row in self._rows_of(account)]
        spends += [
            Spend(period.end_us - 1, entry.terms.charge, entry.amount)
            for owner, entry in self.booked
            if owner == account
        ]
        return [
            (
                f"{format_instant(window.start_us)[:10]} to {format_instant(window.end_us)[:10]}",
                _amount(window.committed),
                *map(_amount, (one.spent, one.within, one.overage, one.true_up, one.total)),
            )
            for window in settle_windows(self.commitment, spends, time_zone, period.start_us, period.end_us)
            for one in [window.settlement]
        ]


def tell(story: Story, world: World) -> None:
    """Let the sections happen in their order. Raises AssertionError where a bill is not as the story says."""
    for section in story.sections:
        text = "\n".join(section.body)
        match section.kind, section.rest.split():
            case "prices" | "accounts" as kind, []:
                world.publish(text, kind, None)
            case "prices" | "accounts" as kind, ["from", time]:
                world.publish(text, kind, time)
            case "events", []:
                world.use(section.body, None)
            case "events", ["arriving", time]:
                world.use(section.body, time)
            case "void", [name]:
                world.void(*name.split("/", 1))
            case "rerate", [account, month]:
                world.rerate(account, month)
                assert world.missing(account, month) == [], "re-rating again books more"
            case "bill", [account, month]:
                check_table(section, _BILL, world.bill(account, month))
            case "grant", [id, amount, *rest]:
                world.grants.append(_grant(id, amount, given(rest)))
            case "credits", [account, month]:
                check_table(section, _CREDITS, world.credits(account, month))
            case "commitment", [amount, *rest]:
                world.commitment = _commitment(amount, given(rest))
            case "settled", [account, month]:
                check_table(section, _SETTLED, world.settled(account, month))
            case _:
                world.happen(section)


def check_table(section: Section, columns: tuple[str, ...], found: Sequence[tuple[str, ...]]) -> None:
    head, *expected = [tuple(re.split(r"\s{2,}", line.strip())) for line in section.body if line.strip()]
    assert head == columns, f"line {section.line}: expected columns {columns}, got {head}"
    if found == expected:
        return
    # Both in one table, so that the same cells are the same text.
    rows = as_table([columns, *expected, *found]).splitlines()
    told, came = rows[: len(expected) + 1], [rows[0], *rows[len(expected) + 1 :]]
    changes = "\n".join(line for line in ndiff(told, came) if not line.startswith("?"))
    raise AssertionError(f"line {section.line}: -- {section.kind}: {section.rest}: - as told, + as it came\n{changes}")


def as_table(rows: Sequence[tuple[str, ...]]) -> str:
    """As stories have it, numbers to the right: copy it there once it is right. A row may lack cells."""
    columns = list(zip_longest(*rows, fillvalue=""))
    widths = [max(map(len, column)) for column in columns]
    right = [all(map(_NUMBER.fullmatch, column[1:])) for column in columns]
    shapes = [f"{'>' if to else '<'}{width}" for to, width in zip(right, widths, strict=True)]
    padded = [[format(cell, shape) for cell in column] for column, shape in zip(columns, shapes, strict=True)]
    return "\n".join("  ".join(row).rstrip() for row in zip(*padded, strict=True))


def _key(terms: Terms) -> tuple[Any, ...]:
    return (
        terms.contract,
        terms.plan,
        terms.plan_version,
        terms.price_version,
        terms.charge,
        terms.meter,
        terms.meter_version,
        terms.period_start_us,
        terms.segment_start_us,
        terms.cell,
        terms.currency,
    )


def _period_of(terms: Terms) -> Period:
    return Period(terms.period_start_us, terms.period_end_us)


def _held(row: Row) -> HeldRow:
    terms = row.terms
    return HeldRow(
        contract=terms.contract,
        plan=terms.plan,
        plan_version=terms.plan_version,
        meter=terms.meter,
        meter_version=terms.meter_version,
        price_version=terms.price_version,
        charge=terms.charge,
        period_start_us=terms.period_start_us,
        period_end_us=terms.period_end_us,
        segment_start_us=terms.segment_start_us,
        cell=terms.cell,
        currency=terms.currency,
        price_class=terms.price_class,
        quantity=row.quantity,
        amount=row.amount,
        late=row.late,
    )


def _amount(amount: int) -> str:
    return plain(amount_decimal(amount))


def given(words: Iterable[str]) -> dict[str, str]:
    return dict(word.split("=", 1) for word in words)


def _grant(id: str, amount: str, given: dict[str, str]) -> Grant:
    kind = given.get("kind", "prepaid")
    assert kind in GRANT_KINDS, kind
    return Grant(
        id,
        scaled(Decimal(amount), AMOUNT_DECIMALS),
        start_us=parse_instant(given["from"]) if "from" in given else 0,
        end_us=parse_instant(given["until"]) if "until" in given else None,
        kind=kind,
        priority=int(given.get("priority", PRIORITY_DEFAULT)),
    )


def _commitment(amount: str, given: dict[str, str]) -> Commitment:
    return Commitment(
        "commitment",
        scaled(Decimal(amount), AMOUNT_DECIMALS),
        parse_instant(given["from"]),
        parse_instant(given["until"]) if "until" in given else None,
        overage_factor=Decimal(given.get("factor", "1")),
    )
