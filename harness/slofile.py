"""Reads SLOs from a YAML file in OpenSLO's terms: one document per SLO.

Ours beyond OpenSLO is only what its `metricSource.spec` leaves to the source: modes, measure, endpoint, statistic and
margin. Every key is checked; a typo is refused with the file, the document and the field. The words are explained in
`analysis/slo`, the units in the file itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec
import yaml

from harness.analysis.slo import OPS, STATISTICS, Measure, Op, Slo, Statistic
from harness.errors import BadUsage
from harness.sample import Endpoint, Mode

SLO_FILE = Path("data/slo.yaml")
"""The checkout's own SLOs."""


class SloFileError(BadUsage):
    """A file of SLOs cannot be used. `document` counts from 1; 0 when the file as a whole is at fault."""

    def __init__(self, path: Path, document: int, fault: str) -> None:
        where = f"{path}, document {document}" if document else f"{path}"
        super().__init__(f"{where}: {fault}")
        self.path = path
        self.document = document


class _Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    modes: Annotated[tuple[Mode, ...], msgspec.Meta(min_length=1)]
    measure: Measure
    statistic: Statistic
    margin: Annotated[float, msgspec.Meta(ge=0, lt=1)]
    endpoint: Endpoint | None = None


class _MetricSource(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: Literal["plimsoll-samples"]
    spec: _Source


class _ThresholdMetric(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    metric_source: _MetricSource


class _IndicatorSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    threshold_metric: _ThresholdMetric


class _Metadata(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    name: Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")]
    display_name: str | None = None


class _Indicator(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    metadata: _Metadata
    spec: _IndicatorSpec


class _Objective(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    op: Op
    value: Annotated[float, msgspec.Meta(ge=0, le=1e12)]  # a verdict cannot hold infinity


class _Spec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    service: str
    indicator: _Indicator
    objectives: Annotated[tuple[_Objective, ...], msgspec.Meta(min_length=1, max_length=1)]
    description: str = ""


class _Document(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    api_version: Literal["openslo/v1"]
    kind: Literal["SLO"]
    metadata: _Metadata
    spec: _Spec


def read_slos(path: Path) -> tuple[Slo, ...]:
    """Return the SLOs of a file, in its order. Raises SloFileError naming the document and the field."""
    try:
        documents = [one for one in yaml.safe_load_all(path.read_text(encoding="utf-8")) if one is not None]
    except FileNotFoundError:
        raise SloFileError(path, 0, "this file of SLOs does not exist") from None
    except (OSError, UnicodeDecodeError) as fault:
        raise SloFileError(path, 0, f"cannot be read: {fault}") from None
    except yaml.YAMLError as fault:
        raise SloFileError(path, 0, f"is not YAML: {' '.join(str(fault).split())}") from None
    slos = tuple(_slo(path, index, document) for index, document in enumerate(documents, 1))
    if not slos:
        raise SloFileError(path, 0, "holds no SLO")
    names = [slo.name for slo in slos]
    for index, name in enumerate(names, 1):
        if name in names[: index - 1]:
            raise SloFileError(path, index, f"the name {name!r} is taken by an earlier document (metadata.name)")
    return slos


def _slo(path: Path, index: int, document: object) -> Slo:
    """Return one document's SLO. Raises SloFileError."""
    try:
        read = msgspec.convert(document, _Document)
    except msgspec.ValidationError as fault:
        raise SloFileError(path, index, _plainly(str(fault))) from None
    source = read.spec.indicator.spec.threshold_metric.metric_source.spec
    objective = read.spec.objectives[0]
    here = "spec.indicator.spec.thresholdMetric.metricSource.spec"
    if source.statistic not in STATISTICS[source.measure]:
        known = ", ".join(STATISTICS[source.measure])
        refusal = f"{source.measure} has no statistic '{source.statistic}', only {known} ({here}.statistic)"
        raise SloFileError(path, index, refusal)
    if (source.endpoint is None) == (source.measure in {Measure.LATENCY, Measure.DRIFT}):
        need = "needs an endpoint" if source.endpoint is None else "takes no endpoint"
        raise SloFileError(path, index, f"{source.measure} {need} ({here}.endpoint)")
    if objective.op not in OPS[source.measure]:
        known = " or ".join(OPS[source.measure])
        raise SloFileError(path, index, f"{source.measure} is compared by {known} (spec.objectives[0].op)")
    if source.measure is Measure.DRIFT and not 0.0 < objective.value * (1.0 + source.margin) < 1.0:
        raise SloFileError(path, index, "drift is a share: give a value between 0 and 1 (spec.objectives[0].value)")
    return Slo(
        name=read.metadata.name,
        title=read.metadata.display_name or read.metadata.name,
        modes=source.modes,
        measure=source.measure,
        endpoint=source.endpoint,
        statistic=source.statistic,
        op=objective.op,
        target=objective.value,
        margin=source.margin,
    )


def _plainly(fault: str) -> str:
    """Turn msgspec's "… - at `$.spec.x`" into "… (spec.x)"."""
    return fault.replace(" - at `$.", " (").replace(" - at `$`", "").replace("`", "") + (
        ")" if " - at `$." in fault else ""
    )
