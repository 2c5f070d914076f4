"""`tally rater`, `tally sink`, `tally relay`, `tally alerts`: one worker in the foreground, until SIGTERM or Ctrl-C."""

import signal
import threading
from collections.abc import Callable

import typer

from pipeline.cli.context import DataDir, settings_for
from pipeline.infra import logs
from pipeline.infra.settings import Settings


def register(app: typer.Typer) -> None:
    app.command()(rater)
    app.command()(sink)
    app.command()(relay)
    app.command()(alerts)


def rater(data_dir: DataDir = None) -> None:
    """Rate usage events: dedupe, enrich, price. Run as many as there are partitions."""
    # Faust and numpy take half a second to import: only the worker that needs them pays.
    from pipeline.rating import app as rating

    settings = settings_for(data_dir)
    logs.configure(settings, worker="rater")
    rating.run(settings)


def sink(data_dir: DataDir = None) -> None:
    """Write rated usage to PostgreSQL as lines of open invoices. Run as many as there are partitions."""
    from pipeline.billing import sink as billing

    _until_told(billing.run, settings_for(data_dir), worker="sink")


def relay(data_dir: DataDir = None) -> None:
    """Carry published prices and accounts from PostgreSQL to Kafka. Run two for standby; one is active."""
    from pipeline.catalog import relay as catalog

    _until_told(catalog.run, settings_for(data_dir), worker="relay")


def alerts(data_dir: DataDir = None) -> None:
    """Keep balances up to date and tell thresholds on billing.alerts. Run two for standby; one is active."""
    from pipeline.billing import alerts as billing

    _until_told(billing.run, settings_for(data_dir), worker="alerts")


def _until_told(run: Callable[[Settings, threading.Event], None], settings: Settings, *, worker: str) -> None:
    logs.configure(settings, worker=worker)
    run(settings, told_to_stop())


def told_to_stop() -> threading.Event:
    """Is set once the process is told to stop, by SIGTERM or Ctrl-C, which end it no more by themselves."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return stop
