"""Documents as PDF, and the way from a line to its events in a month of ten million rows."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import date

from psycopg.rows import scalar_row

from pipeline.billing.months import ensure_months
from pipeline.documents.model import Line
from pipeline.documents.render import Maker
from pipeline.infra.postgres import connect
from pipeline.infra.settings import Settings
from tests.bench.figures import RUNS, Figure, median
from tests.bench.sinks import own_database
from tests.documents import samples

_PDFS = 20
_ROWS, _LINES, _ASKED = 10_000_000, 100_000, 50


def pdfs(_: Settings) -> Iterator[Figure]:
    """A PDF of two pages with its e-invoice inside; the first, which reads fonts and schema, does not count."""
    maker, document = Maker(None), samples.domestic()
    maker.pdf(document)
    seconds, used = [], []
    for run in range(RUNS):
        # Each another one: what is laid out twice comes from memory.
        others = [replace(document, number=f"{run}-{n}", lines=_other(document.lines, n)) for n in range(_PDFS)]
        began, cpu = time.perf_counter(), time.process_time()
        for other in others:
            maker.pdf(other)
        seconds.append((time.perf_counter() - began) / _PDFS)
        used.append((time.process_time() - cpu) / _PDFS)
    yield Figure("pdf_ms", median(seconds) * 1000, "ms a PDF of two pages with its e-invoice, one process")
    yield Figure("pdf_cpu_ms", median(used) * 1000, "ms of CPU a PDF")


def _other(lines: Sequence[Line], number: int) -> tuple[Line, ...]:
    return tuple(replace(line, name=f"{line.name} {number}") for line in lines)


_INVOICES = """
INSERT INTO billing.invoice (account, currency, period_start, period_end)
SELECT 'a' || i, 'USD', '2026-09-01Z', '2026-10-01Z' FROM generate_series(1, %s) AS i
"""
_LINES_OF = """
INSERT INTO billing.invoice_line (
    invoice_id, contract, plan, plan_version, price_version, meter, meter_version, charge, segment_start
)
SELECT id, 'c', 'p', 1, 'p@1', 'm', 1, 'charge', '2026-09-01Z' FROM billing.invoice
"""
#: Rows of a line lie scattered over the month, as its events do.
_USAGE = """
INSERT INTO billing.rated_usage
SELECT date '2026-09-01', md5(i::text)::uuid, 1 + i %% %(lines)s, i, i, i, 1,
    timestamptz '2026-09-01Z' + i * interval '0.259 second', now(), i %% 4, i %% 4, 0, 'usage', false, 'charge', '',
    'a' || 1 + i %% %(lines)s, 'k' || i, 'llm.request', 'u', 's', 1, 1, 2, 0.000003,
    '{"input_tokens": "10", "model": "large"}'
FROM generate_series(%(first)s::bigint, %(last)s::bigint) AS i
"""


def line_events(settings: Settings) -> Iterator[Figure]:
    """From one line to its hundred events among ten million, with 23 other months beside theirs."""
    with (
        own_database(settings, "bench_line_events") as own,
        connect(own.dsn, application="bench", autocommit=True, role=None) as connection,
    ):
        ensure_months(connection, [date(year, month, 1) for year in (2025, 2026) for month in range(1, 13)])
        connection.execute(_INVOICES, [_LINES])
        connection.execute(_LINES_OF)
        for first in range(0, _ROWS, _ROWS // 20):
            some = {"lines": _LINES, "first": first, "last": first + _ROWS // 20 - 1}
            connection.execute(_USAGE, some)
        connection.execute("ANALYZE")
        seconds = []
        with connection.cursor(row_factory=scalar_row) as cursor:
            for line in cursor.execute("SELECT id FROM billing.invoice_line ORDER BY id LIMIT %s", [_ASKED]).fetchall():
                began = time.perf_counter()
                events = connection.execute("SELECT * FROM finance.line_events WHERE line_id = %s", [line]).fetchall()
                seconds.append(time.perf_counter() - began)
                assert len(events) == _ROWS // _LINES, "expected the events of one line"
        yield Figure("line_events_ms", median(seconds) * 1000, "ms, median of 50 lines of 100 events, 10M rows")
        yield Figure("line_events_max_ms", max(seconds) * 1000, "ms, the slowest of them")
