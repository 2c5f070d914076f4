"""Histories: what may happen to a deployment, in any order, drawn by Hypothesis and judged by ``laws``."""

from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pipeline.rating.batch import Source
from tests.rating.world import account, contract
from tests.simulation import laws
from tests.simulation.world import (
    ACCOUNTS,
    DAY_MS,
    GROUP,
    HOUR_MS,
    PARTITIONS,
    SECOND_MS,
    SINK_PLACES,
    UNPUBLISHED,
    Sink,
    Worker,
    World,
)

#: Account, key, tokens, and on which partition if not its own; None is no event at all. Few of each: most events meet
#: one like them.
Event = tuple[str, int, str, int | None] | None
_EVENTS: list[Event] = [
    (name, key, tokens, partition)
    for name in ACCOUNTS
    for key in range(4)
    for tokens, partition in (("10", None), ("10", None), ("75", None), ("many", None), ("10", 0), ("10", 1))
]
_BURSTS = st.lists(st.sampled_from([*_EVENTS, None]), min_size=1, max_size=5)
#: How many steps before something else happens; None: until it has nothing to do.
_PART = st.integers(1, 60)
_STEPS = st.one_of(st.none(), _PART)
_FETCHES = st.sampled_from(["all", "all", "all", "one", "none", "again", "ahead", "dropped"])
_FAULTS = st.sampled_from([None, None, None, "lost", "late", "abort"])
_TIMES = st.sampled_from([2 * SECOND_MS, 2 * SECOND_MS, 20 * SECOND_MS, HOUR_MS, 8 * DAY_MS])
_INDEX = st.integers(0, 5)
#: Who hears of a new generation, and what it is given. Who does not hear of it goes on with what it had.
_SHARES: list[dict[str, list[int]]] = [
    {"rater-0": [0], "rater-1": [1]},
    {"rater-0": [1], "rater-1": [0]},
    {"rater-0": [0, 1], "rater-1": []},
    {"rater-0": [0, 1]},
    {"rater-1": [0, 1]},
]
_SINK_SHARES = [
    {"sink-0": SINK_PLACES[::2], "sink-1": SINK_PLACES[1::2]},
    {"sink-0": SINK_PLACES[1::2], "sink-1": SINK_PLACES[::2]},
    {"sink-0": SINK_PLACES},
    {"sink-1": SINK_PLACES},
]
_SINK_FAULTS = st.sampled_from([None, None, None, "lost", "late"])


