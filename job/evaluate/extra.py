"""Computes scores that need a model: BERTScore here, the others through RadEval (`job.evaluate.radeval`).

Each is requested in `evaluation.extra_metrics` with its model's folder, which a bundle includes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from job.config.schema import ExtraMetric
from job.context import RunContext
from job.data import Data
from job.errors import OutOfMemory, SpecError
from job.evaluate.encoder import refuse_unless_encoder
from job.evaluate.radeval import RADEVAL, ask_radeval, refuse_without_radeval
from job.evaluate.records import Answer, PerRow
from job.layout import EXTRA_KEY
from job.output.stored import own_json, run_of
from job.runtime.staging import local_path

LAYERS = {("bert", 12): 9, ("bert", 24): 18, ("roberta", 12): 10, ("roberta", 24): 17}
"""The layer that agrees best with human judgement, by kind and depth of the encoder (Zhang et al. 2020, as in bert-score
0.3.13)."""


def model_folders(asked: Mapping[ExtraMetric, str], scratch: Path) -> dict[ExtraMetric, Path]:
    """Return the folder of each metric's model; `asked` says where it is. Raises SpecError when a model or its package is
    missing."""
    found: dict[ExtraMetric, Path] = {}
    for metric, named in asked.items():
        field = f"evaluation.extra_metrics.{metric}"
        if metric in RADEVAL:
            refuse_without_radeval(field)
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
        keys = {metric: f"{metric} by {named}" for metric, named in asked.items()}
        missing = {metric: folder for metric, folder in folders.items() if keys[metric] not in stored}
        try:
            for found in scored(missing, [before, after]):
                stored |= {keys[metric]: values for metric, values in found.items()}
                ctx.store.write(EXTRA_KEY, json.dumps(stored | {"run": run}).encode())
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(
                "evaluation.extra_metrics.bertscore: does not fit the GPU beside the tuned model; name a smaller one"
            ) from error
        facts += asked
    return by_side(stored[key] for key in keys.values())


def by_side(found: Iterable[Mapping[str, list[Any]]]) -> tuple[PerRow, PerRow]:
    """Return the values of all metrics before, and after, by name."""
    values = {name: sides for each in found for name, sides in each.items()}
    return {name: sides[0] for name, sides in values.items()}, {name: sides[1] for name, sides in values.items()}


def scored(
    folders: Mapping[ExtraMetric, Path], sides: Sequence[Sequence[Answer]]
) -> Iterator[dict[ExtraMetric, dict[str, list[Any]]]]:
    """Yield for some metrics, by name and side, the value of each row's text and its reference. RadEval's metrics of one folder
    share a process, and so the models that several of them need."""
    pairs = [([row.reference for row in side], [row.generated for row in side]) for side in sides]
    by_folder: dict[Path, list[ExtraMetric]] = {}
    for metric, folder in folders.items():
        if metric == "bertscore":
            yield {metric: {metric: [bertscore(folder, *pair) for pair in pairs]}}
        else:
            by_folder.setdefault(folder, []).append(metric)
    for folder, metrics in by_folder.items():
        yield ask_radeval(metrics, folder, pairs)


def bertscore(folder: Path, references: Sequence[str], generated: Sequence[str]) -> list[float]:
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
