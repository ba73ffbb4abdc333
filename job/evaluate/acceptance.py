"""Checks the measured results against `evaluation.require` before the tuned model is published."""

from __future__ import annotations

from collections.abc import Mapping

from job.config.schema import RequirementSpec
from job.evaluate import metric_info
from job.evaluate.records import Comparison, Estimate, Requirement


def judged(required: Mapping[str, RequirementSpec], measured: Comparison) -> list[Requirement]:
    """Judge every bound. Each is said as the metric, its value, its interval, the bound and its field."""
    found = []
    for metric, requirement in required.items():
        for field, bound in requirement.model_dump(exclude={"judged_by"}, exclude_none=True).items():
            is_minimum, of_change = field.startswith("min"), field.endswith("change")
            estimate = (measured.change if of_change else measured.after).get(metric, Estimate())
            if estimate.value is None:
                said = f"{metric} was not measured, but evaluation.require.{metric}.{field} is {bound:g}"
                found.append(Requirement(metric, False, said))
                continue
            by_interval = requirement.judged_by == "interval"
            judged = (estimate.low if is_minimum else estimate.high) if by_interval else estimate.value
            met = judged is not None and (judged >= bound if is_minimum else judged <= bound)
            side = ("at least " if is_minimum else "at most ") if met else ("below " if is_minimum else "above ")
            result = f"changed by {estimate.value:+.4f}" if of_change else f"is {estimate.value:.4f}"
            said = (
                f"{metric} {result} ({_interval(estimate, measured)}, n = {estimate.n}), {side}"
                f"evaluation.require.{metric}.{field} = {bound:g}"
                f"{', which the whole interval must meet' if by_interval else ''}"
            )
            found.append(Requirement(metric, met, said))
    return found


def _interval(estimate: Estimate, measured: Comparison) -> str:
    if estimate.low is None:
        return "no interval: too few rows"
    return f"{metric_info.confidence(measured)} interval {estimate.low:.4f} to {estimate.high:.4f}".replace(
        "\u00a0", " "
    )
