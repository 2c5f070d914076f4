"""The compiled way and the Python way give the same, for events as producers write them and for damaged ones."""

import importlib.util
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.charges import Cell, Charge, Tier
from pipeline.core.meters import Filter
from pipeline.core.plans import Pool
from pipeline.core.usage import DecodedEvent, Event
from pipeline.infra.wire import IDENTITY_BYTES, PAYLOAD_BYTES
from pipeline.rating import compiled, rate
from pipeline.rating.batch import Outcome, Source
from pipeline.rating.enrich import RatingTerms, Split, TermsView
from pipeline.rating.recent import new_recent
from tests.rating.world import (
    DAY_US,
    NOW_MS,
    NOW_US,
    UNIT,
    Memory,
    account,
    contract,
    framed,
    message,
    meter,
    parked,
    per_unit,
    plan,
    run,
    usage,
    view,
    without_fastpath,
)

#: The long form: TALLY_FUZZ_EXAMPLES=100000.
EXAMPLES = int(os.environ.get("TALLY_FUZZ_EXAMPLES", "300"))


def both(
    records: Sequence[Any], terms: TermsView, state: Memory | None = None, **options: Any
) -> tuple[Outcome, Outcome]:
    fast = run(records, terms, state, **options)
    with pytest.MonkeyPatch.context() as patch:
        without_fastpath(patch)
        return fast, run(records, terms, state, **options)


def test_it_is_compiled_wherever_there_is_a_c_compiler() -> None:
    if shutil.which("gcc") is None and shutil.which("cc") is None:
        pytest.skip("no C compiler here")
    assert importlib.util.find_spec("pipeline.rating.fastpath")


texts = st.text(st.characters(codec="utf-8"), max_size=90)
numbers = st.one_of(
    st.integers(-(10**19), 10**19).map(str),
    st.decimals(-(10**6), 10**6, places=9).map(str),
    st.sampled_from(["", "x", "NaN", "1e3", "0", "007", "1" * 40, "²"]),
)
events = st.builds(
    usage,
    key=st.one_of(texts, st.text("ab", min_size=1, max_size=2)),
    account=st.sampled_from(["acme", "acme", "acme", "acme", "", "nobody", "büro", "a" * 70, "a" * 129]),
    event_type=st.sampled_from(["completion", "completion", "completion", "other", "", "t" * 65, "t" * 129]),
    timestamp=st.one_of(
        st.integers(NOW_US - 36 * DAY_US, NOW_US + 600_000_000), st.integers(-(2**63), 2**63 - 1), st.integers(-9, 9)
    ),
    subject=texts,
    properties=st.dictionaries(st.one_of(texts, st.just("tokens")), st.one_of(texts, numbers), max_size=40).flatmap(
        lambda some: st.builds(
            lambda tokens, model, cost: {**some, "tokens": tokens} | model | cost,
            numbers,
            st.sampled_from([{"model": "large"}, {"model": "large"}, {"model": "small"}, {"model": "m" * 401}, {}]),
            st.sampled_from([{"cost": "2.5"}, {"cost": "2.5"}, {"cost": "0.1"}, {"cost": "x"}, {}]),
        )
    ),
    source=st.one_of(texts, st.just("s" * 256)),
    sequence=st.one_of(st.integers(0, 3000), st.integers(-(2**63), 2**63 - 1)),
)


@st.composite
def damaged(draw: st.DrawFn, event: dict[str, Any]) -> bytes:
    """The bytes of an event with some bits turned, bytes cut, doubled or put in."""
    data = bytearray(framed(event))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        match draw(st.sampled_from(["flip", "cut", "insert", "drop", "long"])):
            case "flip":
                data[at : at + 1] = bytes([data[at] ^ 1 << draw(st.integers(0, 7))]) if data else b""
            case "cut":
                del data[at:]
            case "insert":
                data[at:at] = draw(st.binary(min_size=1, max_size=3))
            case "drop":
                del data[at : at + 1]
            case "long":
                data[at : at + 1] = b"\xff" * draw(st.integers(1, 11))
    return bytes(data)


#: Half as they were written, half damaged.
values = events.flatmap(lambda event: st.one_of(st.just(framed(event)), damaged(event)))
TIERS = (Tier(1000 * UNIT, Decimal("0.003")), Tier(None, Decimal("0.002")))
#: Two charges of one meter and one of another, so that an event makes several rows, some of them tiered.
PLAIN = (
    meter(),
    meter("calls", aggregation="count", value=None),
    plan(
        per_unit("0.000000001", id="flat"),
        Charge(id="tiers", meter="tokens", model="graduated", tiers=TIERS),
        per_unit("0.1", id="calls", meter="calls"),
    ),
    account(),
    contract(),
)
#: Every other way to price: cells, subjects, by event, from a pool, of a maximum, untold, with a last tier that parks.
OTHERS = (
    meter(allow_negative=True),
    meter("peak", aggregation="max", filters=(Filter("model", ("large", "small")),)),
    meter("seen", aggregation="unique"),
    replace(
        plan(
            Charge("matrix", "tokens", "matrix", Decimal(1), by=("model",), cells=(Cell(("large",), Decimal(3)),)),
            Charge("tiers", "tokens", "volume", tiers=TIERS, per_subject=True, by=("model", "region")),
            Charge("rate", "tokens", "percentage", rate=Decimal(1), event_minimum=Decimal("0.3")),
            Charge("brings", "peak", "dynamic", amount_property="cost", by=("model",)),
            per_unit("2", id="pooled"),
            per_unit("3", id="pooled too"),
            per_unit("4", "peak", "peak"),
            per_unit("5", "seen", "seen"),
            Charge("bounded", "tokens", "graduated", tiers=(Tier(10**18, Decimal(1)),), beyond="park"),
        ),
        pools=(Pool("pool", "token", 2000 * UNIT, ("pooled", "pooled too")),),
    ),
    account(),
    contract(),
)


