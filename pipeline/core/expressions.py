"""Arithmetic over an event's properties, as pricing managers write it in price files.

``seconds * memory_mb / 1024``, ``ceil(bytes, 1000) / 1000``, ``input if cached < 1 else default(output, 0) * 3``

There are numbers, properties by their names, ``+ - * /``, brackets, ``x if test else y``, tests by ``< <= > >= == !=``
and ``and or not``, and these functions:

======================  ========================================================================
max(a, …)  min(a, …)    the greatest, the least
abs(a)                  without its sign
floor(a)  floor(a, b)   down to a whole number, to a multiple of b (towards minus infinity)
ceil(a)  ceil(a, b)     up to a whole number, to a multiple of b (towards infinity)
round(a)  round(a, b)   to the nearest whole number, to the nearest multiple of b, halves away from zero
default(name, a)        the property, or ``a`` for an event without it
property("name")        the property, for names that are no words here: ``property("gpu.seconds")``
======================  ========================================================================

Everything is exact: decimal literals are read as written, and numbers are fractions.

simpleeval evaluates an expression, knowing no other operators, functions and names than those it is given here. It does
so once, over functions in place of numbers, which gives the function that every event calls: a walk of the tree by each
event takes five times as long (``seconds * memory_mb / 1024`` is measured in 1.6 µs, that way in 8.7).
"""

import ast
import operator
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypeAlias

from simpleeval import SimpleEval

from pipeline.core.money import PRICE_DECIMALS, parse_decimal, round_half_up_div
from pipeline.core.reasons import Reason

#: Characters of an expression. Bounds, with the limits of its numbers, the size of results.
LENGTH_MAX = 500
#: Numbers in expressions, literals and properties, have at most 18 decimals.
NUMBER_ONE: int = 10**PRICE_DECIMALS

#: The value of each name used, in units of 1e-18; None for an optional one that is absent.
Numbers: TypeAlias = Mapping[str, int | None]
#: An exact number: a numerator over a denominator above 0. They may have common factors.
Ratio: TypeAlias = tuple[int, int]
Value: TypeAlias = Callable[[Numbers], Ratio]
Test: TypeAlias = Callable[[Numbers], bool]


@dataclass(frozen=True, slots=True)
class Expression:
    """An expression that was checked and can be evaluated."""

    #: Every property it names.
    names: frozenset[str]
    #: Those that may be absent: named nowhere but as the first argument of ``default``.
    optional: frozenset[str]
    #: Raises ZeroDivisionError for a division by 0, or a rounding to multiples of 0.
    evaluate: Value


def compile_expression(text: str) -> Expression:
    """The expression, ready to be evaluated.

    Raises ValueError, saying what was expected and what came, for what is not in the language, a number with more than
    18 digits before the point or 18 decimals, a text of more than 500 characters, a test where a number belongs or a
    number where a test belongs.
    """
    text = text.strip()
    if not text or len(text) > LENGTH_MAX:
        raise ValueError(f"expected an expression of 1 to {LENGTH_MAX} characters, got {len(text)}")
    if unicodedata.normalize("NFKC", text) != text:  # the parser would look for properties of other names
        raise ValueError(f"expected letters in their normal form (NFKC), got {text!r}")
    try:
        root = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError) as error:  # ValueError: a NUL
        where = f" at character {error.offset}" if isinstance(error, SyntaxError) and error.offset else ""
        raise ValueError(f"expected an expression such as seconds * memory_mb / 1024, got {text!r}{where}") from error
    reader = _Reader(text)
    read = reader.number(root)
    names = {name: _property(name) for name in reader.required}
    evaluate: Value = SimpleEval(_OPERATORS, _FUNCTIONS | _FORMS, names).eval(text, previously_parsed=read)
    return Expression(frozenset(reader.names), frozenset(reader.names - reader.required), evaluate)


# What each operator and function makes of the functions that stand for its operands.


def _property(name: str) -> Value:
    def value(numbers: Numbers) -> Ratio:
        number = numbers[name]
        assert number is not None  # one that may be absent is read by default alone
        return number, NUMBER_ONE

    return value


def _default(name: str, otherwise: Value) -> Value:
    def value(numbers: Numbers) -> Ratio:
        number = numbers[name]
        return otherwise(numbers) if number is None else (number, NUMBER_ONE)

    return value


def _literal(number: int) -> Value:
    ratio = Fraction(number, NUMBER_ONE).as_integer_ratio()
    return lambda _: ratio


def _plus(left: Value, right: Value) -> Value:
    def value(numbers: Numbers) -> Ratio:
        (a, b), (c, d) = left(numbers), right(numbers)
        return (a + c, b) if b == d else (a * d + c * b, b * d)

    return value


