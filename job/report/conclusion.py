"""Words the one conclusion of a report from the stored verdict (`job.evaluate.verdict`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from job.evaluate import metric_info
from job.evaluate.metric_info import number, plain
from job.evaluate.records import Comparison
from job.evaluate.verdict import CONSTANT, IMAGES

TAGS = {"no clear change": "no clear change", "unproven": "unproven", "too few rows": "too few samples"}


def tag(measured: Comparison, metric: str) -> str:
    """Returns the verdict in a word or two; empty for a metric that has none."""
    verdict = measured.verdict
    return TAGS.get(verdict.said, verdict.said) if verdict.said and metric == verdict.metric else ""


def conclusion(measured: Comparison) -> list[str]:
    """Returns the verdict as sentences; empty if nothing was judged."""
    verdict = measured.verdict
    if verdict.said is None:
        return []
    title = metric_info.about(verdict.metric).title
    of = "samples" if verdict.units == verdict.rows else "patients or other units"
    said = {
        "better": f"Better: {title} {moved(measured)}.",
        "worse": f"Worse: {title} {moved(measured)}.",
        "changed": f"Changed: {title} {moved(measured)}.",
        "no clear change": f"No clear change: {title} {moved(measured)}.",
        "unchanged": f"Unchanged: {title} is the same before and after in all {plain(verdict.rows)} samples.",
        "too few rows": f"Too few to judge by: only {plain(verdict.units)} held-out {of}.",
        "unproven": f"Not shown to be better: {title} {moved(measured)}, but {doubts(measured)}."
        if verdict.doubts and verdict.change.value is not None
        else f"Not judged: {f'only {plain(verdict.units)}' if verdict.units else 'no'} held-out {of} are new to the model.",
    }[verdict.said]
    return [said, *filter(None, [_power(measured), _leak(measured), _variety(measured)])]


def image_use(measured: Comparison) -> str:
    """Returns how much of what was learned needs the images; empty if that was not measured."""
    used = measured.image_use
    if used is None or used.after.value is None:
        return ""
    rise = number(used.after.value, "number", signed=True)
    said = (
        f"With the images of other samples, the tuned model's loss changes by {rise} "
        f"({metric_info.confidence(measured)} interval {metric_info.span(used.after, 'number', signed=True)})"
    )
    if used.gain_without is None:
        return f"{said}."
    return (
        f"{said}, and {number(min(1.0, max(0.0, used.gain_without)), 'share')} of the gain in loss from tuning remains."
    )


def smaller(gate: Mapping[str, Any], folder: str | None = None) -> list[str]:
    """Returns a sentence on what each format in fewer bits, or only `folder`, keeps of the adapter's gain."""
    found = []
    for name, measured in (gate.get("smaller") or {}).items():
        kept = [f"{share:.0%} ({metric_info.about(metric).title})" for metric, share in measured["gain_kept"].items()]
        said = measured["refused"] or measured["note"] or f"{name}/ keeps {' and '.join(kept)} of the adapter's gain"
        found += [f"{said}."] if folder in (None, name) else []
    return found


def moved(measured: Comparison) -> str:
    """Returns how far the metric of the verdict moved, with interval and p-value."""
    verdict, change = measured.verdict, measured.verdict.change
    kind, level = metric_info.about(verdict.metric).kind, metric_info.confidence(measured)
    return (
        f"changed by {number(change.value, kind, signed=True)} on {plain(verdict.rows)} samples ({level} interval "
        f"{metric_info.span(change, kind, signed=True)}; {metric_info.p_text(change.p) or 'no p-value'})"
    )


def doubts(measured: Comparison) -> str:
    """Returns why a higher score is not called better; empty if nothing speaks against it."""
    verdict = measured.verdict
    known = {
        CONSTANT: "that is not clearly more than one answer to every sample would score "
        f"({number(verdict.constant, metric_info.about(verdict.metric).kind)})",
        IMAGES: "the true answers are predicted as well with the images of other samples",
    }
    return ", and ".join(known[doubt] for doubt in verdict.doubts)


def _power(measured: Comparison) -> str:
    """Returns what change could have been seen, where none was."""
    verdict = measured.verdict
    size = metric_info.noticeable(verdict.change, measured.settings.confidence)
    if verdict.said != "no clear change" or size is None:
        return ""
    change = number(size, metric_info.about(verdict.metric).kind, signed=True).lstrip("+")
    return f"A true change of {change} would be noticed on so many samples about four times in five, a smaller one less often."


def _leak(measured: Comparison) -> str:
    if not measured.verdict.leaked:
        return ""
    return (
        f"{plain(measured.verdict.leaked)} held-out samples are left out of this: the training data hold the same patient or "
        "image, or nearly the same image. All other numbers include them."
    )


def _variety(measured: Comparison) -> str:
    different, rows = measured.verdict.different, measured.settings.rows
    if different > max(1, rows // 10):
        return ""
    answers = "one answer" if different == 1 else f"only {plain(different)} different answers"
    return f"The tuned model gives {answers} to {plain(rows)} samples."
