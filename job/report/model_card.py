"""Renders the model card: README.md beside the adapter and beside the merged weights, from the contents of a report."""

from __future__ import annotations

import re
from typing import Any

import yaml

from job.evaluate.records import Comparison
from job.model.families import family_of
from job.report import page
from job.report.contents import Contents
from job.report.licences import ON_HUB, Licence, licence_of

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
KINDS = {
    "adapter": "A LoRA adapter for",
    "merged": "Weights with a LoRA adapter folded in, in the precision and the files of",
    "merged_fp8": "Weights in FP8 (compressed-tensors) with a LoRA adapter folded in, made from",
    "merged_int4": "Weights in INT4 (compressed-tensors W4A16) with a LoRA adapter folded in, made from",
    "gguf": "Weights in GGUF for llama.cpp, of the base and of its vision tower, with a LoRA adapter folded in, made from",
    "merged_4bit": "Weights in 4 bits (bitsandbytes nf4) with a LoRA adapter folded in, made from",
}


def render(contents: Contents, kind: str = "adapter") -> str:
    """Returns the card of one of `KINDS` with its YAML front matter, as the Hub reads it. It contains no caption and no row
    id."""
    base, family = contents.base.name_or_path, contents.base.model_type or ""
    licence = licence_of(base, family)
    instruction = contents.instruction or "Describe this image."
    code = _code(instruction, base, contents.lineage.base_revision, kind, contents.max_new_tokens)
    return page.fill(
        "model_card.md",
        autoescape=False,
        contents=contents,
        kind=kind,
        kinds=KINDS,
        front_matter=_front_matter(base, licence, contents.metrics, kind),
        results=page.markdown(contents.metrics),
        licence=licence,
        servers=family_of(family).servers,
        code=code,
        fence="`" * max(3, 1 + max(map(len, re.findall("`+", code)), default=0)),
    )


def _front_matter(base: str, licence: Licence, measured: Comparison, kind: str) -> str:
    head: dict[str, Any] = {"library_name": "peft" if kind == "adapter" else "transformers"}
    if HUB_ID.fullmatch(base):
        head |= {"base_model": base, "base_model_relation": "adapter" if kind == "adapter" else "finetune"}
    head |= {"pipeline_tag": "image-text-to-text", "license": licence.name if licence.name in ON_HUB else "other"}
    if licence.name not in ON_HUB:
        head["license_name"] = licence.name
    head["tags"] = ["lora", "vision-language", "vision-lora-job"]
    if "rougeL" in measured.change:
        head["metrics"] = ["rouge", "bleu", "chrf"]
    return yaml.safe_dump(head, sort_keys=False, allow_unicode=True)


def _code(instruction: str, base: str, revision: str | None, kind: str, max_new_tokens: int) -> str:
    pinned = f", revision={revision!r}" if revision else ""
    source = f"{base or 'BASE'!r}{pinned}" if kind == "adapter" else f"{kind!r}"
    libraries = "import torch\nfrom peft import PeftModel" if kind == "adapter" else "import torch"
    adapted = config = ""
    if kind == "adapter":
        config = ", GenerationConfig"
        adapted = """
model.generation_config = GenerationConfig.from_pretrained("adapter")  # the base's own may stop elsewhere
model = PeftModel.from_pretrained(model, "adapter")"""
    return f"""{libraries}
from transformers import AutoModelForImageTextToText, AutoProcessor{config}

model = AutoModelForImageTextToText.from_pretrained({source}, dtype="auto", device_map="auto"){adapted}
processor = AutoProcessor.from_pretrained({kind!r})  # this folder

question = [{{"type": "image", "path": "image.png"}}, {{"type": "text", "text": {instruction!r}}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": question}}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
).to(model.device)
with torch.inference_mode():
    answer = model.generate(**inputs, max_new_tokens={max_new_tokens}, do_sample=False)
print(processor.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""
