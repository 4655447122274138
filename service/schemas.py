"""JSON Schemas that came from outside: which are taken, and whether arguments meet one, in a bounded amount of work.

Both a schema and the arguments are somebody else's, and both are looked at in a process that serves all tenants. So a
schema is small, refers to nothing outside of itself, and does without the keywords whose cost nobody can bound; each
keyword that is applied is paid for from a budget, since a schema of some lines may double its work with every one of
them; and patterns are matched in linear time by RE2 (Russ Cox, "Regular Expression Matching in the Wild", 2010), which
has no backtracking, and neither look-around nor back-references.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import msgspec
from referencing import Registry
from referencing.exceptions import Unresolvable

from service.errors import Invalid
from service.schema_library import Draft202012Validator, SchemaError, ValidationError, validators

MOST_SCHEMA_BYTES = 16 << 10
"""Largest schema, as JSON: checking it against the meta-schema takes some 20 microseconds a byte."""

MOST_WORK = 20_000
"""Keywords applied, and members of what they are applied to, for one call's arguments: some 0.2 seconds."""

TOO_COSTLY = ("patternProperties", "unevaluatedItems", "unevaluatedProperties")
"""Keywords that are refused: they look at the whole of the schema or match patterns where no budget reaches."""

MOST_DEPTH = 100
"""How deep a schema, or arguments, may be nested. Readers recurse: what one process could just write, another one,
deeper in its own calls, could not read, and with it all that it reads in one go."""


class Unusable(Exception):
    """A schema cannot be applied, or not with bounded work; the message says why."""


_left: ContextVar[list[int]] = ContextVar("work that is left")


def require_schema(schema: dict[str, Any], field: str) -> None:
    """Raise Invalid naming the field unless this is a JSON Schema (2020-12) that can be applied."""
    try:
        if _is_deep(schema):
            raise Invalid(field, f"is nested more than {MOST_DEPTH} deep")
        size = len(msgspec.json.encode(schema))
        if size > MOST_SCHEMA_BYTES:
            raise Invalid(field, f"has {size} bytes; at most {MOST_SCHEMA_BYTES} are taken")
        Draft202012Validator.check_schema(schema)
        _require_usable(schema)
        for pattern in _values(schema, "pattern"):
            _matches(pattern, "")
    except (SchemaError, RecursionError) as wrong:
        message = wrong.message[:300] if isinstance(wrong, SchemaError) else "it is nested too deeply"
        raise Invalid(field, f"is no JSON Schema (2020-12): {message}") from None
    except Unusable as why:
        raise Invalid(field, str(why)) from None


def explain(schema: Mapping[str, Any], arguments: Any) -> str | None:
    """Say in one line what is wrong with arguments; None when nothing is."""
    if _is_deep(arguments):
        return f"arguments: nested more than {MOST_DEPTH} deep"
    try:
        _require_usable(schema)
        wrong = _first_error(schema, arguments)
    except Unusable as why:
        return f"the schema {why}"
    except Unresolvable as missing:
        return f"the schema refers to what it does not hold: {str(missing)[:300]}"
    except RecursionError:
        return "they are nested too deeply"
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as fault:
        # A reference may lead to what is no schema, and a number may be none that can be divided.
        return f"the schema cannot be applied to them: {type(fault).__name__}"
    if wrong is None:
        return None
    where = "".join(f"[{part!r}]" for part in wrong.absolute_path)
    return f"arguments{where}: {wrong.message[:300]}"


def _first_error(schema: Mapping[str, Any], arguments: Any) -> ValidationError | None:
    # A schema that names its dialect would be applied by the library's own class, which has no budget.
    bare = {name: value for name, value in schema.items() if name != "$schema"}
    spent = _left.set([MOST_WORK])
    try:
        validator = _Bounded(bare, registry=Registry())  # an empty one: it fetches nothing
        return next(iter(validator.iter_errors(arguments)), None)
    finally:
        _left.reset(spent)


def _require_usable(schema: Mapping[str, Any]) -> None:
    """Raise Unusable for a schema that leads elsewhere or whose work cannot be bounded."""
    for ref in (*_values(schema, "$ref"), *_values(schema, "$dynamicRef")):
        if not ref.startswith("#"):
            raise Unusable(f"refers to {ref[:100]!r}: only references within the schema (#…) are followed")
    if any(_values(inner, "$schema") for name, inner in schema.items() if name != "$schema"):
        raise Unusable("names a dialect in its inside: `$schema` belongs to its top")
    for keyword in TOO_COSTLY:
        if any(keyword in inner for inner in _objects(schema)):
            raise Unusable(f"uses {keyword}, which is not supported")


def _is_deep(value: Any) -> bool:
    """Tell whether a value is nested deeper than MOST_DEPTH."""
    level = [value]
    for _ in range(MOST_DEPTH + 1):
        containers = [each for each in level if isinstance(each, Mapping | list)]
        if not containers:
            return False
        level = [inner for each in containers for inner in (each.values() if isinstance(each, Mapping) else each)]
    return True


def _objects(value: Any) -> Iterator[Mapping[str, Any]]:
    """Yield every object in a value, that itself included."""
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, Mapping):
            yield each
            waiting.extend(each.values())
        elif isinstance(each, list):
            waiting.extend(each)


def _values(value: Any, name: str) -> list[str]:
    """Return every text that stands under a name, however deep."""
    return [inner for each in _objects(value) if isinstance(inner := each.get(name), str)]


def _matches(pattern: str, text: str) -> bool:
    """Tell whether a pattern is found in a text, in time linear in both; raises Unusable."""
    # Loaded when the first pattern is met: few schemas have one, and every process would wait for it.
    import pyarrow as pa
    import pyarrow.compute as pc

    try:
        return bool(pc.match_substring_regex(pa.scalar(text), pattern).as_py())
    except (pa.ArrowInvalid, ValueError) as wrong:
        raise Unusable(f"has a pattern that RE2 does not take: {pattern[:100]!r}: {str(wrong)[:100]}") from None


def _pattern(validator: Any, pattern: str, instance: Any, schema: Any) -> Iterator[ValidationError]:
    """Apply the keyword `pattern` (JSON Schema Validation 2020-12, section 6.3.3)."""
    if isinstance(instance, str):
        text = instance.encode("utf-8", "replace").decode()  # a lone surrogate matches nothing
        if not _matches(pattern, text):
            yield ValidationError(f"{instance[:100]!r} does not match {pattern[:100]!r}")


Keyword = Callable[[Any, Any, Any, Any], Iterable[ValidationError] | None]


def _paid(keyword: Keyword) -> Keyword:
    """Return a keyword that takes its work from the budget before it is applied."""

    def apply(validator: Any, value: Any, instance: Any, schema: Any) -> Iterable[ValidationError] | None:
        left = _left.get()
        left[0] -= 1 + (len(instance) if isinstance(instance, dict | list) else 0)
        if value is True and isinstance(instance, list) and schema.get("uniqueItems") is True:
            left[0] -= len(instance) ** 2 // 64  # each is compared with each when they cannot be sorted
        if left[0] < 0:
            raise Unusable(f"needs more than {MOST_WORK} steps for them")
        return keyword(validator, value, instance, schema)

    return apply


_KEYWORDS: Mapping[str, Keyword] = {**Draft202012Validator.VALIDATORS, "pattern": _pattern}

_Bounded: Any = validators.extend(  # type: ignore[no-untyped-call]
    Draft202012Validator, {name: _paid(keyword) for name, keyword in _KEYWORDS.items()}
)
