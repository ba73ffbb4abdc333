"""The memory that the plan foresees is what was measured, within 15 %."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.autograd.graph import saved_tensors_hooks
from transformers import AttentionInterface, AutoModelForImageTextToText
from transformers.initialization import no_init_weights
from transformers.modeling_layers import GradientCheckpointingLayer

from job.config.schema import LoraSpec
from job.model.collator import Collator
from job.model.families import Family, family_of
from job.model.lora_targets import GROUPS, Linear, parameters, targets
from job.model.memory_model import Kept, kept_by_towers, memory, values, vision_tokens, widths
from job.model.patches.mllama_checkpointing import make_recomputable
from job.model.transformers_backend import linears
from tests.families import FAMILIES
from tests.tiny import models, processors, row


def llama_11b() -> dict[str, Linear]:
    """The linear layers of Llama 3.2 11B Vision."""
    layers = {"model.multi_modal_projector": Linear(4096, 7680), "lm_head": Linear(128256, 4096)}
    for block in [f"transformer.layers.{n}" for n in range(32)] + [f"global_transformer.layers.{n}" for n in range(8)]:
        at = f"model.vision_model.{block}"
        layers |= {f"{at}.self_attn.{name}_proj": Linear(1280, 1280) for name in "qkvo"}
        layers |= {f"{at}.mlp.fc1": Linear(5120, 1280), f"{at}.mlp.fc2": Linear(1280, 5120)}
    for number in range(40):
        at = f"model.language_model.layers.{number}"
        attention = "cross_attn" if number % 5 == 3 else "self_attn"
        layers |= {f"{at}.{attention}.{name}_proj": Linear(4096, 4096) for name in "qo"}
        layers |= {f"{at}.{attention}.{name}_proj": Linear(1024, 4096) for name in "kv"}
        layers |= {f"{at}.mlp.{name}_proj": Linear(14336, 4096) for name in ("gate", "up")}
        layers[f"{at}.mlp.down_proj"] = Linear(4096, 14336)
    return layers


CONFIG = {"model_type": "mllama", "vision_config": {"image_size": 560, "patch_size": 14, "max_num_tiles": 4}}


@pytest.mark.parametrize(
    ("vision", "kept", "rows", "measured"),
    [
        (False, "nothing", 8, 11.61e9),
        (True, "nothing", 2, 10.1e9),
        (True, "nothing", 8, 16.0e9),
        (True, "inputs", 8, 17.45e9),
        (True, "all", 2, 35.2e9),
        (True, "all", 8, 113.9e9),
    ],
)
def test_the_estimate_is_near_the_peak(vision: bool, kept: Kept, rows: int, measured: float) -> None:
    """Peaks on an H100 and an H200: 4 bits, r 16, 512-pixel images, 8-bit AdamW."""
    layers = llama_11b()
    groups = parameters(16, layers, targets(LoraSpec(finetune_vision_layers=vision), layers))
    assert sum(groups.values()) == (67_174_400 if vision else 52_428_800)
    assert set(groups) <= set(GROUPS)
    found = memory(
        CONFIG,
        layers,
        10_670_220_835,
        groups,
        precision="4bit",
        optim="adamw_8bit",
        unsloth=True,
        kept=kept,
        tokens=138,
    )
    assert found.of(rows) == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize(
    ("config", "tokens", "pictures", "patches"),
    [
        ({"model_type": "gemma4", "vision_config": {"pooling_kernel_size": 3}}, 380, 1, 2520),
        ({"model_type": "gemma4", "vision_config": {"pooling_kernel_size": 3}}, 660, 2, 2 * 2520),
        ({"model_type": "gemma4", "vision_config": {"pooling_kernel_size": 3}}, 1200, 1, 1120 * 9),
        ({"model_type": "gemma4", "vision_config": {"pooling_kernel_size": 3}}, 20, 0, 0),
        ({"model_type": "smolvlm", "scale_factor": 4, "vision_config": {"image_size": 512}}, 1200, 1, 16 * 1200),
        ({"model_type": "mistral3", "spatial_merge_size": 2}, 500, 1, 2000),
        ({"model_type": "glm4v", "vision_config": {"spatial_merge_size": 2}}, 500, 1, 2000),
        ({"model_type": "internvl", "downsample_ratio": 0.5}, 300, 1, 1200),
        ({"model_type": "llama4", "vision_config": {"pixel_shuffle_ratio": 0.5}}, 300, 1, 1200),
    ],
)
def test_the_tower_sees_as_many_patches_as_the_processor_gives_it(
    config: dict[str, Any], tokens: int, pictures: int, patches: int
) -> None:
    assert vision_tokens(config, tokens, pictures) == patches


class Sizes(torch.autograd.Function):
    """What flash attention keeps, on tensors without numbers, for which torch would take another way."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        made = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, made)
        return made


def sizes(_module: Any, query: Any, key: Any, value: Any, _mask: Any = None, **_: Any) -> tuple[torch.Tensor, None]:
    made: torch.Tensor = Sizes.apply(query, key, value)  # type: ignore[no-untyped-call]
    return made.transpose(1, 2).contiguous(), None


