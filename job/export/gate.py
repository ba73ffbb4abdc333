"""The proof that merged weights are base + adapter, read back from where they will be served. One model at a time is in memory.

Two questions are asked, because each alone can be fooled.

**Are the weights right?** Of every weight of the merged model, as transformers loads it, a sample is compared with base +
adapter, folded here from the adapter as it lies in memory. Both sides round the same float32 sum once, so they are the same to
the bit and there is no noise that a fault could hide in: a LoRA that was left out, put in the wrong layer, scaled wrongly
or read from a damaged file is named, however little it moves the logits.

**Do they say the same?** Base + adapter, not folded, answers held-out rows beside the merged model. This sees what the
weights alone do not: a configuration, a processor or a forward pass that differs. But it cannot be exact. Folding rounds
each adapted weight to the files' dtype, and how much that moves the logits depends on the model alone: well-trained ones
move by less than a hundredth of their spread; forty layers of random weights amplify each other's rounding and were seen
to move by 0.08, with every fourth first token changed. So the model itself is asked: one adapted weight in twelve, chosen
at random, is moved to its neighbour in the files' dtype, adapters left unfolded. Rounding to
the nearest has an error that is spread evenly over ±½ unit in the last place, with the variance 1/12; a whole unit with the
chance 1/12 has the same. Rounding by chance (`job.export.fold`) has the variance f(1 − f) for a number that lies the share f
of a unit above the one below: 1/4 at most, 1.7 times the size. What the jitter does to logits and first tokens is the floor,
and the merged model may differ by `rounding_allowance` times as much, twice if not said otherwise, or by the spec's bounds
where they are wider.
Where an adapter outweighs its base, folded weights are larger than the base's and round more coarsely than that floor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from job.errors import GateRefused
from job.export.answers import Answers, agreement, answers, apart, loss, spread, spread_rows
from job.export.places import Base
from job.export.reference import Expected, adapters_of, beside, expected, jittered, samples, trained, trained_weights
from job.model import Loaded, release
from job.model.lora import group_of
from job.model.memory import gate_batch, last_cure, served_precision
from job.model.oom_retry import MicroBatches
from job.model.transformers_backend import Offload, load_weights
from job.spec import GateSpec, JobSpec

MOST_WRONG = 0.01
"""Share of them that may differ: float32 sums of another kind of device round otherwise now and then."""
VISIBLE = 0.01
"""Adapters that move logits by less (a trial of few steps) cannot be told from rounding."""


@dataclass(frozen=True)
class Verdict:
    """Differences of logits are means of |a − b|, as a share of the standard deviation of base + adapter's logits.

    `token_agreement` is the share of tokens at which merged puts first what base + adapter does, or holds within
    `max_mean_logit_difference` of it; `rounding_…` is what rounding alone makes of both. Losses are nats a token of the
    true answers. `difference_from_trained` is from the model as it was trained and
    measured: the same as `mean_logit_difference`, but where the base was held in 4 bits or Unsloth's kernels computed it.
    `weights` counts tensors by group: how many were `adapted`, and by what share of their size; `wrong` names those that are
    not base + adapter.
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

    def facts(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Reference:
    """All that is asked of base + adapter, on the CPU: what `tuned` and `untuned` say, what `jitter` (rounding alone) makes
    of it, what the merged model's weights must be, and what the model said as it was `trained`, where that
    was in 4 bits or by Unsloth's kernels, else None."""

    batches: list[list[dict[str, Any]]]
    tuned: list[Answers]
    untuned: list[Answers]
    jitter: list[Answers]
    trained: list[Answers] | None
    weights: dict[str, Expected]
    groups: dict[str, dict[str, float]]


def compare(
    spec: JobSpec,
    loaded: Loaded,
    base: Base,
    read_merged: Callable[[str], Any],
    rows: Any,
    *,
    let_go: Callable[[], None] = lambda: None,
    offload: Offload | None = None,
) -> Verdict:
    """Measure the merged model, which `read_merged(precision)` loads, against base + adapter on `rows`.

    Both in the precision that was trained in; where that is 4bit, both in 16 bits, which is what merged weights are made
    from and served in. Both are asked by transformers: the kernels of Unsloth round otherwise, which some models amplify
    beyond what folding does to them. One model at a time is in memory: `let_go` is called once nothing is wanted of
    `loaded.model` any more, before another is read. `offload` says which part of a model in 16 bits stays outside the GPU,
    and is for a base that was held in 4 bits.
    """
    reference = refer(spec, loaded, base, rows, let_go, offload)
    precision = served_precision(loaded.precision)
    again = replace(loaded, model=read_merged(precision), precision=precision, backend="transformers")
    micro = micro_batches(spec, loaded)
    merged = answers(again, reference.batches, spec, micro)
    wrong = wrong_weights(reference.weights, samples(again.model))
    release(again.model)
    return judge(spec, reference, merged, wrong)


def refer(
    spec: JobSpec, loaded: Loaded, base: Base, rows: Any, let_go: Callable[[], None], offload: Offload | None
) -> Reference:
    """Ask base + adapter all that the merged model is compared with, and let go of it."""
    micro = micro_batches(spec, loaded)
    batches = spread_rows(rows, spec.export.gate.rows, gate_batch(spec))
    as_trained, adapted = None, trained(loaded)
    apart_from_served = loaded.precision == "4bit" or loaded.backend == "unsloth"
    if apart_from_served:
        as_trained = answers(loaded, batches, spec, micro)
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
    weights, groups = expected(adapted, base)
    with jittered(adapted, base):
        jitter = answers(adapted.loaded, batches, spec, micro)
    if apart_from_served:
        release(adapted.loaded.model)
    else:
        let_go()
    return Reference(batches, tuned, untuned, jitter, as_trained, weights, groups)


def judge(spec: JobSpec, reference: Reference, merged: list[Answers], wrong: list[str]) -> Verdict:
    """The figures of the verdict from what both sides said."""
    tuned, untuned, jitter = reference.tuned, reference.untuned, reference.jitter
    scale = spread(tuned)
    near = spec.export.gate.max_mean_logit_difference * scale
    difference, largest = apart(tuned, merged)
    before_merge = reference.trained
    return Verdict(
        rows=sum(map(len, reference.batches)),
        tokens=sum(len(batch.targets) for batch in tuned),
        mean_logit_difference=difference / scale,
        max_logit_difference=largest / scale,
        token_agreement=agreement(tuned, merged, near),
        rounding_logit_difference=apart(tuned, jitter)[0] / scale,
        rounding_token_agreement=agreement(tuned, jitter, near),
        mean_difference_from_base=apart(untuned, merged)[0] / scale,
        mean_effect_of_adapter=apart(untuned, tuned)[0] / scale,
        difference_from_trained=(apart(before_merge, merged)[0] if before_merge else difference) / scale,
        loss_base=loss(untuned),
        loss_adapter=loss(before_merge or tuned),
        loss_merged=loss(merged),
        weights=reference.groups,
        compared=len(reference.weights),
        wrong=wrong,
    )


def wrong_weights(right: dict[str, Expected], found: dict[str, Tensor]) -> list[str]:
    """Names of weights that the merged model lacks, or that are not what they must be."""
    wrong = []
    for name, each in right.items():
        there = found.get(name)
        if there is None or not float(((there - each.sample).abs() <= each.tolerance).float().mean()) >= 1 - MOST_WRONG:
            wrong.append(name)
    return wrong


def micro_batches(spec: JobSpec, loaded: Loaded) -> MicroBatches:
    cure = f"lower export.gate.rows, shrink images with dataset.image_max_side, {last_cure(loaded.precision)}"
    return MicroBatches(gate_batch(spec), "the gate", cure)


def refuse(result: Verdict, spec: GateSpec) -> None:
    """Raises GateRefused, saying which weights are wrong, or which bound was crossed."""
    most = max(spec.max_mean_logit_difference, spec.rounding_allowance * result.rounding_logit_difference)
    least = min(spec.min_token_agreement, 1 - spec.rounding_allowance * (1 - result.rounding_token_agreement))
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
            f"{spec.rounding_allowance:g} times what rounding alone makes ({result.rounding_logit_difference:.4f})"
        )
    if not result.token_agreement >= least:
        reasons.append(
            f"token agreement {result.token_agreement:.4f} is under export.gate.min_token_agreement "
            f"{spec.min_token_agreement:g} and under what rounding alone explains ({least:.4f})"
        )
    visible = max(VISIBLE, result.mean_logit_difference / 3)
    if result.mean_effect_of_adapter > visible and result.mean_difference_from_base < result.mean_logit_difference:
        reasons.append("they are nearer to the base than to base + adapter")
    if reasons:
        raise GateRefused(
            f"merged weights differ from base + adapter: {'; '.join(reasons)}; the adapter is published, merged is not"
        )
