"""Which of other people's code we rely on; test_upstream.py holds it. `python -m tests.upstream` prints today's digests."""

from __future__ import annotations

import ast
import hashlib
import inspect
import re
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

CODE = """
transformers.trainer:Trainer.
d9833db7afa9 _save_checkpoint LoraTrainer has it make a checkpoint, by the hooks that it overrides
2087abb7d8bc save_model LoraTrainer overrides `_save`, which it calls, to make the folder alone
3e432da30f46 _save LoraTrainer lets it write once all that never changes, and expects the adapter's file there
2a7409cf6ddd _save_optimizer_and_scheduler LoraTrainer writes its files, by its names, from copies
1123d887f1c7 _load_optimizer_and_scheduler it reads what `LoraTrainer.states` names
726bd2c713ec _get_train_sampler LoraTrainer gives its own order
65fe983a5316 get_batch_samples LoraTrainer does the same, with weights and ranks
170af7a8f8bb _prepare_inputs LoraTrainer puts a batch on the device with it, before the vision tower
1563bbe55202 training_step LoraTrainer calls it for each part of a micro-batch
dcd0994c2015 compute_loss LoraTrainer calls it past SFTTrainer's
c9154039b11f _run_epoch job/train/callbacks.py reads `_tr_loss` and counts on this order of events
1a527d62ee57 _maybe_log_save_evaluate `Safety._write_line` writes the line that it would have written
af4b07a67375 _get_learning_rate `Safety` notes what it says of the step that is made
trl.trainer.sft_trainer:SFTTrainer.
1aa7af20403a _save_checkpoint LoraTrainer (job/train/trainer.py) goes around it; look whether it does anything new that is needed
8c5fa1dbca99 training_step LoraTrainer (job/train/trainer.py) goes around it; look whether it does anything new that is needed
368d7695faa4 compute_loss LoraTrainer (job/train/trainer.py) goes around it; look whether it does anything new that is needed
transformers.models.mllama.modeling_mllama:
3f09da3d811b _prepare_aspect_ratio_attention_mask patches/mllama_attention.py reads padding off its diagonal
236c61e9ab01 _prepare_cross_attention_mask patches/mllama_cross_attention.py reads what is seen off it
transformers.models.mllama.modeling_mllama:MllamaTextCrossAttention.
532639fd6214 forward patches/mllama_cross_attention.py replaces its attention function
transformers.models.mllama.modeling_mllama:MllamaVisionAttention.
f6348f1bd5df forward patches/mllama_attention.py replaces its attention function
transformers.models.mllama.modeling_mllama:MllamaVisionEncoder.
3023373a0ed7 forward patches/mllama_attention.py arranges its states and changes the mask that it takes by name
transformers.modeling_layers:GradientCheckpointingLayer.
734ddf2c6cf9 __call__ patches/mllama_checkpointing.py lends it
transformers.models.qwen3_vl.modeling_qwen3_vl:Qwen3VLTextRMSNorm.
3480f6ca9ea4 forward patches/rms_norm.py may be needless now
transformers.integrations.sdpa_attention:
83f68b4ed085 sdpa_attention_forward patches/sdpa_attention.py stands in for it
d2934c8ca9f3 use_gqa_in_sdpa patches/sdpa_attention.py may be needless now
transformers.cache_utils:
4207d7a06b51 StaticLayer `Buffer` of job/model/decoding.py counts beside it, and takes steps back
3582d1fdd39f DynamicLayer `Pictures` of job/model/decoding.py calls it fit for graphs
transformers.core_model_loading:
ede1dd0395bf rename_source_key job/model/weight_map.py names the files' tensors with it
a4c96b7f56ab convert_and_load_state_dict_in_model job/model/weight_map.py takes the same steps
transformers.conversion_mapping:
55a051f01be6 get_model_conversion_mapping job/model/weight_map.py asks it for the steps
transformers.models.qwen2_vl.image_processing_qwen2_vl:Qwen2VLImageProcessor.
dc6fbf82d46c _preprocess patches/image_processors.py makes the same numbers
9fb7b0b9928f patchify patches/image_processors.py makes the same numbers
transformers.models.mllama.image_processing_mllama:
b50d5131c5f3 pad_batches_and_tiles patches/image_processors.py makes the same numbers
transformers.models.mllama.image_processing_mllama:MllamaImageProcessor.
5e7ff5b7b59b _preprocess patches/image_processors.py makes the same numbers
transformers.image_processing_backends:TorchvisionBackend.
d39006d49ecf rescale_and_normalize patches/image_processors.py normalises by the same operations
d5ee4957e8fe _fuse_mean_std_and_rescale_factor patches/image_processors.py normalises by the same operations
accelerate.hooks:AlignDevicesHook.
1ad3adf8ba1d init_hook `waits` (job/model/transformers_backend.py) knows it by `meta`
"""
"""Functions and classes of packages that pyproject.toml pins: where they are; digest, name, and who relies on each for what."""
RL, UTILS, VISION = "unsloth/models/rl.py", "unsloth/models/_utils.py", "unsloth/models/vision.py"
GEMMA = "unsloth_zoo/temporary_patches/gemma.py"
TOKENS = "unsloth_zoo/tokenizer_utils.py"
TEXTS = [
    (RL, "def _patch_trl_rl_trainers(trainer_file", "patches/unsloth_import.py calls it for one trainer"),
    (RL, "\n    patch_trl_rl_trainers()", "patches/unsloth_import.py replaces what is called here"),
    (UTILS, '"flex_attention"', "patches/unsloth_flex_attention.py is needless: nothing chooses it"),
    (UTILS, "if max_seq_length < 512:", "OFFLOADED of job/model/unsloth_backend.py is this bound"),
    (VISION, 'torch_compiler_set_stance(stance = "default"', "patches/compile_stance.py sets it again"),
    (GEMMA, "TEMPORARY_PATCHES.append(patch_Gemma3Processor)", "patches/unsloth_import.py removes it from there"),
    (TOKENS, "result = fix_pad_token(original_tokenizer, model = model", "patches/unsloth_pad_token.py replaces it"),
    ("bitsandbytes/nn/modules.py", ".quant_state", "`release` of job/model/loaded.py frees it"),
]
"""Of packages for a GPU: file, what must stand in it, who relies on it."""
PRIVATE = {
    "model": {"_attn_implementation", "_patch_trl_rl_trainers"},
    "store": {"_raw_stream", "_fp"},
    "train": {
        *("_tr_loss", "_globalstep_last_logged", "_get_learning_rate", "_prepare_inputs"),
        *("_save", "_save_checkpoint", "_iterator", "_shutdown_workers"),
    },
}
"""Private names of other people that a room may use."""
OVERRIDDEN = {
    *("_get_train_sampler", "_save", "_save_checkpoint", "_save_optimizer_and_scheduler"),
    *("compute_loss", "get_batch_samples", "training_step"),
}
"""What LoraTrainer overrides of its base, but `__init__`."""
SET = {"model_accepts_loss_kwargs"}
"""Attributes of transformers' Trainer that LoraTrainer sets; every other one that it sets is its own."""
STANDARD = {"_replace", "_asdict", "_exit", "_Hash"}
"""Python's own."""