def keeping(model: Any) -> tuple[dict[int, torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]:
    """What is kept, and the hook that notes it: each memory once, weights not."""
    kept = dict[int, torch.Tensor]()
    weights = {weight.untyped_storage()._cdata for weight in [*model.parameters(), *model.buffers()]}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if (storage := tensor.untyped_storage()._cdata) not in weights:
            kept[storage] = tensor
        return tensor

    return kept, pack


def bytes_of(kept: dict[int, torch.Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.filterwarnings("ignore:`hidden_state` is deprecated:FutureWarning")
@pytest.mark.parametrize("what", ["all", "inputs"])
def test_the_estimate_of_what_a_row_keeps_is_near_it(what: Literal["all", "inputs"]) -> None:
    """The whole 11B shape on torch's `meta` device, where tensors have sizes and no numbers."""
    processor = processors.build_processor("mllama", "full", models.MLLAMA_TEXT_VOCABULARY)
    model = models.build_model("mllama", "full", processor, "meta", torch.bfloat16)
    layers = linears(model)
    chosen = targets(LoraSpec(), layers)
    AttentionInterface.register("sizes", sizes)
    model.set_attn_implementation("sizes")
    make_recomputable(model)
    model = get_peft_model(model, LoraConfig(r=16, target_modules=list(chosen)), autocast_adapter_dtype=False).train()
    tokens = 138
    kept, pack = keeping(model)

    def see(_layer: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        pack(arguments[0] if arguments else named.get("hidden_states", named.get("hidden_state")))

    if what == "inputs":  # which are no saved tensors, but held by the function that is run again
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for layer in model.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                layer.register_forward_pre_hook(see, with_kwargs=True)
    with torch.device("meta"), saved_tensors_hooks(pack, lambda tensor: tensor):
        model(
            input_ids=torch.ones(1, tokens, dtype=torch.int64),
            pixel_values=torch.ones(1, 1, 4, 3, 560, 560, dtype=torch.bfloat16),
            aspect_ratio_ids=torch.ones(1, 1, dtype=torch.int64),
            aspect_ratio_mask=torch.ones(1, 1, 4, dtype=torch.int64),
            cross_attention_mask=torch.ones(1, tokens, 1, 4, dtype=torch.int64),
            use_cache=False,
        )
    assert sum(kept_by_towers(layers, True, what, tokens, 6432, family_of("mllama"))) == pytest.approx(
        bytes_of(kept), rel=0.15
    )


WIDTHS = {
    "hidden_size",
    "intermediate_size",
    "out_hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "num_heads",
}


COUNTED = [each for each in FAMILIES if each != "mllama" and family_of(each).kept != Family().kept]


@pytest.mark.parametrize("family", COUNTED)
def test_the_estimate_of_what_a_layer_keeps_is_near_it(family: str) -> None:
    """By what a second layer adds, in either tower. All widths are a quarter of the published ones."""
    processor = processors.build_processor(family, "full", None)
    AttentionInterface.register("sizes", sizes)

    def kept_with(language: int, vision: int) -> tuple[int, Any, dict[str, Linear], Any]:
        config = models.configuration(family, "full", processor)
        text, seeing = config.text_config, config.vision_config
        for part in (text, seeing):
            for name in WIDTHS & vars(part).keys():
                setattr(part, name, getattr(part, name) // 4)
        text.num_hidden_layers, text.vocab_size = language, len(processor.tokenizer)
        text.layer_types = ["full_attention"] * language
        setattr(seeing, "depth" if family.startswith("qwen") else "num_hidden_layers", vision)
        seeing.fullatt_block_indexes, seeing.deepstack_visual_indexes = [*range(vision)], [0]
        with no_init_weights():
            model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
        model.set_attn_implementation("sizes")
        layers = linears(model)
        chosen = list(targets(LoraSpec(), layers))
        model = get_peft_model(model, LoraConfig(r=16, target_modules=chosen), autocast_adapter_dtype=False).train()
        inputs = Collator(processor, 4096)([row(1, shape=(224, 224))])
        inputs.pop("labels")
        kept, pack = keeping(model)
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            model.get_base_model().model(
                **inputs | {"pixel_values": inputs["pixel_values"].bfloat16()}, use_cache=False
            )
        return bytes_of(kept), inputs, layers, config

    (one, inputs, layers, config), more, seen = kept_with(1, 1), kept_with(2, 1)[0], kept_with(1, 2)[0]
    of_layer, of_vision_layer = family_of(family).kept
    of_text = inputs["input_ids"].shape[1] * 2 * values(widths(layers, "language"), of_layer)
    pixels = inputs["pixel_values"]
    patches = len(pixels) if pixels.ndim == 2 else vision_tokens(config.to_dict(), 0, 1)
    assert of_text == pytest.approx(more - one, rel=0.1)
    assert patches * 2 * values(widths(layers, "vision"), of_vision_layer) == pytest.approx(seen - one, rel=0.1)
