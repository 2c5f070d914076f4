"""The sink's hand-written reader against fastavro, and what it refuses."""

import io
from collections.abc import Iterator
from decimal import Decimal

import fastavro
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.billing import commit, rated
from pipeline.billing.rated import KINDS, PRICE_CLASSES, Malformed, Row, reader
from pipeline.core.money import scaled
from pipeline.infra.avro import RATED, Record, frame, load_schemas
from tests.billing.records import rated_record, scaled_decimal

SCHEMAS = load_schemas()
#: Of RatedUsage, oldest first.
VERSIONS = [version for version in SCHEMAS.versions if version.subject == RATED]
#: PostgreSQL's text holds no NUL; the reader refuses it, see below.
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=150)
LONG = st.integers(-(2**63), 2**63 - 1)
INT = st.integers(-(2**31), 2**31 - 1)
MICROS = st.integers(-62_135_596_800_000_000, 253_370_764_799_999_999)
MILLIS = st.integers(-62_135_596_800_000, 253_370_764_799_999)
QUANTITY = st.integers(-(10**38) + 1, 10**38 - 1)

EVENTS = st.fixed_dictionaries(
    {
        "idempotency_key": TEXT,
        "account": TEXT.map(lambda text: text[:128]),
        "event_type": TEXT,
        "timestamp": MICROS,
        "subject": TEXT,
        "properties": st.dictionaries(TEXT, TEXT, max_size=5),
        "source": TEXT,
        "sequence": LONG,
    }
)
PERIODS = st.lists(MICROS, min_size=2, max_size=2, unique=True).map(sorted)


@st.composite
def records(draw: st.DrawFn) -> Record:
    start, end = draw(PERIODS)
    return {
        "event": draw(EVENTS),
        "origin_topic": draw(TEXT),
        "origin_partition": draw(INT),
        "origin_offset": draw(LONG),
        "origin_appended_at": draw(MILLIS),
        "identity": draw(st.binary(min_size=16, max_size=16)),
        "catalog_offset": draw(LONG),
        "contract": draw(TEXT),
        "plan": draw(TEXT),
        "plan_version": draw(INT),
        "meter": draw(TEXT),
        "meter_version": draw(INT),
        "price_version": draw(TEXT),
        "charge": draw(TEXT),
        "period_start": start,
        "period_end": end,
        "segment_start": draw(MICROS),
        "cell": draw(TEXT),
        "currency": draw(st.sampled_from(["USD", "JPY", "KWD"])),
        "price_class": draw(st.sampled_from(PRICE_CLASSES)),
        "entry": draw(INT),
        "kind": draw(st.sampled_from(KINDS)),
        "quantity": scaled_decimal(draw(QUANTITY), 9),
        "quantity_before": scaled_decimal(draw(QUANTITY), 9),
        "quantity_after": scaled_decimal(draw(QUANTITY), 9),
        "amount": scaled_decimal(draw(QUANTITY), 12),
        "late": draw(st.booleans()),
    }


def _expected(record: Record) -> tuple[object, ...]:
    event = [record["event"][name] for name in rated_record()["event"]]
    rest = [value for name, value in record.items() if name != "event"]
    rest[-5:-1] = [scaled(record[n], 9) for n in ("quantity", "quantity_before", "quantity_after")] + [
        scaled(record["amount"], 12)
    ]
    return (*event, *rest)


@pytest.fixture(scope="module", autouse=True, params=["compiled", "python"])
def way(request: pytest.FixtureRequest) -> Iterator[None]:
    """Everything here is read both ways: by the compiled fast path, and in Python alone."""
    if request.param == "compiled":
        if rated.PlainRows is None:
            pytest.skip("installed without a C compiler")
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rated, "PlainRows", None)
        yield


def _flat(row: Row) -> tuple[object, ...]:
    head, terms = row.head, row.terms
    return (
        *head,
        *(getattr(terms, name) for name in terms.__slots__),
        *row[2:],
    )


def test_reads_the_fields_of_the_schema_in_its_order() -> None:
    """A new version of the shape must come with a reader that knows it."""
    newest = list(rated_record())
    first = [name for name in newest if name != "price_class"]
    for version, expected in zip(VERSIONS, (first, newest), strict=True):
        names = [field["name"] for field in version.parsed()["fields"]]  # type: ignore[index,call-overload]
        event = [field["name"] for field in version.parsed()["fields"][0]["type"]["fields"]]  # type: ignore[index,call-overload]
        assert event == list(rated_record()["event"])
        assert names == expected


@given(st.lists(records(), min_size=1, max_size=3), st.lists(st.tuples(st.integers(0, 2), st.booleans()), max_size=8))
def test_rows_from_before_there_were_price_classes_are_running(
    made: list[Record], order: list[tuple[int, bool]]
) -> None:
    """While raters are upgraded one by one, rows of both versions come in turn, of the same events and terms."""
    read = reader(SCHEMAS).read
    for i, old in order:
        record = made[i % len(made)]
        data = _as_first_version(record) if old else SCHEMAS.encode(RATED, record)
        assert _flat(read(data)) == _expected(record | {"price_class": "running"} if old else record)


