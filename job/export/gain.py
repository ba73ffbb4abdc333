"""Measures how much of an adapter's gain is left when merged weights have fewer bits.

Fewer bits cost any model some loss. What counts is whether the adapter survives them: the share of its gain that is left,
(base − format) / (base − tuned), for the loss of the true answers on the gate's rows, and for each label on all held-out rows,
where evaluation has answers of base and tuned model already. Any share can come out of a gain near zero, so one is only
formed of a gain that is clear: in loss by its standard error, in a label as `job.evaluate.verdict` judges.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from job.config.schema import GateSpec, JobSpec, LabelSpec
from job.data import Data
from job.evaluate.generate import answer, micro_batches
from job.evaluate.label_metrics import stated_and_right
from job.evaluate.metric_info import direction
from job.evaluate.records import Comparison
from job.evaluate.stage import Results, label_specs
from job.evaluate.text_metrics import label_sums
from job.export.gate import Verdict
from job.model.loaded import Loaded

CLEAR = 2.0
"""Standard errors by which the gain in loss must differ from zero."""


@dataclass(frozen=True)
class Smaller:
    """What was measured of merged weights in fewer bits: their `loss` on the gate's rows (nats per token), and the share of the
    adapter's gain that they keep, by metric. `refused` says why they are not published, `note` why no share could be formed.
    Nothing else is known of files that are refused before they are measured."""

    loss: float | None = None
    gain_kept: dict[str, float] = field(default_factory=dict)
    refused: str | None = None
    note: str | None = None


def judge(name: str, loss: float, labels: Mapping[str, float], gate: Verdict, spec: GateSpec) -> Smaller:
    """Judge the format `name` by its `loss`, and by the shares of the gains in `labels` that it keeps."""
    if not math.isfinite(loss):
        return Smaller(loss, refused=f"{name}/ is not published: its loss on the gate's rows is {loss}")
    gain, error = gate.loss_base - gate.loss_adapter, gate.gain_error
    clear = error is not None and gain > CLEAR * error
    kept = ({"loss": (gate.loss_base - loss) / gain} if clear else {}) | dict(labels)
    low = [f"{share:.1%} in {metric}" for metric, share in kept.items() if share < spec.min_gain_kept]
    refused = note = None
    if low:
        refused = (
            f"{name}/ is not published: of the adapter's gain it keeps {', '.join(low)}, and export.gate.min_gain_kept is "
            f"{spec.min_gain_kept:g}; serve merged/ or a format with more bits, or lower the bound"
        )
    elif not kept:
        note = (
            f"No share of the adapter's gain can be formed for {name}/, which is published as it is: from base to tuned model "
            f"the loss on the gate's {gate.rows} rows fell by {gain:.3f} nats per token (standard error "
            f"{'unknown' if error is None else f'{error:.3f}'}), and no label is clearly better"
        )
    return Smaller(loss, kept, refused, note)


def label_shares(small: Loaded, data: Data, spec: JobSpec, results: Results) -> dict[str, float]:
    """Return the share that `small` keeps of each label's gain in accuracy, if that gain is clear. It answers all held-out rows
    if there is such a label."""
    measured, labels = results.metrics, dict[str, LabelSpec]()
    for name, label in label_specs(spec.evaluation, data).items():
        change = measured.change.get(f"{name}_accuracy")
        if change and direction(f"{name}_accuracy", change, spec.evaluation.confidence) == "better":
            labels[name] = label
    if not labels:
        return {}
    rows = [replace(row, generated=text) for row, text in zip(results.after, _texts(small, data, spec), strict=True)]
    found = {}
    for name, label in labels.items():
        score = label_sums(name, *stated_and_right(rows, name, label))[f"{name}_accuracy"]
        found[f"{name}_accuracy"] = _share(measured, f"{name}_accuracy", float(score.finish(score.rows.sum(axis=0))))
    return found


def _share(measured: Comparison, metric: str, value: float) -> float:
    before, after = measured.before[metric].value, measured.after[metric].value
    assert before is not None
    assert after is not None
    return (value - before) / (after - before)


@torch.inference_mode()
def _texts(small: Loaded, data: Data, spec: JobSpec) -> list[str]:
    """Return greedy answers to all held-out rows."""
    rows, size, texts = data.evaluation, spec.evaluation.batch, list[Any]()
    micro = micro_batches(small, size, "answers in fewer bits")
    for start in range(0, len(rows), size):
        batch = [rows[place] for place in range(start, min(start + size, len(rows)))]
        texts += micro.map(batch, lambda part: answer(small, list(part), spec.evaluation.max_new_tokens))
    return [text for text, _ in texts]
