"""The library for JSON Schema, without the grammar that it would build at import; used by `schemas`.

Where the package `rfc3987_syntax` is installed (notebooks bring it along), jsonschema imports it for one format, `iri`,
and it builds a parser in a second or two of CPU: three quarters of the start of every process here, and so of how long
the service takes to recover from the death of one. Formats are not checked here (they are annotations; JSON Schema
2020-12, validation, section 7.2.1), so the library is loaded as if that package were not there.
"""

from __future__ import annotations

import sys
from typing import Any

SLOW = "rfc3987_syntax"

_modules: dict[str, Any] = sys.modules
_before = {SLOW: _modules[SLOW]} if SLOW in _modules else {}
_modules[SLOW] = None  # the import system's own way to say: not installed
try:
    from jsonschema import Draft202012Validator, validators
    from jsonschema.exceptions import SchemaError, ValidationError
finally:
    del _modules[SLOW]
    _modules.update(_before)

__all__ = ["Draft202012Validator", "SchemaError", "ValidationError", "validators"]
