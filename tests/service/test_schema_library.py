"""What every process of the service imports does not make it slow to start."""

from __future__ import annotations

import subprocess
import sys

import pytest

from service.schema_library import SLOW, Draft202012Validator


@pytest.mark.parametrize("module", ["service.app", "service.worker"])
def test_no_process_builds_a_grammar_that_nobody_asks_for(module: str) -> None:
    subprocess.run(  # noqa: S603 - our own
        [sys.executable, "-c", f"import sys, {module}; sys.exit({SLOW!r} in sys.modules)"], check=True
    )


def test_whoever_wants_it_can_still_have_it() -> None:
    command = f"import service.schema_library, {SLOW}; assert {SLOW}.is_valid_syntax('iri', 'http://example.org')"
    subprocess.run([sys.executable, "-c", command], check=True)  # noqa: S603 - our own


def test_schemas_are_checked_as_ever() -> None:
    validator = Draft202012Validator({"type": "object", "required": ["a"]})
    assert [error.message for error in validator.iter_errors({})] == ["'a' is a required property"]
