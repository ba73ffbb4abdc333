"""The memory that the plan foresees is what was measured, within 15 %."""

from __future__ import annotations

import pytest

from job.model.lora import GROUPS, Linear, parameters, targets
from job.model.memory import memory
from job.spec import LoraSpec


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
    ("vision", "rows", "measured"),
    [(False, 8, 11.61e9), (True, 2, 10.1e9), (True, 8, 16.0e9)],  # H100, 4 bits, r 16, 512-pixel images, 8-bit AdamW
)
def test_the_estimate_is_near_the_peak(vision: bool, rows: int, measured: float) -> None:
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
        checkpointing_offloaded=True,
        tokens=138,
    )
    assert found.of(rows) == pytest.approx(measured, rel=0.15)
