"""Verifies that merged weights, read back from where they will be served, equal base + adapter. One model at a time is in
memory.

Two questions are asked, because each alone can be fooled.

**Are the weights right?** Every file is compared whole with base + adapter, folded here from the adapter in memory
(`job.export.verify`), and a sample of every weight of the merged model as transformers loads it. Both sides round the same
float32 sum once, so they agree to the bit and no noise can hide a fault: a LoRA that was left out, put in the wrong layer,
scaled wrongly or read from a damaged file, or a zeroed row, is named, however little it moves the logits.

**Do the outputs agree?** Base + adapter, not folded, is compared with the merged model on held-out rows. This shows what the
weights do not: a different configuration, processor or forward pass. But it cannot be exact. Folding rounds each adapted
weight to the files' dtype, and how much that moves the logits depends only on the model: well-trained ones move by less than a
hundredth of their spread; forty layers of random weights amplify each other's rounding and were seen to move by 0.08, with
every fourth first token changed. So the model itself is measured: some of its adapted weights, chosen at random, are moved to
their neighbours in the files' dtype, with adapters left unfolded. The fold determines how many: the mean square of what
rounding moved in a sample of the weight, over the square of a unit in the last place. That is 1/12 for rounding to nearest,
whose error is uniform over ±½ unit, and f(1 − f) for stochastic rounding (`job.export.fold`) of a number that lies the
fraction f of a unit above the one below. The effect of this jitter on logits and first tokens is the floor, and the merged
model may differ by `rounding_allowance` times as much, twice by default, or by the spec's bounds where they are wider.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from job.config.schema import GateSpec, JobSpec
from job.data import Row
from job.errors import GateRefused
from job.export.logits import (
    Answers,
    agreement,
    answers,
    logit_difference,
    loss,
    loss_error,
    share_along,
    spread,
    spread_rows,
)
from job.export.read_back import Check
from job.export.unmerged import Expected, adapters_of, beside, expected, jittered, samples, trained, trained_weights
from job.export.verify import from_memory, wrong_tensors
from job.model.loaded import Loaded, is_sharded, release
from job.model.lora_targets import group_of
from job.model.memory_model import gate_batch, last_cure, served_precision
from job.model.oom_retry import MicroBatches
from job.model.transformers_backend import Offload, load_weights
from job.model.weight_map import Base

MOST_WRONG = 0.01
"""Share of the sampled numbers that may differ: float32 sums on another kind of device occasionally round differently."""
DRAWS = 2
"""Number of rounding draws, of which the worst counts: in a model that amplifies rounding, one can be half of another."""
EATEN = 0.5
"""Share of the adapter's effect by which merged weights may differ from base + adapter before a warning."""
VISIBLE = 0.01
"""Adapters that move logits by less (a trial of a few steps) are indistinguishable from rounding."""


@dataclass(frozen=True)
class Verdict:
    """Logit differences are means of |a − b|, as a share of the standard deviation of base + adapter's logits.

    `token_agreement` is the share of tokens at which the merged model's first choice is base + adapter's, or within
    `max_mean_logit_difference` of it; `rounding_…` is the effect of rounding alone on both. Losses are nats per token of the
    true answers. `difference_from_trained` compares with the model as it was trained and measured: equal to
    `mean_logit_difference`, unless the base was held in 4 bits or Unsloth's kernels computed it. `weights` gives by group the
    number of `adapted` tensors and their relative change; `wrong` names those that are not base + adapter. `effect_kept` is the
    share of the adapter's effect on the logits that the merged model has too: 1 if all of it, 0 if it is the base (None if the
    adapter has no effect). `warning` says that rounding ate it. `gain_error` is the standard error of the gain
    `loss_base` − `loss_adapter`, None for one row.
    """

    rows: int
    tokens: int
    mean_logit_difference: float
    max_logit_difference: float
    token_agreement: float
    rounding_logit_difference: float
    rounding_token_agreement: float
    mean_difference_from_base: float
    mean_effect_of_adapter: float
    difference_from_trained: float
    loss_base: float
    loss_adapter: float
    loss_merged: float
    weights: dict[str, dict[str, float]]
    compared: int
    wrong: list[str]
    effect_kept: float | None = None
    warning: str | None = None
    gain_error: float | None = None


