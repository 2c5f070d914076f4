"""``tally cases`` as a user runs it: what it prints, and its exit code."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from pipeline.cli import app

CASES = [
    {"id": "right", "model": "per_unit", "inputs": {"unit": "2", "quantity": "5"}, "expected": {"total": "10"}},
    {"id": "wrong", "model": "package", "inputs": {"package_size": "10", "package_price": "3", "quantity": "11"}}
    | {"expected": {"total": "3", "packages": "2"}},
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "cases.json"
    file.write_text(json.dumps(CASES))
    return file


def tally(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["cases", *map(str, arguments)])


def test_says_what_differs_and_counts(file: Path) -> None:
    result = tally(file)
    assert result.exit_code == 4
    assert result.stdout == "wrong: total: expected 3, got 6\n1 passed, 1 failed\n"


def test_only_some_models(file: Path) -> None:
    result = tally(file, "--model", "per_unit", "--model", "tax")
    assert (result.exit_code, result.stdout) == (0, "1 passed, 0 failed\n")


def test_json(file: Path) -> None:
    result = tally(file, "--json")
    assert result.exit_code == 4
    found = json.loads(result.stdout)
    assert found["passed"] == 1
    assert found["failed"] == [{"id": "wrong", "model": "package", "differences": ["total: expected 3, got 6"]}]


@pytest.mark.parametrize(
    ("text", "message"), [("{", "expected JSON"), ('[{"id": "x"}]', "expected a list of objects with expected, id")]
)
def test_a_file_that_is_none(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "broken.json"
    file.write_text(text)
    result = tally(file)
    assert message in str(result.exception)
