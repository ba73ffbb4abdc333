"""Spec + facts → plan, and nothing else."""

from dataclasses import replace
from typing import Any

import pytest

from job.config.environment import Environment
from job.config.loader import validate
from job.data.facts import DataFacts, ImageFacts, ShrunkFacts, TokenFacts
from job.errors import SpecError
from job.model.base_model import BaseFacts
from job.model.lora_targets import Linear
from job.planning.describe import describe
from job.planning.facts import Device, Facts
from job.planning.plan import Plan, make_plan
from tests.model.test_memory_model import llama_11b

LAYERS = {
    "model.visual.blocks.0.attn.qkv": Linear(96, 32),
    "model.visual.blocks.0.mlp.up_proj": Linear(64, 32),
    "model.visual.merger.mlp.0": Linear(32, 32),
    "model.language_model.layers.0.self_attn.q_proj": Linear(64, 64),
    "model.language_model.layers.0.mlp.up_proj": Linear(128, 64),
    "lm_head": Linear(1000, 64),
}
BASE = BaseFacts("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", 1_000_000, 2_000_000, LAYERS)
DATA = DataFacts(source="s", rows=110, train=100, evaluation=30)
CPU = Device("cpu", "CPU", 10**10)
FACTS = Facts(data=DATA, base=BASE, device=CPU)


def plan(tree: dict[str, Any], facts: Facts = FACTS, **sections: dict[str, Any]) -> Plan:
    return make_plan(validate(tree | sections), facts)


def actions(found: Plan) -> list[str]:
    return [stage.action for stage in found.stages]


def test_a_fresh_output_does_everything(tree):
    assert set(actions(plan(tree))) == {"do"}


def test_a_published_output_skips_everything(tree):
    assert set(actions(plan(tree, replace(FACTS, keys=frozenset({"RESULT.json"}))))) == {"skip"}


def test_training_resumes_from_the_newest_checkpoint(tree):
    found = plan(tree, replace(FACTS, checkpoints=(20, 10), keys=frozenset({"evaluation/before.jsonl"})))
    assert found.action("evaluate before") == "skip"
    assert next(stage for stage in found.stages if stage.name == "train").detail == "from step 20 of 39 steps"


def test_finished_training_is_skipped(tree):
    keys = frozenset({"evaluation/before.jsonl", "evaluation/after.partial.jsonl"})
    found = plan(tree, replace(FACTS, checkpoints=(39,), keys=keys))
    assert found.action("train") == "skip"
    assert found.action("evaluate after") == "resume"


def test_an_after_measured_on_other_weights_is_made_again(tree):
    found = plan(tree, replace(FACTS, checkpoints=(10,), keys=frozenset({"evaluation/after.jsonl"})))
    assert found.action("evaluate after") == "do"


@pytest.mark.parametrize(
    ("rows", "effective", "micro", "epochs", "steps"),
    [(100, 8, 8, 3, 39), (100, 8, 2, 3, 39), (96, 8, 4, 1, 12), (3, 8, 8, 2, 2), (100, 8, 1, 1, 13)],
)
def test_steps_are_counted_as_transformers_does(tree, rows, effective, micro, epochs, steps):
    training = {"effective_batch_size": effective, "per_device_train_batch_size": micro, "num_train_epochs": epochs}
    assert plan(tree, replace(FACTS, data=replace(DATA, train=rows)), training=training).total_steps == steps


def test_max_steps_cuts(tree):
    assert plan(tree, training={"max_steps": 5}).total_steps == 5


def test_the_micro_batch_divides_the_effective_batch(tree):
    found = plan(tree, training={"effective_batch_size": 12})
    assert (found.micro_batch, found.accumulation) == (6, 2)


def test_trainable_parameters_are_counted_by_group_without_torch(tree):
    assert plan(tree, lora={"r": 4}).groups == {
        "vision/attention": 4 * 128,
        "vision/mlp": 4 * 96,
        "language/attention": 4 * 128,
        "language/mlp": 4 * 192,
    }


def test_a_group_that_the_model_lacks_is_refused(tree):
    layers = {name: shape for name, shape in LAYERS.items() if "visual" not in name}
    with pytest.raises(SpecError, match="finetune_vision_layers and finetune_attention_modules are true, but"):
        plan(tree, replace(FACTS, base=replace(BASE, linears=layers)))


A6000 = Device("cuda", "RTX A6000", 48 * 10**9)


def test_a_base_is_held_in_16_bits_where_four_rows_fit_with_it_else_in_4(tree):
    large = replace(BASE, parameters=30 * 10**9)
    assert plan(tree, replace(FACTS, device=A6000)).precision == "16bit"
    assert plan(tree, replace(FACTS, device=A6000, base=large)).precision == "4bit"
    assert plan(tree).precision == "32bit"