@dataclass(frozen=True)
class Reference:
    """Everything measured on base + adapter, on the CPU: the outputs with the adapter (`tuned`) and without (`untuned`);
    `scale`, the standard deviation of the tuned logits; how far rounding alone moves logits, on average, and the token
    agreement that it leaves; the expected weights of the merged model; and the outputs of the model as it was `trained`, if
    that was in 4 bits or by Unsloth's kernels, else None."""

    batches: list[list[Row]]
    tuned: list[Answers]
    untuned: list[Answers]
    scale: float
    moved: float
    agreed: float
    trained: list[Answers] | None
    weights: dict[str, Expected]
    groups: dict[str, dict[str, float]]


def compare(
    spec: JobSpec,
    loaded: Loaded,
    base: Base,
    read_merged: Callable[[str, Check], Any],
    rows: Any,
    *,
    processor: Any = None,
    let_go: Callable[[], None] = lambda: None,
    offload: Offload | None = None,
    keep: Callable[[Reference], None] = lambda reference: None,
) -> Verdict:
    """Measure the merged model, which `read_merged(precision, check)` loads after `check` saw each of its files, with the
    `processor` published with it (default: that of `loaded`), against base + adapter on `rows`.

    Both are in the training precision; if that is 4bit, both are in 16 bits, in which merged weights are made and served. Both
    run on transformers: Unsloth's kernels round differently, which some models amplify beyond the effect of folding. Both run on
    this rank alone: of a sharded model, only the adapters are used. One model at a time is in memory: `let_go` is called once
    `loaded.model` is no longer needed, before another is loaded. `offload` keeps part of a 16-bit model outside the GPU, for a
    base that was held in 4 bits or sharded. `keep` is called with what was measured on
    base + adapter.
    """
    right, wrong = from_memory(base, loaded.model, loaded.device), list[str]()
    reference = refer(spec, loaded, base, rows, let_go, offload)
    keep(reference)
    precision = served_precision(loaded.precision)
    model = read_merged(precision, lambda file, path: wrong.extend(wrong_tensors(right, file, path)))
    served = processor or loaded.processor
    again = replace(loaded, model=model, processor=served, precision=precision, backend="transformers")
    micro = micro_batches(spec, loaded)
    merged = answers(again, reference.batches, spec, micro)
    wrong += wrong_weights(reference.weights, samples(again.model))
    release(again.model)
    return judge(spec, reference, merged, list(dict.fromkeys(wrong)))


def refer(
    spec: JobSpec, loaded: Loaded, base: Base, rows: Any, let_go: Callable[[], None], offload: Offload | None
) -> Reference:
    """Measure everything on base + adapter that the merged model is compared with, and release it."""
    micro = micro_batches(spec, loaded)
    batches = spread_rows(rows, spec.export.gate.rows, gate_batch(spec))
    as_trained, adapted = None, trained(loaded)
    sharded = is_sharded(loaded.model)  # no rank can run it alone
    differs = loaded.precision == "4bit" or loaded.backend == "unsloth"
    if differs:
        as_trained = answers(loaded, batches, spec, micro)
    if differs or sharded:
        adapters, others = adapters_of(loaded.model), trained_weights(loaded.model)
        let_go()
        whole = load_weights(spec.model, loaded.folder, loaded.device, served_precision(loaded.precision), offload)
        with torch.no_grad():
            for name, weight in others.items():
                whole.get_parameter(name).copy_(weight)
        adapted = beside(loaded, whole, adapters)
        del whole
    tuned = answers(adapted.loaded, batches, spec, micro)
    with adapted.silent():
        untuned = answers(adapted.loaded, batches, spec, micro)
    weights, groups, roundings = expected(adapted, base)
    scale, moved, agreed = spread(tuned), 0.0, 1.0
    for draw in range(DRAWS):
        with jittered(adapted, roundings, draw):
            jitter = answers(adapted.loaded, batches, spec, micro)
        moved, agreed = (
            max(moved, logit_difference(tuned, jitter)[0]),
            min(agreed, agreement(tuned, jitter, near(spec, scale))),
        )
        del jitter
    if differs or sharded:
        release(adapted.loaded.model)
    else:
        let_go()
    return Reference(batches, tuned, untuned, scale, moved, agreed, as_trained, weights, groups)


