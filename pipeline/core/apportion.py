"""Splits that add up: largest remainder, then the first of equals. Pure, exact."""

from collections.abc import Sequence

from pipeline.core.money import round_half_up_div


def round_to(whole: int, numerators: Sequence[int], denominator: int) -> list[int]:
    """Integers next to ``numerators[i] / denominator`` that add up to ``whole``.

    Each is its fraction rounded down, and those with the largest rests, the first of equals, are one more. Numerators
    of any signs, a denominator above 0. The whole must be the sum of the fractions, or that rounded up or down:
    ValueError otherwise.
    """
    parts = [numerator // denominator for numerator in numerators]
    missing = whole - sum(parts)
    if missing == 0:
        return parts
    rests = [numerator % denominator for numerator in numerators]
    if not 0 < missing <= len(parts) - rests.count(0):
        raise ValueError(f"expected the sum of {list(numerators)} / {denominator}, rounded, got {whole}")
    for i in sorted(range(len(parts)), key=lambda i: -rests[i])[:missing]:
        parts[i] += 1
    return parts


def round_together(numerators: Sequence[int], denominator: int) -> list[int]:
    """Integers next to ``numerators[i] / denominator`` that add up to the half-up rounding of the fractions' sum."""
    return round_to(round_half_up_div(sum(numerators), denominator), numerators, denominator)


def apportion(whole: int, weights: Sequence[int]) -> list[int]:
    """The whole in proportion to weights of any signs. Raises ValueError where weights come to 0 and it does not."""
    total = sum(weights)
    if total == 0:
        if whole:
            raise ValueError(f"expected weights to split {whole} by, got {list(weights)}")
        return [0] * len(weights)
    sign = 1 if total > 0 else -1
    return round_to(whole, [whole * weight * sign for weight in weights], abs(total))
