"""The plan shards a base over several devices where one cannot hold it, and says so."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from job.errors import SpecError
from job.model.base_model import BaseFacts
from job.model.memory_model import card_bytes, weight_bytes
from job.planning.describe import describe
from job.planning.facts import Device, Facts
from job.planning.plan import make_plan
from job.planning.sharding import backend_for
from tests.model.test_memory_model import llama_11b
from tests.planning.test_plan import DATA
from tests.tiny import job_spec

LINEARS = llama_11b()
LLAMA = BaseFacts(
    "mllama",
    "MllamaForConditionalGeneration",
    10_670_220_835,
    21_340_441_670,
    LINEARS,
    {
        "model_type": "mllama",
        "vision_config": {"image_size": 560, "patch_size": 14, "max_num_tiles": 4},
        "text_config": {"vocab_size": 128_256, "hidden_size": 4096},
    },
    matrices={name: layer.in_features * layer.out_features for name, layer in LINEARS.items()},
)


def spec_of(shard: str = "auto", **model: Any) -> Any:
    return job_spec(model={"name_or_path": "tiny", "precision": "16bit"} | model, training={"shard": shard})


def facts(gigabytes: float, world: int = 2, backend: str = "transformers") -> Facts:
    card = Device("cuda", "card", int(gigabytes * 1e9))
    return Facts(data=DATA, base=LLAMA, device=card, backend=backend, world=world)


def test_a_base_that_one_card_cannot_hold_is_shared_by_those_that_can():
    spec, here = spec_of(), facts(24)
    plan = make_plan(spec, here)
    assert plan.shards == 2
    assert max(plan.device_memory.values()) < 24e9
    assert plan.gate_room is not None
    assert "sharded over 2 devices: each holds" in describe(spec, plan, here)
    assert 21.3e9 / 2 < card_bytes(LLAMA, "16bit", 2) < 0.8 * weight_bytes(LLAMA, "16bit")
    assert card_bytes(LLAMA, "16bit", 4) < card_bytes(LLAMA, "16bit", 2)


def test_what_fits_one_card_is_not_shared_unless_asked():
    assert make_plan(spec_of(), facts(48)) == make_plan(spec_of("none"), facts(48))
    assert make_plan(spec_of("fsdp"), facts(48)).shards == 2
    assert make_plan(spec_of("fsdp"), facts(48, world=1)).shards == 1
    whole = make_plan(spec_of(precision="auto"), facts(24))
    assert (whole.precision, whole.shards) == ("4bit", 1)
    shared = make_plan(spec_of("fsdp", precision="auto"), facts(24))
    assert (shared.precision, shared.shards) == ("16bit", 2)


@pytest.mark.parametrize(
    ("spec", "here", "why"),
    [
        (spec_of("none"), facts(20), "each of the 2 GPUs holds the whole model, since training.shard is none"),
        (spec_of(precision="4bit"), facts(6), "a base in 4 bits is not sharded; set model.precision to 16bit"),
        (spec_of(), facts(20, backend="unsloth"), "Unsloth needs whole weights; set model.backend to transformers"),
        (spec_of(), facts(10), "each of the 2 GPUs holds its share of the model; use more GPUs"),
    ],
)
def test_what_no_card_can_hold_is_refused_with_the_cure(spec: Any, here: Facts, why: str):
    with pytest.raises(SpecError, match=why):
        make_plan(spec, here)


def test_rows_without_images_and_unknown_families_are_refused_where_ranks_would_wait_for_each_other():
    mixed = replace(facts(24), data=replace(DATA, without_images=3))
    with pytest.raises(SpecError, match="training.shard: 3 rows have no image, and skip layers of Llama 3.2 Vision"):
        make_plan(spec_of("fsdp"), mixed)
    other = replace(facts(24), base=replace(LLAMA, model_type="other", architecture="Other"))
    with pytest.raises(SpecError, match="Other is not sharded, only Llama 3.2 Vision, "):
        make_plan(spec_of("fsdp"), other)


def test_unsloth_is_left_out_where_the_base_is_to_be_shared():
    def backend(gigabytes: float, spec: Any, world: int = 2) -> str:
        return backend_for(spec, "unsloth", LLAMA, Device("cuda", "card", int(gigabytes * 1e9)), world)

    assert backend(20, spec_of()) == backend(48, spec_of("fsdp")) == "transformers"
    assert backend(48, spec_of()) == backend(20, spec_of("none")) == backend(20, spec_of(), world=1) == "unsloth"
    assert backend(20, spec_of(precision="auto")) == backend(6, spec_of(precision="4bit")) == "unsloth"
    assert backend(20, spec_of(backend="unsloth")) == "unsloth"
