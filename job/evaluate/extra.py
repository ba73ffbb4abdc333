"""Computes scores that need a model: BERTScore, and RadGraph F1, CheXbert and GREEN through the RadEval package.

Each is requested in `evaluation.extra_metrics` with its model's folder, which a bundle includes. RadEval finds its models only
in caches. So its folder is a cache that RadEval filled where there was a network (`XDG_CACHE_HOME=FOLDER
HF_HOME=FOLDER/huggingface`), and RadEval runs in a separate process that sees that cache and no network.
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

from job.config.schema import ExtraMetric
from job.context import RunContext
from job.data import Data
from job.errors import OutOfMemory, SpecError
from job.evaluate.encoder import refuse_unless_encoder
from job.evaluate.records import Answer, PerRow
from job.layout import EXTRA_KEY
from job.output.ownership import own_json, run_of
from job.runtime.staging import local_path

RADEVAL = {
    "radgraph": ("radgraph", "radgraph_partial"),
    "chexbert": ("f1chexbert", "f1chexbert_sample_acc_5"),
    "green": ("green", "green"),
}
"""RadEval's name of each metric, and of its list of values per row (RadEval 2.2)."""
ASK_RADEVAL = """
import json, sys
from radeval import RadEval
refs, hyps = json.load(sys.stdin)
print(json.dumps(RadEval(metrics=sys.argv[1:], per_sample=True, show_progress=False)(refs=refs, hyps=hyps)))
"""
LAYERS = {("bert", 12): 9, ("bert", 24): 18, ("roberta", 12): 10, ("roberta", 24): 17}
"""The layer that agrees best with human judgement, by kind and depth of the encoder (Zhang et al. 2020, as in bert-score
0.3.13)."""


def model_folders(asked: Mapping[ExtraMetric, str], scratch: Path) -> dict[str, Path]:
    """Return the folder of each metric's model; `asked` says where it is. Raises SpecError when a model or its package is
    missing."""
    found: dict[str, Path] = {}
    for metric, named in asked.items():
        field = f"evaluation.extra_metrics.{metric}"
        if metric in RADEVAL and importlib.util.find_spec("radeval") is None:
            raise SpecError(f"{field}: the package radeval is not installed; install the radiology extra, or remove it")
        found[metric] = folder = local_path(named, scratch, field, SpecError)
        if not (folder / "config.json" if metric == "bertscore" else folder).exists():
            kind = "an encoder (a folder with config.json)" if metric == "bertscore" else "RadEval's cache of models"
            raise SpecError(f"{field}: {named} is not here; name {kind}, or remove it")
        if metric == "bertscore":
            refuse_unless_encoder(folder, field)
    return found


def extra_scores(
    ctx: RunContext, data: Data, before: Sequence[Answer], after: Sequence[Answer]
) -> tuple[PerRow, PerRow]:
    """Return the values of each row before and after by metric: those in the output, or else computed now and stored there."""
    asked = ctx.spec.evaluation.extra_metrics
    if not asked or not after:
        return {}, {}
    import torch

    run = run_of(ctx.spec, data.identity)
    stored = own_json(ctx.store, EXTRA_KEY, run)
    with ctx.record.stage("score") as facts, ctx.preemption.leave_at_once():
        folders = model_folders(asked, ctx.scratch)
        for metric, named in asked.items():
            known, folder = f"{metric} of {named}", folders[metric]
            if known not in stored:
                try:
                    stored[known] = pair_scores(metric, folder, [*before, *after])
                except torch.OutOfMemoryError as error:
                    raise OutOfMemory(
                        f"evaluation.extra_metrics.{metric}: does not fit the GPU beside the tuned model; name a smaller one"
                    ) from error
                ctx.store.write(EXTRA_KEY, json.dumps(stored | {"run": run}).encode())
            facts.append(metric)
    values = {metric: stored[f"{metric} of {named}"] for metric, named in asked.items()}
    count = len(before)
    return {name: each[:count] for name, each in values.items()}, {name: each[count:] for name, each in values.items()}


def pair_scores(metric: str, folder: Path, rows: Sequence[Answer]) -> list[float]:
    """Return the value of `metric` for each row's text and its reference, by the model in `folder`."""
    ask = bertscore if metric == "bertscore" else radeval
    return ask(metric, folder, [row.reference for row in rows], [row.generated for row in rows])


def bertscore(_metric: str, folder: Path, references: Sequence[str], generated: Sequence[str]) -> list[float]:
    """BERTScore's F1 of each pair, without idf weights and baseline (Zhang et al. 2020): each word piece is matched with the
    most similar one of the other text. 0 where a text is empty."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model = AutoModel.from_pretrained(folder).eval()
        config = model.config
        space = {"add_prefix_space": True} if config.model_type == "roberta" else {}
        tokenizer = AutoTokenizer.from_pretrained(folder, **space)
    except MemoryError:
        raise
    except Exception as error:  # the libraries raise many types when these files make no model
        said = " ".join(str(error).split())[:300]
        raise SpecError(
            f"evaluation.extra_metrics.bertscore: {folder} is not a usable encoder ({said}); name another one"
        ) from error
    model = model.to(device)
    layer = LAYERS.get((config.model_type, config.num_hidden_layers), config.num_hidden_layers)
    most = min(tokenizer.model_max_length, config.max_position_embeddings - 2)

    def embedded(text: str) -> tuple[Any, Any]:
        """Return unit vectors (pieces, width), and which pieces are words (pieces,)."""
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
    """RadEval's value for each pair, 0 to 1. Raises SpecError with only the type of RadEval's error, whose message may quote a
    report."""
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
            f"evaluation.extra_metrics.{metric}: RadEval ended with {kind}; check that {folder} holds its models "
            "(docs/evaluation.md says how to fill it)"
        ) from error
