"""``python -m tests.bench [NAME …]``: one JSON line per figure on stdout as it comes, a table on stderr at the end.

Without names, all that take minutes; ``state``, ``sink_20m``, ``close_100k`` and ``line_events`` take long and are
measured when named.
A measurement that fails does not lose the others: its error goes to stderr, and the exit code is 1.
"""

import json
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from pydantic import SecretStr
from rich.console import Console
from rich.table import Table

from pipeline.infra import embedded
from pipeline.infra.postgres import migrate
from pipeline.infra.settings import Settings
from tests.bench import world
from tests.bench.backtests import backtests
from tests.bench.closes import close, close_100k
from tests.bench.documents import line_events, pdfs
from tests.bench.end_to_end import end_to_end, producer
from tests.bench.figures import RUNS, Figure, Skipped, median
from tests.bench.raters import catalog, many_keys, rater, scale
from tests.bench.recovery import restarted, taken_over
from tests.bench.sinks import sink, sink_20m
from tests.bench.state import state
from tests.bench.streams import streams
from tests.integration.deployment import Deployment


def recovery(settings: Settings) -> Iterator[Figure]:
    """From SIGKILL of a rater to the next commit on each of its partitions."""
    for name, measured in (("restart", restarted), ("take_over", taken_over)):
        seconds = []
        for run in range(RUNS):
            with world.topics(settings, f"{name}{run}") as here:
                seconds.append(measured(Deployment(here)))
        yield Figure(f"recovery_{name}_s", median(seconds), "s")


def state_and_rater(settings: Settings) -> Iterator[Figure]:
    """50M keys: what the state alone costs, and then what a rater does."""
    yield from state(settings)
    yield from many_keys(settings)


FIGURES: dict[str, Callable[[Settings], Iterator[Figure]]] = {
    "producer": producer,
    "rater": rater,
    "catalog": catalog,
    "streams": streams,
    "scale": scale,
    "sink": sink,
    "end_to_end": end_to_end,
    "backtest": backtests,
    "close": close,
    "pdfs": pdfs,
    "recovery": recovery,
}
#: Only when named: each takes many minutes and gigabytes of disk.
LONG: dict[str, Callable[[Settings], Iterator[Figure]]] = {
    "state": state_and_rater,
    "sink_20m": sink_20m,
    "close_100k": close_100k,
    "line_events": line_events,
}

#: Of the table where there is no terminal to fit, characters.
_WIDTH = 160


def main(names: list[str]) -> int:
    known = FIGURES | LONG
    if unknown := [name for name in names if name not in known]:
        sys.exit(f"expected some of {', '.join(known)}, got {', '.join(unknown)}")
    err = Console(stderr=True, width=None if sys.stderr.isatty() else _WIDTH)
    found: list[Figure] = []
    failed: list[str] = []
    with TemporaryDirectory(prefix="tally-bench-") as folder, embedded.running(Path(folder)) as services:
        settings = Settings(
            kafka_bootstrap=services.endpoints.kafka_bootstrap,
            postgres_dsn=SecretStr(services.endpoints.postgres_dsn),
            data_dir=Path(folder) / "bench",
        )
        migrate(settings.dsn)
        for name in names or FIGURES:
            err.print(f"measuring {name}")
            try:
                for figure in known[name](settings):
                    found.append(figure)
                    sys.stdout.write(json.dumps(figure.as_json(), ensure_ascii=False) + "\n")
                    sys.stdout.flush()
            except Skipped as reason:
                err.print(f"{name} skipped: {reason}", markup=False)
            except Exception:  # noqa: BLE001 - whatever it is, the other figures are still wanted
                failed.append(name)
                err.print(f"{name} failed:\n{traceback.format_exc()}", markup=False)
    err.print(_table(found))
    if failed:
        err.print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


def _table(figures: list[Figure]) -> Table:
    table = Table()
    table.add_column("figure", min_width=max((len(figure.name) for figure in figures), default=0))
    table.add_column("unit")
    table.add_column("peer")
    for column in ("value", "peer's value", "ratio"):
        table.add_column(column, justify="right")
    for figure in figures:
        table.add_row(
            figure.name,
            figure.unit,
            figure.peer or "",
            _number(figure.value),
            "" if figure.peer_value is None else _number(figure.peer_value),
            "" if figure.ratio is None else f"{figure.ratio:.3f}",
        )
    return table


def _number(value: float) -> str:
    return f"{value:,.4g}" if value < 1000 else f"{value:,.0f}"


# Guarded: what ``state`` measures in processes of its own is imported there once more.
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
