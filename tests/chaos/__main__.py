"""``MINUTES=… SEED=… python -m tests.chaos``: progress on stderr, one JSON object on stdout, exit 4 on a difference.

MINUTES (3) of load and faults; EVENTS in all (300 a second); SEED of both (drawn and shown unless given); FAULTS in
all (9 a minute); SESSION_TIMEOUT of raters and sinks in seconds (6).
"""

import json
import os
import shutil
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from random import SystemRandom

from tests.chaos.run import Options, run, say, show

EXIT_DIFFERENCES = 4


def main() -> int:
    given = os.environ
    minutes = float(given.get("MINUTES") or 3)
    options = Options(
        seed=int(given.get("SEED") or SystemRandom().randrange(10**6)),
        minutes=minutes,
        events=int(given.get("EVENTS") or minutes * 60 * 300),
        faults=int(given.get("FAULTS") or minutes * 9),
        session_timeout=float(given.get("SESSION_TIMEOUT") or 6),
    )
    data_dir = Path(tempfile.mkdtemp(prefix="tally-chaos-"))
    say(f"data and logs in {data_dir}")
    summary, differences = run(options, data_dir)
    if differences:
        summary.data_dir = str(data_dir)
        show(differences, data_dir)
    else:
        shutil.rmtree(data_dir)
    sys.stdout.write(json.dumps(asdict(summary)) + "\n")
    return EXIT_DIFFERENCES if differences else 0


if __name__ == "__main__":
    sys.exit(main())
