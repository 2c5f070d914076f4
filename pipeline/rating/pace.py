"""When a partition may begin its next transaction, so that a worker with many partitions does not drown in commits.

A transaction costs its worker and the broker some milliseconds of CPU, whatever is in it. Partitions that commit what
came since their last commit make smaller transactions the more of them there are, until transactions are most of what
the machine does. So a partition that has begun one lets events gather before it begins another, for its share of what
its worker may begin in a second. What comes to an idle partition, or fills a batch, waits for nothing.

Pure: times are arguments, seconds of one clock that only goes forward.
"""

#: Longest that events gather, seconds, however many partitions a worker has: half of what their whole way may take.
_INTERVAL_MAX_S = 0.5


def interval_s(partitions: int, transactions_per_second: float) -> float:
    """From one beginning to the next of each of a worker's partitions, when all of them are busy."""
    return min(partitions / transactions_per_second, _INTERVAL_MAX_S)


class Pace:
    """Of one partition."""

    def __init__(self, interval_s: float, full_records: int) -> None:
        """``interval_s``: from one beginning to the next; ``full_records``: so many are not kept waiting."""
        self._interval_s = interval_s
        self._full_records = full_records
        self._next_s = float("-inf")

    def wait_s(self, records: int, now_s: float) -> float:
        """How long ``records`` that wait have to go on waiting; 0.0 when a transaction may begin."""
        return 0.0 if records >= self._full_records else max(0.0, self._next_s - now_s)

    def begun(self, now_s: float) -> None:
        """A transaction begins."""
        self._next_s = now_s + self._interval_s
