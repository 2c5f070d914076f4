"""`python -m tests.bench [rater|sink|producer|end_to_end …]`: a table on stderr, one JSON line per figure on stdout."""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from pydantic import SecretStr
from rich.console import Console
from rich.table import Table

from pipeline.infra import embedded
from pipeline.infra.postgres import migrate
from pipeline.infra.settings import Settings
from tests.bench.figures import FIGURES, Figure


def main(names: list[str]) -> None:
    unknown = [name for name in names if name not in FIGURES]
    if unknown:
        sys.exit(f"expected one of {', '.join(FIGURES)}, got {', '.join(unknown)}")
    err = Console(stderr=True)
    found: list[Figure] = []
    with TemporaryDirectory(prefix="tally-bench-") as folder, embedded.running(Path(folder)) as services:
        settings = Settings(
            kafka_bootstrap=services.endpoints.kafka_bootstrap,
            postgres_dsn=SecretStr(services.endpoints.postgres_dsn),
            data_dir=Path(folder) / "bench",
        )
        migrate(settings.dsn)
        for name in names or FIGURES:
            err.print(f"measuring {name}")
            for figure in FIGURES[name](settings):
                found.append(figure)
                sys.stdout.write(json.dumps(figure.as_json(), ensure_ascii=False) + "\n")
                sys.stdout.flush()
    table = Table("figure", "unit", "peer")
    for column in ("value", "peer's value", "ratio"):
        table.add_column(column, justify="right")
    for figure in found:
        table.add_row(
            figure.name,
            figure.unit,
            figure.peer or "",
            f"{figure.value:,.4g}" if figure.value < 1000 else f"{figure.value:,.0f}",
            "" if figure.peer_value is None else f"{figure.peer_value:,.4g}",
            "" if figure.ratio is None else f"{figure.ratio:.3f}",
        )
    err.print(table)


main(sys.argv[1:])
