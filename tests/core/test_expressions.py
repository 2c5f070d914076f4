"""Arithmetic over properties: what it gives, what it refuses, and that it is exact."""

from collections.abc import Mapping
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.expressions import LENGTH_MAX, NUMBER_ONE, compile_expression


def evaluated(text: str, numbers: Mapping[str, str | int | Fraction | None]) -> Fraction:
    scaled = {name: None if number is None else int(Fraction(number) * NUMBER_ONE) for name, number in numbers.items()}
    numerator, denominator = compile_expression(text).evaluate(scaled)
    assert (type(numerator), type(denominator), denominator > 0) == (int, int, True)
    return Fraction(numerator, denominator)


RESULTS = {
    "a property": ("tokens", {"tokens": "4"}, "4"),
    "precedence and brackets": ("(a + b) * 2 - -a / 4", {"a": "1", "b": "2"}, "6.25"),
    "decimals as written, not as floats": ("0.1 + 0.2", {}, "0.3"),
    "a literal with all its digits": ("0.123456789012345678 * a", {"a": "1"}, "0.123456789012345678"),
    "division is exact": ("a / 3 * 3", {"a": "1"}, "1"),
    "a name outside ASCII": ("größe * 2", {"größe": "3"}, "6"),
    "max": ("max(a, b, 3)", {"a": "1", "b": "2"}, "3"),
    "min": ("min(a, -b)", {"a": "1", "b": "2"}, "-2"),
    "abs": ("abs(a)", {"a": "-1.5"}, "1.5"),
    "floor": ("floor(a)", {"a": "-1.5"}, "-2"),
    "floor to a step": ("floor(a, 0.25)", {"a": "1.6"}, "1.5"),
    "ceil": ("ceil(a)", {"a": "1.000000001"}, "2"),
    "ceil of a whole number": ("ceil(a)", {"a": "2"}, "2"),
    "minutes begun": ("ceil(seconds, 60) / 60", {"seconds": "61"}, "2"),
    "round up from half": ("round(a)", {"a": "2.5"}, "3"),
    "round away from zero": ("round(a)", {"a": "-2.5"}, "-3"),
    "round to a step": ("round(a, 100)", {"a": "149"}, "100"),
    "a step has no sign": ("floor(a, -60) + ceil(a, -60) + round(a, -60)", {"a": "61"}, "240"),
    "division by less than 0": ("1 / a + a / -4", {"a": "-0.5"}, "-1.875"),
    "if": ("a if a > b else b", {"a": "1", "b": "2"}, "2"),
    "a chain of comparisons": ("1 if 0 < a <= 2 else 0", {"a": "2"}, "1"),
    "and, or, not": ("1 if a > 0 and (b > 5 or not b == 2) else 0", {"a": "1", "b": "2"}, "0"),
    "the first of equals": ("max(a, b) - min(a, b)", {"a": "1", "b": "1"}, "0"),
    "greater or equal": ("1 if a >= b else 0", {"a": "2", "b": "2"}, "1"),
    "what is not chosen is not evaluated": ("1 if a == 0 or 1 / a > 1 else 1 / a", {"a": "0"}, "1"),
    "a property by the name of a function": ("max(max, And)", {"max": "1", "And": "2"}, "2"),
    "not equal": ("1 if a != b else 0", {"a": "1", "b": "1.0"}, "0"),
    "a default that is not needed": ("default(cached, 5)", {"cached": "2"}, "2"),
    "a default that is": ("default(cached, 5)", {"cached": None}, "5"),
    "a name with a dot": ('property("gpu.seconds") * 2', {"gpu.seconds": "3"}, "6"),
    "a name that is an operation otherwise": ("property('a-b') - a - b", {"a-b": "9", "a": "2", "b": "1"}, "6"),
    "a name that is a keyword": ("max(property('if'), 1)", {"if": "4"}, "4"),
    "a default of a quoted name": ('default(property("a.b"), 5)', {"a.b": None}, "5"),
    "a property by the name of property": ("property + property('property')", {"property": "2"}, "4"),
    "spaces around": ("  a\t", {"a": "1"}, "1"),
}


@pytest.mark.parametrize(("text", "numbers", "expected"), RESULTS.values(), ids=RESULTS)
def test_result(text: str, numbers: dict[str, str | None], expected: str) -> None:
    assert evaluated(text, numbers) == Fraction(expected)


