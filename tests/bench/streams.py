"""The rater beside a Kafka Streams application that does the same work, on the same broker, run by run in turn.

The peer is ``../shared/peer_streams`` (its README says what it does); it is built once into the cache directory, and
works on a copy.

Equal: the events, which are the peer's own load in our schema: 1,000 accounts on five plans of graduated tiers over
a month's running quantity, 2 % repeats, 0.1 % that cannot be rated, 31 days of usage, in the same order on the same 4
partitions; an empty state at the start; exactly once; lz4; and what is measured: all CPU of the processes from their
start to the last commit, and the rate from the first events to that, once over all and once over the last 60 %. Both
outputs are checked against the load's own totals by outcome; the peer's also by amount, which of ours the tests prove.

Not equal: our events also carry a subject, a source and a sequence number, and lie later in time, to be inside the
rater's window; so month ends fall on other events. We also compare the payload of repeats, write receipts and what a
row was rated by, and try what is of an unknown account again; the peer drops repeats whatever they say, and gives
unknown accounts up. It commits every 100 ms, the rater after each batch.
"""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fastavro

from pipeline.infra.avro import EVENTS, frame, load_schemas
from pipeline.infra.processes import locked
from pipeline.infra.settings import Settings, default_cache_dir
from pipeline.infra.topics import Topics
from tests.bench import world
from tests.bench.figures import RUNS, Figure, Skipped, compared, median
from tests.bench.raters import Speed, rated
from tests.integration.deployment import ROOT, Deployment

#: With fewer a JVM's warm-up is most of what the peer costs.
COUNT = 1_000_000
THREADS = 2
#: What the peer's load has, and its application counts on.
_PARTITIONS = 4
_PEER = ROOT.parent / "shared" / "peer_streams"
#: When the last event of the peer's load happened.
_LOAD_ENDS = datetime(2026, 11, 20, tzinfo=UTC)
_HEAD_BYTES = 5
_JAVA_MIN = 17


def streams(settings: Settings) -> Iterator[Figure]:
    """One rater, two raters and the peer with two threads, in turn."""
    built = _built()
    one: list[Speed] = []
    two: list[Speed] = []
    peers: list[dict[str, Any]] = []
    peer = _Peer(settings, built)
    try:
        expected = peer.load()
        messages = peer.events()
        for run in range(RUNS):
            for speeds, workers in ((one, 1), (two, 2)):
                with world.deployment(settings, f"streams{run}-{workers}", partitions=_PARTITIONS) as here:
                    world.send(here, Topics(here.topic_prefix).events, messages)
                    speeds.append(rated(here, COUNT, workers=workers))
                    _check(here, expected)
            peers.append(peer.run())
    finally:
        peer.close()
    name = f"Kafka Streams, exactly once, {THREADS} threads"
    ours, theirs = [speed.whole_cpu_us_per_event for speed in one], [run["cpu_us_per_event"] for run in peers]
    yield compared("streams_cpu_us_per_event", "µs", ours, name, theirs)
    ratio = median(mine / its for mine, its in zip(ours, theirs, strict=True))
    yield Figure("streams_cpu_ratio", ratio, "rater's CPU an event / the peer's")
    whole, steady = ([run[key] for run in peers] for key in ("events_per_s", "steady_events_per_s"))
    for raters, speeds in (("one_worker", one), ("two_workers", two)):
        rates = [speed.events_per_s for speed in speeds]
        yield compared(f"rater_{raters}_events_per_s", "events/s", rates, name, whole)
        rates = [speed.steady_events_per_s for speed in speeds]
        yield compared(f"rater_{raters}_steady_events_per_s", "events/s once warm", rates, name, steady)


