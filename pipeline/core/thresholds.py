"""Threshold billing: usage is billed within its period as soon as enough of it is unbilled. Pure.

What is billed early is a document of its own, of kind progress. The period's invoice bills all of the period, and takes
the lines of its progress documents back.
"""

from pipeline.core.money import Amount


def reached(threshold: Amount, used: Amount, billed: Amount, *, times: int = 0, repeats: bool = True) -> bool:
    """Whether usage of a period is to be billed now. Amounts in 1e-12 of one currency.

    ``used``: what the period's usage costs so far. ``billed``: what of it progress documents billed, in ``times`` many.
    Where it does not repeat, a period has one at most.
    """
    return used - billed >= threshold and (repeats or times == 0)
