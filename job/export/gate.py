"""The proof that merged weights are base + adapter, read back from where they will be served.

Two questions are asked, because each alone can be fooled.

**Are the weights right?** Of every weight of the merged model, as transformers loads it, a sample is compared with base +
adapter, folded here from the live modules of PEFT. Both sides round the same float32 sum once, so they are the same to
the bit and there is no noise that a fault could hide in: a LoRA that was left out, put in the wrong layer, scaled wrongly
or read from a damaged file is named, however little it moves the logits.

**Do they say the same?** Base + adapter, not folded, answers held-out rows beside the merged model. This sees what the
weights alone do not: a configuration, a processor or a forward pass that differs. But it cannot be exact. Folding rounds
each adapted weight to the files' dtype, and how much that moves the logits depends on the model alone: well-trained ones
move by less than a hundredth of their spread; forty layers of random weights amplify each other's rounding and were seen
to move by 0.08, with every fourth first token changed. So the model itself is asked: one adapted weight in twelve, chosen
at random, is moved to its neighbour in the files' dtype, adapters left unfolded. A rounding error is spread evenly over
±½ unit in the last place and has the variance 1/12; a whole unit with the chance 1/12 has the same. This is a rounding
of the same size in the same weights, and by construction nothing else. What it does to logits and first tokens is the
floor, and the merged model may differ by `rounding_allowance` times as much (twice: two draws of one noise differ
little, and folding also saves the roundings of the adapters' own products), or by the spec's bounds where they are wider.
Where an adapter outweighs its base, folded weights are larger than the base's and round more coarsely than that floor.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from job.errors import GateRefused
from job.export.answers import Answers, agreement, answer_logits, apart, loss, spread, spread_rows
from job.export.fold import Lora, changed
from job.export.places import DTYPES, Base
from job.export.quantised import held_weights
from job.model import Loaded
from job.model.lora import group_of
from job.model.transformers_backend import load_weights
from job.spec import GateSpec, JobSpec

SAMPLE = 4096
"""Numbers of each weight that are compared."""
MOST_WRONG = 0.01
"""Share of them that may differ: float32 sums of another kind of device round otherwise now and then."""
VISIBLE = 0.01
"""Adapters that move logits by less (a trial of few steps) cannot be told from rounding."""
FLIPPED = 12
MANTISSA = {torch.float64: 52, torch.float32: 23, torch.float16: 10, torch.bfloat16: 7}


@dataclass(frozen=True)
class Verdict:
    """Differences of logits are means of |a − b|, as a share of the standard deviation of base + adapter's logits.

    `token_agreement` is the share of tokens at which merged puts first what base + adapter does, or holds within
    `max_mean_logit_difference` of it; `rounding_…` is what rounding alone makes of both. Losses are nats a token of the
    true answers. `difference_from_trained` is from the model as it was trained and measured: the same as
    `mean_logit_difference`, but where the base was held in 4 bits. `weights` counts tensors by group: how many were
    `adapted`, and by what share of their size; `wrong` names those that are not base + adapter.
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


def compare(
    spec: JobSpec, loaded: Loaded, base: Base, adapter: Path, read_merged: Callable[[str], Any], rows: Any
) -> Verdict:
    """Measure the merged model, which `read_merged(precision)` loads, against base + adapter on `rows`.

    Both in the precision that was trained in; where that is 4bit, both in 16 bits, which is what merged weights are made
    from and served in. `adapter` is read only then.
    """
    gate = spec.export.gate
    precision = "16bit" if loaded.precision == "4bit" else loaded.precision
    batches = spread_rows(rows, gate.rows, spec.evaluation.batch_size)

    def answers(model: Loaded, tuned: bool = True) -> list[Answers]:
        return [answer_logits(model, batch, spec, tuned=tuned) for batch in batches]

    trained = answers(loaded) if loaded.precision == "4bit" else None
    again = replace(loaded, model=read_merged(precision), precision=precision, backend="transformers")
    merged, samples = answers(again), {name: sample(name, weight) for name, weight in again.model.named_parameters()}
    del again  # its memory is wanted for the next one
    torch.cuda.empty_cache()
    reference = loaded if precision == loaded.precision else in_16_bits(spec, loaded, adapter)
    tuned, untuned = answers(reference), answers(reference, tuned=False)
    with jittered(reference.model, base):
        jitter = answers(reference)
    scale = spread(tuned)
    near = gate.max_mean_logit_difference * scale
    difference, largest = apart(tuned, merged)
    weights, wrong = compare_weights(reference.model, base, samples)
    return Verdict(
        rows=sum(map(len, batches)),
        tokens=sum(len(batch.targets) for batch in tuned),
        mean_logit_difference=difference / scale,
        max_logit_difference=largest / scale,
        token_agreement=agreement(tuned, merged, near),
        rounding_logit_difference=apart(tuned, jitter)[0] / scale,
        rounding_token_agreement=agreement(tuned, jitter, near),
        mean_difference_from_base=apart(untuned, merged)[0] / scale,
        mean_effect_of_adapter=apart(untuned, tuned)[0] / scale,
        difference_from_trained=(apart(trained, merged)[0] if trained else difference) / scale,
        loss_base=loss(untuned),
        loss_adapter=loss(trained or tuned),
        loss_merged=loss(merged),
        weights=weights,
        compared=len(samples),
        wrong=wrong,
    )


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


