"""Which faults happen when, and to whom: drawn from a seed before the run, so the same seed gives the same faults."""

from collections import defaultdict
from dataclasses import dataclass, field
from random import Random

RATERS = ("rater-1", "rater-2", "rater-3")
SINKS = ("sink-1", "sink-2")
RELAYS = ("relay-1", "relay-2")
PRODUCERS = ("producer-1", "producer-2")
_MOST = {"rater": 5, "sink": 3}
_FEWEST = {"rater": 2, "sink": 1}

#: How often each kind comes, one of each first, in this order: a short run has at least these.
_KINDS = {
    "kill rater": 5,
    "publish accounts": 2,
    "kill broker": 2,
    "kill sink": 4,
    "kill postgres": 2,
    "pause rater": 4,
    "flood retry": 1,
    "add rater": 2,
    "wipe rater": 2,
    "cut kafka": 3,
    "kill relay": 2,
    "cut postgres": 2,
    "kill producer": 2,
    "remove rater": 2,
    "pause sink": 2,
    "pause broker": 2,
    "publish prices": 1,
    "stall kafka": 1,
    "crash postgres session": 1,
    "add sink": 1,
    "remove sink": 1,
    "pause postgres": 1,
    "pause relay": 1,
}
#: How long a pause or an outage lasts, seconds. Raters and sinks also longer than their session.
_SECONDS = {
    "pause rater": (1.0, 18.0),
    "pause sink": (1.0, 18.0),
    "pause relay": (1.0, 10.0),
    "pause broker": (0.5, 8.0),
    "pause postgres": (0.5, 6.0),
    "stall kafka": (0.5, 12.0),
    "kill broker": (0.0, 5.0),
    "kill postgres": (0.0, 5.0),
}
#: A target is left alone for so long after a fault on it, seconds: services take a while to start.
_REST = {"broker": 15.0, "postgres": 10.0, "network": 8.0}
_REST_OF_WORKERS = 5.0


@dataclass(frozen=True, slots=True)
class Fault:
    """``at`` seconds after the load began; ``seconds`` until what was paused or stopped comes back, 0 if at once."""

    at: float
    kind: str
    target: str
    seconds: float
    #: Between 0 and 1, for what else there is to choose.
    share: float

    def __str__(self) -> str:
        lasts = f" for {self.seconds:.1f} s" if self.seconds else ""
        return f"{self.kind}{f' ({self.target})' if self.target else ''}{lasts}"


@dataclass(slots=True)
class _World:
    """Who is there, and until when each has been dealt a fault."""

    workers: dict[str, list[str]] = field(
        default_factory=lambda: {
            "rater": list(RATERS),
            "sink": list(SINKS),
            "relay": list(RELAYS),
            "producer": list(PRODUCERS),
        }
    )
    busy_until: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    number: int = 10


def draw(seed: int, seconds: float, faults: int, without: frozenset[str] = frozenset()) -> list[Fault]:
    """So many faults, about evenly over the time, the last one well before its end."""
    rng = Random(f"{seed}/faults")
    kinds = {kind: often for kind, often in _KINDS.items() if kind not in without}
    world = _World()
    gap = seconds * 0.95 / faults
    waiting = list(kinds)[:faults]
    rng.shuffle(waiting)
    drawn: list[Fault] = []
    for number in range(faults):
        at = gap * (number + rng.uniform(0.1, 0.9))
        while (fault := next((dealt for kind in waiting if (dealt := _deal(kind, at, rng, world))), None)) is None:
            waiting += rng.sample(list(kinds), sum(kinds.values()) // 4, counts=list(kinds.values()))
        waiting.remove(fault.kind)
        drawn.append(fault)
    return drawn


def _deal(kind: str, at: float, rng: Random, world: _World) -> Fault | None:
    """A fault of this kind, or None when everyone it could befall has one already."""
    verb, _, what = kind.partition(" ")
    seconds = rng.uniform(*_SECONDS[kind]) if kind in _SECONDS else 0.0
    share = rng.random()
    if verb in ("publish", "flood"):
        return Fault(at, kind, "", 0.0, share)
    workers = world.workers.get(what)
    if verb == "add":
        assert workers is not None
        if len(workers) >= _MOST[what]:
            return None
        world.number += 1
        target = f"{what}-{world.number}"
        workers.append(target)
    elif workers is not None:
        free = [name for name in workers if world.busy_until[name] <= at]
        if not free or (verb == "remove" and len(workers) <= _FEWEST[what]):
            return None
        target = rng.choice(free)
        if verb == "remove":
            workers.remove(target)
    else:
        target = {"kafka": "network", "broker": "broker"}.get(what, "postgres")
        if world.busy_until[target] > at:
            return None
    world.busy_until[target] = at + seconds + _REST.get(target, _REST_OF_WORKERS)
    return Fault(at, kind, target, seconds, share)
