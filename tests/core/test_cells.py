"""The text of a cell: one text for every cell, one cell for every text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.cells import cell_text, cell_values

#: Values made of what the text form treats specially, and of what it does not.
VALUES = st.text(st.one_of(st.sampled_from("\\,x0\x1f\n\x7f"), st.characters(exclude_categories=["Cs"])), max_size=8)
CELLS = st.lists(VALUES, max_size=4).map(tuple)


def test_a_cell_reads_as_its_values() -> None:
    assert cell_text(()) == ""
    assert cell_text(("large", "eu")) == "large,eu"
    assert cell_text(("a,b", "", "c\\d", "é\x1f")) == r"a\,b,,c\\d,é\x1f"


@given(CELLS)
def test_the_text_tells_the_values(values: tuple[str, ...]) -> None:
    assert cell_values(cell_text(values), len(values)) == values


@given(CELLS)
def test_no_control_character_stands_in_it(values: tuple[str, ...]) -> None:
    """Names of counters are parts joined by one."""
    assert not any(ord(character) < 32 for character in cell_text(values))


@pytest.mark.parametrize(
    ("text", "dimensions"), [("a,b", 1), ("a", 2), ("a", 0), ("a\\", 1), ("\\x41", 1), ("\x1f", 1), ("\\q", 1)]
)
def test_other_texts_are_refused(text: str, dimensions: int) -> None:
    with pytest.raises(ValueError, match="text of a cell"):
        cell_values(text, dimensions)
