"""The completeness gate on real services: a month that may be closed, then each thing that stands in its way."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from psycopg import Connection
from psycopg.types.json import Jsonb

from pipeline.billing import fx_rates
from pipeline.billing.gate import GRACE, Estimate, Missing, check
from pipeline.billing.reconcile import reconcile
from pipeline.billing.rerate import Month
from pipeline.catalog.invoicing_apply import apply
from pipeline.catalog.invoicing_files import read_invoicing_files
from pipeline.core.contracts import Account, Contract, Phase
from pipeline.core.cycles import Cycle
from pipeline.core.documents import Item, kind_of, to_document
from pipeline.core.periods import to_micros
from pipeline.infra.embedded import Endpoints
from pipeline.infra.postgres import connect
from pipeline.infra.settings import Settings
from tests.billing.rater import Rater
from tests.billing.records import letter_record, rated_record, receipt_record, sequences
from tests.billing.running import meter, per_unit, publish, running_sink, wait_until
from tests.billing.test_reconcile import arrive
from tests.conftest import fresh_settings

MONTH = Month(2026, 5)
END = datetime(2026, 6, 1, tzinfo=UTC)
DUE = END + GRACE

INVOICING = """
legal_entities:
  - id: tally
    name: Tally GmbH
    address: {lines: [Weg 1], city: Berlin, country: DE}
    reporting_currency: EUR
taxes:
  - {tax: VAT, country: DE, rates: [{percent: 19, valid_from: 2021-01-01}]}
customers:
  - {account: acct, name: Acct, address: {lines: [Weg 2], city: Berlin, country: DE}}
