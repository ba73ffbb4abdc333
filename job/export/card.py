"""The model card: README.md beside the adapter and beside the merged weights, made from the stored facts of a run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from job.evaluate import report, wording
from job.export.licences import Licence, licence_of
from job.serving import SERVERS

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


KINDS = {
    "adapter": "A LoRA adapter for",
    "merged": "Weights with a LoRA adapter folded in, in the precision and the files of",
    "merged_fp8": "Weights in FP8 (compressed-tensors) with a LoRA adapter folded in, made from",
    "gguf": "Weights in GGUF for llama.cpp, of the base and of its vision tower, with a LoRA adapter folded in, made from",
    "merged_4bit": "Weights in 4 bits (bitsandbytes nf4) with a LoRA adapter folded in, made from",
}


def render(facts: Mapping[str, Any], kind: str = "adapter") -> str:
    """The card of one of `KINDS` with its YAML front matter, as the Hub reads it. `facts` as for `report.render`.

    Besides those: `base` {"name_or_path", "model_type"}, `instruction`, and `base_revision` of the lineage. No caption
    and no id of a row is in it.
    """
    lineage, about_base = facts.get("lineage") or {}, facts.get("base") or {}
    base = str(about_base.get("name_or_path") or "")
    name = str(facts.get("name") or "vision-lora")
    licence = licence_of(base, str(about_base.get("model_type") or ""))
    parts = [
        _front_matter(base, licence, facts, kind),
        f"# {report.cell(name)}\n",
        _opening(base, lineage, kind),
        "## Intended use\n\n" + _intended(),
        "## Results\n\n" + (report.markdown(facts) or "Nothing was measured.\n"),
        "## Data\n\n" + _list(facts.get("data"), "Not recorded.\n"),
        "## Limits\n\n" + _limits(facts),
        "## Human oversight\n\n" + OVERSIGHT,
        "## Privacy\n\n" + _privacy(facts),
        "## Licence\n\n" + licence.text,
        "## How to load\n\n" + _loading(facts, base, kind),
        _serving(str(about_base.get("model_type") or ""), kind),
        _proof(facts.get("gate"), kind),
        "## Lineage\n\n" + _list(lineage, "Not recorded.\n"),
    ]
    return "\n".join(part for part in parts if part)


OVERSIGHT = """**Not a medical device.** It has not been cleared or certified for diagnosis, triage or treatment. \
Its findings need a qualified reader: a person who is trained for these images looks at each image, and answers for \
each text before it is used. Show that a text was generated. Watch its errors in use, and stop when they grow.
"""


def _front_matter(base: str, licence: Licence, facts: Mapping[str, Any], kind: str) -> str:
    head: dict[str, Any] = {"library_name": "peft" if kind == "adapter" else "transformers"}
    if HUB_ID.fullmatch(base):
        head |= {"base_model": base, "base_model_relation": "adapter" if kind == "adapter" else "finetune"}
    head["pipeline_tag"] = "image-text-to-text"
    head["license"] = licence.tag
    if licence.name:
        head["license_name"] = licence.name
    head["tags"] = ["lora", "vision-language", "vision-lora-job"]
    measured = (facts.get("metrics") or {}).get("change") or {}
    if scorers := [name for name, key in (("rouge", "rougeL"), ("bleu", "bleu"), ("chrf", "chrf")) if key in measured]:
        head["metrics"] = scorers
    return f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---\n"


def _opening(base: str, lineage: Mapping[str, Any], kind: str) -> str:
    revision = f" at revision {report.cell(lineage['base_revision'])}" if lineage.get("base_revision") else ""
    return f"{KINDS[kind]} {report.cell(base) if base else 'a base model that was not recorded'}{revision}.\n"


def _intended() -> str:
    return """- **For** drafting texts about images of the kind it was tuned on, for research and for drafts that a \
