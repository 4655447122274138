"""What one JMeter sample says, whichever form of results file (JTL) it stands in (JMeter 5).

`timeStamp` is the start of a sample in milliseconds (`sampleresult.timestamp.start=true`, as JMeter ships it),
`elapsed` runs to its end and includes connecting. A sample that an assertion rejected is an error whatever its code.
What sums up other samples (a transaction controller) is left out, with a note. Next: `jmeter_csv`, `jmeter_xml`.
"""

from __future__ import annotations

import dataclasses
import re

from harness.importers.fields import StampUnit, duration_ns, instant_ns, shown, whole
from harness.importers.importer import source_of
from harness.importers.rows import outcome_of, request_row, target_of
from harness.importers.source import Unusable
from harness.sample import Outcome, Sample
from harness.sampleset import Source

BYTES_MAX = 2**62
_TRANSACTION = re.compile(r"Number of samples in transaction\s*:")
_THREAD = re.compile(r"\s*\d+-\d+$")  # "Thread Group 1-7": thread 7 of group 1
_STATUS = re.compile(r"[1-9]\d\d")


@dataclasses.dataclass(frozen=True, slots=True)
class JmeterSample:
    """The texts of one sample; empty where the file does not have them. Named as the CSV names its columns."""

    timeStamp: str  # noqa: N815
    elapsed: str
    success: str
    label: str = ""
    responseCode: str = ""  # noqa: N815
    responseMessage: str = ""  # noqa: N815
    failureMessage: str = ""  # noqa: N815
    threadName: str = ""  # noqa: N815
    bytes: str = ""
    URL: str = ""
    Latency: str = ""
    method: str = ""

    @property
    def sums_up(self) -> bool:
        """Whether it stands for samples that are recorded themselves."""
        return _TRANSACTION.match(self.responseMessage) is not None


def row_of(ordinal: int, one: JmeterSample) -> Sample:
    """Return the row of one sample. Raises Unusable."""
    sent_at_ns = instant_ns(one.timeStamp, "timeStamp", StampUnit.MS)
    service_ns = duration_ns(one.elapsed, "elapsed", StampUnit.MS)
    if one.success.lower() not in {"true", "false"}:
        raise Unusable(f"{shown(one.success)} is neither true nor false", "success")
    status = int(one.responseCode) if _STATUS.fullmatch(one.responseCode) else None
    fault = " ".join(part for part in (one.responseCode, one.responseMessage) if part)
    accepted = one.success.lower() == "true"
    outcome = outcome_of(status, fault, accepted=accepted)
    if status is None and not accepted and not one.responseCode.startswith("Non HTTP"):
        outcome = Outcome.HTTP_ERROR  # a sampler of another protocol, or an assertion, said no
    waited_ns = duration_ns(one.Latency or "0", "Latency", StampUnit.MS)
    answered = status is not None and 0 < waited_ns <= service_ns
    error = None if outcome is Outcome.OK else one.failureMessage or fault
    return request_row(
        ordinal=ordinal, target=target_of(one.method or None, one.URL.replace("null", ""), one.label),
        scenario=_THREAD.sub("", one.threadName), service_ns=service_ns, outcome=outcome, status=status, error=error,
        sent_at_ns=sent_at_ns, first_byte_at_ns=sent_at_ns + waited_ns if answered else None,
        done_at_ns=sent_at_ns + service_ns,
        response_bytes=whole(one.bytes, "bytes", BYTES_MAX) if one.bytes and status is not None else None,
    )  # fmt: skip


def jmeter_source(left_out: int) -> Source:
    """Return what JMeter cannot know; `left_out` is how many rows summed up others."""
    notes = [
        "JMeter is a closed loop unless a timer makes it otherwise: what was not sent while threads waited is missing.",
        "timeStamp is taken for the start of a sample, as JMeter ships it; elapsed includes connecting.",
        "Stamps and durations have whole milliseconds.",
        "Where the file has no method, a request to /api/runs/ is taken for a create.",
    ]
    if left_out:
        notes.append(f"Samples of controllers, which sum up others or contain them, left out: {left_out:,}.")
    return source_of("jmeter", (), notes)