def test_as_many_rows_go_through_at_once_as_fit_the_card_with_a_tenth_to_spare(tree):
    rows = {"effective_batch_size": 16, "gradient_checkpointing": "unsloth"}
    whole = plan(tree, replace(FACTS, device=A6000), training=rows)
    assert whole.micro_batch == 16
    for at_once in (8, 4, 1):
        needed = whole.estimates["GPU memory in all"] - (16 - at_once) * whole.estimates["each row of a micro-batch"]
        card = Device("cuda", "small card", int(needed / 0.9) + 1000)
        fitted = plan(
            tree, replace(FACTS, device=card), training=rows, model={"name_or_path": "b", "precision": "16bit"}
        )
        assert (fitted.micro_batch, fitted.accumulation) == (at_once, 16 // at_once)


def test_of_as_many_rows_as_fit_the_most_is_kept_for_the_backward(tree):
    """Gradient checkpointing is a means to more rows, and of no use beyond."""
    layers = LAYERS | {f"model.language_model.layers.{n}.mlp.up_proj": Linear(20_000, 64) for n in range(1, 9)}
    facts, rows = replace(FACTS, base=replace(BASE, linears=layers)), {"effective_batch_size": 16}
    held = {"name_or_path": "b", "precision": "16bit"}
    large = Device("cuda", "large card", 10**12)
    ways = {False: "all", True: "inputs", "unsloth": "nothing"}
    needed = {}
    for given, kept in ways.items():
        training = rows | {"gradient_checkpointing": given}
        asked = plan(tree, replace(facts, device=large), training=training, model=held)
        assert (asked.kept, asked.micro_batch) == (kept, 16)
        needed[kept] = asked.estimates["GPU memory in all"]
    assert needed["all"] > needed["inputs"] > needed["nothing"]
    for kept, need in needed.items():
        card = replace(facts, device=Device("cuda", "card", int(need / 0.9) + 1000))
        found = plan(tree, card, training=rows, model=held)
        assert (found.kept, found.micro_batch) == (kept, 16)
    assert "kept on the GPU for the backward pass: nothing (the layers' inputs are off" in describe(
        validate(tree), found, card
    )
    small = replace(facts, device=Device("cuda", "small card", 10**5))
    assert plan(tree, small, training=rows, model=held).kept == "nothing"
    eager = held | {"backend": "transformers"}
    assert plan(tree, small, training=rows, model=eager).kept == "inputs"
    assert plan(tree, facts).kept == "all"  # on a CPU


def test_all_is_kept_of_itself_only_where_its_memory_is_known(tree):
    large = replace(FACTS, device=Device("cuda", "large card", 10**12))
    assert plan(tree, large).kept == "all"
    assert plan(tree, large, lora={"lora_dropout": 0.1}).kept == "inputs"
    assert plan(tree, replace(large, backend="transformers")).kept == "inputs"
    given = plan(tree, replace(large, backend="transformers"), training={"gradient_checkpointing": False})
    assert given.kept == "all"


def test_rows_of_more_pictures_take_more_memory(tree):
    base = replace(BASE, model_type="gemma3", config={"model_type": "gemma3"})

    def row(most):
        images = ImageFacts(110, (8, 8), (8, 8), (8, 8), most)
        facts = replace(FACTS, data=replace(DATA, images=images), base=base, device=A6000)
        return plan(tree, facts).estimates["each row of a micro-batch"]

    assert row(3) > row(1)


def test_the_plan_says_who_serves_the_family(tree):
    def said(model_type):
        facts = replace(FACTS, base=replace(BASE, model_type=model_type))
        return describe(validate(tree), plan(tree, facts), facts)

    assert "vLLM up to 0.10.2, SGLang" in said("mllama")
    assert "llama.cpp does not (its converter does not know MllamaForConditionalGeneration)" in said("mllama")
    assert "vLLM 0.11.0 and newer" in said("qwen3_vl")


def test_less_is_kept_is_the_first_cure_where_more_was_asked_for(tree):
    small = replace(FACTS, device=Device("cuda", "small card", 10**5), backend="unsloth")

    def said(facts, given):
        return " ".join(plan(tree, facts, training={"gradient_checkpointing": given}).warnings)

    assert "has 100.0 kB; set training.gradient_checkpointing to unsloth, shrink images" in said(small, False)
    assert "has 100.0 kB; shrink images" in said(small, "auto")
    eager = replace(small, backend="transformers")
    assert "has 100.0 kB; set training.gradient_checkpointing to true, shrink images" in said(eager, False)
    assert "has 100.0 kB; shrink images" in said(eager, True)


def test_no_more_rows_are_announced_than_are_answered(tree):
    def announced(**evaluation):
        stages = plan(tree, FACTS, evaluation=evaluation).stages
        return [stage.detail for stage in stages if stage.name.startswith("evaluate")]

    assert announced() == ["30 rows", "30 rows"]
    assert announced(max_rows=12) == ["12 rows", "12 rows"]


def test_shrinking_is_told_with_its_cost(tree):
    shrunk = ShrunkFacts(7, (2544, 3056), (896, 1064), 5921, 1412)
    said = describe(validate(tree), plan(tree, FACTS), replace(FACTS, data=replace(DATA, shrunk=shrunk)))
    line = "7, the median one from 2544×3056 to 896×1064, which takes its row from 5921 to 1412 tokens"
    assert f"  shrunk before the model's processor: {line}" in said.splitlines()


def test_no_held_out_rows_are_warned_about_and_nothing_is_measured(tree):
    found = plan(tree, replace(FACTS, data=replace(DATA, evaluation=0)))
    assert found.action("evaluate before") == found.action("evaluate after") == "skip"
    assert any("nothing will be measured" in warning for warning in found.warnings)


def test_a_save_that_does_not_fit_the_grace_is_warned_about(tree):
    slow = replace(FACTS, checkpoint_seconds=25.0, environment=Environment(grace_seconds=30))
    assert any("took 25 s to reach the store" in warning for warning in plan(tree, slow).warnings)
    patient = replace(slow, environment=Environment(grace_seconds=60))
    assert not any("to reach the store" in warning for warning in plan(tree, patient).warnings)


def test_a_split_without_patients_is_warned_about(tree):
    assert any("group_column is not set" in warning for warning in plan(tree).warnings)
    grouped = plan(tree, dataset={"path": "d", "group_column": "patient"})
    assert not any("group_column" in warning for warning in grouped.warnings)


def test_patients_that_zeros_tell_apart_are_warned_about(tree):
    alike = replace(FACTS, data=replace(DATA, grouped=True, alike_groups=2, alike_rows=(3, 17)))
    found = plan(tree, alike, dataset={"path": "d", "group_column": "patient"})
    assert any(
        "2 groups of rows" in warning and "rows 3, 17) and count as diff" in warning for warning in found.warnings
    )


def test_weights_that_do_not_fit_are_warned_about(tree):
    small = replace(FACTS, device=Device("cuda", "small card", 10**5))
    shrink = "and small card has 100.0 kB; shrink images with dataset.image_max_side, "
    assert any(f"{shrink}use a GPU with more memory" in warning for warning in plan(tree, small).warnings)
    in_16_bits = plan(tree, small, model={"name_or_path": "m", "precision": "16bit"})
    assert any(f"{shrink}set model.precision to 4bit" in warning for warning in in_16_bits.warnings)


LLAMA = replace(
    BASE,
    model_type="mllama",
    parameters=10_670_220_835,
    linears=llama_11b(),
    config={"model_type": "mllama", "vision_config": {"image_size": 560, "patch_size": 14, "max_num_tiles": 4}},
)


def on_a_card(tree, gigabytes, precision="auto", learned=128, **sections):
    device = Device("cuda", "card", int(gigabytes * 1e9))
    data = replace(DATA, tokens=TokenFacts(median=130, longest=max(138, learned), learned=learned))
    facts = replace(FACTS, base=LLAMA, device=device, backend="unsloth", data=data)
    return plan(tree, facts, model={"name_or_path": "m", "precision": precision}, **sections)


def test_the_gate_of_a_base_in_16_bits_needs_no_more_than_evaluation(tree):
    found = on_a_card(tree, 48)
    assert (found.precision, found.gate_room) == ("16bit", None)
    assert 21.3e9 < found.device_memory["export"] <= found.device_memory["evaluate after"] < 0.9 * 48e9
    assert found.answer_batch == 16


def test_long_answers_come_in_smaller_batches(tree):
    """Their logits, 128,256 for each token, take more room than all else."""
    batches = [on_a_card(tree, 80, learned=tokens).answer_batch for tokens in (128, 1200)]
    assert batches == [32, 16]


def test_answers_come_in_the_largest_batch_that_fits(tree):
    assert [on_a_card(tree, size).answer_batch for size in (48, 80, 32)] == [16, 32, 4]
    assert on_a_card(tree, 80, evaluation={"batch_size": 5}).answer_batch == 5
    assert plan(tree).answer_batch == 8


def test_the_gate_leaves_outside_what_a_small_card_cannot_hold_and_says_how_long_that_takes(tree):
    found = on_a_card(tree, 24, "4bit")
    assert found.gate_room is not None
    assert 10e9 < found.gate_room < 21.3e9
    assert max(found.device_memory.values()) <= 0.9 * 24e9
    facts = replace(FACTS, base=LLAMA, device=Device("cuda", "card", 24 * 10**9))
    assert "from host memory takes about" in describe(validate(tree), found, facts)
    assert on_a_card(tree, 48, "4bit").gate_room is None


def test_the_gate_asks_fewer_rows_where_they_would_leave_less_room_for_weights_than_training_had(tree):
    found = on_a_card(tree, 13, "4bit")
    assert found.gate_room is not None
    assert 7.4e9 < found.gate_room < 0.9 * 13e9


def test_biases_trained_beside_a_base_that_the_gate_cannot_hold_whole_are_refused_before_training(tree):
    with pytest.raises(SpecError, match="lora.bias: all cannot be checked in the merge"):
        on_a_card(tree, 24, "4bit", lora={"bias": "all"})
    assert on_a_card(tree, 24, "4bit", lora={"bias": "all"}, export={"merged": False}).gate_room is None
