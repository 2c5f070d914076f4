"""One producing service: sends its events when they are due, through the real UsageProducer, until SIGTERM.

Killed and started again it goes on where its spool is. Tells how far it is in a file.
"""

import json
import signal
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

from pipeline.infra.processes import write_json
from pipeline.infra.settings import Settings
from pipeline.producer.client import UsageProducer
from tests.chaos.load import Load

_LOOK_S, _TELL_S = 0.02, 0.5


def main(source: str, load: Load, told: Path) -> None:
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    telling = 0.0
    with UsageProducer.from_settings(Settings(), source=source) as producer:
        while not stop.wait(_LOOK_S):
            due = load.due(time.time_ns() // 1000)
            while producer.next_sequence <= due and not stop.is_set():
                producer.emit_usage(load.usage(source, producer.next_sequence))
            if time.monotonic() >= telling:
                write_json(told, {"source": producer.source, "next": producer.next_sequence, **asdict(producer.stats)})
                telling = time.monotonic() + _TELL_S


if __name__ == "__main__":
    given = json.loads(sys.argv[2])
    main(
        sys.argv[1],
        Load(**given | {"sources": tuple(given["sources"]), "late_accounts": tuple(given["late_accounts"])}),
        Path(sys.argv[3]),
    )
