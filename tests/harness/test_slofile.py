from __future__ import annotations

from pathlib import Path

import pytest

from harness.analysis.slo import Measure, Op, Slo, Statistic
from harness.errors import ExitCode
from harness.sample import Endpoint, Mode
from harness.slofile import SloFileError, read_slos

SHIPPED = Path(__file__).parents[2] / "data" / "slo.yaml"

STEADY = (Mode.SMOKE, Mode.SOAK, Mode.OPEN, Mode.IMPORT)

GOOD = """\
apiVersion: openslo/v1
kind: SLO
metadata: {name: create-mean, displayName: Run creation}
spec:
  service: plimsoll
  indicator:
    metadata: {name: create-latency}
    spec:
      thresholdMetric:
        metricSource:
          type: plimsoll-samples
          spec: {modes: [smoke], measure: latency, endpoint: create, statistic: mean, margin: 0}
  objectives: [{op: lt, value: 300}]
"""


def test_the_shipped_promises_are_the_users() -> None:
    latency, responses = Measure.LATENCY, Measure.RESPONSES
    assert read_slos(SHIPPED) == (
        Slo("create-mean", "Run creation", STEADY, latency, Endpoint.CREATE, Statistic.MEAN, Op.LT, 300.0, 0.0),
        Slo("spawn-mean", "Subrun spawn", STEADY, latency, Endpoint.SPAWN, Statistic.MEAN, Op.LT, 200.0, 0.0),
        Slo("snapshot-p95", "Snapshot poll", STEADY, latency, Endpoint.SNAPSHOT, Statistic.P95, Op.LT, 375.0, 0.0),
        Slo("tick-throughput", "Tick throughput", (Mode.SMOKE, Mode.BURST), Measure.TICKS, None,
            Statistic.PER_BUSY_SECOND, Op.GTE, 5.0, 0.0),
        Slo("no-failed-responses", "Failed API responses", STEADY, responses, None,
            Statistic.FAILED_COUNT, Op.LTE, 0.0, 0.0),
        Slo("burst-errors", "Burst plan: errors", (Mode.BURST,), responses, None, Statistic.ERROR_SHARE, Op.LT, 0.01,
            0.0),
        Slo("burst-completion", "Burst plan: run completion", (Mode.BURST,), Measure.COMPLETION, None, Statistic.MAX,
            Op.LT, 30.0, 0.0),
        Slo("soak-drift", "Soak plan: drift of creation", (Mode.SOAK,), Measure.DRIFT, Endpoint.CREATE,
            Statistic.P50_CHANGE, Op.LT, 0.05, 0.0),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "right", "said"),
    [
        ("valeu: 300", "value: 300", "unknown field valeu (spec.objectives[0])"),
        ("value: fast", "value: 300", "Expected float, got str (spec.objectives[0].value)"),
        ("value: -1", "value: 300", "spec.objectives[0].value"),
        ("op: below", "op: lt", "spec.objectives[0].op"),
        ("op: gte", "op: lt", "latency is compared by lt or lte (spec.objectives[0].op)"),
        (
            "modes: [smoek]",
            "modes: [smoke]",
            "Invalid enum value 'smoek' (spec.indicator.spec.thresholdMetric.metricSource.spec.modes[0])",
        ),
        ("modes: []", "modes: [smoke]", "modes"),
        ("statistic: p42", "statistic: mean", "statistic"),
        ("statistic: max", "statistic: mean", "latency has no statistic 'max', only mean, p50"),
        ("measure: latency, statistic", "measure: latency, endpoint: create, statistic", "latency needs an endpoint"),
        ("endpoint: crate", "endpoint: create", "metricSource.spec.endpoint"),
        ("margin: 2", "margin: 0", "metricSource.spec.margin"),
        ("statistic: mean}", "statistic: mean, margin: 0}", "missing required field margin"),
        ("type: prometheus", "type: plimsoll-samples", "metricSource.type"),
        ("kind: Service", "kind: SLO", "kind"),
        ("name: Create Mean", "name: create-mean", "metadata.name"),
        ("objectives: []", "objectives: [{op: lt, value: 300}]", "spec.objectives"),
    ],
)
def test_a_typo_is_refused_with_file_document_and_field(tmp_path: Path, wrong: str, right: str, said: str) -> None:
    file = tmp_path / "slo.yaml"
    file.write_text(GOOD + "---\n" + GOOD.replace("create-mean", "second").replace(right, wrong), encoding="utf-8")
    if right == "name: create-mean":
        file.write_text(GOOD.replace("create-mean", "first") + "---\n" + GOOD.replace(right, wrong), encoding="utf-8")
    with pytest.raises(SloFileError) as refusal:
        read_slos(file)
    assert str(refusal.value).startswith(f"{file}, document 2: ")
    assert said in str(refusal.value)
    assert refusal.value.exit_code is ExitCode.USAGE
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "holds no SLO"),
        ("a: [", "is not YAML"),
        ("just words", "document 1: Expected object, got str"),
        (GOOD + "---\n" + GOOD, "document 2: the name 'create-mean' is taken"),
    ],
)
def test_a_file_that_holds_no_promises_is_refused(tmp_path: Path, content: str, said: str) -> None:
    file = tmp_path / "slo.yaml"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(SloFileError, match=said):
        read_slos(file)


def test_a_file_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SloFileError, match="does not exist"):
        read_slos(tmp_path / "absent.yaml")