qualified person checks.
- **Not for** deciding on a person's care, for use without a person who checks, for other kinds of images, body parts, \
devices or languages than those of the data, or for identifying people.
"""


def _limits(facts: Mapping[str, Any]) -> str:
    measured = facts.get("metrics") or {}
    rows = (measured.get("settings") or {}).get("rows")
    lines = [
        "It knows the scope of its data and no more: other sites, devices, views, ages and languages were not measured "
        "unless a table above names them.",
        "Rare conditions are rare in the data too. It may miss them, or name a common one in their place, and the "
        "averages above would hardly show it.",
        "It can state findings that are not there, and leave out some that are, in fluent and certain words.",
        wording.UNSEEN,
    ]
    if rows:
        lines.insert(0, f"It was measured on {rows:,} held-out samples; the intervals say how far that carries.")
    few = [
        f"{wording.readable(column)} {value}"
        for column, values in (measured.get("groups") or {}).items()
        for value, group in values.items()
        if group["too_few"]
    ]
    if few:
        lines.append(f"Too few held-out samples to judge: {', '.join(few)}.")
    for column, gaps in (measured.get("gaps") or {}).items():
        names = [wording.about(metric).title for metric, gap in gaps.items() if gap["flagged"]]
        if names:
            lines.append(f"Results differ by {column} more than chance explains: {', '.join(names)}.")
    return "".join(f"- {report.cell(line)}\n" for line in lines)


def _privacy(facts: Mapping[str, Any]) -> str:
    shown = "are" if report.shows_rows(facts) else "are not"
    return (
        "A model can reproduce texts that it was tuned on. If those were about people, treat these weights with the "
        "care that the data asks for, and look at what it writes before you share them. This card holds no caption, "
        f"image or id of the data. Held-out images and texts {shown} in the run's report.\n"
    )


def _loading(facts: Mapping[str, Any], base: str, kind: str) -> str:
    if kind == "gguf":
        return "```sh\nllama-server -m gguf/model.gguf --mmproj gguf/mmproj.gguf\n```\n"
    pinned = (facts.get("lineage") or {}).get("base_revision")
    revision = f", revision={str(pinned)!r}" if pinned else ""
    source = f"{(base or 'BASE')!r}{revision}"
    if kind == "adapter":
        load = f"""import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

base = AutoModelForImageTextToText.from_pretrained({source}, dtype="auto", device_map="auto")
model = PeftModel.from_pretrained(base, "adapter")  # this folder
processor = AutoProcessor.from_pretrained("adapter")"""
    else:
        load = f"""import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{kind}", dtype="auto", device_map="auto")  # this folder
processor = AutoProcessor.from_pretrained("{kind}")"""
    instruction = str(facts.get("instruction") or "Describe this image.")
    code = f"""{load}

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
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", code)), default=0))
    return f"{fence}python\n{code}\n{fence}\n\nIt was measured like this: with this instruction, and greedily.\n"


def _serving(model_type: str, kind: str) -> str:
    if kind != "merged" or model_type not in SERVERS:
        return ""
    rows = [
        f"| {server.name} | {server.versions or 'no version'} | {f'`{server.command}`' if server.versions else ''} "
        f"| {server.note} | {server.source} |\n"
        for server in SERVERS[model_type]
    ]
    head = "| server | versions | command | note | source |\n|---|---|---|---|---|\n"
    return (
        "## How to serve\n\nAs the servers' own documents say; only transformers was tried here.\n\n"
        + head
        + "".join(rows)
    )


def _proof(gate: object, kind: str) -> str:
    if kind == "adapter" or not isinstance(gate, Mapping) or not gate:
        return ""
    return (
        "## Proof of the merge\n\nMeasured on held-out rows against base + adapter, not folded, with the weights read back "
        "from where they were written. Differences are shares of the spread of the logits, losses nats a token; what "
        "rounding alone makes of this model stands beside them.\n\n" + _list(gate, "")
    )


def _list(facts: object, otherwise: str) -> str:
    lines = wording.flat(facts) if isinstance(facts, Mapping) else []
    return "".join(f"- {report.cell(name)}: {report.cell(value)}\n" for name, value in lines) or otherwise
