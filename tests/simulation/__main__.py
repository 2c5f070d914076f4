"""The long form: ``python -m tests.simulation`` until a law is broken or ``TALLY_SIM_EXAMPLES`` histories are over.

Prints the seed and what was found on stderr, one JSON summary on stdout; exits 4 when a law was broken.
"""

import json
import os
import secrets
import sys
import traceback

from tests.simulation.running import chosen, run


def main() -> int:
    os.environ.setdefault("TALLY_SIM_SEED", str(secrets.randbelow(10**9)))
    examples, first = chosen(10_000)
    print(f"{examples} histories from TALLY_SIM_SEED={first}", file=sys.stderr)
    try:
        ran = run(examples, first)
    except Exception:  # noqa: BLE001  whatever was found is the result
        traceback.print_exc()
        print(json.dumps({"seed": first, "law_broken": True}))
        return 4
    print(json.dumps(ran.summary() | {"law_broken": False}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