def _times(left: Value, right: Value) -> Value:
    def value(numbers: Numbers) -> Ratio:
        (a, b), (c, d) = left(numbers), right(numbers)
        return a * c, b * d

    return value


def _over(left: Value, right: Value) -> Value:
    def value(numbers: Numbers) -> Ratio:
        (a, b), (c, d) = left(numbers), right(numbers)
        if c == 0:
            raise ZeroDivisionError
        return (a * d, b * c) if c > 0 else (-a * d, -b * c)

    return value


def _to_numerator(change: Callable[[int], int]) -> Callable[[Value], Value]:
    def changed(operand: Value) -> Value:
        def value(numbers: Numbers) -> Ratio:
            a, b = operand(numbers)
            return change(a), b

        return value

    return changed


_negative = _to_numerator(operator.neg)


def _to_steps(divide: Callable[[int, int], int]) -> Callable[..., Value]:
    """Rounding to multiples of a step, 1 unless given, as ``divide`` rounds the number of steps."""

    def rounded(operand: Value, step: Value = _literal(NUMBER_ONE)) -> Value:  # noqa: B008
        def value(numbers: Numbers) -> Ratio:
            (a, b), (c, d) = operand(numbers), step(numbers)
            if c == 0:
                raise ZeroDivisionError
            return divide(a * d, b * abs(c)) * abs(c), d

        return value

    return rounded


def _chosen(choose: Callable[[int, int], bool]) -> Callable[..., Value]:
    """The first of several numbers that no other is chosen over."""

    def chosen(*operands: Value) -> Value:
        def value(numbers: Numbers) -> Ratio:
            a, b = operands[0](numbers)
            for operand in operands[1:]:
                c, d = operand(numbers)
                if choose(c * b, a * d):
                    a, b = c, d
            return a, b

        return value

    return chosen


def _compared(compare: Callable[[int, int], bool]) -> Callable[[Value, Value], Test]:
    def compared(left: Value, right: Value) -> Test:
        def test(numbers: Numbers) -> bool:
            (a, b), (c, d) = left(numbers), right(numbers)
            return compare(a * d, c * b)

        return test

    return compared


def _joined(join: Callable[[Iterable[bool]], bool]) -> Callable[..., Test]:
    return lambda *tests: lambda numbers: join(test(numbers) for test in tests)


