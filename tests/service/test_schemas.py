"""Schemas from outside: what is taken, what is refused, and that no schema makes anybody wait."""

from __future__ import annotations

from typing import Any

import pytest

from service.errors import Invalid
from service.schemas import MOST_DEPTH, MOST_SCHEMA_BYTES, MOST_WORK, explain, require_schema


def nested(depth: int) -> Any:
    """Return a list in a list in a list."""
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def doubling(levels: int) -> dict[str, Any]:
    """Return a schema that does twice the work for each level."""
    definitions: dict[str, Any] = {
        f"d{level}": {"allOf": [{"$ref": f"#/$defs/d{level + 1}"}] * 2} for level in range(levels)
    }
    return {"$ref": "#/$defs/d0", "$defs": {**definitions, f"d{levels}": {}}}


@pytest.mark.parametrize(
    ("schema", "arguments", "wrong"),
    [
        ({}, {"a": 1}, None),
        ({"required": ["a"]}, {}, "arguments: 'a' is a required property"),
        ({"properties": {"a": {"type": "string"}}}, {"a": 1}, "arguments['a']: 1 is not of type 'string'"),
        ({"properties": {"a": {"pattern": "^[a-z]+-\\d{2}$"}}}, {"a": "ab-12"}, None),
        ({"properties": {"a": {"pattern": "^b"}}}, {"a": "ab"}, "arguments['a']: 'ab' does not match '^b'"),
        ({"properties": {"a": {"pattern": "^b$"}}}, {"a": "b\n"}, "arguments['a']: 'b\\n' does not match '^b$'"),
        ({"properties": {"a": {"pattern": "b"}}}, {"a": 5}, None),
        ({"$schema": "https://json-schema.org/draft/2020-12/schema", "maxProperties": 0}, {}, None),
        ({"properties": {"a": {"uniqueItems": True}}}, {"a": [1, "1", 1.5]}, None),
        ({"properties": {"a": {"uniqueItems": True}}}, {"a": [1, 1]}, "arguments['a']: [1, 1] has non-unique elements"),
        ({"$defs": {"n": {"type": "number"}}, "additionalProperties": {"$ref": "#/$defs/n"}}, {"a": 1}, None),
    ],
)
def test_arguments_are_explained(schema: dict[str, Any], arguments: Any, wrong: str | None) -> None:
    require_schema(schema, "schema")
    assert explain(schema, arguments) == wrong


@pytest.mark.parametrize(
    ("schema", "arguments", "why"),
    [
        (doubling(40), {}, f"the schema needs more than {MOST_WORK} steps for them"),
        (
            {"$schema": "https://json-schema.org/draft/2020-12/schema", **doubling(40)},
            {},
            f"the schema needs more than {MOST_WORK} steps for them",
        ),
        (
            {"properties": {"a": {"uniqueItems": True}}},
            {"a": [n if n % 2 else str(n) for n in range(100_000)]},
            f"the schema needs more than {MOST_WORK} steps for them",
        ),
        (
            {"additionalProperties": {"items": {}}},
            {"a": [0] * 1_000_000},
            "the schema needs more than 20000 steps for them",
        ),
        ({"$ref": "#"}, {}, "they are nested too deeply"),
        (
            {"properties": {"a": {"multipleOf": 0.1}}},
            {"a": 10**400},
            "the schema cannot be applied to them: OverflowError",
        ),
        ({"$ref": "#/const", "const": 5}, {}, "the schema cannot be applied to them: TypeError"),
        ({"$ref": "#/allOf/x", "allOf": [{}]}, {}, "the schema cannot be applied to them: ValueError"),
    ],
    ids=["doubling", "doubling in a named dialect", "unique", "items", "itself", "number", "no schema", "no index"],
)
def test_a_schema_that_cannot_be_applied_is_explained_in_bounded_work(
    schema: dict[str, Any], arguments: Any, why: str
) -> None:
    require_schema(schema, "schema")
    assert explain(schema, arguments) == why


def test_a_pattern_that_would_backtrack_for_ever_is_matched_in_linear_time() -> None:
    schema = {"properties": {"a": {"pattern": "^(a+)+$"}}}
    require_schema(schema, "schema")
    assert explain(schema, {"a": "a" * 100_000}) is None
    assert (explain(schema, {"a": "a" * 100_000 + "b"}) or "").endswith("does not match '^(a+)+$'")


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        ({"type": "thing"}, "is no JSON Schema (2020-12): 'thing' is not valid under any of the given schemas"),
        ({"pattern": "("}, "is no JSON Schema (2020-12): '(' is not a 'regex'"),
        ({"pattern": "(?=a)"}, "has a pattern that RE2 does not take: '(?=a)': "),
        ({"pattern": "(a)\\1"}, "has a pattern that RE2 does not take: "),
        ({"items": {"patternProperties": {"a": {}}}}, "uses patternProperties, which is not supported"),
        ({"unevaluatedItems": False}, "uses unevaluatedItems, which is not supported"),
        ({"$ref": "https://example.com/s"}, "refers to 'https://example.com/s': only references within"),
        ({"items": {"$dynamicRef": "other"}}, "refers to 'other': only references within"),
        ({"items": {"$schema": "http://json-schema.org/draft-07/schema#"}}, "names a dialect in its inside"),
        ({"description": "x" * MOST_SCHEMA_BYTES}, "has 16402 bytes; at most 16384 are taken"),
    ],
)
def test_a_schema_that_is_not_taken_is_refused_with_the_reason(schema: dict[str, Any], why: str) -> None:
    with pytest.raises(Invalid) as refused:
        require_schema(schema, "schema")
    assert refused.value.detail.startswith(f"schema: {why}")


def test_what_is_nested_deeply_is_refused_before_anybody_recurses_into_it() -> None:
    require_schema({"const": nested(MOST_DEPTH - 1)}, "schema")
    assert explain({}, {"a": nested(MOST_DEPTH - 1)}) is None
    for depth in (MOST_DEPTH, 900, 100_000):
        with pytest.raises(Invalid, match="schema: is nested more than 100 deep"):
            require_schema({"const": nested(depth)}, "schema")
        assert explain({}, {"a": nested(depth)}) == "arguments: nested more than 100 deep"


def test_a_definition_that_was_made_before_is_held_to_the_same() -> None:
    assert explain({"patternProperties": {"(a+)+$": {}}}, {"a" * 50 + "b": 1}) == (
        "the schema uses patternProperties, which is not supported"
    )
    assert (explain({"properties": {"a": {"pattern": "(?=a)"}}}, {"a": "a"}) or "").startswith(
        "the schema has a pattern that RE2 does not take"
    )