def test_a_row_of_the_first_version_is_not_read_as_one_of_the_second() -> None:
    """Both begin alike, and this one would read as a void of the second: one byte further on, it is well formed."""
    read, tiny = reader(SCHEMAS).read, Decimal("2E-9")
    record = rated_record(quantity=tiny, before=tiny, quantity_after=tiny, amount=0)
    for data in (SCHEMAS.encode(RATED, record), *[_as_first_version(record)] * 2):
        assert _flat(read(data)) == _expected(record)


def _as_first_version(record: Record) -> bytes:
    out = io.BytesIO()
    out.write(frame(VERSIONS[0].id))
    fastavro.schemaless_writer(out, VERSIONS[0].parsed(), record)
    return out.getvalue()


@given(st.lists(records(), min_size=1, max_size=3), st.lists(st.integers(0, 2), min_size=1, max_size=6))
def test_equals_fastavro(made: list[Record], order: list[int]) -> None:
    """Whatever came before: heads and terms are remembered between rows and must never leak into another."""
    read = reader(SCHEMAS).read
    for i in order:
        record = made[i % len(made)]
        assert _flat(read(SCHEMAS.encode(RATED, record))) == _expected(record)


@given(records(), st.data())
def test_a_row_of_another_charge_after_the_same_event(record: Record, data: st.DataObject) -> None:
    read = reader(SCHEMAS).read
    first = read(SCHEMAS.encode(RATED, record))
    other = record | {"charge": data.draw(TEXT), "amount": scaled_decimal(data.draw(QUANTITY), 12)}
    second = read(SCHEMAS.encode(RATED, other))
    assert _flat(second) == _expected(other)
    assert second.head is first.head, "the event is decoded once for its rows"
    assert (second.terms is first.terms) == (other["charge"] == record["charge"]), "terms once for their lines"


def test_reads_map_blocks_of_any_form() -> None:
    """Avro lets a writer split a map into blocks and give their size in bytes."""
    plain = SCHEMAS.encode(RATED, rated_record(properties={"a": "1", "b": "2"}))
    one_block = b"\x04\x02a\x021\x02b\x022\x00"
    assert plain.count(one_block) == 1
    split = plain.replace(one_block, b"\x02\x02a\x021\x01\x08\x02b\x022\x00")
    assert _flat(reader(SCHEMAS).read(split)) == _flat(reader(SCHEMAS).read(plain))


def test_every_truncation_and_every_byte_more_is_refused() -> None:
    data = SCHEMAS.encode(RATED, rated_record())
    fresh, warm = reader(SCHEMAS), reader(SCHEMAS)
    warm.read(data)
    for read in (fresh.read, warm.read):
        for end in range(len(data)):
            with pytest.raises(Malformed):
                read(data[:end])
        with pytest.raises(Malformed, match="1 bytes left over"):
            read(data + b"\0")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"charge": "a\0b"}, "NUL"),
        ({"key": "a\0b"}, "NUL"),
        ({"properties": {"a": "\0"}}, "NUL"),
        ({"currency": "usd"}, "currency"),
        ({"period_end": 0}, "period"),
        ({"timestamp": 2**62}, "years 1 to 9998"),
        ({"cell": "x" * 401}, "cell of at most 400"),
        ({"charge": "x" * 201}, "charge of at most 200"),
    ],
)
def test_refuses_what_postgres_cannot_hold(change: dict[str, object], message: str) -> None:
    with pytest.raises(Malformed, match=message):
        reader(SCHEMAS).read(SCHEMAS.encode(RATED, rated_record(**change)))


@pytest.mark.parametrize("data", [b"", b"\0", b"\xff" * 40, b"\0\0\0\0\x01" + b"\0" * 60])
def test_refuses_other_frames(data: bytes) -> None:
    with pytest.raises(Malformed, match="frame of a RatedUsage"):
        reader(SCHEMAS).read(data)


@given(st.binary(max_size=300))
def test_any_bytes_give_a_row_or_malformed(body: bytes) -> None:
    try:
        row = reader(SCHEMAS).read(b"\0\0\0\0\x02" + body)
    except Malformed:
        return
    assert isinstance(row, Row)


def test_uses_no_avro_library_for_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    data = SCHEMAS.encode(RATED, rated_record())
    monkeypatch.delattr(fastavro, "schemaless_reader")
    assert reader(SCHEMAS).read(data).head.account == "acct"


@given(records())
def test_the_text_for_copy_is_the_same_both_ways(record: Record) -> None:
    if commit.plain_text is None:
        pytest.skip("installed without a C compiler")
    head = reader(SCHEMAS).read(SCHEMAS.encode(RATED, record)).head
    compiled = commit.plain_text(head)
    assert compiled in (None, commit._text_of_event(head))
    plain = head.timestamp_us >= 0 and head.origin_appended_ms >= 0
    texts = "".join((*head.properties, *head.properties.values()))
    if plain and texts.isprintable() and not set(texts) & {'"', "\\"}:
        assert compiled is not None