def judge(spec: JobSpec, reference: Reference, merged: list[Answers], wrong: list[str]) -> Verdict:
    """Compute the verdict from the outputs of both sides."""
    tuned, untuned, scale = reference.tuned, reference.untuned, reference.scale
    difference, largest = logit_difference(tuned, merged)
    before_merge = reference.trained
    verdict = Verdict(
        rows=sum(map(len, reference.batches)),
        tokens=sum(len(batch.targets) for batch in tuned),
        mean_logit_difference=difference / scale,
        max_logit_difference=largest / scale,
        token_agreement=agreement(tuned, merged, near(spec, scale)),
        rounding_logit_difference=reference.moved / scale,
        rounding_token_agreement=reference.agreed,
        mean_difference_from_base=logit_difference(untuned, merged)[0] / scale,
        mean_effect_of_adapter=logit_difference(untuned, tuned)[0] / scale,
        difference_from_trained=(logit_difference(before_merge, merged)[0] if before_merge else difference) / scale,
        loss_base=loss(untuned),
        loss_adapter=loss(before_merge or tuned),
        loss_merged=loss(merged),
        weights=reference.groups,
        compared=len(reference.weights),
        wrong=wrong,
        effect_kept=share_along(untuned, tuned, merged),
        gain_error=loss_error(untuned, before_merge or tuned),
    )
    return replace(verdict, warning=eaten(verdict))


def eaten(result: Verdict) -> str | None:
    """Return a sentence if rounding to the files' dtype ate the adapter's effect, or drowned it; else None."""
    effect, kept, difference = result.mean_effect_of_adapter, result.effect_kept, result.mean_logit_difference
    if kept is None or difference <= EATEN * effect:
        return None
    return (
        f"Rounding loses this adapter: it moves the logits by {effect:.2g} of their spread, and the merged weights, rounded to "
        f"the precision of the base model's files, are {difference:.2g} from that and keep {kept:.0%} of its effect. Serve "
        "adapter/ with the base model, or fold it into a float32 copy of the base model (model.name_or_path)."
    )


def near(spec: JobSpec, scale: float) -> float:
    """Return how far below the highest logit another may be and still count as first."""
    return spec.export.gate.max_mean_logit_difference * scale


def wrong_weights(right: dict[str, Expected], found: dict[str, Tensor]) -> list[str]:
    """Return the names of weights that the merged model lacks or that differ from the expected ones."""
    wrong = []
    for name, each in right.items():
        there = found.get(name)
        if there is None or not float(((there - each.sample).abs() <= each.tolerance).float().mean()) >= 1 - MOST_WRONG:
            wrong.append(name)
    return wrong


def micro_batches(spec: JobSpec, loaded: Loaded) -> MicroBatches:
    cure = f"lower export.gate.rows, shrink images with dataset.image_max_side, {last_cure(loaded.precision)}"
    return MicroBatches(gate_batch(spec), "the gate", cure)


def limits(result: Verdict, spec: GateSpec) -> tuple[float, float]:
    """Return the most that the mean logit difference, and the least that the token agreement may be."""
    return (
        max(spec.max_mean_logit_difference, spec.rounding_allowance * result.rounding_logit_difference),
        least_agreement(spec.min_token_agreement, spec, result.rounding_token_agreement, result.tokens),
    )


def least_agreement(bound: float, spec: GateSpec, rounded: float, tokens: int) -> float:
    """Return the least share of `tokens` that must agree: `bound`, or less if rounding alone leaves `rounded`. One token may
    always differ, which is a large share of few."""
    return min(bound, 1 - spec.rounding_allowance * (1 - rounded), (tokens - 1) / tokens)


def refuse(result: Verdict, spec: GateSpec) -> None:
    """Raises GateRefused with the wrong weights or the violated bound."""
    most, least = limits(result, spec)
    reasons = []
    if result.wrong:
        first = result.wrong[0]
        reasons.append(
            f"{len(result.wrong)} of {result.compared} weights are not base + adapter, first {first} "
            f"({group_of(first) or 'no group'})"
        )
    if not result.mean_logit_difference <= most:
        reasons.append(
            f"mean logit difference {result.mean_logit_difference:.4f} is over "
            f"export.gate.max_mean_logit_difference {spec.max_mean_logit_difference:g} and over "
            f"{spec.rounding_allowance:g} times what rounding alone causes ({result.rounding_logit_difference:.4f})"
        )
    if not result.token_agreement >= least:
        reasons.append(
            f"token agreement {result.token_agreement:.4f} is under {least:.4f}, the least that is allowed "
            f"(export.gate.min_token_agreement {spec.min_token_agreement:g}, rounding, and one token)"
        )
    visible = max(VISIBLE, result.mean_logit_difference / 3)
    if result.mean_effect_of_adapter > visible and result.mean_difference_from_base < result.mean_logit_difference:
        reasons.append("they are closer to the base model than to base + adapter")
    if reasons:
        raise GateRefused(
            f"merged weights differ from base + adapter: {'; '.join(reasons)}; the adapter is published, the merged model is not"
        )
