"""YAML as people write it: scalars keep their text, everything knows its line, every mistake becomes a finding.

PyYAML's node tree is used rather than its values, so that an unquoted ``0.000003`` stays exactly that and never passes
through a float.
"""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticCustomError

Key: TypeAlias = tuple[str | int, ...]
#: A scalar's text, None where nothing or ``null`` stands, or lists and dicts of these.
Data: TypeAlias = Any

_NULL = "tag:yaml.org,2002:null"
_SHOWN_MAX = 60
#: Lists and mappings within each other; the deepest of our files has nine.
_DEPTH_MAX = 30


@dataclass(frozen=True, slots=True)
class Where:
    """A place in a file: line from 1, and the way to it through the document."""

    file: str
    line: int
    path: str

    def finding(self, message: str) -> "Finding":
        return Finding(self.file, self.line, self.path, message)


@dataclass(frozen=True, slots=True, order=True)
class Finding:
    """A mistake: what was expected, what came, what to do."""

    file: str
    line: int
    path: str
    message: str

    def __str__(self) -> str:
        place = f"{self.path}: " if self.path else ""
        return f"{self.file}:{self.line}: {place}{self.message}"


M = TypeVar("M", bound=BaseModel)


@dataclass(slots=True)
class Source:
    """One YAML file: its data, where each part stands, and the findings so far."""

    file: str
    data: Data = None
    findings: list[Finding] = field(default_factory=list)
    _lines: dict[Key, int] = field(default_factory=dict)
    _key_lines: dict[Key, int] = field(default_factory=dict)

    def where(self, path: Key, *, key: bool = False) -> Where:
        """Where a part stands, or its key; a part that is not there stands where its parent does."""
        lines = self._key_lines if key else self._lines
        known = path
        while known and known not in lines:
            known, lines = known[:-1], self._lines
        return Where(self.file, lines.get(known, 1), self._shown(path))

    def report(self, path: Key, message: str, *, key: bool = False) -> None:
        self.findings.append(self.where(path, key=key).finding(message))

    def parts(self, path: Key, data: Data) -> list[tuple[Key, Data]]:
        """The elements of a list with their paths; anything but a list is reported. Nothing is an empty list."""
        if data is None:
            return []
        if not isinstance(data, list):
            self.report(path, f"expected a list, got {shown(data)}")
            return []
        return [((*path, index), part) for index, part in enumerate(data)]

    def validated(self, model: type[M], path: Key, data: Data) -> M | None:
        """The data as a model, or None after reporting each of its mistakes."""
        try:
            return model.model_validate(data)
        except ValidationError as error:
            for problem in error.errors():
                at = (*path, *problem["loc"])
                match problem["type"]:
                    case "missing":
                        self.report(at, "expected a value, got nothing")
                    case "extra_forbidden":
                        known = _keys_at(model, problem["loc"][:-1])
                        self.report(at, f"unknown key {problem['loc'][-1]!r}{suggestion(at[-1], known)}", key=True)
                    case "model_type":
                        self.report(at, f"expected a mapping, got {shown(problem['input'])}")
                    case "dict_type":
                        self.report(at, f"expected a mapping of properties to values, got {shown(problem['input'])}")
                    case "list_type":
                        self.report(at, f"expected a list, got {shown(problem['input'])}")
                    case _:
                        self.report(at, problem["msg"])
            return None

    def _shown(self, path: Key) -> str:
        """``plans[llm].charges[input].tiers[#2].up_to``: list elements by their id, else by number from 1."""
        text, data = "", self.data
        for step in path:
            data = _step(data, step)
            if isinstance(step, str):
                text += f".{step}" if text else step
            else:
                name = data.get("id") if isinstance(data, dict) else None
                text += f"[{name}]" if isinstance(name, str) and name else f"[#{step + 1}]"
        return text


@dataclass(frozen=True, slots=True)
class Part:
    """An element of a file, with its place."""

    source: Source
    path: Key
    data: Data

    def report(self, key: str, message: str) -> None:
        self.source.report((*self.path, key), message)

    def where(self, key: str) -> Where:
        return self.source.where((*self.path, key))

    def parts(self, key: str) -> list["Part"]:
        path = (*self.path, key)
        return [Part(self.source, at, data) for at, data in self.source.parts(path, get(self.data, key))]

    def validated(self, model: type[M], *, without: tuple[str, ...] = ()) -> M | None:
        """The data as a model; what stands under the keys ``without`` is judged elsewhere."""
        data = self.data
        if isinstance(data, dict) and without:
            data = {key: part for key, part in data.items() if key not in without}
        return self.source.validated(model, self.path, data)


