"""How the interpreter of a worker is set up."""

import gc

#: Objects made between two looks of the cycle collector: several batches' worth.
_ALLOCATIONS = 200_000


def collect_seldom() -> None:
    """Have the cycle collector look seldom, and never at what is there now.

    Batches are many short-lived tuples without cycles: looking through them again and again costs a rater a tenth of
    its time, a sink more.
    """
    gc.freeze()
    gc.set_threshold(_ALLOCATIONS, 20, 20)