class _Peer:
    """A copy of the built peer, and its topics."""

    def __init__(self, settings: Settings, built: Path) -> None:
        self._settings = settings
        self._prefix = f"{settings.topic_prefix}peer-"
        self._folder = settings.data_dir / "peer"
        # With the files' times: else its script would build it again.
        shutil.copytree(built, self._folder)

    def load(self) -> dict[str, int]:
        """Put its load on the broker; returns how many of the events are to have which outcome with us."""
        self._execute([sys.executable, "tools/load.py", str(COUNT)])
        manifest = json.loads((self._folder / "out" / f"{self._prefix}manifest.json").read_text())
        unknown = manifest["bad_kinds"].get("unknown", 0)
        return {
            "rated": manifest["good"],
            "duplicate": manifest["dup"],
            "parked": unknown,
            "dead_lettered": manifest["bad"] - unknown,
        }

    def events(self) -> list[world.Message]:
        """Its load in our schema and of late, each partition in its order."""
        theirs = fastavro.parse_schema(json.loads((self._folder / "app/src/main/avro/usage_event.avsc").read_text()))
        newest = load_schemas().newest(EVENTS)
        ours, head = newest.parsed(), frame(newest.id)
        later_us = time.time_ns() // 1000 - int(_LOAD_ENDS.timestamp() * 1e6) - 60_000_000
        made: list[world.Message] = []
        for message in Deployment(self._settings).read(f"{self._prefix}usage-events"):
            key, body = message.key() or b"", (message.value() or b"")[_HEAD_BYTES:]
            try:
                event: Any = fastavro.schemaless_reader(io.BytesIO(body), theirs, None)
            except EOFError:  # cut short on purpose
                made.append((key, head + body))
                continue
            event |= {
                "account": event["account_id"],
                "timestamp": event["timestamp"] + later_us,
                "subject": "",
                "source": "bench/1",
                "sequence": len(made) + 1,
            }
            out = io.BytesIO()
            out.write(head)
            fastavro.schemaless_writer(out, ours, event)
            made.append((key, out.getvalue()))
        return made

    def run(self) -> dict[str, Any]:
        """Let it rate its load, and what it measured. Raises RuntimeError when its output is not right."""
        self._execute(["bash", "run.sh"])
        found: dict[str, Any] = json.loads((self._folder / "out" / "runs.jsonl").read_text().splitlines()[-1])
        return found

    def close(self) -> None:
        world.delete_topics(self._settings.model_copy(update={"topic_prefix": self._prefix}))
        shutil.rmtree(self._folder)

    def _execute(self, command: list[str]) -> None:
        environment = {
            "BOOTSTRAP": self._settings.kafka["bootstrap.servers"],
            "TOPIC_PREFIX": self._prefix,
            "N": str(COUNT),
            "THREADS": str(THREADS),
            "PY": sys.executable,
        }
        _execute(command, self._folder, environment)


def _check(settings: Settings, expected: dict[str, int]) -> None:
    counts = Deployment(settings).counts()
    if found := {outcome: counts[outcome] for outcome in expected if counts[outcome] != expected[outcome]}:
        raise RuntimeError(f"the rater's outcomes are not the load's: expected {expected}, got {found}")


def _built() -> Path:
    """The peer with its application built, in the cache by what it is built from. Raises Skipped."""
    if not _PEER.is_dir():
        raise Skipped("needs the peer's application beside the repository, ../shared/peer_streams")
    if missing := [program for program in ("java", "mvn", "bash") if shutil.which(program) is None]:
        raise Skipped(f"needs Java {_JAVA_MIN} or newer and Maven: {' and '.join(missing)} not found")
    if (java := _java_version()) < _JAVA_MIN:
        raise Skipped(f"needs Java {_JAVA_MIN} or newer, java is {java}")
    digest = hashlib.sha256()
    for path in sorted(path for path in _PEER.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(_PEER)}\0".encode() + path.read_bytes())
    home = default_cache_dir() / f"peer-streams-{digest.hexdigest()[:16]}"
    with locked(home.parent / "peer-streams.lock", timeout=1800):
        if not home.is_dir():
            partial = home.with_name(f"{home.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(_PEER, partial, copy_function=shutil.copyfile)
            for folder in (partial, *(path for path in partial.rglob("*") if path.is_dir())):
                folder.chmod(0o755)  # the shared ones may be read-only
            _execute(["mvn", "-q", "-B", "package"], partial / "app", {})
            partial.rename(home)
    return home


def _java_version() -> int:
    said = subprocess.run(["java", "-version"], capture_output=True, text=True, check=True).stderr
    return int(said.split('"')[1].split(".")[0])


def _execute(command: list[str], folder: Path, environment: dict[str, str]) -> None:
    done = subprocess.run(
        command, cwd=folder, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} of the peer ended with {done.returncode}:\n{done.stdout[-2000:]}")