REFUSED = {
    "nothing": (" ", "expected an expression of 1 to 500 characters, got 0"),
    "too long": ("a" * (LENGTH_MAX + 1), "expected an expression of 1 to 500 characters, got 501"),
    "not finished": ("a +", "expected an expression such as seconds * memory_mb / 1024, got 'a +'"),
    "two expressions": ("a; b", "expected an expression such as seconds * memory_mb / 1024, got 'a; b' at character 2"),
    "an assignment": ("a = 1", "expected an expression such as seconds * memory_mb / 1024, got 'a = 1' at character"),
    "a NUL": ("a\0", "expected an expression such as seconds"),
    "unbounded depth": ("-" * 499 + "a", "expected at most 50 levels of operators and brackets, got '---"),
    "brackets without end": ("(" * 240 + "a" + ")" * 240, "expected an expression such as"),
    "a text": ("'a'", "expected a decimal number of at most 18 digits and 18 decimals, got \"'a'\""),
    "a truth": ("True", "expected a decimal number of at most 18 digits and 18 decimals, got 'True'"),
    "a hexadecimal": ("0x10", "expected a decimal number of at most 18 digits and 18 decimals, got '0x10'"),
    "a number without end": ("1e999999999", "expected a decimal number of at most 18 digits and 18 decimals"),
    "an imaginary number": ("2j", "expected a decimal number of at most 18 digits and 18 decimals, got '2j'"),
    "a power": ("2 ** a", "expected numbers, properties, + - * /, if else, comparisons or one of abs, ceil, default"),
    "an attribute": ("a.__class__", "expected numbers, properties, + - * /, if else"),
    "a name with a dot, unquoted": ("gpu.seconds * 2", "expected numbers, properties, + - * /, if else"),
    "no name in quotes": ("property('')", "expected a name in quotes and without backslashes, as property("),
    "a name without quotes": ("property(a)", "expected a name in quotes and without backslashes, as property("),
    "a name with an escape": ("property('a\\x2eb')", "expected a name in quotes and without backslashes"),
    "names joined": ("property('a' 'b')", "expected a name in quotes and without backslashes"),
    "a name that is computed": ("property('a' + 'b')", "expected a name in quotes and without backslashes"),
    "two names": ("property('a', 'b')", "expected a name in quotes and without backslashes"),
    "bytes": ("property(b'a')", "expected a name in quotes and without backslashes"),
    "a name with more in it": ("property(f'{a}')", "expected a name in quotes and without backslashes"),
    "an item": ("a[0]", "expected numbers, properties, + - * /, if else"),
    "a lambda": ("lambda: 1", "expected numbers, properties, + - * /, if else"),
    "a comprehension": ("[a for a in b]", "expected numbers, properties, + - * /, if else"),
    "a function that is not ours": ("open(a)", "expected numbers, properties, + - * /, if else"),
    "a function of a function": ("max(a, b)(c)", "expected numbers, properties, + - * /, if else"),
    "a form that is not for texts": ("And(a, b)", "expected numbers, properties, + - * /, if else"),
    "a keyword": ("round(a, step=2)", "expected numbers, properties, + - * /, if else"),
    "membership": ("1 if a in b else 0", "expected a test such as a > b, got 'a in b'"),
    "a test as the result": ("a > 1", "expected a number, got 'a > 1'"),
    "a test as an operand": ("(a > 1) + 1", "expected a number, got 'a > 1'"),
    "a number as a test": ("1 if a else 2", "expected a test such as a > b, got 'a'"),
    "max of one": ("max(a)", "expected 2 or more arguments for max, got 'max(a)'"),
    "floor of three": ("floor(a, b, c)", "expected 1 or 2 arguments for floor, got 'floor(a, b, c)'"),
    "abs of two": ("abs(a, b)", "expected one argument for abs, got 'abs(a, b)'"),
    "a default of a number": ("default(1, 2)", "expected a property as the first argument of default, got"),
    "arguments spread": ("abs(*a)", "expected numbers, properties, + - * /, if else"),
    "a name that would be read as another": ("ﬁle * 2", "expected letters in their normal form (NFKC), got 'ﬁle * 2'"),
}


@pytest.mark.parametrize(("text", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError) as refused:
        compile_expression(text)
    assert str(refused.value).startswith(message)


@pytest.mark.parametrize("text", ["1 / a", "floor(1, a)", "ceil(1, a)", "round(1, a)"])
def test_division_by_zero(text: str) -> None:
    with pytest.raises(ZeroDivisionError):
        evaluated(text, {"a": 0})


def test_what_may_be_absent() -> None:
    expression = compile_expression("default(a, b) + default(c, default(d, 0)) + c")
    assert expression.names == {"a", "b", "c", "d"}
    assert expression.optional == {"a", "d"}
    quoted = compile_expression("default(property('a.b'), property('c.d')) + default(property('c.d'), 0)")
    assert (quoted.names, quoted.optional) == ({"a.b", "c.d"}, {"a.b"})


def test_the_deepest_expression_evaluates() -> None:
    assert evaluated("-" * 49 + "a", {"a": 1}) == -1
    assert evaluated("+".join("a" * 49), {"a": 1}) == 49


# A naive second reading: text and value are built side by side, with Python's own fractions.

numbers = st.decimals("-1e12", "1e12", places=6, allow_nan=False).map(lambda number: f"{abs(number):f}")
names = st.sampled_from("abc")
Pair = tuple[str, Fraction]


@st.composite
def expressions(draw: st.DrawFn, values: dict[str, Fraction], depth: int = 4) -> Pair:
    def below() -> Pair:
        return draw(expressions(values, depth - 1))

    kind = draw(st.sampled_from(("number", "name") if depth == 0 else ("+", "-", "*", "/", "neg", "max", "if", "ceil")))
    match kind:
        case "number":
            text = draw(numbers)
            return text, Fraction(text)
        case "name":
            name = draw(names)
            return name, values[name]
        case "neg":
            text, value = below()
            return f"-({text})", -value
        case "ceil":
            text, value = below()
            return f"ceil({text})", Fraction(-((-value.numerator) // value.denominator))
    (left, a), (right, b) = below(), below()
    match kind:
        case "max":
            return f"max({left}, {right})", max(a, b)
        case "if":
            return f"(({left}) if {left} < {right} else ({right}))", a if a < b else b
        case "/" if b == 0:
            return f"({left} / 7)", a / 7
        case "/":
            return f"({left} / {right})", a / b
        case "*":
            return f"({left} * {right})", a * b
        case "-":
            return f"({left} - {right})", a - b
        case _:
            return f"({left} + {right})", a + b


@given(st.data(), st.fixed_dictionaries({name: numbers.map(Fraction) for name in "abc"}))
def test_as_python_s_fractions(data: st.DataObject, values: dict[str, Fraction]) -> None:
    text, value = data.draw(expressions(values, depth=2))
    assert evaluated(text, values) == value
