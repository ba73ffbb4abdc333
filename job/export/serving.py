"""Writes beside published weights what they were measured with, and tells what no file can say."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from filecmp import cmpfiles
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image

from job.config.schema import JobSpec
from job.data import Data
from job.data.conversations import conversation
from job.data.images import Bounds
from job.export.engines import PROCESSORS
from job.export.merge import copy_rest
from job.model.base_model import json_object, weight_files
from job.model.collator import DATE, adds_first_token, replacement
from job.model.generation import greedy
from job.model.loaded import Loaded
from job.model.transformers_backend import load_processor
from job.store import files_of

SIZES = ((2000, 2000), (3000, 1300), (1300, 3000), (700, 500))
"""Pictures that show whether a processor shrinks as training did."""


@dataclass(frozen=True)
class Serving:
    """What a server must be given to do what was measured. `system` is the content of the system turn in the form that the
    template takes, `date` what the template would else replace with today's; `unwritten` names what no published file says.
    `bounds` are the limits that pictures were shrunk to."""

    system: Any = None
    date: str | None = None
    unwritten: tuple[str, ...] = ()
    bounds: dict[str, Any] = field(default_factory=dict)


def write_settings(folder: Path, loaded: Loaded, spec: JobSpec, bounds: Bounds) -> None:
    """Write into a folder to publish how its answers were measured: generation settings, and the limit of pictures if its image
    processor can keep it."""
    config = greedy(loaded.processor, loaded.folder)
    config.update(max_new_tokens=spec.evaluation.max_new_tokens, repetition_penalty=1.0)
    config.save_pretrained(folder)
    for file in filter(Path.is_file, (folder / name for name in PROCESSORS)):
        tree = json_object(file)
        images = tree.get("image_processor", tree)
        if _limit(images, bounds):
            file.write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n")


def _limit(images: dict[str, Any], bounds: Bounds) -> bool:
    """Lower the largest area of Qwen's image processor to that of training. Returns whether it changed. Pictures that training
    shrank stay as they are, and larger ones get as many tokens as they had there."""
    if not str(images.get("image_processor_type")).startswith("Qwen2VL"):
        return False
    most, changed = bounds.most(), False
    if bounds.side:
        grid = images.get("patch_size", 14) * images.get("merge_size", 2)
        most = (max(round(bounds.side / grid), 1) * grid) ** 2
    for settings, low, high in (
        (images, "min_pixels", "max_pixels"),
        (images.get("size") or {}, "shortest_edge", "longest_edge"),
    ):
        if most is not None and most < (settings.get(high) or 0):
            settings[high], changed = max(most, settings.get(low) or 0), True
    return changed


def beside_weights(folder: Path, loaded: Loaded, spec: JobSpec, bounds: Bounds) -> Path:
    """Write into a folder all that is published beside merged weights but for the model card, and return it."""
    copy_rest(loaded.folder, folder)
    write_settings(folder, loaded, spec, bounds)
    return folder


def spoilt(folder: Path, loaded: Loaded, spec: JobSpec, bounds: Bounds) -> str | None:
    """Explain which files beside merged weights are not, byte for byte, the base's or those of `write_settings`; None if all
    are. The model card may be there."""
    with TemporaryDirectory(dir=folder.parent) as name:
        made = beside_weights(Path(name), loaded, spec, bounds)
        wanted = set(files_of(made))
        there = set(files_of(folder)) - {"README.md", *(file.name for file in weight_files(loaded.folder))}
        _, changed, unread = cmpfiles(made, folder, wanted & there, shallow=False)
    what = {
        "missing": wanted - there,
        "not the base model's": {*changed, *unread},
        "not of the base model": there - wanted,
    }
    found = [f"{name} is {wrong}" for wrong, names in what.items() for name in sorted(names)]
    return f"merged/: {'; '.join(found)}; only the adapter is kept; run again" if found else None


def serving(spec: JobSpec, loaded: Loaded, data: Data, scratch: Path) -> Serving:
    """Find what a server must be given beside the published files."""
    with TemporaryDirectory(dir=scratch) as name:
        published = load_processor(spec.model, beside_weights(Path(name), loaded, spec, data.bounds))
    system, date = _system_turn(loaded.processor, spec.dataset.system_prompt)
    shrunk, unwritten = data.bounds, list[str]()
    if shrunk.side or not all(_same_tokens(loaded.processor, published, shrunk, size) for size in SIZES):
        unwritten.append("how far pictures were shrunk (dataset.image_max_side), which its processor cannot do")
    if data.facts.source.startswith("dicom"):
        unwritten.append("how DICOM files became pictures")
    if system is not None:
        unwritten.append("the system prompt")
    if date is not None:
        unwritten.append(f"the date in the system turn ({date}), where the chat template writes today's")
    if adds_first_token(loaded.processor):
        unwritten.append("the tokenizer's first token, which a server adds only if add_special_tokens is true")
    return Serving(system, date, tuple(unwritten), shrunk._asdict())


def _same_tokens(measured: Any, published: Any, bounds: Bounds, size: tuple[int, int]) -> bool:
    shown = (Image.new("RGB", each) for each in (size, bounds.size(*size, 1)))
    return replacement(published, next(shown)) == replacement(measured, next(shown))


def _system_turn(processor: Any, prompt: str | None) -> tuple[Any, str | None]:
    """Return the content of the system turn, and the date if the template writes one into the conversation."""
    *asked, _ = conversation("?", ".", prompt)

    def said(**named: str) -> str:
        return str(processor.apply_chat_template(asked, tokenize=False, add_generation_prompt=True, **named))

    system = asked[0]["content"] if prompt else None
    if prompt and str(system) in said():  # see `job.model.collator.render`
        system = asked[0]["content"] = prompt
    dated = "date_string" in str(processor.chat_template) and said(date_string=DATE) != said(date_string="-")
    return system, DATE if dated else None
