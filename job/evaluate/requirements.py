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
    measured = measured or {}
    found = []
    for metric, demand in required.items():
        for field, bound in demand.model_dump(exclude={"judged_by"}, exclude_none=True).items():
            least, of_change = field.startswith("min"), field.endswith("change")
            entry = (measured.get("change" if of_change else "after") or {}).get(metric)
            if entry is None or entry["value"] is None:
                found.append(f"{metric} was not measured, and evaluation.require.{metric}.{field} is {bound:g}")
                continue
            whole = demand.judged_by == "interval"
            judged = entry["low" if least else "high"] if whole else entry["value"]
            if judged is None or (judged < bound if least else judged > bound):
                says = f"changed by {entry['value']:+.4f}" if of_change else f"is {entry['value']:.4f}"
                found.append(
                    f"{metric} {says} ({_interval(entry, measured)}, n = {entry['n']}), {'under' if least else 'over'} "
                    f"evaluation.require.{metric}.{field} {bound:g}{', which the whole interval must meet' if whole else ''}"
                )
    return found


def _interval(entry: Mapping[str, Any], measured: Mapping[str, Any]) -> str:
    if entry["low"] is None:
        return "no interval: too few rows"
    return f"{wording.confidence(measured)} interval {entry['low']:.4f} to {entry['high']:.4f}".replace("\u00a0", " ")
