"""Files with one JSON object in each line, decoded into a type."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import msgspec

from harness.importers.source import Lines, Unusable

Row = TypeVar("Row")


def decoded(lines: Lines, decoder: msgspec.json.Decoder[Row]) -> Iterator[Row]:
    """Yield each line as the decoder's type; blank lines are passed over. Raises Unusable."""
    for line in lines:
        if not line.strip():
            continue
        try:
            yield decoder.decode(line)
        except msgspec.ValidationError as fault:
            text, _, place = str(fault).partition(" - at `$")
            raise Unusable(text, place.rstrip("`").lstrip(".") or None) from None
        except msgspec.DecodeError as fault:
            text = f"is no JSON object ({fault}): the file is cut off or damaged"
            raise Unusable(text, shape=lines.line == 1) from None
