"""What is logged can be read, whoever else writes to the same place."""

from __future__ import annotations

import io
import json
import sys

import pytest
import structlog

from service.telemetry import configure_logging


class Stream(io.TextIOBase):
    """A stream that keeps each write apart."""

    def __init__(self) -> None:
        self.pieces: list[str] = []

    def write(self, piece: str) -> int:
        self.pieces.append(piece)
        return len(piece)


def test_a_log_line_and_its_end_are_one_write(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, before = Stream(), structlog.get_config()
    monkeypatch.setattr(sys, "stderr", stream)
    configure_logging("info")
    structlog.get_logger().info("something happened")
    structlog.configure(**before)
    (line,) = stream.pieces
    assert line.endswith("\n")
    assert json.loads(line)["event"] == "something happened"
