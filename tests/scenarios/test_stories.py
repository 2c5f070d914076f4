"""The stories, each told to the core and to PostgreSQL."""

from pathlib import Path

import pytest

from pipeline.billing.reconcile import reconcile
from pipeline.infra.settings import Settings

from .database import DatabaseWorld
from .story import Section, World, check_table, read_story, tell

STORIES = sorted(Path(__file__).parent.glob("*.txt"))
#: Of reconcile, what concerns lines; a story has no receipts.
_OF_LINES = ("lines =", "counters =", "USD of", "EUR of")


@pytest.mark.parametrize("path", STORIES, ids=lambda path: path.stem)
def test_story(path: Path, tmp_path: Path) -> None:
    tell(read_story(path), World(tmp_path))


@pytest.mark.parametrize("path", STORIES, ids=lambda path: path.stem)
def test_story_in_postgres(path: Path, tmp_path: Path, settings: Settings) -> None:
    """The same bills from rows, entries and lines in tables; and they reconcile."""
    tell(read_story(path), DatabaseWorld(tmp_path, settings))
    checks = [check for check in reconcile(settings).checks if check.name.startswith(_OF_LINES)]
    assert [check for check in checks if check.difference] == []


def test_a_table_that_is_not_so_shows_the_difference() -> None:
    section = Section("invoice", "2026-000001 acme", ("line  total", "plan   100.00", "calls   30.00", ""), 7)
    with pytest.raises(AssertionError) as raised:
        check_table(section, ("line", "total"), [("plan", "100.00"), ("calls", "130.00")])
    assert str(raised.value).splitlines() == [
        "line 7: -- invoice: 2026-000001 acme: - as told, + as it came",
        "  line    total",
        "  plan   100.00",
        "- calls   30.00",
        "+ calls  130.00",
    ]
