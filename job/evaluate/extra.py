"""Scores that need a model of their own: BERTScore, and RadGraph F1, CheXbert and GREEN through the RadEval package.

Each is asked for in `evaluation.extra_metrics` with the folder of its model, which a bundle brings along. RadEval finds its
models in caches alone. So its folder is a cache that RadEval filled where there was a network (`XDG_CACHE_HOME=FOLDER
HF_HOME=FOLDER/huggingface`), and it runs in a process of its own, which sees that cache and no network.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from job.attempt import Attempt
from job.errors import OutOfMemory, SpecError
from job.output import read_json
from job.spec import JobSpec
from job.stage_in import local_path

EXTRA_KEY = "evaluation/extra.json"
RADEVAL = {
    "radgraph": ("radgraph", "radgraph_partial"),
    "chexbert": ("f1chexbert", "f1chexbert_sample_acc_5"),
    "green": ("green", "green"),
}
"""RadEval's own name of each metric, and of the list with a value for each row (RadEval 2.2)."""
ASK_RADEVAL = """
import json, sys
from radeval import RadEval
refs, hyps = json.load(sys.stdin)
print(json.dumps(RadEval(metrics=sys.argv[1:], per_sample=True, show_progress=False)(refs=refs, hyps=hyps)))
"""
LAYERS = {("bert", 12): 9, ("bert", 24): 18, ("roberta", 12): 10, ("roberta", 24): 17}
"""The layer that agrees best with people, by kind and depth of the encoder (Zhang et al. 2020, as in bert-score 0.3.13)."""


def model_folders(spec: JobSpec, scratch: Path) -> dict[str, Path]:
    """Where the model of each metric asked for is. Raises SpecError where a model or its package is missing."""
    found: dict[str, Path] = {}
    for metric, named in spec.evaluation.extra_metrics.items():
        field = f"evaluation.extra_metrics.{metric}"
        if metric in RADEVAL and importlib.util.find_spec("radeval") is None:
            raise SpecError(f"{field}: the package radeval is not installed; install the radiology extra, or remove it")
        found[metric] = folder = local_path(named, scratch, field, SpecError)
        if not (folder / "config.json" if metric == "bertscore" else folder).exists():
            kind = "an encoder (a folder with config.json)" if metric == "bertscore" else "RadEval's cache of models"
            raise SpecError(f"{field}: {named} is not here; name {kind}, or remove it")
    return found


def scored(attempt: Attempt, before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]) -> None:
    """Give each row `extra`, its values by metric: those that the output holds, else computed now and kept there."""
    if not attempt.spec.evaluation.extra_metrics or not after:
        return
    import torch

    stored: dict[str, Any] = read_json(attempt.store, EXTRA_KEY) or {}
    with attempt.record.stage("score") as facts, attempt.preemption.leave_at_once():
        for metric, folder in model_folders(attempt.spec, attempt.scratch).items():
            if metric not in stored:
                references = [str(row["reference"]) for row in (*before, *after)]
                generated = [str(row["generated"]) for row in (*before, *after)]
                ask = bertscore if metric == "bertscore" else radeval
                try:
                    stored[metric] = ask(metric, folder, references, generated)
                except torch.OutOfMemoryError as error:
                    raise OutOfMemory(
                        f"evaluation.extra_metrics.{metric}: no room on the GPU beside the tuned model; name a smaller one"
                    ) from error
                attempt.store.write(EXTRA_KEY, json.dumps(stored).encode())
            facts.append(metric)
    for place, row in enumerate((*before, *after)):
        row["extra"] = {metric: stored[metric][place] for metric in attempt.spec.evaluation.extra_metrics}


def bertscore(_metric: str, folder: Path, references: Sequence[str], generated: Sequence[str]) -> list[float]:
    """BERTScore's F1 of each pair, without idf weights and baseline (Zhang et al. 2020): each word piece is matched with the
    most similar one of the other text. 0 where a text is empty."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModel.from_pretrained(folder).eval().to(device)
    config = model.config
    space = {"add_prefix_space": True} if config.model_type == "roberta" else {}
    tokenizer = AutoTokenizer.from_pretrained(folder, **space)
    layer = LAYERS.get((config.model_type, config.num_hidden_layers), config.num_hidden_layers)
    most = min(tokenizer.model_max_length, config.max_position_embeddings - 2)

    def embedded(text: str) -> tuple[Any, Any]:
        """(pieces, width) of length 1, and (pieces,) which are words."""
        pieces = tokenizer(
            text.strip(), truncation=True, max_length=most, return_special_tokens_mask=True, return_tensors="pt"
        ).to(device)
        words = pieces.pop("special_tokens_mask")[0] == 0
        states = model(**pieces, output_hidden_states=True).hidden_states[layer][0]
        return torch.nn.functional.normalize(states, dim=-1), words

    def f1(reference: str, said: str) -> float:
        if not (reference.strip() and said.strip()):
            return 0.0
        (theirs, of_theirs), (ours, of_ours) = embedded(reference), embedded(said)
        alike = ours @ theirs.T
        precision = float(alike.max(dim=1).values[of_ours].mean())
        recall = float(alike.max(dim=0).values[of_theirs].mean())
        return round(2 * precision * recall / (precision + recall), 6)

    with torch.inference_mode():
        return [f1(*pair) for pair in zip(references, generated, strict=True)]


def radeval(metric: str, folder: Path, references: Sequence[str], generated: Sequence[str]) -> list[float]:
    """RadEval's value for each pair, 0 to 1. Raises SpecError with the kind of its error, whose words may be a report's."""
    name, key = RADEVAL[metric]
    cache = {"XDG_CACHE_HOME": str(folder), "HF_HOME": str(folder / "huggingface"), "HF_HUB_OFFLINE": "1"}
    asked = subprocess.run(
        [sys.executable, "-c", ASK_RADEVAL, name],
        input=json.dumps([references, generated]),
        env=os.environ | cache,
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        values: Mapping[str, list[float]] = json.loads(asked.stdout.splitlines()[-1])
        return [float(value) for value in values[key]]
    except (IndexError, ValueError, KeyError, TypeError) as error:
        kind = (asked.stderr.strip().splitlines() or ["silence"])[-1].partition(":")[0]
        kind = kind if re.fullmatch(r"[\w.]+", kind) else "words that may be a report's"
        raise SpecError(
            f"evaluation.extra_metrics.{metric}: RadEval ended with {kind}; are its models in {folder}? Fill it where there is "
            "a network, as docs/evaluation.md says"
        ) from error
