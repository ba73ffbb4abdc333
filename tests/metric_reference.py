"""Writes docs/metrics.md from `job.evaluate.metric_info`: `python -m tests.metric_reference`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from job.evaluate.metric_info import ABOUT, EXTRA, OF_CHEXBERT, OF_LABELS, About, about

PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"
HEAD = """# Metrics

The names in `evaluation/metrics.json`. `evaluation.require` accepts all that a run measures, `evaluation.primary_metric` all but
those of a single VALUE. [Statistics](statistics.md) says how intervals are made and how the verdict is reached. To change this
page, change `job/evaluate/metric_info.py` and run `python -m tests.metric_reference`.
"""
UNITS = {"share": "0 to 1, shown in %", "fraction": "0 to 1", "points": "0 to 100", "number": "number"}
BETTER = {1: "more", -1: "less", 0: "neither"}
OF_A_VALUE = ("_sensitivity", "_specificity", "_ppv", "_npv")
PARTS = {
    "Of the wording": "Those down to `token_f1` compare the words of an answer with those of the reference text. "
    "They do not see whether a statement is true.",
    "Of labels": "Whether answers state the facts that `evaluation.labels` names ([labels](evaluation.md#labels)). "
    "LABEL is the name of a label in the spec, and VALUE one of its values: `finding_accuracy`, `pneumothorax_sensitivity`.",
    "That need a model": "`evaluation.extra_metrics` and `job score` compute them "
    "([how to install them](evaluation.md#metrics-that-need-a-model)).",
}


def reference() -> str:
    """Return the whole page."""
    labels = {f"LABEL{suffix}": about(f"x{suffix}") for suffix in ("_accuracy", *OF_LABELS) if suffix not in OF_A_VALUE}
    labels |= {f"VALUE{suffix}": about(f"x{suffix}") for suffix in OF_A_VALUE}
    tables = [ABOUT, labels, EXTRA | OF_CHEXBERT]
    return HEAD + "".join(_parts(zip(PARTS.items(), tables, strict=True)))


def _parts(parts: Iterable[tuple[tuple[str, str], Mapping[str, About]]]) -> Iterator[str]:
    for (title, text), metrics in parts:
        yield f"\n## {title}\n\n{text}\n\n| metric | values | better is | meaning |\n|---|---|---|---|\n"
        for name, known in metrics.items():
            yield f"| `{name}` | {UNITS[known.kind]} | {BETTER[known.better]} | {known.meaning} |\n"


if __name__ == "__main__":
    PAGE.write_text(reference())