def in_16_bits(spec: JobSpec, loaded: Loaded, adapter: Path) -> Loaded:
    """The base read again in 16 bits, the adapter beside it, not folded. With `fold_onto: dequantised`, each weight that
    `loaded` holds in 4 bits is what those stand for."""
    from peft import PeftModel

    base = load_weights(spec.model, loaded.folder, loaded.device, "16bit")
    if spec.export.fold_onto == "dequantised":
        with torch.no_grad():
            for name, weight in held_weights(loaded.model).items():
                base.get_parameter(name).copy_(weight())
    model = PeftModel.from_pretrained(base, str(adapter)).eval()
    return replace(loaded, model=model, precision="16bit", backend="transformers")


def compare_weights(
    model: Any, base: Base, samples: dict[str, Tensor]
) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Samples of the merged model's weights against the live base + adapter: counts by group, and names of the wrong."""
    kept = {name: DTYPES.get(base.slots[key].dtype) for key, name in base.names.items()}
    groups: dict[str, dict[str, float]] = {}
    wrong = []
    for name, weight, adapters in with_adapters(model):
        dtype = kept.get(name) or weight.dtype
        right = before = sample(name, weight)
        if adapters is not None:
            right = sample(name, changed(weight.detach(), adapters))
            group = groups.setdefault(group_of(name) or "other", {"adapted": 0, "change": 0.0})
            share = float((right - before).norm() / before.norm())
            group["change"] = (group["change"] * group["adapted"] + share) / (group["adapted"] + 1)
            group["adapted"] += 1
        exact = weight.dtype == dtype or weight.dtype == torch.float32
        tolerance = torch.zeros(()) if exact else right.abs() * 2.0 ** -MANTISSA[weight.dtype]
        right, found = right.to(dtype).float(), samples.get(name)
        if found is None or not float(((found - right).abs() <= tolerance).float().mean()) >= 1 - MOST_WRONG:
            wrong.append(name)
    return groups, wrong


def with_adapters(model: Any) -> Iterator[tuple[str, Tensor, Lora | None]]:
    """Weights of the base by their names in it, each with the adapter that is beside it."""
    from peft.tuners.lora import LoraLayer

    base = model.get_base_model()
    layers = {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}
    for name, weight in base.named_parameters():
        if ".original_module." in name or ".lora_" in name:
            continue
        module, _, last = name.rpartition(".base_layer.")
        adapters = adapters_of(layers[module]) if module in layers and last == "weight" else None
        yield name.replace(".base_layer.", ".").replace(".modules_to_save.default.", "."), weight, adapters


def adapters_of(layer: Any) -> Lora:
    """The live adapter of a layer, with the scale that PEFT uses."""
    (adapter,) = layer.active_adapters
    scale = float(layer.scaling[adapter])
    if adapter in layer.lora_embedding_A:
        return Lora(layer.lora_embedding_B[adapter].T, layer.lora_embedding_A[adapter].T, scale)
    magnitude = layer.lora_magnitude_vector[adapter].weight if adapter in layer.lora_magnitude_vector else None
    return Lora(layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, scale, magnitude)


def sample(name: str, weight: Tensor) -> Tensor:
    """The same numbers of a weight each time, chosen by its name: float32 on the CPU."""
    flat = weight.detach().flatten()
    if len(flat) > SAMPLE:
        chosen = torch.randint(len(flat), (SAMPLE,), generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        flat = flat[chosen.to(flat.device)]
    return flat.float().cpu()


@contextmanager
def jittered(model: Any, base: Base) -> Iterator[None]:
    """One adapted weight in twelve moved to its neighbour in the files' dtype; afterwards all are as they were."""
    dtypes = {name: DTYPES.get(base.slots[key].dtype, torch.float32) for key, name in base.names.items()}
    adapted = [(name, weight) for name, weight, adapters in with_adapters(model) if adapters is not None]
    _flip(adapted, dtypes)
    try:
        yield
    finally:
        _flip(adapted, dtypes)


@torch.no_grad()
def _flip(weights: list[tuple[str, Tensor]], dtypes: dict[str, torch.dtype]) -> None:
    """Flip the last bit that the files keep, in one number of twelve. Done twice, it undoes itself."""
    for name, weight in weights:
        bit = 1 << max(0, MANTISSA[weight.dtype] - MANTISSA[dtypes.get(name, weight.dtype)])
        generator = torch.Generator(weight.device).manual_seed(zlib.crc32(name.encode()))
        dice = torch.randint(FLIPPED, weight.shape, dtype=torch.uint8, device=weight.device, generator=generator)
        integers = weight.data.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()])
        integers ^= (dice == 0).to(integers.dtype) * bit
