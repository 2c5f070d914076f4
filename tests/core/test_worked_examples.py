"""Worked examples of other billing systems, through the product's own pricing as ``tally cases`` runs it."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli.cases import run

FILE = Path(__file__).parents[2].parent / "shared" / "cases" / "worked_examples.json"
CASES = json.loads(FILE.read_text()) if FILE.exists() else []

if not CASES:
    pytest.skip(f"no worked examples at {FILE.name}: they are not part of the repository", allow_module_level=True)


@pytest.mark.parametrize("case", CASES, ids=[case["id"] for case in CASES])
def test_worked_example(case: dict[str, Any]) -> None:
    assert run(case).differences == ()