@pytest.mark.parametrize("items", [PLAIN, OTHERS], ids=["plain", "others"])
@settings(max_examples=EXAMPLES, deadline=None)
@given(
    written=st.lists(values, max_size=8),
    before=st.one_of(st.integers(0, 10**16), st.integers(-(10**30), 10**30), st.integers(10**36, 10**38 - 1)),
)
def test_both_ways_give_the_same(items: tuple[Any, ...], written: list[bytes], before: int) -> None:
    """Rows byte for byte, running quantities, what was refused and why, and which sequence numbers arrived."""
    if compiled.fastpath is None:
        pytest.skip("nothing to compare the Python way with")
    records = [message(value, number, key=b"acme") for number, value in enumerate(written)]
    terms = view(*items)
    found = terms.find(b"acme", b"completion", NOW_US)
    assert isinstance(found, RatingTerms)
    state = Memory(totals={priced.counter: before for priced in found.priced if not isinstance(priced, Split)})
    fast, python = both(records, terms, state)
    assert fast == python


retried = st.one_of(
    values,
    st.integers(-200, 400).map(lambda ahead_s: framed(usage(f"k{ahead_s}", timestamp=NOW_US + ahead_s * 1_000_000))),
)


@pytest.mark.parametrize("clock_ms", [NOW_MS, NOW_MS - 120_000, NOW_MS + 120_000], ids=["right", "behind", "ahead"])
@settings(max_examples=EXAMPLES // 3, deadline=None)
@given(written=st.lists(retried, max_size=8))
def test_both_ways_give_the_same_of_retried_events(clock_ms: int, written: list[bytes]) -> None:
    """Whether prices may still come for an event is judged by the worker's clock, which need not be the broker's."""
    records = [parked(usage(), number, value=value, not_before_ms=0) for number, value in enumerate(written)]
    fast, python = both(records, view(*PLAIN), source=Source.RETRY, now_ms=clock_ms)
    assert fast == python


def joined(identities: list[int]) -> bytes:
    return b"".join(number.to_bytes(IDENTITY_BYTES, "big") for number in identities)


@given(
    batches=st.lists(
        st.lists(st.tuples(st.integers(0, 40), st.binary(min_size=8, max_size=8)), max_size=1500), max_size=4
    ),
    asked=st.lists(st.integers(0, 60), max_size=20),
)
def test_recent_rows_are_found_as_in_a_dictionary(batches: list[list[tuple[int, bytes]]], asked: list[int]) -> None:
    """Of one identity the last row counts, also after the table has grown."""
    kept: dict[int, bytes] = {}
    recent = new_recent()
    for number, batch in enumerate(batches):
        rows = [(identity + 1000 * number, payload) for identity, payload in batch] + batch
        recent.add(b"".join(joined([identity]) + payload for identity, payload in rows))
        kept |= dict(rows)
    found = recent.find(joined(asked))
    assert (found or [None] * len(asked)) == [kept.get(identity) for identity in asked]
    assert len(recent) == len(kept)
    entries = recent.entries()
    size = IDENTITY_BYTES + PAYLOAD_BYTES
    assert sorted(entries[at : at + size] for at in range(0, len(entries), size)) == sorted(
        joined([identity]) + payload for identity, payload in kept.items()
    )


@pytest.mark.parametrize("half", [0, 1], ids=["first", "second"])
def test_recent_rows_with_half_a_key_in_common_take_no_longer(half: int) -> None:
    """Hashes without a secret can be made so. In a table that looks at one half, these 40,000 take half a second."""
    halves = [(b"the same", b"%8d" % number)[:: 1 - 2 * half] for number in range(40_000)]
    recent = new_recent()
    start_s = time.thread_time()
    recent.add(b"".join(first + second + b"\0" * PAYLOAD_BYTES for first, second in halves))
    assert time.thread_time() - start_s < 0.2
    assert len(recent) == len(halves)


def test_none_is_no_block_of_rows() -> None:
    with pytest.raises(TypeError):
        new_recent().add(None)  # type: ignore[arg-type]


def test_an_event_kept_as_it_came_is_told_from_another() -> None:
    """What it says of itself, as a tuple does: equal to itself decoded, and to no other."""
    (event,) = run([message(usage("k1"))]).rated
    (other,) = run([message(usage("k2"))]).rated
    decoded = DecodedEvent(
        event.record,
        event.identity,
        event.payload,
        event.key,
        event.account,
        event.event_type,
        event.timestamp_us,
        event.properties,
    )
    assert event == decoded and decoded == event
    assert event != other and decoded != other
    others: list[object] = ["k1", None]
    assert event not in others


def test_once_its_cells_are_met_an_event_is_priced_without_the_python_way(monkeypatch: pytest.MonkeyPatch) -> None:
    if compiled.fastpath is None:
        pytest.skip("nothing is compiled")
    by_python: list[Event] = []
    measured = rate._measured

    def counted(event: Event, terms: RatingTerms) -> Any:
        by_python.append(event)
        return measured(event, terms)

    monkeypatch.setattr(rate, "_measured", counted)
    terms = view(*OTHERS)
    events = [
        message(usage(f"k{i}", subject=subject, properties={"tokens": "7", "model": "large", "cost": "2"}), i)
        for i, subject in enumerate(("ada", "bob", "ada", "", "bob", ""))
    ]
    outcome = run(events, terms)
    assert [event.key for event in by_python] == [b"k0", b"k1", b"k3"], "who meets a cell first"
    assert len(outcome.rated) == len(events)
    assert len(outcome.rows) == 9 * len(events)
