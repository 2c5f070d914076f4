"""A service to be killed: emits without end and writes each key and number once emit has returned.

Arguments: bootstrap, topic prefix, spool folder, first row.
"""

import os
import sys
from datetime import UTC, datetime
from itertools import count

from pipeline.producer import UsageProducer


def main() -> None:
    bootstrap, prefix, spool, first = sys.argv[1:]
    producer = UsageProducer(bootstrap=bootstrap, topic_prefix=prefix, source="svc", spool_dir=spool)
    for row in count(int(first)):
        key = f"k-{row}"
        number = producer.emit(
            account=f"acct-{row % 7}",
            event_type="llm.request",
            properties={"tokens": row},
            timestamp=datetime(2025, 3, 1, tzinfo=UTC),
            idempotency_key=key,
        )
        os.write(1, f"{key} {number}\n".encode())


if __name__ == "__main__":
    main()
