"""Renders the model card: README.md beside the adapter and beside the merged weights, from the contents of a report."""

from __future__ import annotations

import re
from collections.abc import Mapping
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
    code = _code(contents, kind)
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


LATE = (
    """

# Transformers 5.17 takes these states one layer late: see github.com/huggingface/transformers/pull/39785
def with_first(encoder, given, output):
    if len(output.hidden_states) == len(encoder.layers):
        output.hidden_states = (given[0], *output.hidden_states)
    return output

""",
    "\nmodel.model.vision_model.transformer.register_forward_hook(with_first)",
)
"""What job/model/patches/mllama_intermediate.py does, before and behind the line that loads the model."""


def _code(contents: Contents, kind: str) -> str:
    """Returns a program that answers about a file as was measured."""
    base, revision = contents.base.name_or_path, contents.lineage.base_revision
    pinned = f", revision={revision!r}" if revision else ""
    source = f"{base or 'BASE'!r}{pinned}" if kind == "adapter" else f"{kind!r}"
    libraries = "import torch\nfrom peft import PeftModel" if kind == "adapter" else "import torch"
    adapted = config = ""
    if kind == "adapter":
        config = ", GenerationConfig"
        adapted = """
model.generation_config = GenerationConfig.from_pretrained("adapter")  # the base's own may stop elsewhere
model = PeftModel.from_pretrained(model, "adapter")"""
    late_states, late = LATE if family_of(contents.base.model_type or "").padded_tiles else ("", "")
    shrunk, draft, resized = _shrinking(contents.bounds)
    shown = {"type": "image", "image": "PICTURE"}
    content = [shown, {"type": "text", "text": contents.instruction or "Describe this image."}]
    system = [{"role": "system", "content": contents.system}] if contents.system else []
    turns = "".join(f"\n    {turn!r}," for turn in [*system, {"role": "user", "content": content}])
    dated = f"\n    date_string={contents.date!r}," if contents.date else ""
    return f"""{libraries}
from PIL import Image, ImageOps
from transformers import AutoModelForImageTextToText, AutoProcessor{config}
{late_states}
model = AutoModelForImageTextToText.from_pretrained({source}, dtype="auto", device_map="auto"){late}{adapted}
processor = AutoProcessor.from_pretrained({kind!r})  # this folder

{shrunk}picture = Image.open("image.png"){draft}
picture = ImageOps.exif_transpose(picture).convert("RGB"){resized}
messages = [{turns.replace("'PICTURE'", "picture")}
]
inputs = processor.apply_chat_template(
    messages,
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",{dated}
).to(model.device, dtype=model.dtype)
with torch.inference_mode():
    answer = model.generate(**inputs, max_new_tokens={contents.max_new_tokens}, do_sample=False)
print(processor.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())"""


def _shrinking(bounds: Mapping[str, Any]) -> tuple[str, str, str]:
    """Returns the code of `job.data.images.Bounds.size` for one picture, what follows opening it, and what follows turning it;
    all empty if nothing is shrunk."""
    limits = {name: limit for name, limit in bounds.items() if limit}
    resample = limits.pop("resample", None)
    if not limits:
        return "", "", ""
    areas = [limits[name] for name in ("area", "row") if name in limits]
    if grid := limits.get("grid"):
        most = int(min(areas))
        code = f"""    if round(width / {grid}) * round(height / {grid}) * {grid}**2 <= {most}:
        return width, height
    factor = (width * height / {most}) ** 0.5
    return tuple(max(int(side / factor / {grid}), 1) * {grid} for side in (width, height))"""
    else:
        scales = [f"({area!r} / (width * height)) ** 0.5" for area in areas]
        scales += [f"{limits['side']!r} / max(width, height)"] if "side" in limits else []
        scales += [f"{limits['short']!r} / min(width, height)"] if "short" in limits else []
        by_short = ""
        if short := limits.get("short"):
            by_short = f"""
    if scale == {short!r} / min(width, height) < 1:
        return tuple(int({short!r} * side / min(width, height)) for side in (width, height))"""
        code = f"""    scale = min(1, {", ".join(scales)}){by_short}
    return max(round(width * scale), 4), max(round(height * scale), 4)"""
    size = "shrunk(*picture.size)"
    head = f"def shrunk(width, height):  # as in training\n{code}\n\n\n"
    how = "Image.Resampling.LANCZOS, reducing_gap=3.0" if resample is None else f"Image.Resampling({resample})"
    draft = f"\npicture.draft(None, {size})" if resample is None else ""
    return head, draft, f"\npicture = picture.resize({size}, {how})"
