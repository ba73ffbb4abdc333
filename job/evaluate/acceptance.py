"""Checks the measured change against the spec's requirements before a better model is published."""

from __future__ import annotations

from collections.abc import Mapping

from job.config.schema import RequirementSpec
from job.evaluate import metric_info
from job.evaluate.records import Comparison, Estimate


def unmet(required: Mapping[str, RequirementSpec], measured: Comparison) -> list[str]:
    """Return one sentence per violated bound: the metric, its value, its interval, the bound and its field."""
    found = []
    for metric, demand in required.items():
        for field, bound in demand.model_dump(exclude={"judged_by"}, exclude_none=True).items():
            least, of_change = field.startswith("min"), field.endswith("change")
            estimate = (measured.change if of_change else measured.after).get(metric, Estimate())
            if estimate.value is None:
                found.append(f"{metric} was not measured, and evaluation.require.{metric}.{field} is {bound:g}")
                continue
            whole = demand.judged_by == "interval"
            judged = (estimate.low if least else estimate.high) if whole else estimate.value
            if judged is None or (judged < bound if least else judged > bound):
                says = f"changed by {estimate.value:+.4f}" if of_change else f"is {estimate.value:.4f}"
                found.append(
                    f"{metric} {says} ({_interval(estimate, measured)}, n = {estimate.n}), {'under' if least else 'over'} "
                    f"evaluation.require.{metric}.{field} {bound:g}{', which the whole interval must meet' if whole else ''}"
                )
    return found


def _interval(estimate: Estimate, measured: Comparison) -> str:
    if estimate.low is None:
        return "no interval: too few rows"
    return f"{metric_info.confidence(measured)} interval {estimate.low:.4f} to {estimate.high:.4f}".replace(
        "\u00a0", " "
    )
