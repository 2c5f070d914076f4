"""A story's world in PostgreSQL: rows written as the sink writes them, booked by ``rerate``, bills from its tables."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from psycopg.types.json import Jsonb

from pipeline.billing.close_entries import CloseEntry, StoredLine, read_lines
from pipeline.billing.commit import commit, prepare
from pipeline.billing.intake import Batch, RatedMessage
from pipeline.billing.lines import Lines
from pipeline.billing.months import ensure_months
from pipeline.billing.rerate import Month, Rerated, preview, rerate
from pipeline.catalog.files import AnyDraft
from pipeline.core.periods import Period, to_datetime
from pipeline.infra.postgres import connect
from pipeline.infra.settings import Settings
from pipeline.infra.topics import Topics

from .story import World

_PUBLISH = """
INSERT INTO billing.catalog_version (kind, id, version, valid_from, document, published_by)
VALUES (%s, %s, %s, %s, %s, 'story')
"""


class DatabaseWorld(World):
    """Does everything in PostgreSQL too, and lets PostgreSQL say what came of it."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        super().__init__(folder)
        self.settings = settings
        self._lines = Lines()
        self._written = 0

    def _publish(self, draft: AnyDraft, at: int | None) -> None:
        before = len(self.versions)
        super()._publish(draft, at)
        with connect(self.settings.dsn, application="story") as connection:
            for one in self.versions[before:]:
                key = (one.kind, one.id, one.version, to_datetime(one.valid_from_us))
                connection.execute(_PUBLISH, [*key, Jsonb(one.document)])

    def _process(self, records: Any, source: Any, partition: int) -> None:
        super()._process(records, source, partition)
        new = self.rows[self._written :]
        messages = [RatedMessage(partition, self._written + n, row, b"") for n, row in enumerate(new)]
        self._written = len(self.rows)
        with connect(self.settings.dsn, application="story", autocommit=True) as connection:
            ensure_months(connection, {to_datetime(row.head.timestamp_us).date().replace(day=1) for row in new})
            prepare(connection)
            topics = Topics(self.settings.topic_prefix)
            written = commit(connection, Batch(rated=messages), self._lines, topics, lambda _: None)
        assert written.billed == len(new), written.quarantined

    def missing(self, account: str, month: str) -> list[CloseEntry]:
        return _entries(preview(self.settings.dsn, Month.parse(month), account=account))

    def rerate(self, account: str, month: str) -> None:
        expected = self.missing(account, month)
        dsn = self.settings.dsn
        booked = _entries(rerate(dsn, Month.parse(month), account=account, actor="story", note="as told"))
        assert [entry.amount for entry in booked] == [entry.amount for entry in expected]
        self.booked += [(account, entry) for entry in booked]

    def lines_of(self, account: str, period: Period) -> list[StoredLine]:
        with connect(self.settings.dsn, application="story") as connection:
            return read_lines(connection, account, period)


def _entries(found: Iterable[Rerated]) -> list[CloseEntry]:
    entries: list[CloseEntry] = []
    for one in found:
        assert one.problem is None, one.problem
        entries += one.entries
    return entries