class Histories(RuleBasedStateMachine):
    """One deployment with two raters, two sinks and two partitions, all at work when a history begins."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self._broken = False
        for worker in self.world.workers.values():
            for number in list(worker.raters):
                worker.work(number)
        for sink in self.world.sinks.values():
            sink.work()

    # -- usage, the catalog, time

    @rule(events=_BURSTS)
    def usage(self, events: list[Event]) -> None:
        for event in events:
            if event is None:
                self.world.send_junk(0)
            else:
                self.world.send(*event)

    @rule(what=st.sampled_from(["prices", *UNPUBLISHED]))
    def publish(self, what: str) -> None:
        if what == "prices":
            self.world.publish_prices()
        elif (item := account(what)) not in self.world.catalog:
            self.world.publish(item, contract(what))

    @rule(partition=st.integers(0, PARTITIONS - 1), index=_INDEX)
    def replay(self, partition: int, index: int) -> None:
        self.world.replay(partition, index)

    @rule(partition=st.integers(0, PARTITIONS - 1), index=_INDEX, tokens=st.sampled_from([None, "10", "20"]))
    def correct(self, partition: int, index: int, tokens: str | None) -> None:
        self.world.correct(partition, index, tokens)

    @rule(milliseconds=_TIMES, in_the_dark=st.booleans())
    def time_passes(self, milliseconds: int, in_the_dark: bool) -> None:
        if self.world.broker.now_ms + milliseconds - self.world.started_ms > 20 * DAY_MS:
            return  # longer than identities are remembered is another story
        self.world.broker.pass_time(milliseconds)
        if not in_the_dark:
            for worker in self.world.workers.values():
                worker.read_catalog()

    # -- raters

    @rule(index=_INDEX, fetch=_FETCHES, steps=_STEPS, fault=_FAULTS)
    def rate(self, index: int, fetch: str, steps: int | None, fault: str | None) -> None:
        owned = [(worker, number) for worker in self._workers() for number in worker.raters]
        if owned:
            worker, number = owned[index % len(owned)]
            self._rate(worker, number, fetch, steps, fault)

    @rule(events=_BURSTS, number=st.integers(0, PARTITIONS - 1), steps=_PART, goes_on=_PART, fault=_FAULTS)
    def rater_sleeps(self, events: list[Event], number: int, steps: int, goes_on: int, fault: str | None) -> None:
        """One stops in the middle, the other takes its partition and works; then the first wakes up."""
        self.usage(events)
        for worker in self._workers():
            if number in worker.raters:
                self._rate(worker, number, "all", steps, None)
        sleeper, heir = self.world.workers.values()
        if number in heir.raters:
            sleeper, heir = heir, sleeper
        self.share_partitions({heir.name: [0, 1]})
        self._rate(heir, number, "all", None, None)
        self._rate(heir, number, "all", None, fault)
        if sleeper.alive and number in sleeper.raters:
            self._rate(sleeper, number, "none", goes_on, None)

    def _rate(self, worker: Worker, number: int, fetch: str, steps: int | None, fault: str | None) -> None:
        if not worker.alive:
            return
        for source in Source:
            self._fetch(worker, number, source, fetch)
        self.world.broker.fault = fault
        worker.work(number, steps)
        self.world.broker.fault = None

    def _fetch(self, worker: Worker, number: int, source: Source, fetch: str) -> None:
        """What comes of a fetch: all there is, little, nothing, an old list, one behind a hole, or one that is lost."""
        if fetch == "all":
            worker.fetch(number, source)
        elif fetch == "one":
            worker.fetch(number, source, most=1)
        elif fetch == "again":
            worker.fetch(number, source, start=0, most=3)
        elif fetch == "ahead":
            worker.fetch(number, source, start=worker.fetched_to[source, number] + 1, most=2)
        elif fetch == "dropped":
            worker.fetched_to[source, number] += 1

    @rule(
        index=_INDEX,
        disk=st.sampled_from(["kept", "kept", "lost", "stale"]),
        share=st.sampled_from(_SHARES),
        offsets=st.sampled_from(["kept", "kept", "went back"]),
    )
    def kill_rater(self, index: int, disk: str, share: dict[str, list[int]], offsets: str) -> None:
        """One is killed, and the group shares its partitions out, to a new one in its place too."""
        if offsets == "went back":
            self.world.broker.groups[GROUP].goes_back |= self.world.broker.groups[GROUP].offsets.keys()
        workers = self._workers()
        if workers:
            self.world.crash_worker(workers[index % len(workers)].name, disk)
        self.share_partitions(share)

    @rule(share=st.sampled_from(_SHARES))
    def share_partitions(self, share: dict[str, list[int]]) -> None:
        for name in share:
            if not self.world.workers[name].alive:
                self.world.start_worker(name)
        self.world.share_partitions(share)

    def _workers(self) -> list[Worker]:
        return [worker for worker in self.world.workers.values() if worker.alive]

    # -- sinks

    @rule(index=_INDEX, steps=_STEPS, fault=_SINK_FAULTS)
    def sink(self, index: int, steps: int | None, fault: str | None) -> None:
        sinks = self._sinks()
        if sinks:
            self.world.store.fault = fault
            sinks[index % len(sinks)].work(steps)
            self.world.store.fault = None

    @rule(events=_BURSTS, index=_INDEX, steps=_PART, goes_on=_PART)
    def sink_sleeps(self, events: list[Event], index: int, steps: int, goes_on: int) -> None:
        """One stops in the middle, the other is given all and works; then the first wakes up."""
        sinks = list(self.world.sinks.values())
        sleeper, heir = sinks if index % 2 else sinks[::-1]
        self._work_off(events)
        if sleeper.alive:
            sleeper.work(steps)
        self._work_off(events)
        self.share_places({heir.name: SINK_PLACES})
        heir.work()
        heir.work()
        if sleeper.alive:
            sleeper.work(goes_on)

    def _work_off(self, events: list[Event]) -> None:
        self.usage(events)
        for worker in self._workers():
            for number in list(worker.raters):
                self._rate(worker, number, "all", None, None)

    @rule(index=_INDEX, share=st.sampled_from(_SINK_SHARES))
    def kill_sink(self, index: int, share: dict[str, Any]) -> None:
        sinks = self._sinks()
        if sinks:
            sinks[index % len(sinks)].kill()
        self.share_places(share)

    @rule(share=st.sampled_from(_SINK_SHARES))
    def share_places(self, share: dict[str, Any]) -> None:
        for name in share:
            if not self.world.sinks[name].alive:
                self.world.start_sink(name)
        self.world.share_places(share)

    @rule(name=st.sampled_from(sorted(ACCOUNTS)))
    def close(self, name: str) -> None:
        self.world.close_periods(name)

    @rule(away=st.booleans())
    def database(self, away: bool) -> None:
        self.world.database_away = away

    def _sinks(self) -> list[Sink]:
        return [sink for sink in self.world.sinks.values() if sink.alive]

    # -- laws

    @invariant()
    def laws_hold(self) -> None:
        self._broken = True
        laws.check(self.world)
        self._broken = False

    def teardown(self) -> None:
        try:
            if not self._broken:
                work_off(self.world)
                laws.check(self.world)
                laws.check_end(self.world)
        finally:
            self.world.close()


def work_off(world: World) -> None:
    """Nothing breaks any more: everybody is up, hears of everything, and works until there is nothing to do."""
    world.broker.fault = world.store.fault = None
    world.database_away = False
    world.broker.pass_time(20 * SECOND_MS)  # what the dead left open ends
    _start_all(world)
    quiet = 0
    for _ in range(200):
        before = (sum(log.end for log in world.broker.logs.values()), world.store.commits)
        for worker in world.workers.values():
            worker.read_catalog()
            for number in list(worker.raters):
                for source in Source:
                    worker.fetch(number, source)
                worker.work(number)
        if not all(worker.alive for worker in world.workers.values()):
            _start_all(world)
        for sink in (*world.sinks.values(), *world.sinks.values()):
            sink.work()
        if before == (sum(log.end for log in world.broker.logs.values()), world.store.commits):
            quiet += 1
            if quiet == 3:
                return
            world.broker.pass_time(HOUR_MS + HOUR_MS // 4)  # the longest back-off
    failures = [worker.failure for worker in world.workers.values()]
    raise AssertionError(f"no end of the work is in sight: {failures}")


def _start_all(world: World) -> None:
    for name, worker in world.workers.items():
        if not worker.alive:
            world.start_worker(name)
    for name, sink in world.sinks.items():
        if not sink.alive:
            world.start_sink(name)
    world.share_partitions(_SHARES[0])
    world.share_places(_SINK_SHARES[0])
