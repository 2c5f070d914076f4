"""The laws hold in every simulated history, and the simulation finds what breaks them.

Short form of ``python -m tests.simulation``; ``TALLY_SIM_EXAMPLES`` and ``TALLY_SIM_SEED`` choose another.
"""

import pytest

from tests.simulation import mutations
from tests.simulation.mutations import Mutation
from tests.simulation.running import chosen, run

#: Enough for each defect below, many times over.
_MANY = 2_000


def test_the_laws_hold_in_every_history() -> None:
    ran = run(*chosen(100))
    print(ran.summary())
    assert ran.histories >= 100
    # Not because nothing happened, or nobody looked.
    assert ran.steps > 5 * ran.histories
    assert ran.kafka_commits > 3 * ran.histories
    assert ran.postgres_commits > 3 * ran.histories


def test_the_same_seed_gives_the_same_histories() -> None:
    first, again = run(15, 7), run(15, 7)
    assert (first.steps, first.pauses) == (again.steps, again.pauses)
    assert (first.kafka_commits, first.postgres_commits) == (again.kafka_commits, again.postgres_commits)


DEFECTS: dict[str, tuple[Mutation, ...]] = {
    "a batch is remembered before it is committed": (mutations.overlay_before_commit,),
    "a batch is remembered although it was aborted": (mutations.overlay_after_abort,),
    "the disk is believed without its changelogs": (mutations.no_restore,),
    "the group's offset is believed though it went back": (mutations.offsets_believed,),
    "neither transactional id nor generation fence": (mutations.own_transactional_ids, mutations.no_generation),
    "generation alone, and offsets believed that are not read as stable": (
        mutations.own_transactional_ids,
        mutations.unstable_offsets,
        mutations.offsets_believed,
    ),
    "a correction is not remembered": (mutations.corrections_forgotten,),
    "the sink moves positions without looking": (mutations.positions_without_compare,),
    "the sink moves positions after the rows": (mutations.positions_after_rows,),
    "the sink does not see that an invoice is closed": (mutations.closed_unseen,),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_it_finds_that(defect: str) -> None:
    with pytest.raises(AssertionError):
        run(_MANY, 3, *DEFECTS[defect], shrink=False)


LOCKS: dict[str, tuple[Mutation, ...]] = {
    "transactional ids fence nobody": (mutations.own_transactional_ids,),
    "the generation fences nobody": (mutations.no_generation,),
    "the sink's table is not unique": (mutations.not_unique,),
}


@pytest.mark.parametrize("open_lock", LOCKS)
def test_the_other_locks_are_enough_when(open_lock: str) -> None:
    run(40, 1, *LOCKS[open_lock], shrink=False)
