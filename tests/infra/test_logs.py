import json
import subprocess
import sys

_SAYS = """
import logging
from pipeline.infra import logs
from pipeline.infra.settings import Settings
logs.configure(Settings(log_format="json", log_level="info"), worker="rater-1")
log = logs.get_logger("pipeline.rating")
log.debug("too fine")
log.info("partition taken", partition=3)
logging.getLogger("faust").info("chatter")
logging.getLogger("faust").warning("broker %s away", "x")
logging.getLogger("aiokafka").error("said again and again while the broker is away")
secret = "hunter2"
try:
    1 / 0
except ZeroDivisionError:
    log.exception("failed")
"""


def test_one_json_object_per_line_on_stderr_and_no_variables() -> None:
    said = subprocess.run([sys.executable, "-c", _SAYS], capture_output=True, text=True, check=True)
    assert said.stdout == ""
    lines = [json.loads(line) for line in said.stderr.splitlines()]
    assert [line["event"] for line in lines] == ["partition taken", "broker x away", "failed"]
    assert lines[0]["partition"] == 3 and lines[0]["worker"] == "rater-1" and lines[0]["level"] == "info"
    assert lines[1]["logger"] == "faust"
    assert "ZeroDivisionError" in lines[2]["exception"] and "hunter2" not in said.stderr
