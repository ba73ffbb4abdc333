"""A tiny model that learned to say what it sees, and what evaluation measured of it: an adapter with a gain to lose."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from job.config.schema import JobSpec
from job.data import Data
from job.data.prepare import prepare
from job.evaluate import compare
from job.evaluate.generate import generations, to_device
from job.evaluate.records import Settings
from job.evaluate.stage import Results, label_specs
from job.model.collator import Collator
from job.model.loaded import Loaded
from job.model.transformers_backend import load
from tests.tiny import CPU, job_spec, models, picture

FINDINGS = ("an effusion", "a nodule", "a fracture")
ROWS = 24
"""Half of them are held out, and learned as well: here a gain is wanted, not a fair measure of it."""


@dataclass(frozen=True)
class Trained:
    spec: JobSpec
    loaded: Loaded
    data: Data
    results: Results


def make_wide(folder: Path) -> Path:
    """A tiny Qwen2.5-VL whose widths are multiples of the 128 columns that share a scale in INT4."""
    parts = models.TEXT["qwen2_5_vl"], models.VISION["qwen2_5_vl"]
    before = [part["tiny"] for part in parts]
    rope = before[0]["rope_parameters"] | {"mrope_section": [4, 6, 6]}
    wide = {"hidden_size": 128, "intermediate_size": 256, "rope_parameters": rope}
    try:
        for part, sizes in zip(parts, (wide, {"out_hidden_size": 128}), strict=True):
            part["tiny"] = part["tiny"] | sizes
        return models.make_model("qwen2_5_vl", folder, dtype=torch.bfloat16)
    finally:
        for part, tiny in zip(parts, before, strict=True):
            part["tiny"] = tiny


def make_trained(folder: Path, steps: int = 60, **export: Any) -> Trained:
    """Train for `steps`, and measure before and after. Without steps there is no gain."""
    rows = folder / "rows"
    rows.mkdir(parents=True)
    lines = [
        {"file_name": f"{number}.png", "caption": f"There is {finding}.", "finding": finding.split()[1]}
        for number in range(ROWS)
        for finding in [FINDINGS[number % len(FINDINGS)]]
    ]
    for number, line in enumerate(lines):
        picture(number).save(rows / line["file_name"])
    (rows / "metadata.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    spec = job_spec(
        model={"name_or_path": "tiny", "precision": "32bit"},
        lora={"r": 8},
        dataset={"path": str(rows), "answer_column": "caption", "eval_fraction": 0.5},
        evaluation={
            "labels": {"finding": {"column": "finding"}},
            "max_new_tokens": 8,
            "batch_size": 12,
            "bootstrap_samples": 200,
        },
        export=export,
    )
    data = prepare(spec, folder / "data")
    loaded = load(spec, make_wide(folder / "base"), CPU)
    train(loaded, [data.evaluation[place] for place in range(len(data.evaluation))], steps)
    order = range(len(data.evaluation))
    before, after = (generations(loaded, data.evaluation, spec, tuned=tuned, order=order) for tuned in (False, True))
    settings = Settings(spec.evaluation.bootstrap_samples, spec.evaluation.confidence, 0)
    measured = compare.compare(before, after, label_specs(spec.evaluation, data), (), settings)
    return Trained(spec, loaded, data, Results(before, after, measured, []))


def train(loaded: Loaded, rows: list[Any], steps: int) -> None:
    torch.manual_seed(0)
    inputs = to_device(Collator(loaded.processor, 2048)(rows), loaded)
    learned = [weight for weight in loaded.model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=5e-3)
    loaded.model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loaded.model(**inputs).loss.backward()
        optimizer.step()
    loaded.model.eval()
