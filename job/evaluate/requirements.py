"""What the spec demands of the measured change before anything is published under the name of a better model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from job.evaluate import wording
from job.spec import RequirementSpec


def unmet(required: Mapping[str, RequirementSpec], measured: Mapping[str, Any] | None) -> list[str]:
    """One sentence for each bound that is crossed: the metric, its value, its interval, the bound and its field.

    `measured` is the content of metrics.json, None when nothing was measured: then no demand is met.
    """
    return [sentence for metric, demand in required.items() for sentence in _unmet(metric, demand, measured or {})]


def _unmet(metric: str, demand: RequirementSpec, measured: Mapping[str, Any]) -> list[str]:
    found = []
    for part, says, field, bound, least in (
        ("change", "changed by", "min_change", demand.min_change, True),
        ("change", "changed by", "max_change", demand.max_change, False),
        ("after", "is", "min_value", demand.min_value, True),
        ("after", "is", "max_value", demand.max_value, False),
    ):
        if bound is None:
            continue
        entry = (measured.get(part) or {}).get(metric)
        if entry is None or entry["value"] is None:
            found.append(f"{metric} was not measured, and evaluation.require.{metric}.{field} is {bound:g}")
            continue
        judged = entry["value"]
        if demand.judged_by == "interval":
            judged = entry["low" if least else "high"]
        if judged is None or (judged < bound if least else judged > bound):
            found.append(
                f"{metric} {says} {_said(entry, signed=part == 'change')} ({_interval(entry, measured)}, "
                f"n = {entry['n']}), {'under' if least else 'over'} evaluation.require.{metric}.{field} {bound:g}"
                + (", which the whole interval must meet" if demand.judged_by == "interval" else "")
            )
    return found


def _said(entry: Mapping[str, Any], *, signed: bool) -> str:
    return f"{entry['value']:+.4f}" if signed else f"{entry['value']:.4f}"


def _interval(entry: Mapping[str, Any], measured: Mapping[str, Any]) -> str:
    if entry["low"] is None or entry["high"] is None:
        return "no interval: too few rows"
    return f"{wording.confidence(measured)} interval {entry['low']:.4f} to {entry['high']:.4f}".replace("\u00a0", " ")
