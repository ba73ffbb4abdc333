"""Scores that need a model: BERTScore is the bert-score package's, RadEval has a process of its own, what is missing is said."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from job.errors import SpecError
from job.evaluate import extra, scores
from job.preemption import Preemption
from job.record import Record
from job.store import open_store
from tests.tiny import job_spec, make_encoder

PAIRS = [
    ("A nodule is seen in the left lung.", "a nodule in the right lung."),
    ("The lung is clear, no effusion.", "no effusion is seen"),
    ("effusion", ""),
]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("encoder"))


def test_bertscore_is_that_of_the_bert_score_package(encoder: Path) -> None:
    # bert_score 0.3.13: score(generated, references, model_type=folder, num_layers=2, idf=False)
    found = extra.bertscore("bertscore", encoder, *map(list, zip(*PAIRS, strict=True)))
    assert found == pytest.approx([0.911470, 0.910291, 0.0], abs=1e-5)


RADEVAL = """
import os

class RadEval:
    def __init__(self, metrics, per_sample, show_progress):
        assert (metrics, per_sample, show_progress) == (["green"], True, False)
    def __call__(self, refs, hyps):
        print("a progress bar")
        assert os.environ["HF_HUB_OFFLINE"] == "1"
        cache = os.path.basename(os.path.dirname(os.environ["HF_HOME"]))
        return {"green": [float(ref == hyp) / (cache == "cache") for ref, hyp in zip(refs, hyps)], "other": [0.0]}
"""


@pytest.fixture
def radeval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of the name and interface of RadEval 2.2, whose models would be gigabytes; and its folder of models."""
    (tmp_path / "radeval.py").write_text(RADEVAL)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


def test_radeval_is_asked_in_its_own_process_with_its_models_and_no_network(radeval: Path) -> None:
    assert extra.radeval("green", radeval, ["a", "b"], ["a", "c"]) == [1.0, 0.0]
    with pytest.raises(
        SpecError, match=r"extra_metrics.green: RadEval ended with ZeroDivisionError; are its models in"
    ):
        extra.radeval("green", radeval.parent, ["a", "b"], ["a", "c"])


def test_no_words_of_radeval_are_told_since_they_may_be_a_report_s(radeval: Path) -> None:
    (radeval.parent / "radeval.py").write_text("raise SystemExit('No effusion in Mrs. Doe')")
    with pytest.raises(SpecError) as told:
        extra.radeval("green", radeval, ["a"], ["b"])
    assert "Doe" not in str(told.value)


@pytest.mark.parametrize("metric", ["bertscore", "green"])
def test_a_missing_model_is_refused_with_its_field(metric: str, tmp_path: Path, radeval: Path) -> None:
    spec = job_spec(evaluation={"extra_metrics": {metric: str(tmp_path / "none")}})
    with pytest.raises(
        SpecError, match=f"evaluation.extra_metrics.{metric}: .*none is not here; name .*, or remove it"
    ):
        extra.model_folders(spec, tmp_path)


def test_a_missing_package_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="the package radeval is not installed; install the radiology extra"):
        extra.model_folders(job_spec(evaluation={"extra_metrics": {"radgraph": str(tmp_path)}}), tmp_path)


def test_values_are_computed_once_and_measured_like_any_other(encoder: Path, tmp_path: Path) -> None:
    spec = job_spec(
        evaluation={"extra_metrics": {"bertscore": str(encoder)}, "require": {"bertscore": {"min_change": 0}}}
    )
    store = open_store(str(tmp_path / "output"))
    attempt: Any = SimpleNamespace(
        spec=spec, store=store, scratch=tmp_path, record=Record(store, tmp_path), preemption=Preemption()
    )
    before = [{"reference": one, "generated": other, "labels": {}} for one, other in PAIRS]
    after = [row | {"generated": row["reference"]} for row in before]
    extra.scored(attempt, before, after)
    assert [row["extra"]["bertscore"] for row in after] == pytest.approx([1, 1, 1], abs=1e-5)
    sums = scores.sample_scores(before, {})["bertscore"]
    assert float(sums.finish(sums.rows.sum(axis=0))) == pytest.approx((0.911470 + 0.910291) / 3, abs=1e-5)
    again = [{**row, "generated": "x", "extra": None} for row in after]
    extra.scored(attempt, before, again)
    assert again[0]["extra"] == after[0]["extra"]
