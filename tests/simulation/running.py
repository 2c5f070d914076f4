"""Running histories: how many, from which seed, and what they came to."""

import os
import time
from contextlib import ExitStack
from dataclasses import dataclass

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import invariant, run_state_machine_as_test

from tests.simulation.machine import Histories
from tests.simulation.mutations import Mutation
from tests.simulation.tasks import Task
from tests.simulation.world import simulated

#: Rules applied in a history, at most.
STEPS = 30


@dataclass
class Ran:
    """What was simulated. Seconds of wall time and of this process's own."""

    seed: int
    histories: int = 0
    steps: int = 0
    #: Places at which a thread could be stopped.
    pauses: int = 0
    kafka_commits: int = 0
    postgres_commits: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    def summary(self) -> dict[str, object]:
        """For a line of JSON."""
        rates = {
            "histories_per_minute": round(60 * self.histories / (self.seconds or 1)),
            "histories_per_cpu_minute": round(60 * self.histories / (self.cpu_seconds or 1)),
        }
        times = {"seconds": round(self.seconds, 1), "cpu_seconds": round(self.cpu_seconds, 1)}
        return vars(self) | times | rates


def chosen(default: int) -> tuple[int, int]:
    """How many histories, and from which seed: ``TALLY_SIM_EXAMPLES`` and ``TALLY_SIM_SEED``, else the defaults."""
    return int(os.environ.get("TALLY_SIM_EXAMPLES", default)), int(os.environ.get("TALLY_SIM_SEED", 1))


def run(examples: int, first: int, *defects: Mutation, shrink: bool = True) -> Ran:
    """Run so many histories from a seed. Raises what breaks a law; Hypothesis then prints the shortest history."""
    ran = Ran(first)
    began, began_cpu, passed = time.monotonic(), time.process_time(), Task.passed

    class Counted(Histories):
        @invariant()
        def laws_hold(self) -> None:
            ran.steps += 1
            super().laws_hold()

        def teardown(self) -> None:
            ran.histories += 1
            ran.kafka_commits += self.world.broker.commits
            ran.postgres_commits += self.world.store.commits
            ran.seconds, ran.cpu_seconds = time.monotonic() - began, time.process_time() - began_cpu
            super().teardown()
            ran.pauses = Task.passed - passed

    options = settings(
        max_examples=examples,
        stateful_step_count=STEPS,
        phases=(Phase.generate, *((Phase.shrink,) if shrink else ())),
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    with ExitStack() as stack:
        stack.enter_context(simulated())
        for defect in defects:
            stack.enter_context(defect())
        run_state_machine_as_test(seed(first)(Counted), settings=options)
    return ran
