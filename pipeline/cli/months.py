"""A month as commands take it."""

from pipeline.billing.rerate import Month
from pipeline.cli.output import EXIT_USAGE, fail


def month_named(text: str, option: str = "") -> Month:
    """The month YYYY-MM; anything else is wrong usage, and the message names the option it came with."""
    try:
        return Month.parse(text)
    except ValueError as error:
        fail(f"{option}: {error}" if option else str(error), EXIT_USAGE)
