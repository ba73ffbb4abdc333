"""Checks the measured results against `evaluation.require` before the tuned model is published."""

from __future__ import annotations

from collections.abc import Mapping

from job.config.schema import RequirementSpec
from job.evaluate import metric_info
from job.evaluate.records import Comparison, Estimate


def unmet(required: Mapping[str, RequirementSpec], measured: Comparison) -> list[str]:
    """Return one sentence per violated bound: the metric, its value, its interval, the bound and its field."""
    found = []
    for metric, requirement in required.items():
        for field, bound in requirement.model_dump(exclude={"judged_by"}, exclude_none=True).items():
            is_minimum, of_change = field.startswith("min"), field.endswith("change")
            estimate = (measured.change if of_change else measured.after).get(metric, Estimate())
            if estimate.value is None:
                found.append(f"{metric} was not measured, but evaluation.require.{metric}.{field} is {bound:g}")
                continue
            by_interval = requirement.judged_by == "interval"
            judged = (estimate.low if is_minimum else estimate.high) if by_interval else estimate.value
            if judged is None or (judged < bound if is_minimum else judged > bound):
                side = "below" if is_minimum else "above"
                result = f"changed by {estimate.value:+.4f}" if of_change else f"is {estimate.value:.4f}"
                found.append(
                    f"{metric} {result} ({_interval(estimate, measured)}, n = {estimate.n}), {side} "
                    f"evaluation.require.{metric}.{field} = {bound:g}"
                    f"{', which the whole interval must meet' if by_interval else ''}"
                )
    return found


def _interval(estimate: Estimate, measured: Comparison) -> str:
    if estimate.low is None:
        return "no interval: too few rows"
    return f"{metric_info.confidence(measured)} interval {estimate.low:.4f} to {estimate.high:.4f}".replace(
        "\u00a0", " "
    )
