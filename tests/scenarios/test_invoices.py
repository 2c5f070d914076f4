"""The invoice stories: each is closed, billed and credited by the product's own code in a database of its own."""

from pathlib import Path

import pytest

from pipeline.infra.postgres import connect
from pipeline.infra.settings import Settings

from .invoicing import InvoicingWorld
from .story import read_story, tell

STORIES = sorted((Path(__file__).parent / "invoices").glob("*.txt"))


@pytest.mark.parametrize("path", STORIES, ids=lambda path: path.stem)
def test_story(path: Path, tmp_path: Path, database: Settings) -> None:
    """And in the end everything adds up (``finance.document_checks``)."""
    with connect(database.dsn, application="story", autocommit=True) as connection:
        world = InvoicingWorld(tmp_path, database, connection)
        tell(read_story(path), world)
        assert world.untold() == [], "expected every document to be shown"
        assert connection.execute("SELECT * FROM finance.document_checks").fetchall() == []
