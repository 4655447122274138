"""The flags of a campaign: bad usage is one line and exit code 64, as in every command, before anything starts."""

from __future__ import annotations

import argparse
from typing import NoReturn

from harness.errors import ExitCode


class Flags(argparse.ArgumentParser):
    """The parser of the campaign `name`; `about` is its page's opening, which `--help` shows as it is written."""

    def __init__(self, name: str, about: str | None) -> None:
        super().__init__(
            prog=f"python -m tests.campaigns.{name}",
            description=about,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """End with the message."""
        self.exit(ExitCode.USAGE, f"{self.prog}: {message} (see --help)\n")
