"""Every setting of Tally, read once from the environment (``TALLY_…``), checked, and passed on as plain values.

Nothing else in the package reads the environment.
"""

import getpass
import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict


def _state_home() -> Path:
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "tally"


def default_cache_dir() -> Path:
    """Where fetched files are kept that can be fetched again."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "tally"


def _user() -> str:
    """Who runs this process, for the audit trail; the user's number where the system has no name for it."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


class Settings(BaseSettings):
    """Settings of one process. Durations are seconds, sizes bytes, unless the name says otherwise."""

    model_config = SettingsConfigDict(env_prefix="TALLY_", extra="ignore", frozen=True)

    # -- where things are
    kafka_bootstrap: str | None = Field(None, description="host:port of your Kafka; unset means the embedded one")
    postgres_dsn: SecretStr | None = Field(
        None, description="libpq DSN of your PostgreSQL; unset means the embedded one"
    )
    registry_url: str | None = Field(None, description="schema registry; unset means the ids in schemas/avro/ids.json")
    data_dir: Path = Field(default_factory=_state_home, description="state of embedded services and workers")

    # -- Kafka
    topic_prefix: str = Field(
        "", pattern=r"^[a-zA-Z0-9._-]*$", description="put before every topic, group and transactional id"
    )
    partitions: int = Field(4, ge=1, le=512, description="partitions of the usage topics, fixed at creation")
    replication_factor: int = Field(1, ge=1, le=9)
    kafka_security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    kafka_sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = "PLAIN"
    kafka_sasl_username: str | None = None
    kafka_sasl_password: SecretStr | None = None
    kafka_ssl_ca: Path | None = None
    kafka_ssl_certificate: Path | None = None
    kafka_ssl_key: Path | None = None

    # -- workers
    metrics_host: str = Field("127.0.0.1", description="address the metrics server listens on")
    metrics_port: int | None = Field(None, ge=0, le=65535, description="0 picks a free port; unset turns metrics off")
    log_format: Literal["console", "json"] = "console"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    session_timeout: float = Field(6.0, ge=6.0, description="a dead rater's partitions move on after this long")
    progress_timeout: float = Field(
        60.0, ge=5.0, description="a rater that stands still for so long while events wait ends, to be started again"
    )
    snapshot_dir: Path | None = Field(
        None,
        description="where raters keep copies of their state, on a volume that outlives a worker's disk and that all "
        "raters share; unset means that a lost disk is made good by reading the changelogs, up to 37 days of them",
    )
    snapshot_interval: float = Field(600.0, gt=0, description="from one copy of a partition's state to the next")
    batch_records: int = Field(5000, ge=1, le=5000, description="most events in one transaction")
    transactions_per_second: float = Field(
        100.0,
        gt=0,
        description="about the most transactions a rater begins, all its partitions together: events of a busy one "
        "gather meanwhile, 0.5 s at most; a full batch waits for nothing",
    )
    dead_letter_run_max: int = Field(
        1000, ge=0, description="a partition stops after more dead letters in a row; 0 means no limit"
    )
    dead_letter_percent_max: int = Field(
        50, ge=1, le=100, description="a partition stops above this share of dead letters; 100 means no limit"
    )
    dead_letter_window: int = Field(10_000, ge=1, description="the last events that share is taken of")
    sequence_grace: float = Field(
        900.0, ge=0, description="a sequence number may be this late before it counts as missing"
    )
    actor: str = Field(default_factory=_user, description="who publishes and decides")
    four_eyes: bool = Field(
        True, description="what `tally plans publish` and `rollback` change waits until a second person approves it"
    )

    @property
    def kafka(self) -> dict[str, Any]:
        """Connection part of a librdkafka configuration. Raises ValueError when no broker is known."""
        if not self.kafka_bootstrap:
            raise ValueError("no Kafka known: set TALLY_KAFKA_BOOTSTRAP or run `tally up`")
        # Only what is critical: every line would say again that the broker is away, which those who wait say once.
        config: dict[str, Any] = {"bootstrap.servers": self.kafka_bootstrap, "log_level": 2}
        if self.kafka_security_protocol != "PLAINTEXT":
            config["security.protocol"] = self.kafka_security_protocol
        if self.kafka_security_protocol.startswith("SASL"):
            config["sasl.mechanism"] = self.kafka_sasl_mechanism
            config["sasl.username"] = self.kafka_sasl_username or ""
            config["sasl.password"] = self.kafka_sasl_password.get_secret_value() if self.kafka_sasl_password else ""
        for name, path in (
            ("ssl.ca.location", self.kafka_ssl_ca),
            ("ssl.certificate.location", self.kafka_ssl_certificate),
            ("ssl.key.location", self.kafka_ssl_key),
        ):
            if path is not None:
                config[name] = str(path)
        return config

    @property
    def dsn(self) -> str:
        """DSN of PostgreSQL. Raises ValueError when none is known."""
        if self.postgres_dsn is None:
            raise ValueError("no PostgreSQL known: set TALLY_POSTGRES_DSN or run `tally up`")
        return self.postgres_dsn.get_secret_value()
