"""Which services a command talks to: the environment's, else the embedded ones running in the data directory."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.infra import embedded
from pipeline.infra.settings import Settings

DataDir = Annotated[
    Path | None,
    typer.Option("--data-dir", help="Where embedded services keep their data (default: the user's state directory)."),
]
Json = Annotated[bool, typer.Option("--json", help="JSON on stdout.")]
#: None means the setting; see ``grace_of``.
Grace = Annotated[
    float | None,
    typer.Option(
        min=0,
        metavar="SECONDS",
        help="Sequence numbers may be this late before they count as missing (default: TALLY_SEQUENCE_GRACE, 900).",
    ),
]


def settings_for(data_dir: Path | None = None) -> Settings:
    """Settings with every address filled in that can be: environment first, then running embedded services."""
    settings = Settings() if data_dir is None else Settings(data_dir=data_dir)
    if settings.kafka_bootstrap and settings.postgres_dsn:
        return settings
    found = embedded.find(settings.data_dir)
    if found is None:
        return settings
    return settings.model_copy(
        update={
            "kafka_bootstrap": settings.kafka_bootstrap or found.kafka_bootstrap,
            "postgres_dsn": settings.postgres_dsn or found.postgres_dsn_secret,
        }
    )


def grace_of(grace: float | None, settings: Settings) -> float:
    """Seconds that a sequence number may be late: as asked, or as set."""
    return settings.sequence_grace if grace is None else grace
