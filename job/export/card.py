"""The model card: README.md beside the adapter and beside the merged weights, made from the stored facts of a run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from job.evaluate import report
from job.export.licences import Licence, licence_of
from job.serving import SERVERS

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
KINDS = {
    "adapter": "A LoRA adapter for",
    "merged": "Weights with a LoRA adapter folded in, in the precision and the files of",
    "merged_fp8": "Weights in FP8 (compressed-tensors) with a LoRA adapter folded in, made from",
    "merged_int4": "Weights in INT4 (compressed-tensors W4A16) with a LoRA adapter folded in, made from",
    "gguf": "Weights in GGUF for llama.cpp, of the base and of its vision tower, with a LoRA adapter folded in, made from",
    "merged_4bit": "Weights in 4 bits (bitsandbytes nf4) with a LoRA adapter folded in, made from",
}


def render(facts: Mapping[str, Any], kind: str = "adapter") -> str:
    """The card of one of `KINDS` with its YAML front matter, as the Hub reads it. `facts` as for `report.render`.

    Besides those: `base` {"name_or_path", "model_type"}, `instruction`, and `base_revision` of the lineage. No caption
    and no id of a row is in it.
    """
    lineage, measured = facts.get("lineage") or {}, facts.get("metrics") or {}
    base, family = ((facts.get("base") or {}).get(name) or "" for name in ("name_or_path", "model_type"))
    licence = licence_of(base, family)
    code = _code(str(facts.get("instruction") or "Describe this image."), base, lineage.get("base_revision"), kind)
    return report.fill(
        "card.md",
        autoescape=False,
        name=facts.get("name") or "vision-lora",
        kind=kind,
        kinds=KINDS,
        base=base,
        front_matter=_front_matter(base, licence, measured, kind),
        lineage={"base_revision": None, "taken_step": None} | lineage,
        results=report.markdown(facts),
        measured={"groups": {}, "settings": {"rows": 0}, "gaps": {key: {} for key in measured.get("groups") or ()}}
        | measured,
        data=facts.get("data") or {},
        gate=facts.get("gate") or {},
        shows_rows=report.shows_rows(facts),
        licence=licence,
        servers=SERVERS.get(family, ()),
        code=code,
        fence="`" * max(3, 1 + max(map(len, re.findall("`+", code)), default=0)),
    )


def _front_matter(base: str, licence: Licence, measured: Mapping[str, Any], kind: str) -> str:
    head: dict[str, Any] = {"library_name": "peft" if kind == "adapter" else "transformers"}
    if HUB_ID.fullmatch(base):
        head |= {"base_model": base, "base_model_relation": "adapter" if kind == "adapter" else "finetune"}
    head |= {"pipeline_tag": "image-text-to-text", "license": licence.tag}
    if licence.name:
        head["license_name"] = licence.name
    head["tags"] = ["lora", "vision-language", "vision-lora-job"]
    if "rougeL" in (measured.get("change") or {}):
        head["metrics"] = ["rouge", "bleu", "chrf"]
    return yaml.safe_dump(head, sort_keys=False, allow_unicode=True)


def _code(instruction: str, base: str, revision: str | None, kind: str) -> str:
    pinned = f", revision={revision!r}" if revision else ""
    source = f"{base or 'BASE'!r}{pinned}" if kind == "adapter" else f"{kind!r}"
    libraries = "import torch\nfrom peft import PeftModel" if kind == "adapter" else "import torch"
    adapted = '\nmodel = PeftModel.from_pretrained(model, "adapter")' if kind == "adapter" else ""
    return f"""{libraries}
from transformers import AutoModelForImageTextToText, AutoProcessor

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
    answer = model.generate(**inputs, max_new_tokens=128, do_sample=False)
print(processor.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""
