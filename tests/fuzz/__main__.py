"""``MESSAGES=… SEED=… python -m tests.fuzz``: progress on stderr, one JSON object on stdout, exit 4 on a difference.

MESSAGES (1,000,000) in all; SEED they are drawn from (drawn and shown unless given). Services, one rater and one sink
are the run's own. RssAnon of both is sampled twice a second from the first message until the last is written; see
``run._MEMORY_SLACK_MIB`` for when it counts as level.
"""

import json
import os
import shutil
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from random import SystemRandom

from pipeline.infra import embedded
from pipeline.infra.postgres import migrate
from pipeline.infra.settings import Settings
from pipeline.infra.topics import ensure_topics
from tests.fuzz.run import run, say

EXIT_DIFFERENCES = 4
_DIFFERENCES_SHOWN = 30


def main() -> int:
    seed = int(os.environ.get("SEED") or SystemRandom().randrange(10**6))
    messages = int(os.environ.get("MESSAGES") or 1_000_000)
    data_dir = Path(tempfile.mkdtemp(prefix="tally-fuzz-"))
    say(f"data and logs in {data_dir}")
    with embedded.running(data_dir) as services:
        settings = Settings(
            kafka_bootstrap=services.endpoints.kafka_bootstrap,
            postgres_dsn=services.endpoints.postgres_dsn_secret,
            data_dir=data_dir,
            topic_prefix="fuzz-",
            partitions=4,
            actor="fuzz",
        )
        migrate(settings.dsn)
        ensure_topics(settings)
        summary, differences = run(settings, seed, messages)
    if differences:
        summary.data_dir = str(data_dir)
        for difference in differences[:_DIFFERENCES_SHOWN]:
            say(f"DIFFERENCE {difference}")
        (data_dir / "differences.txt").write_text("\n".join(differences) + "\n")
        say(f"{len(differences)} differences, all in {data_dir}/differences.txt, logs in {data_dir}/logs")
    else:
        shutil.rmtree(data_dir)
    sys.stdout.write(json.dumps(asdict(summary)) + "\n")
    return EXIT_DIFFERENCES if differences else 0


if __name__ == "__main__":
    sys.exit(main())
