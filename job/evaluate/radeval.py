"""Asks RadEval (Xu et al. 2025, radeval 2.2) for the radiology metrics, in one process of its own that sees no network.

RadEval finds its models only in caches, so a metric's folder is a cache that RadEval filled where there was a network. It needs
other versions of common packages than the job, so it may live in an environment of its own, whose Python JOB_RADEVAL_PYTHON
names (`.ci/radeval` makes one).
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from job.config.environment import Environment
from job.config.schema import ExtraMetric
from job.errors import SpecError

RADEVAL: dict[ExtraMetric, tuple[str, str]] = {
    "radgraph": ("radgraph", "radgraph_partial"),
    "chexbert": ("f1chexbert", "f1chexbert_sample_acc_5"),
    "ratescore": ("ratescore", "ratescore"),
    "radcliq": ("radcliq", "radcliq_v1"),
    "srrbert": ("srrbert", "srrbert_weighted_f1"),
    "green": ("green", "green"),
    "crimson": ("crimson", "crimson"),
}
"""RadEval's name of each metric, and of its list of values per row."""
LABELS = "chexbert_labels"
"""What CheXbert reads of each row: `CONDITIONS` of the reference, then of the answer; 1 for present, -1 for uncertain, else 0."""
CONDITIONS = (
    *(
        "enlarged cardiomediastinum",
        "cardiomegaly",
        "lung opacity",
        "lung lesion",
        "edema",
        "consolidation",
        "pneumonia",
    ),
    *("atelectasis", "pneumothorax", "pleural effusion", "pleural other", "fracture", "support devices", "no finding"),
)
ASK = """
import json, sys
import radeval
sys.modules.setdefault("RadEval", radeval)  # its RadGraph imports it by this name, which only some file systems find
from radeval import RadEval
names, sides = json.load(sys.stdin)
if {"f1chexbert", "radcliq"} & set(names):
    import torch
    from radeval.metrics.f1chexbert import F1CheXbert
    if not torch.cuda.is_available():
        F1CheXbert.__init__.__kwdefaults__["device"] = "cpu"  # its default is cuda everywhere
if "srrbert" in names:
    import nltk
    nltk.download = lambda *_, **__: True  # it looks for a network at each start
whole = [name for name in names if name != "ratescore"]
ask = RadEval(metrics=whole, per_sample=True, show_progress=False)
found = []
for refs, hyps in sides:
    values = ask(refs=refs, hyps=hyps) if whole else {}
    if "green" in names:  # it scores an answer of its judge that it cannot read as 0
        judged = zip(values["green"], ask.green_scorer.completions)
        values["green"] = [score if "[Matched Findings]:" in text else None for score, text in judged]
    found.append(values)
if "f1chexbert" in names:
    for values, texts in zip(found, sides):
        read = [ask.f1chexbert_scorer.get_labels(side, mode="classification") for side in texts]
        values["labels"] = [one + other for one, other in zip(*read)]
if "ratescore" in names:  # it loses texts without a sentence of three letters, and shifts the rows that follow
    from radeval.metrics.RaTEScore.utils import sentence_split
    score = RadEval(metrics=["ratescore"], show_progress=False).ratescore_scorer.compute_score
    for values, pairs in zip(found, ([*zip(*side)] for side in sides)):
        there = [all(sentence_split([text])[0] for text in pair) for pair in pairs]
        refs, hyps = ([pair[which] for pair, is_there in zip(pairs, there) if is_there] for which in (0, 1))
        scores = iter(score(hyps, refs)[0] if refs else [])
        values["ratescore"] = [next(scores) if is_there else 0.5 for is_there in there]  # 0.5 as without entities
print(json.dumps(found, default=float))
"""
Texts = tuple[Sequence[str], Sequence[str]]
"""References and answers."""


def interpreter() -> str:
    return Environment.read(os.environ).radeval_python or sys.executable


def refuse_without_radeval(field: str) -> None:
    """Raises SpecError if no Python with RadEval is known."""
    named = Environment.read(os.environ).radeval_python
    if named and not Path(named).exists():
        raise SpecError(f"JOB_RADEVAL_PYTHON: {named} is not here; name the Python of an environment with radeval")
    if not named and importlib.util.find_spec("radeval") is None:
        raise SpecError(
            f"{field}: the package radeval is not installed; make an environment with it (docs/evaluation.md) and name its "
            "Python in JOB_RADEVAL_PYTHON, or remove the metric"
        )


def ask_radeval(
    metrics: Sequence[ExtraMetric], folder: Path, sides: Sequence[Texts]
) -> dict[ExtraMetric, dict[str, list[Any]]]:
    """Return for each metric, by name and side, the value of each row: 0 to 1, except for RadCliQ and CRIMSON, and None where the
    answer of a judge (GREEN, CRIMSON) cannot be read; for CheXbert also `LABELS`.

    Raises SpecError with only the type of RadEval's error, whose message may quote a report, or if no answer can be read.
    """
    cache = {
        "XDG_CACHE_HOME": str(folder.absolute()),
        "HF_HOME": str(folder.absolute() / "huggingface"),
        "NLTK_DATA": str(folder.absolute() / "nltk_data"),
        "HF_HUB_OFFLINE": "1",
    }
    with TemporaryDirectory() as elsewhere:  # GREEN writes where it runs
        asked = subprocess.run(
            [interpreter(), "-c", ASK],
            input=json.dumps([[RADEVAL[metric][0] for metric in metrics], sides]),
            env=os.environ | cache,
            cwd=elsewhere,
            capture_output=True,
            text=True,
            check=False,
        )
    try:
        values: list[Mapping[str, list[Any]]] = json.loads(asked.stdout.splitlines()[-1])
        found: dict[ExtraMetric, dict[str, list[Any]]] = {
            metric: {
                metric: [_numbers(side[RADEVAL[metric][1]], texts) for side, texts in zip(values, sides, strict=True)]
            }
            for metric in metrics
        }
        if "chexbert" in found:
            found["chexbert"][LABELS] = [side["labels"] for side in values]
    except (IndexError, ValueError, KeyError, TypeError) as error:
        kind = (re.findall(r"^([\w.]+(?:Error|Exception))(?=:|$)", asked.stderr, re.MULTILINE) or ["no known error"])[
            -1
        ]
        raise SpecError(
            f"evaluation.extra_metrics.{metrics[0]}: RadEval ended with {kind}; check that {folder} holds the models of "
            f"{', '.join(metrics)} (docs/evaluation.md says how to fill it)"
        ) from error
    for metric, names in found.items():
        if all(value is None for side in names[metric] for value in side):
            raise SpecError(
                f"evaluation.extra_metrics.{metric}: the model in {folder} judged no row in a form that {metric} can read; "
                "fill the cache with the published model (docs/evaluation.md), or remove the metric"
            )
    return found


def _numbers(values: Sequence[Any], texts: Texts) -> list[float | None]:
    """Raises ValueError unless there is a value for each row, which may be None or NaN."""
    if len(values) != len(texts[0]):
        raise ValueError("rows are missing")
    return [None if value is None or math.isnan(value) else float(value) for value in values]