_OPERATORS: dict[type[ast.AST], Callable[..., Value]] = {
    ast.Add: _plus,
    ast.Sub: lambda left, right: _plus(left, _negative(right)),
    ast.Mult: _times,
    ast.Div: _over,
    ast.USub: _negative,
    ast.UAdd: lambda operand: operand,
}
_FUNCTIONS: dict[str, Callable[..., Value]] = {
    "max": _chosen(operator.gt),
    "min": _chosen(operator.lt),
    "abs": _to_numerator(abs),
    "floor": _to_steps(operator.floordiv),
    "ceil": _to_steps(lambda numerator, denominator: -(-numerator // denominator)),
    "round": _to_steps(round_half_up_div),
    "default": _default,
}
#: Names a property by its text.
_PROPERTY = "property"
#: How many arguments a function takes: at least, at most.
_ARGUMENTS = {
    "max": (2, LENGTH_MAX),
    "min": (2, LENGTH_MAX),
    "abs": (1, 1),
    "floor": (1, 2),
    "ceil": (1, 2),
    "round": (1, 2),
    "default": (2, 2),
}
#: What simpleeval would decide at once, by a truth that only an event has. Called by names that no text can spell.
_FORMS: dict[str, Callable[..., Any]] = {
    "if": lambda test, then, otherwise: lambda numbers: then(numbers) if test(numbers) else otherwise(numbers),
    "not": lambda test: lambda numbers: not test(numbers),
    "And": _joined(all),
    "Or": _joined(any),
    "Lt": _compared(operator.lt),
    "LtE": _compared(operator.le),
    "Gt": _compared(operator.gt),
    "GtE": _compared(operator.ge),
    "Eq": _compared(operator.eq),
    "NotEq": _compared(operator.ne),
}

#: Levels of a tree; an evaluation goes a frame deeper with each.
_DEPTH_MAX = 50


class _Reader:
    """Checks that a tree is in the language, so that evaluating it fails by a division by 0 only.

    Gives the tree to evaluate, its literals exact, and notes its names.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        self.names: set[str] = set()
        #: Those named elsewhere than as the first argument of default.
        self.required: set[str] = set()

    def number(self, node: ast.expr, depth: int = 1) -> ast.expr:
        below = self._below(depth)
        match node:
            case ast.Constant():
                return ast.Constant(self._literal(node))  # type: ignore[arg-type]  # what simpleeval takes it for
            case ast.Name(id=name):
                return self._required(name)
            case ast.Call(func=ast.Name(id=function)) if function == _PROPERTY:
                return self._required(self._quoted(node))
            case ast.BinOp(left=left, op=ast.Add() | ast.Sub() | ast.Mult() | ast.Div() as op, right=right):
                return ast.BinOp(self.number(left, below), op, self.number(right, below))
            case ast.UnaryOp(op=ast.USub() | ast.UAdd() as op, operand=operand):
                return ast.UnaryOp(op, self.number(operand, below))
            case ast.IfExp(test=test, body=body, orelse=orelse):
                return _call("if", self.test(test, below), self.number(body, below), self.number(orelse, below))
            case ast.Call(func=ast.Name(id=function), args=arguments, keywords=[]) if function in _FUNCTIONS:
                return _call(function, *self._arguments(node, function, arguments, below))
            case ast.Compare() | ast.BoolOp() | ast.UnaryOp(op=ast.Not()):
                raise self._expected("a number", node)
            case _:
                functions = ", ".join(sorted([*_FUNCTIONS, _PROPERTY]))
                raise self._expected(f"numbers, properties, + - * /, if else, comparisons or one of {functions}", node)

    def test(self, node: ast.expr, depth: int) -> ast.expr:
        below = self._below(depth)
        match node:
            case ast.Compare(left=left, ops=ops, comparators=others) if all(_name(op) in _FORMS for op in ops):
                numbers = [self.number(each, below) for each in (left, *others)]
                pairs = zip(ops, numbers, numbers[1:], strict=False)
                return _call("And", *(_call(_name(op), one, other) for op, one, other in pairs))
            case ast.BoolOp(op=op, values=tests):
                return _call(_name(op), *(self.test(each, below) for each in tests))
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return _call("not", self.test(operand, below))
            case _:
                raise self._expected("a test such as a > b", node)

    def _below(self, depth: int) -> int:
        if depth > _DEPTH_MAX:
            raise ValueError(f"expected at most {_DEPTH_MAX} levels of operators and brackets, got {self._text!r}")
        return depth + 1

    def _arguments(self, node: ast.Call, function: str, arguments: list[ast.expr], depth: int) -> list[ast.expr]:
        least, most = _ARGUMENTS[function]
        if not least <= len(arguments) <= most:
            raise self._expected(f"{_counted(least, most)} for {function}", node)
        if function != "default":
            return [self.number(argument, depth) for argument in arguments]
        named, otherwise = arguments
        match named:
            case ast.Name(id=name):
                pass
            case ast.Call(func=ast.Name(id=called)) if called == _PROPERTY:
                name = self._quoted(named)
            case _:
                raise self._expected("a property as the first argument of default", node)
        self.names.add(name)
        return [ast.Constant(name), self.number(otherwise, depth)]

    def _required(self, name: str) -> ast.Name:
        self.names.add(name)
        self.required.add(name)
        return ast.Name(name)

    def _quoted(self, node: ast.Call) -> str:
        """The name in ``property("name")``: what stands between the quotes, as it stands there."""
        match node:
            case ast.Call(args=[ast.Constant(value=str(name)) as quoted], keywords=[]) if name:
                if self._source(quoted)[1:-1] == name:  # no escapes, no texts that are joined
                    return name
        raise self._expected(f'a name in quotes and without backslashes, as {_PROPERTY}("gpu.seconds")', node)

    def _literal(self, node: ast.Constant) -> Value:
        number = parse_decimal(self._source(node), decimals=PRICE_DECIMALS)
        if isinstance(number, Reason):
            raise self._expected(f"a decimal number of at most 18 digits and {PRICE_DECIMALS} decimals", node)
        return _literal(number)

    def _source(self, node: ast.expr) -> str:
        return ast.get_source_segment(self._text, node) or self._text

    def _expected(self, what: str, node: ast.expr) -> ValueError:
        return ValueError(f"expected {what}, got {self._source(node)!r}")


def _call(function: str, *arguments: ast.expr) -> ast.Call:
    return ast.Call(ast.Name(function), list(arguments), [])


def _name(op: ast.AST) -> str:
    return type(op).__name__


def _counted(least: int, most: int) -> str:
    if least == most:
        return "one argument" if least == 1 else f"{least} arguments"
    return f"{least} or {most} arguments" if most < LENGTH_MAX else f"{least} or more arguments"
