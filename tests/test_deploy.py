"""The deployment's files cannot run here; what can be judged is judged: they parse, and name what exists."""

import json
import os
import re
import secrets
import subprocess
from pathlib import Path

import psycopg
import pytest
import yaml
from prometheus_client import REGISTRY
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.sql import SQL, Identifier

from pipeline.infra import embedded, metrics
from pipeline.infra.embedded import Endpoints
from pipeline.infra.postgres import PROGRAM_ROLE, connect
from pipeline.infra.settings import Settings

_ROOT = Path(__file__).parent.parent


def _compose() -> dict[str, dict[str, dict[str, object]]]:
    loaded: dict[str, dict[str, dict[str, object]]] = yaml.safe_load((_ROOT / "docker-compose.yml").read_text())
    return loaded


def test_compose_sets_only_settings_that_exist() -> None:
    known = {f"TALLY_{name.upper()}" for name in Settings.model_fields}
    for name, service in _compose()["services"].items():
        environment = service.get("environment")
        assert environment is None or isinstance(environment, dict)
        unknown = {variable for variable in environment or {} if variable.startswith("TALLY_")} - known
        assert not unknown, f"{name} sets {unknown}"


def test_compose_publishes_on_loopback_only() -> None:
    for name, service in _compose()["services"].items():
        ports = service.get("ports", [])
        assert isinstance(ports, list)
        assert all(str(port).startswith("127.0.0.1:") for port in ports), f"{name} publishes {ports}"


def test_workers_log_in_as_the_program_and_migrations_as_the_owner() -> None:
    for name, service in _compose()["services"].items():
        environment = service.get("environment")
        assert environment is None or isinstance(environment, dict)
        if dsn := (environment or {}).get("TALLY_POSTGRES_DSN"):
            assert conninfo_to_dict(dsn)["user"] == ("postgres" if name == "init" else "tally"), name


@pytest.mark.skipif(bool(embedded.missing_packages()), reason="needs psql of the embedded services")
def test_the_login_of_the_program_is_made_as_written(services: Endpoints, template_database: str) -> None:
    """Twice, as an upgrade does; with the second password it may what the program may."""
    login, psql = f"tally_{secrets.token_hex(4)}", embedded.postgres_bin() / "psql"
    dsn = make_conninfo(services.postgres_dsn, dbname=template_database)
    try:
        for password in ("first", "second's"):
            command: list[str | Path] = [
                psql,
                dsn,
                "--no-psqlrc",
                f"--set=login={login}",
                f"--file={_ROOT}/deploy/login.sql",
            ]
            subprocess.run(command, env={**os.environ, "PROGRAM_PASSWORD": password}, check=True, capture_output=True)
        with connect(make_conninfo(dsn, user=login, password="second's"), application="test") as connection:
            assert connection.execute("SELECT session_user, current_user").fetchone() == (login, PROGRAM_ROLE)
    finally:
        with psycopg.connect(dsn, autocommit=True) as admin:
            admin.execute(SQL("DROP ROLE IF EXISTS {}").format(Identifier(login)))


def test_dashboard_shows_metrics_that_exist() -> None:
    assert metrics.RATER_EVENTS  # defines them
    shown = set(re.findall(r"tally_\w+", (_ROOT / "deploy/grafana/dashboards/tally.json").read_text()))
    known = set()
    for family in REGISTRY.collect():
        known |= {family.name, f"{family.name}_total", f"{family.name}_bucket"}
    assert shown and shown <= known, f"not defined: {shown - known}"
    json.loads((_ROOT / "deploy/grafana/dashboards/tally.json").read_text())


def test_locks_name_no_registry_and_no_path_of_a_machine() -> None:
    for name in ("requirements.txt", "requirements-dev.txt"):
        text = (_ROOT / name).read_text()
        assert not re.search(r"https?://|index-url|find-links|trusted-host|file://|^[-/]", text, re.MULTILINE), name
        pinned = re.findall(r"^[\w.-]+(?:\[.*\])?==", text, re.MULTILINE)
        assert pinned and text.count("--hash=sha256:") >= len(pinned)