@contextmanager
def uncollected() -> Iterator[None]:
    """Without the cyclic collector: a file's parts all stay, and looking through them took half of the reading time."""
    collected = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collected:
            gc.enable()


def read(path: Path) -> Source:
    """The file's data and places. What is not YAML is a finding, not an error. Raises OSError when unreadable."""
    source = Source(str(path))
    try:
        root = yaml.compose(path.read_bytes(), Loader=yaml.CSafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        context = f"{error.context}: " if error.context else ""
        source.findings.append(Finding(source.file, line, "", f"expected YAML, got {context}{error.problem}"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        source.findings.append(Finding(source.file, 1, "", f"expected YAML in UTF-8, got {error}"))
    else:
        if root is None:
            source.findings.append(Finding(source.file, 1, "", "expected a mapping, got an empty file"))
        else:
            mistakes: list[tuple[Key, int, str]] = []
            source.data = _data(source, root, (), (), mistakes)
            for at, line, message in mistakes:  # said now, since places show ids, which stand in the data
                source.findings.append(Finding(source.file, line, source._shown(at), message))
    return source


def _data(
    source: Source, node: yaml.Node, path: Key, above: tuple[yaml.Node, ...], mistakes: list[tuple[Key, int, str]]
) -> Data:
    source._lines[path] = node.start_mark.line + 1
    if isinstance(node, yaml.ScalarNode):
        return None if node.tag == _NULL else str(node.value)
    if node in above:
        mistakes.append((path, node.start_mark.line + 1, "expected a value, got an alias of what it stands in"))
        return None
    if len(above) == _DEPTH_MAX:
        mistakes.append((path, node.start_mark.line + 1, f"expected at most {_DEPTH_MAX} levels, got one more"))
        return None
    above = (*above, node)
    if isinstance(node, yaml.SequenceNode):
        return [_data(source, part, (*path, index), above, mistakes) for index, part in enumerate(node.value)]
    data: dict[str, Data] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            mistakes.append((path, line, "expected a word as key, got a list or mapping"))
            continue
        key = str(key_node.value)
        if key in data:
            first = source._key_lines[*path, key]
            mistakes.append(((*path, key), line, f"expected each key once, got it on line {first} too"))
            continue
        source._key_lines[*path, key] = line
        data[key] = _data(source, value_node, (*path, key), above, mistakes)
    return data


def get(data: Data, key: str) -> Data:
    """What stands under a key, or None where nothing does or there are no keys."""
    return data.get(key) if isinstance(data, dict) else None


def report_repeats(parts: list[tuple[Part, Data]]) -> None:
    """Report each part whose id, given beside it, is one before it."""
    first: dict[str, Where] = {}
    for part, name in parts:
        if not isinstance(name, str):
            continue
        where = part.where("id")
        known = first.setdefault(name, where)
        if known is not where:
            part.report("id", f"expected each id once, got {name!r} again after {known.file}:{known.line}")


def expected(what: str, value: Data, hint: str = "") -> PydanticCustomError:
    """The error a field's validator raises."""
    return PydanticCustomError("expected", "{text}", {"text": f"expected {what}, got {shown(value)}{hint}"})


def shown(value: Data) -> str:
    """A value as a message quotes it."""
    match value:
        case None | "":
            return "nothing"
        case str():
            return repr(value if len(value) <= _SHOWN_MAX else value[:_SHOWN_MAX] + "…")
        case list():
            return "a list"
        case _:
            return "a mapping"


def suggestion(word: object, known: list[str]) -> str:
    """``: did you mean 'x'?``, or the words there are where none is close."""
    close = get_close_matches(str(word), known, 1)
    if close:
        return f": did you mean {close[0]!r}?"
    return f": expected {one_of(known)}" if known else ""


def one_of(words: Sequence[str], last: str = "or") -> str:
    """``a, b or c``; nothing where there is no word."""
    return f" {last} ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def _step(data: Data, step: str | int) -> Data:
    if isinstance(data, dict):
        return data.get(step)
    if isinstance(data, list) and isinstance(step, int) and step < len(data):
        return data[step]
    return None


def _keys_at(model: type[BaseModel], loc: Key) -> list[str]:
    """The keys a model, or one nested in it, takes."""
    for step in loc:
        if isinstance(step, str):
            annotation = model.model_fields[step].annotation
            nested = [a for a in getattr(annotation, "__args__", (annotation,)) if isinstance(a, type)]
            model = next(a for a in nested if issubclass(a, BaseModel))
    return list(model.model_fields)
