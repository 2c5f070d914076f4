"""`tally cases FILE`: worked pricing examples through the product's own pricing."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.cli.case_models import MODELS
from pipeline.cli.context import Json
from pipeline.cli.output import EXIT_FINDINGS, EXIT_USAGE, emit_json, fail, out
from pipeline.core.money import plain, round_half_up_div


@dataclass(frozen=True, slots=True)
class Outcome:
    """A case, and where its results differ from what it expects."""

    id: str
    model: str
    differences: tuple[str, ...]


def register(app: typer.Typer) -> None:
    app.command()(cases)


def cases(
    file: Annotated[Path, typer.Argument(help="Cases as a JSON list.", exists=True, dir_okay=False)],
    model: Annotated[
        list[str] | None, typer.Option("--model", metavar="MODEL", help="Only cases of this model; may be repeated.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Price worked examples and compare, to the expected number's own decimals. Exit code 4 if any failed."""
    found = [case for case in _read(file) if not model or case["model"] in model]
    outcomes = [run(case) for case in found]
    failed = [outcome for outcome in outcomes if outcome.differences]
    passed = len(outcomes) - len(failed)
    if as_json:
        emit_json(
            {
                "passed": passed,
                "failed": [{"id": one.id, "model": one.model, "differences": one.differences} for one in failed],
            }
        )
    else:
        for outcome in failed:
            out.print(*(f"{outcome.id}: {difference}" for difference in outcome.differences), sep="\n", markup=False)
        out.print(f"{passed} passed, {len(failed)} failed", highlight=False)
    if failed:
        raise typer.Exit(EXIT_FINDINGS)


def run(case: Mapping[str, Any]) -> Outcome:
    """Price one case. A model nobody knows is a difference, as are inputs that cannot be priced."""
    name, model = str(case["id"]), str(case["model"])
    if model not in MODELS:
        return Outcome(name, model, (f"expected a model of {', '.join(sorted(MODELS))}, got {model}",))
    try:
        got = MODELS[model](case["inputs"])
    except KeyError as error:
        return Outcome(name, model, (f"expected an input {error}, got none",))
    except (ValueError, TypeError, AttributeError, ArithmeticError, IndexError) as error:  # inputs of any shape
        return Outcome(name, model, (f"cannot be priced: {str(error) or type(error).__name__}",))
    return Outcome(name, model, tuple(_differences(case["expected"], got, "")))


def _read(file: Path) -> list[dict[str, Any]]:
    try:
        found = json.loads(file.read_text(), parse_float=Decimal)
    except ValueError as error:
        fail(f"{file}: expected JSON, got {error}", EXIT_USAGE)
    needed = {"id", "model", "inputs", "expected"}
    if not isinstance(found, list) or not all(isinstance(case, dict) and needed <= case.keys() for case in found):
        fail(f"{file}: expected a list of objects with {', '.join(sorted(needed))}", EXIT_USAGE)
    return found


def _differences(expected: Any, got: Any, name: str) -> Iterator[str]:
    """Where they differ, each as the path to it, what was expected and what came."""
    match expected, got:
        case dict(), dict():
            for key in expected:
                yield from _differences(expected[key], got.get(key), f"{name}.{key}" if name else key)
        case list(), list() if len(expected) == len(got):
            for number, (one, other) in enumerate(zip(expected, got, strict=True)):
                yield from _differences(one, other, f"{name}[{number}]")
        case _ if not _same(expected, got):
            yield f"{name}: expected {expected}, got {_text(got)}"


def _same(expected: Any, got: Any) -> bool:
    """Numbers are compared at the expected one's own number of decimals."""
    if not isinstance(got, Fraction | Decimal | int):
        return bool(expected == got)
    try:
        number = Decimal(str(expected))
    except InvalidOperation:
        return False
    return _rounded(Fraction(got), _decimals(number)) == number


def _decimals(number: Decimal) -> int:
    exponent = number.as_tuple().exponent
    return max(-exponent, 0) if isinstance(exponent, int) else 0


def _rounded(value: Fraction, decimals: int) -> Decimal:
    """Half up, away from zero."""
    return Decimal(f"{round_half_up_div(value.numerator * 10**decimals, value.denominator)}E-{decimals}")


#: A result that does not end is shown to so many decimals.
_SHOWN_DECIMALS = 18


def _text(got: Any) -> str:
    match got:
        case None:
            return "no such result"
        case Fraction() | Decimal():
            return plain(_rounded(Fraction(got), _SHOWN_DECIMALS))
        case list():
            return f"[{', '.join(map(_text, got))}]"
        case dict():
            return f"{{{', '.join(f'{key}: {_text(value)}' for key, value in got.items())}}}"
        case _:
            return str(got)
