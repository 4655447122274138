"""What is shown of the load: a line where it is worth one."""

import io

from harness.progress import PlainLines, Tally, shown


def test_each_run_is_counted_once_by_how_it_ended() -> None:
    tally = Tally(4)
    tally.end_run(final_status="COMPLETED", timed_out=False)
    tally.end_run(final_status="FAILED", timed_out=False)
    tally.end_run(final_status=None, timed_out=True)
    tally.end_run(final_status=None, timed_out=False)  # its create failed
    assert (tally.completed, tally.failed, tally.timed_out, tally.ended) == (1, 2, 1, 4)


def test_a_plain_line_is_due_at_every_tenth_and_every_ten_seconds() -> None:
    tally = Tally(100)
    lines = PlainLines(tally, io.StringIO(), now_s=0.0)
    assert lines.due(1.0) is None
    tally.completed = 10
    assert lines.due(2.0) == "10/100 runs: 10 completed, 0 failed, 0 timed out; 0 requests"
    assert lines.due(3.0) is None
    tally.failed = 1
    assert lines.due(11.9) is None
    assert lines.due(12.0) == "11/100 runs: 10 completed, 1 failed, 0 timed out; 0 requests"


async def test_plain_lines_end_with_what_was_reached() -> None:
    stream = io.StringIO()
    tally = Tally(1)
    async with shown(tally, stream):
        tally.end_run(final_status="COMPLETED", timed_out=False)
    assert stream.getvalue() == "1/1 runs: 1 completed, 0 failed, 0 timed out; 0 requests\n"


async def test_a_terminal_gets_one_live_line() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    tally = Tally(2)
    async with shown(tally, stream):
        tally.end_run(final_status="COMPLETED", timed_out=False)
    assert "1/2" in stream.getvalue()