def digest(code: Any) -> str:
    """Of a function or class without its comments, docstring and indents."""
    text = re.sub(r'"""(?:.|\n)*?"""', "", inspect.getsource(inspect.unwrap(code)))
    lines = [line.strip() for line in text.splitlines()]
    return hashlib.sha256("\n".join(line for line in lines if line and line[0] != "#").encode()).hexdigest()[:12]


def private_names(file: Path) -> set[str]:
    """Private names in `file` that it does not define: attributes, imports, and texts given to getattr and its like."""
    tree = ast.parse(file.read_text())
    defined, used = set[str](), set[str]()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                defined.add(name)
            case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                defined.add(name)
            case ast.AnnAssign(target=ast.Name(id=name)):
                defined.add(name)
            case ast.Attribute(
                value=ast.Call(func=ast.Name(id="super")) | ast.Name(id="SFTTrainer" | "Trainer"), attr=name
            ):
                used.add(f"super {name}")
            case ast.Attribute(attr=name) | ast.alias(name=name):
                used.add(name)
            case ast.Call(
                func=ast.Name(id="getattr" | "hasattr" | "setattr"), args=[_, ast.Constant(value=str(name)), *_]
            ):
                used.add(name)
    theirs = {name.removeprefix("super ") for name in used if name.startswith("super ")} | (used - defined)
    return {name for name in theirs if re.match(r"_[a-zA-Z]", name)} - STANDARD


def known() -> dict[str, tuple[str, str]]:
    """Digest and reason by address."""
    found, place = dict[str, tuple[str, str]](), ""
    for line in CODE.strip().splitlines():
        match line.split(" ", 2):
            case [place]:
                continue
            case [digest, name, why]:
                found[place + name] = digest, why
    return found


if __name__ == "__main__":
    for address in known():
        print(digest(resolve_name(address)), address)
