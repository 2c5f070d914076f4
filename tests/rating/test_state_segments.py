"""Hash segments against a dictionary: whatever the keys, also those that no hash would give."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.rating import segments
from pipeline.rating.segments import Damaged, Described, Probe, Segment, build, merge, verify

#: Many keys with the same first half, at both ends of the range and in between: the filter then lets all of them pass.
HEADS = st.sampled_from([0, 1, 2**63, 2**64 - 1]) | st.integers(0, 2**64 - 1)
KEYS = st.builds(lambda head, low: head.to_bytes(8, "little") + low.to_bytes(8, "big"), HEADS, st.integers(0, 9))
VALUE_BYTES = [8, 16]


@pytest.fixture(scope="module", autouse=True)
def way() -> None:
    """Nothing here goes through the fast path: once is enough."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("segments")


def table(value_bytes: int) -> st.SearchStrategy[dict[bytes, bytes]]:
    return st.dictionaries(KEYS, st.binary(min_size=value_bytes, max_size=value_bytes), min_size=1, max_size=40)


def written(path: Path, rows: dict[bytes, bytes]) -> Segment:
    value_bytes = len(next(iter(rows.values())))
    described = build(path, b"".join(itertools.chain.from_iterable(rows.items())), value_bytes)
    verify(path.parent, described)
    return Segment(path.parent, described)


def merged(inputs: list[Segment], path: Path) -> Segment:
    steps = merge(inputs, path)
    seen = 0
    while True:
        try:
            seen += next(steps)
        except StopIteration as ended:
            described: Described = ended.value
            break
    assert seen == sum(one.rows for one in inputs)
    verify(path.parent, described)
    return Segment(path.parent, described)


def found(segment: Segment, keys: list[bytes]) -> dict[bytes, bytes]:
    numbers, values = segment.find(Probe(b"".join(keys)))
    return {keys[number]: value for number, value in zip(numbers.tolist(), values, strict=True)}


@pytest.mark.parametrize("value_bytes", VALUE_BYTES)
@given(st.data())
def test_a_segment_finds_what_was_written_and_nothing_else(folder: Path, value_bytes: int, data: st.DataObject) -> None:
    rows = data.draw(table(value_bytes))
    segment = written(folder / "one", rows)
    asked = list(rows) + data.draw(st.lists(KEYS, max_size=20))
    expected = {key: rows[key] for key in asked if key in rows}
    assert found(segment, asked) == expected
    assert {key: value for key in asked if (value := segment.get(key)) is not None} == expected


@pytest.mark.parametrize("value_bytes", VALUE_BYTES)
@given(st.data())
def test_a_merge_holds_every_key_once_with_its_newest_value(
    folder: Path, value_bytes: int, data: st.DataObject
) -> None:
    tables = data.draw(st.lists(table(value_bytes), min_size=1, max_size=5))
    step_words, segments._STEP_WORDS = segments._STEP_WORDS, data.draw(st.integers(1, 4))
    try:
        one = merged([written(folder / f"in-{i}", rows) for i, rows in enumerate(tables)], folder / "out")
    finally:
        segments._STEP_WORDS = step_words
    expected = {key: value for rows in tables for key, value in rows.items()}
    asked = list(expected) + data.draw(st.lists(KEYS, max_size=20))
    assert found(one, asked) == expected
    assert {key: one.get(key) for key in expected} == expected


def test_random_keys_all_found_and_few_others_looked_for(tmp_path: Path) -> None:
    """100,000 rows: what the filter lets pass wrongly is the price of a miss."""
    dice = np.random.default_rng(5)
    packed = dice.bytes(100_000 * 24)
    described = build(tmp_path / "one", packed, 8)
    segment = Segment(tmp_path, described)
    keys = [packed[at : at + 16] for at in range(0, len(packed), 24)]
    numbers, values = segment.find(Probe(b"".join(keys)))
    assert numbers.tolist() == list(range(100_000))
    assert b"".join(values[:9]) == b"".join(packed[at + 16 : at + 24] for at in range(0, 9 * 24, 24))
    others = Probe(dice.bytes(16 * 20_000))
    words = segment.filter[((others.tops * np.uint64(len(segment.filter))) >> np.uint64(32)).astype(np.intp)]
    assert np.count_nonzero((words & others.bits) == others.bits) < 200
    assert segment.find(others)[0].size == 0


@pytest.mark.parametrize("at", [0, 30, 70, -1])
def test_one_wrong_bit_anywhere_is_noticed(tmp_path: Path, at: int) -> None:
    described = build(tmp_path / "one", bytes(range(24 * 7)), 8)
    verify(tmp_path, described)
    content = bytearray((tmp_path / "one").read_bytes())
    content[at] ^= 1
    (tmp_path / "one").write_bytes(content)
    with pytest.raises(Damaged, match="checksum"):
        verify(tmp_path, described)


def test_a_file_cut_short_is_not_mapped(tmp_path: Path) -> None:
    """Reading behind the end of a mapped file would end the process."""
    described = build(tmp_path / "one", bytes(range(24 * 7)), 8)
    content = (tmp_path / "one").read_bytes()
    (tmp_path / "one").write_bytes(content[:-1])
    with pytest.raises(Damaged, match=f"expected {len(content)} bytes, got {len(content) - 1}"):
        Segment(tmp_path, described)
