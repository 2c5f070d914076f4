"""The Avro shapes: documented, numbered, and readable by every version from every version."""

import copy
import json
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import avro.schema
import pytest
from avro.compatibility import ReaderWriterCompatibilityChecker, SchemaCompatibilityType

from pipeline.infra.avro import (
    ALERTS,
    CATALOG,
    CONTROLS,
    CORRECTIONS,
    DEAD_LETTER,
    EVENTS,
    RATED,
    RECEIPTS,
    Schemas,
    SchemaVersion,
    WireError,
    frame,
    load_schemas,
)
from pipeline.infra.resources import schemas_dir
from tests.rating.world import body, usage

FOLDER = schemas_dir() / "avro"
LISTED: list[dict[str, Any]] = json.loads((FOLDER / "ids.json").read_text())
SCHEMAS = load_schemas()


def documents() -> dict[str, Any]:
    return {path.name: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.avsc"))}


# -- documented


def _undocumented(schema: Any, where: str) -> Iterator[str]:
    """Every record, enum, fixed and field below a schema that says nothing about itself."""
    if isinstance(schema, list):
        for branch in schema:
            yield from _undocumented(branch, where)
    elif isinstance(schema, dict):
        if schema["type"] in ("record", "enum", "fixed") and not schema.get("doc", "").strip():
            yield f"{where}: {schema['type']} {schema['name']}"
        for field in schema.get("fields", ()):
            if not field.get("doc", "").strip():
                yield f"{where}.{field['name']}"
            yield from _undocumented(field["type"], f"{where}.{field['name']}")
        for inner in ("items", "values"):
            if inner in schema:
                yield from _undocumented(schema[inner], where)


@pytest.mark.parametrize(("name", "schema"), documents().items(), ids=documents().keys())
def test_every_field_and_type_is_documented(name: str, schema: Any) -> None:
    assert list(_undocumented(schema, name)) == []


def test_the_search_for_undocumented_fields_finds_nested_ones() -> None:
    schema = {
        "type": "record",
        "name": "R",
        "doc": "d",
        "fields": [
            {"name": "a", "doc": "d", "type": ["null", {"type": "enum", "name": "E", "symbols": []}]},
            {"name": "b", "type": "int"},
        ],
    }
    assert list(_undocumented(schema, "r")) == ["r.a: enum E", "r.b"]


# -- numbered


def test_every_schema_file_is_listed_and_every_listed_file_exists() -> None:
    assert {entry["file"] for entry in LISTED} == set(documents())


def test_ids_are_unique_and_versions_count_from_one() -> None:
    ids = [entry["id"] for entry in LISTED]
    assert len(set(ids)) == len(ids)
    versions: defaultdict[str, list[int]] = defaultdict(list)
    for entry in LISTED:
        versions[entry["subject"]].append(entry["version"])
    assert versions.keys() == {EVENTS, RATED, RECEIPTS, DEAD_LETTER, CATALOG, CONTROLS, CORRECTIONS, ALERTS}
    assert all(found == list(range(1, len(found) + 1)) for found in versions.values())


def test_each_version_of_the_event_is_embedded_by_one_rated_schema() -> None:
    """The rater splices the event's bytes, so the schema around them must hold that very version."""
    by_id = {entry["id"]: entry for entry in LISTED}
    embedding = {entry["embeds"]: entry for entry in LISTED if entry["subject"] == RATED}
    assert embedding.keys() == {entry["id"] for entry in LISTED if entry["subject"] == EVENTS}
    for event_id, entry in embedding.items():
        first = documents()[entry["file"]]["fields"][0]
        assert first["name"] == "event"
        assert first["type"] == documents()[by_id[event_id]["file"]]
        assert SCHEMAS.rated_for(event_id) == entry["id"]


# -- compatible


def _incompatible(reader: Any, writer: Any) -> list[str]:
    """Why what ``writer`` wrote cannot be read as ``reader``; nothing when it can."""
    result = ReaderWriterCompatibilityChecker().get_compatibility(
        avro.schema.parse(json.dumps(reader)), avro.schema.parse(json.dumps(writer))
    )
    if result.compatibility is SchemaCompatibilityType.compatible:
        return []
    return [str(problem) for problem in result.messages] or ["incompatible"]


def _broken_pairs(schemas: list[Any]) -> list[str]:
    """Full-transitive: every version reads every other, older or newer."""
    return [
        f"version {r} cannot read version {w}: {why}"
        for r, reader in enumerate(schemas, 1)
        for w, writer in enumerate(schemas, 1)
        for why in _incompatible(reader, writer)
    ]


@pytest.mark.parametrize("subject", [EVENTS, RATED, RECEIPTS, DEAD_LETTER, CATALOG, CONTROLS, CORRECTIONS])
def test_every_version_of_a_subject_reads_every_other(subject: str) -> None:
    files = [v.file for v in SCHEMAS.versions if v.subject == subject]
    assert files
    assert _broken_pairs([documents()[file] for file in files]) == []


def _with_field(**field: Any) -> Any:
    changed = copy.deepcopy(documents()["usage_event.avsc"])
    changed["fields"].append(field)
    return changed


def _without_field(name: str) -> Any:
    changed = copy.deepcopy(documents()["usage_event.avsc"])
    changed["fields"] = [field for field in changed["fields"] if field["name"] != name]
    return changed


def _retyped(name: str, type_: Any) -> Any:
    changed = copy.deepcopy(documents()["usage_event.avsc"])
    next(field for field in changed["fields"] if field["name"] == name)["type"] = type_
    return changed


BREAKING = {
    "a field more, without default": _with_field(name="region", type="string"),
    "a field less that had no default": _without_field("subject"),
    "text becomes a number": _retyped("source", "long"),
    "a number becomes narrower": _retyped("sequence", "int"),
    "a number becomes wider: old readers cannot": _retyped("sequence", "double"),
    "text may be null": _retyped("subject", ["null", "string"]),
}


@pytest.mark.parametrize("changed", BREAKING.values(), ids=BREAKING.keys())
def test_a_breaking_change_is_caught(changed: Any) -> None:
    assert _broken_pairs([documents()["usage_event.avsc"], changed]) != []


def test_a_change_that_breaks_only_with_an_older_version_is_caught() -> None:
    """Each step is fine by itself; the third version cannot be read by, or read, the first."""
    first = _with_field(name="region", type="string", default="eu")
    second = documents()["usage_event.avsc"]
    third = _with_field(name="region", type="long", default=0)
    assert _broken_pairs([first, second]) == _broken_pairs([second, third]) == []
    assert _broken_pairs([first, second, third]) != []


def test_a_field_with_a_default_may_be_added() -> None:
    assert _broken_pairs([documents()["usage_event.avsc"], _with_field(name="region", type="string", default="")]) == []


def test_an_enum_may_not_grow() -> None:
    rated = documents()["rated_usage.avsc"]
    grown = copy.deepcopy(rated)
    kind = next(field for field in grown["fields"] if field["name"] == "kind")
    kind["type"]["symbols"].append("refund")
    assert _broken_pairs([rated, grown]) != []


# -- on the wire


def test_the_frame_is_the_registrys() -> None:
    assert frame(1) == b"\0\0\0\0\1"
    assert frame(0x01020304) == b"\0\1\2\3\4"


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (None, "expected byte 0 and a 4-byte schema id, got nothing"),
        (b"", "got nothing"),
        (b"\0\0", "got 0000"),
        (b"\1\0\0\0\1x", "got 0100000001"),
        (frame(99) + body(usage()), r"expected a schema of usage.events-value \(ids \[1\]\), got id 99"),
        (frame(2) + body(usage()), "got id 2"),
        (frame(1) + body(usage())[:-1], "does not decode as usage.events-value v1"),
        (frame(1) + body(usage()) + b"xy", "2 bytes left over after usage.events-value v1"),
        (frame(1) + body(usage(timestamp=2**62)), "does not decode as usage.events-value v1: OverflowError"),
    ],
)
def test_what_does_not_decode_says_why(data: bytes | None, says: str) -> None:
    with pytest.raises(WireError, match=says):
        SCHEMAS.decode(data, EVENTS)


def test_a_record_that_does_not_fit_is_not_encoded() -> None:
    with pytest.raises((ValueError, TypeError)):
        SCHEMAS.encode(EVENTS, usage(sequence="one"))
    with pytest.raises(ValueError, match="subject"):
        SCHEMAS.encode(EVENTS, {name: value for name, value in usage().items() if name != "subject"})


def test_the_newest_version_of_a_subject_writes() -> None:
    versions = [SchemaVersion(**entry) for entry in LISTED]
    newer = SchemaVersion(77, EVENTS, 2, "usage_event.avsc")
    assert Schemas([newer, *versions]).encode(EVENTS, usage())[:5] == frame(77)
    assert Schemas(versions).encode(EVENTS, usage())[:5] == frame(1)