"""


def estimator(_: "Connection[Any]", accounts: Iterable[str]) -> Estimate:
    """What every event of a known account costs."""
    return lambda value: None if value is None else (Decimal("1.50"), "USD")


class World:
    """Five events of May, four rated and one dead-lettered and discarded; everybody who is billed is known."""

    def __init__(self, settings: Settings, connection: "Connection[Any]", folder: Path) -> None:
        self.settings, self.connection, self._folder = settings, connection, folder

    def execute(self, *statements: str) -> None:
        """As nobody may: append-only tables are set right again, too."""
        with self.connection.transaction():
            self.connection.execute("SET LOCAL ROLE NONE")
            self.connection.execute("SET LOCAL session_replication_role = replica")
            for statement in statements:
                self.connection.execute(statement)

    def insert(self, *items: Item) -> None:
        for item in items:
            self.connection.execute(
                """INSERT INTO billing.catalog_version (kind, id, version, valid_from, document, published_by)
                VALUES (%s, %s, %s, '1970-01-01Z', %s, 'test')""",
                [kind_of(item), item.id, item.version, Jsonb(to_document(item))],
            )

    def invoicing(self, text: str) -> None:
        path = self._folder / "invoicing.yaml"
        path.write_text(text)
        apply(self.connection, read_invoicing_files([path]), actor="test")

    def look(self, now: datetime = DUE, **options: Any) -> list[Missing]:
        options.setdefault("estimator", estimator)
        return check(self.connection, self.settings, MONTH, now=now, **options)

    def kinds(self, now: datetime = DUE, **options: Any) -> list[str]:
        return [one.kind for one in self.look(now, **options)]


@contextmanager
def made_world(settings: Settings, folder: Path) -> Iterator[World]:
    settings = settings.model_copy(update={"sequence_grace": 0.0})
    rater, prefix = Rater(settings), settings.topic_prefix
    publish(settings, per_unit(input="0.1"), meter())
    arrive(settings, rater, partition=0, count=5)
    with rater.transaction():
        rater.rated([rated_record(key=f"k{n}", amount="0.1") for n in range(4)])
        rater.letter(letter_record(prefix, offset=4, reason="not_a_number"), dead=True)
        numbers = [sequences("s", 0, 1, 2, 3, 4)]
        rater.receipt(receipt_record(prefix, count=5, rated=4, dead_lettered=1, rated_rows=4, sequences=numbers))
    with running_sink(settings) as thread:
        wait_until(lambda: reconcile(settings).lag == 0, "the sink to catch up", thread)
    with connect(settings.dsn, application="test", autocommit=True) as connection:
        world = World(settings, connection, folder)
        world.insert(Account("acct", 1, "Acct", "UTC"), Contract("contract-acct", 1, "acct", "basic", 0, None))
        world.invoicing(INVOICING)
        fx_rates.load(connection, "ECB", "EUR", [(END.date(), "USD", Decimal("1.1"))], actor="test")
        world.execute(DISCARD)
        yield world


#: Tables that tests change, and that are as they were for the next one.
CHANGED = ("catalog_version", "invoicing_version", "receipt", "source_hour", "source_sequence", "unrated_event")


@pytest.fixture(scope="module")
def shared_world(
    services: Endpoints, template_database: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("gate")
    with fresh_settings(services, template_database, folder) as settings, made_world(settings, folder) as world:
        world.execute(*(f"CREATE TABLE was_{table} AS TABLE billing.{table}" for table in CHANGED))
        yield world


@pytest.fixture
def world(shared_world: World) -> Iterator[World]:
    yield shared_world
    for table in CHANGED:
        shared_world.execute(f"DELETE FROM billing.{table}", f"INSERT INTO billing.{table} TABLE was_{table}")


class Way(NamedTuple):
    """Something in the way, what is said of it, and what takes it away."""

    happens: str
    kind: str
    count: int
    said: str
    money: dict[str, str]
    mended: tuple[str, ...]


DISCARD = "UPDATE billing.unrated_event SET decision = 'discard'"
UNDECIDED = "UPDATE billing.unrated_event SET decision = NULL"
GAP = "UPDATE billing.source_sequence SET bits = set_bit(set_bit(bits, 2, 0), 3, 0)"
WAYS = {
    "dead letter": Way(
        UNDECIDED,
        "dead_letters",
        1,
        "1 event dead-lettered, undecided: 1 not_a_number",
        {"USD": "1.50"},
        (DISCARD,),
    ),
    "parked": Way(
        f"{UNDECIDED}, state = 'parked', value = NULL",
        "parked",
        1,
        "1 event parked, tried again by themselves: 1 not_a_number",
        {},
        ("UPDATE billing.unrated_event SET state = 'dead_lettered', decision = 'discard', value = 'x'",),
    ),
    "without a readable time: by arrival": Way(
        f"{UNDECIDED}, event_time = NULL",
        "dead_letters",
        1,
        "1 event dead-lettered",
        {"USD": "1.50"},
        (f"{DISCARD}, event_time = appended_at",),
    ),
    "refused for its time: by arrival too": Way(
        f"{UNDECIDED}, event_time = '2019-01-01Z', reason = 'too_old'",
        "dead_letters",
        1,
        "1 too_old",
        {"USD": "1.50"},
        (f"{DISCARD}, event_time = appended_at, reason = 'not_a_number'",),
    ),
    "put aside": Way(
        """INSERT INTO billing.quarantine (reason, rated_topic, rated_partition, rated_offset, value, at)
        VALUES ('already_billed', 't', 0, 0, '', '2026-05-20Z')""",
        "quarantined",
        1,
        "1 already_billed",
        {},
        ("DELETE FROM billing.quarantine",),
    ),
    "numbers that never came": Way(
        GAP,
        "sequence_gaps",
        2,
        "s misses 2-3",
        {"USD": "0.20"},
        ("UPDATE billing.source_sequence SET bits = set_bit(set_bit(bits, 2, 1), 3, 1)",),
    ),
    "a correction not sent": Way(
        """WITH made AS (
            INSERT INTO billing.correction (number, action, account, idempotency_key, identity, event_month,
                event_time, entry, reason_code, actor, message)
            SELECT 1, 'void', account, idempotency_key, gen_random_uuid(), event_month, event_time, 1, 'r', 'a', ''
            FROM billing.rated_usage LIMIT 1 RETURNING number
        ) INSERT INTO billing.correction_outbox SELECT number FROM made""",
        "corrections",
        1,
        "1 corrections of billed usage on their way, 1 of them not sent",
        {},
        ("DELETE FROM billing.correction_outbox", "DELETE FROM billing.correction"),
    ),
    "a backfill half sent": Way(
        """WITH made AS (
            INSERT INTO billing.backfill (name, source, events, note, staged_by, state)
            VALUES ('b', 'backfill-b/1', 1, '', 'a', 'committing') RETURNING name
        ) INSERT INTO billing.backfill_event SELECT name, 1, gen_random_uuid(), 'acct', 'k', 't', '2026-05-31Z', '',
            '{}' FROM made""",
        "backfills",
        1,
        "backfill b is half sent: 1 event of the month",
        {"USD": "0.10"},
        ("UPDATE billing.backfill SET state = 'committed'",),
    ),
    "a receipt that is missing": Way(
        "UPDATE billing.receipt SET first_offset = 1, records = 4, rated = 3",
        "reconciliation",
        1,
        "no receipt for partition 0 offsets 0 to 0",
        {},
        ("UPDATE billing.receipt SET first_offset = 0, records = 5, rated = 4",),
    ),
    "a customer nobody applied": Way(
        "UPDATE billing.invoicing_version SET id = 'nobody' WHERE kind = 'customer'",
        "customers",
        1,
        "1 payer (acct): no name and address",
        {"USD": "0.40"},
        ("UPDATE billing.invoicing_version SET id = 'acct' WHERE kind = 'customer'",),
    ),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_what_stands_in_the_way_is_listed_with_its_money(world: World, way: Way) -> None:
    assert world.look() == []
    world.execute(way.happens)
    found = {one.kind: one for one in world.look()}
    one = found[way.kind]
    assert (one.count, {c: str(amount) for c, amount in one.likely_money}) == (way.count, way.money)
    assert way.said in one.what
    assert one.overridable and one.todo
    world.execute(*way.mended)
    assert world.look() == []


def test_what_is_not_the_months_does_not_stand_in_its_way(world: World) -> None:
    world.execute("UPDATE billing.unrated_event SET decision = NULL, account = 'other'")

    def at(time: str) -> list[str]:
        world.execute(f"UPDATE billing.unrated_event SET event_time = '{time}'")
        return world.kinds(DUE + timedelta(hours=4))

    assert at("2026-04-30T23:59:59.999999Z") == []
    assert at("2026-05-01T00:00:00Z") == ["dead_letters"]
    assert at("2026-06-01T03:00:00Z") == []
    world.insert(Account("other", 1, "Other", "America/New_York"))  # where it is still May by then
    assert at("2026-06-01T03:00:00Z") == ["dead_letters"]
    assert at("2026-05-20T00:00:00Z") == ["dead_letters"]
    quarter = Contract("other-main", 1, "other", "basic", 0, None, cycle=Cycle("quarter"))
    world.insert(quarter, Account("other", 2, "Other", "UTC"))
    assert at("2026-05-20T00:00:00Z") == []  # of the period that ends in June


def test_what_has_no_readable_time_is_of_the_period_of_its_receipt(world: World) -> None:
    """By arrival, or by the latest event it came with: here both lie in May, then either, then none."""
    world.execute(f"{UNDECIDED}, event_time = NULL, account = NULL")

    def at(arrived: str, latest: str) -> list[str]:
        world.execute(f"UPDATE billing.unrated_event SET appended_at = '{arrived}'")
        world.execute(f"UPDATE billing.receipt SET latest_event_at = {latest}")
        return world.kinds()

    may, june = "2026-05-20Z", "2026-06-20Z"
    assert at(may, f"'{may}'") == at(may, f"'{june}'") == at(may, "NULL") == ["dead_letters"]
    assert at(june, f"'{may}'") == ["dead_letters"]
    assert at(june, f"'{june}'") == at(june, "NULL") == []
    world.execute("UPDATE billing.unrated_event SET event_time = '2026-06-20Z'")
    assert at(june, f"'{may}'") == []  # its time can be read


def test_numbers_used_after_all_usage_was_due_are_not_the_months(world: World) -> None:
    world.execute(GAP)
    assert world.kinds() == ["sequence_gaps"]
    world.execute(f"UPDATE billing.source_hour SET began_at = '{DUE + timedelta(days=2)}', highest = 1")
    assert world.kinds() == []


def test_a_month_that_is_not_over_or_not_due(world: World) -> None:
    (running,) = world.look(END - timedelta(seconds=1))
    assert (running.kind, running.overridable) == ("period", False)
    assert "2026-05 is not over for every account before 2026-06-01T00:00:00Z" in running.what
    (early,) = world.look(DUE - timedelta(seconds=1))
    assert (early.kind, early.overridable) == ("period", True)
    assert "until 2026-06-02T00:00:00Z" in early.what
    assert world.kinds(END, grace=timedelta(0)) == []
    world.invoicing(INVOICING.replace("EUR", "EUR\n    grace_hours: 48"))
    assert world.kinds() == ["period"]
    assert world.kinds(DUE + timedelta(days=1)) == []


def test_who_cannot_get_an_invoice(world: World) -> None:
    (stale,) = world.look(DUE + timedelta(days=30))
    assert (stale.kind, stale.count, dict(stale.likely_money)) == ("rates", 1, {"USD": Decimal("0.40")})
    world.invoicing(INVOICING.replace("name: Acct,", "name: Acct, tax_categories: {input: reduced},"))
    (untaxed,) = world.look()
    assert (untaxed.kind, untaxed.count) == ("taxes", 1)
    assert "reduced" in untaxed.what
    world.invoicing(INVOICING)
    world.insert(Account("child", 1, "Child", "UTC", parent="acct"))
    world.insert(Contract("child-main", 1, "child", "basic", 0, None, legal_entity="other"))
    found = {one.kind: one for one in world.look()}
    assert found["customers"].what == "1 payer (child): no name and address"
    assert "expected legal entity 'other', got tally" in found["legal_entities"].what
    assert found["legal_entities"].todo == "`tally invoicing apply FILE` says who sells"
    assert world.kinds(payers=["nobody"]) == []
    world.invoicing(INVOICING.replace("name: Acct,", "name: Acct, consolidates: true,"))
    assert world.kinds() == ["legal_entities"]  # the parent pays for it
    assert world.kinds(payers=["child"]) == ["legal_entities"]


def test_what_a_person_discarded_is_passed_over_while_it_is_parked(world: World) -> None:
    world.execute(f"{UNDECIDED}, state = 'parked'")
    assert "parked" in world.kinds()
    world.execute("UPDATE billing.unrated_event SET decision = 'replay'")
    assert "parked" in world.kinds()
    world.execute(DISCARD)
    assert "parked" not in world.kinds()


def test_a_contract_that_names_no_legal_entity_where_there_are_two(world: World) -> None:
    of_tally = INVOICING[INVOICING.index("  - id: tally") : INVOICING.index("taxes:")]
    world.invoicing(INVOICING.replace("taxes:", of_tally.replace("id: tally", "id: other") + "taxes:"))
    (one,) = world.look()
    assert one.what == (
        "1 payer (acct): expected a contract that names its legal entity, or one legal entity only, got other, tally"
    )
    assert one.todo == "add legal_entity to contract contract-acct and `tally accounts apply`"


def test_what_was_not_read_is_waited_for_then_listed(settings: Settings, tmp_path: Path) -> None:
    with made_world(settings, tmp_path) as world:
        rater = Rater(world.settings)
        arrive(world.settings, rater, partition=2, count=3)
        (unread,) = world.look()
        assert (unread.kind, unread.count, dict(unread.likely_money)) == ("unread", 3, {"USD": Decimal("0.30")})
        assert "no rater has read" in unread.what
        extra = {"rated": 0, "duplicates": 3, "rated_rows": 0}
        with rater.transaction():
            rater.receipt(receipt_record(settings.topic_prefix, partition=2, count=3, **extra))
        (unwritten,) = [one for one in world.look() if "no sink has written" in one.what]
        assert unwritten.kind == "unread"
        with running_sink(world.settings):
            assert world.kinds(wait_s=20) == []


def test_as_json_says_everything(world: World) -> None:
    world.execute(UNDECIDED)
    (one,) = world.look()
    assert one.as_json() == {
        "kind": "dead_letters",
        "what": "1 event dead-lettered, undecided: 1 not_a_number",
        "count": 1,
        "likely_money": {"USD": "1.50"},
        "unpriced": 0,
        "todo": one.todo,
        "overridable": True,
    }
    (unpriced,) = world.look(estimator=None)
    assert (unpriced.likely_money, unpriced.unpriced) == ((), 1)


def test_money_is_added_up_of_what_this_close_may_bill(world: World) -> None:
    """A line that lost 1 holds its month up until it is issued, and again when something of its period comes late."""
    moved = "UPDATE billing.invoice_line SET amount = amount {} 1"
    put = "UPDATE billing.invoice SET state = '{}' WHERE supplement = 0"
    late = """INSERT INTO billing.invoice (account, currency, period_start, period_end, supplement)
        SELECT account, currency, period_start, period_end, 1 FROM billing.invoice"""
    try:
        world.execute(moved.format("-"))
        assert set(world.kinds()) == {"reconciliation"}
        assert "holds" in world.look()[0].what
        before = check(world.connection, world.settings, Month(2026, 4), now=DUE)
        assert "reconciliation" not in {one.kind for one in before}, "none of it is of a month before"
        world.execute(put.format("issued"))
        assert world.kinds() == []
        assert not reconcile(world.settings).reconciled, "all history can still be asked"
        world.execute(late)
        assert set(world.kinds()) == {"reconciliation"}
    finally:
        world.execute("DELETE FROM billing.invoice WHERE supplement = 1", put.format("open"))
        world.execute(moved.format("+"))
    assert world.look() == []


def test_rows_of_no_line_are_found_in_the_months_looked_at(world: World) -> None:
    try:
        world.execute("UPDATE billing.rated_usage SET line_id = line_id + 1000 WHERE idempotency_key = 'k0'")
        assert any("line:None" not in one.what and "holds None" in one.what for one in world.look())
    finally:
        world.execute("UPDATE billing.rated_usage SET line_id = line_id - 1000 WHERE idempotency_key = 'k0'")
    assert world.look() == []


def test_taxes_are_judged_for_every_plan_and_tax_date_of_the_month(world: World) -> None:
    """A plan that a contract goes over to, and a period that ends before the month does."""
    charge = per_unit(input="0.1").charges[0]
    later = replace(per_unit(input="0.1"), id="later", charges=(replace(charge, tax_category="reduced"),))
    world.insert(later)
    day_9, day_20 = (to_micros(datetime(2026, 5, day, tzinfo=UTC)) for day in (9, 20))
    goes_over = Contract("contract-acct", 2, "acct", "basic", 0, None, later_phases=(Phase(day_20, "later"),))
    world.insert(goes_over)
    (untaxed,) = world.look()
    assert (untaxed.kind, untaxed.count) == ("taxes", 1)
    assert "reduced" in untaxed.what and "2026-05-31" in untaxed.what
    reduced_rate = "{category: reduced, percent: 7, valid_from: 2026-05-10}"
    world.invoicing(INVOICING.replace("2021-01-01}]", f"2021-01-01}}, {reduced_rate}]"))
    assert world.look() == []
    # From the 9th of a month to the 9th of the next: its tax date is 8 May, and the rate counts from the 10th on.
    world.insert(replace(goes_over, version=3, plan="later", later_phases=(), cycle=Cycle("month", 9), end_us=day_9))
    early = {one.kind: one for one in world.look()}["taxes"]
    assert "reduced" in early.what and "2026-05-08" in early.what
