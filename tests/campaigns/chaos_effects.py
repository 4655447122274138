"""A tool whose effect can be counted from outside: it appends the id of its call to a file, and repeats nothing.

The campaign puts a folder with an entry point of the group `plimsoll.tools` on the path of the service's processes, as
an installed package would bring it. The file is the idempotent sink's opposite: a call that is started twice is there
twice, whatever the database says.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from service.tools import GROUP, Tool, ToolContext

FILE_VARIABLE = "PLIMSOLL_CHAOS_EFFECTS"


async def _take_effect(arguments: Mapping[str, Any], context: ToolContext) -> dict[str, Any]:
    """Have the effect at once, then take a while: whoever dies in between has had it."""
    file = os.open(os.environ[FILE_VARIABLE], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(file, f"{context.tool_call_id}\n".encode())  # one short write to the end of a file is never torn
    finally:
        os.close(file)
    await asyncio.sleep(arguments["seconds"])
    return {"effect": context.tool_call_id}


EFFECT = Tool(
    name="effect",
    description="Writes down that it was started, and takes some seconds.",
    schema={"type": "object", "properties": {"seconds": {"type": "number"}}, "required": ["seconds"]},
    run=_take_effect,
)


def install(folder: Path) -> Path:
    """Make a folder that, on the path of a process, installs the tool for it."""
    information = folder / "plimsoll_chaos-0.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: plimsoll-chaos\nVersion: 0\n")
    (information / "entry_points.txt").write_text(f"[{GROUP}]\neffect = {__name__}:EFFECT\n")
    return folder


def read_effects(file: Path) -> Counter[str]:
    """Return how often each tool call had its effect."""
    return Counter(file.read_text().split()) if file.exists() else Counter()
