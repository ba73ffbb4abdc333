"""Scores that need a model: BERTScore is the bert-score package's, RadEval has a process of its own, what is missing is said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from job.errors import SpecError
from job.evaluate import extra, text_metrics
from job.evaluate.radeval import ask_radeval
from job.evaluate.records import Answer
from job.runtime.preemption import Preemption
from job.runtime.status import Record
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
    found = extra.bertscore(encoder, *map(list, zip(*PAIRS, strict=True)))
    assert found == pytest.approx([0.911470, 0.910291, 0.0], abs=1e-5)


def _index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}'
    )


def _configured(**changed: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changed))

    return change


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no .safetensors weights"),
        (lambda folder: (folder / "config.json").write_text("["), "is not a usable encoder"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "mine"}'), "is not a usable encoder"),
        (
            lambda folder: [file.unlink() for file in folder.glob("*token*")] + [(folder / "vocab.txt").unlink()],
            "is not a usable encoder",
        ),
        (_index, "model-2.safetensors does not exist"),
        (_configured(num_hidden_layers=3), "16 weights are missing or of another shape, encoder.layer.2"),
        (_configured(hidden_size=32), "of another shape"),
        (_configured(model_type="clip_vision_model"), "is not a usable encoder"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "t5"}'), "has a decoder"),
    ],
)
def test_what_is_no_whole_encoder_is_refused_before_anything_is_trained(
    encoder: Path, tmp_path: Path, damage: Callable[[Path], object], reason: str
) -> None:
    folder = Path(shutil.copytree(encoder, tmp_path / "encoder"))
    spec = job_spec(evaluation={"extra_metrics": {"bertscore": str(folder)}})
    assert extra.model_folders(spec.evaluation.extra_metrics, tmp_path) == {"bertscore": folder}
    damage(folder)
    with pytest.raises(SpecError, match=f"^evaluation.extra_metrics.bertscore: .*{reason}"):
        extra.model_folders(spec.evaluation.extra_metrics, tmp_path)


RADEVAL = """
import os

class RadEval:
    def __init__(self, metrics, per_sample, show_progress):
        assert (metrics, per_sample, show_progress) == (["green"], True, False)
        self.green_scorer = self
    def __call__(self, refs, hyps):
        print("a progress bar")
        assert os.environ["HF_HUB_OFFLINE"] == "1"
        cache = os.path.basename(os.path.dirname(os.environ["HF_HOME"]))
        self.completions = ["?" if hyp == "c" else "[Matched Findings]: 1." for hyp in hyps]
        scores = [float("nan" if hyp == "d" else ref == hyp) / (cache == "cache") for ref, hyp in zip(refs, hyps)]
        return {"green": scores, "other": [0.0]}
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
    sides = [(["a", "b"], ["a", "c"]), (["a", "b"], ["b", "d"])]
    assert ask_radeval(["green"], radeval, sides) == {"green": {"green": [[1.0, None], [0.0, None]]}}
    with pytest.raises(
        SpecError, match=r"extra_metrics.green: the model in .*cache judged no row in a form that green"
    ):
        ask_radeval(["green"], radeval, [(["a"], ["c"])])
    with pytest.raises(
        SpecError,
        match=r"extra_metrics.green: RadEval ended with ZeroDivisionError; check that .* holds the models of green",
    ):
        ask_radeval(["green"], radeval.parent, sides)


def test_rows_that_a_judge_could_not_score_are_left_out() -> None:
    rows = [Answer(str(place), "a", generated="a") for place in range(3)]
    sums = text_metrics.sample_scores(rows, {}, {"green": [1.0, None, 0.5]})["green"]
    assert float(sums.finish(sums.rows.sum(axis=0))) == 0.75
    assert sums.counted.tolist() == [True, False, True]


def test_no_words_of_radeval_are_told_since_they_may_be_a_report_s(radeval: Path) -> None:
    (radeval.parent / "radeval.py").write_text("raise SystemExit('No effusion in Mrs. Doe')")
    with pytest.raises(SpecError) as told:
        ask_radeval(["green"], radeval, [(["a"], ["b"])])
    assert "Doe" not in str(told.value)


@pytest.mark.parametrize("metric", ["bertscore", "green"])
def test_a_missing_model_is_refused_with_its_field(metric: str, tmp_path: Path, radeval: Path) -> None:
    spec = job_spec(evaluation={"extra_metrics": {metric: str(tmp_path / "none")}})
    with pytest.raises(
        SpecError, match=f"evaluation.extra_metrics.{metric}: .*none is not here; name .*, or remove it"
    ):
        extra.model_folders(spec.evaluation.extra_metrics, tmp_path)


def test_an_encoder_that_is_not_whole_is_refused_before_training(encoder: Path, tmp_path: Path) -> None:
    half = shutil.copytree(encoder, tmp_path / "half")
    weights = half / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    spec = job_spec(evaluation={"extra_metrics": {"bertscore": str(half)}})
    with pytest.raises(SpecError, match="evaluation.extra_metrics.bertscore: .*not all of it"):
        extra.model_folders(spec.evaluation.extra_metrics, tmp_path)
    shutil.copy(encoder / "model.safetensors", weights)
    (half / "config.json").write_text('{"model_type": "bert", "hidden_size": "many"}')
    with pytest.raises(SpecError, match="evaluation.extra_metrics.bertscore: .* is not a usable encoder"):
        extra.bertscore(half, ["a"], ["b"])


def test_a_missing_package_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="the package radeval is not installed; make an environment"):
        extra.model_folders({"radgraph": str(tmp_path)}, tmp_path)


def test_values_are_computed_once_and_measured_like_any_other(encoder: Path, tmp_path: Path) -> None:
    spec = job_spec(
        evaluation={"extra_metrics": {"bertscore": str(encoder)}, "require": {"bertscore": {"min_change": 0}}}
    )
    store = open_store(str(tmp_path / "output"))
    attempt: Any = SimpleNamespace(
        spec=spec, store=store, scratch=tmp_path, record=Record(store, tmp_path), preemption=Preemption()
    )
    data: Any = SimpleNamespace(identity=None)
    before = [Answer(str(place), one, generated=other) for place, (one, other) in enumerate(PAIRS)]
    after = [replace(row, generated=row.reference) for row in before]
    values = extra.extra_scores(attempt, data, before, after)
    assert values[1]["bertscore"] == pytest.approx([1, 1, 1], abs=1e-5)
    sums = text_metrics.sample_scores(before, {}, values[0])["bertscore"]
    assert float(sums.finish(sums.rows.sum(axis=0))) == pytest.approx((0.911470 + 0.910291) / 3, abs=1e-5)
    again = [replace(row, generated="x") for row in after]
    assert extra.extra_scores(attempt, data, before, again) == values
