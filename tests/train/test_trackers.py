"""Trackers get spec, curves and result, and none of them ends a run; nor does a package that nobody installed, hours later.

W&B and MLflow are tried where they are installed: `make test-trackers`.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from job.config.loader import validate
from job.errors import SpecError
from job.planning.optional_packages import check_packages
from job.train.trackers import Outcome, Run, Tracker
from tests.conftest import Job

CONFIG = {"lora.r": 8, "model.name_or_path": "m", "dataset.instruction": "x" * 9000, "lora.init_adapter": None}
OUTCOME = Outcome(
    step=3,
    before={"rougeL": 0.25},
    after={"rougeL": 0.75},
    facts={"verdict": "rougeL: better"},
    report=b"<!doctype html>",
    samples=[{"id": "row-1", "before": "no", "after": "clear lungs"}],
)


def attempts(name: str, tmp_path: Path) -> None:
    """A run that is preempted after its second step, repeats it, and is published."""
    for folder, steps in (("first", (1, 2)), ("second", (2, 3))):
        (tmp_path / folder).mkdir()
        tracker = Tracker(name, Run("chest", "0123456789abcdef", CONFIG, tmp_path / folder))
        for step in steps:
            tracker.numbers({"step": step, "loss": 1 / step, "rows": [1, 2], "grad_norm": None})
        tracker.tell("close", finished=folder == "second")
    tracker = Tracker(name, Run("chest", "0123456789abcdef", CONFIG, tmp_path / "second"))
    tracker.tell("show", OUTCOME)
    tracker.tell("close", finished=True)


def published(tree: dict[str, Any], demo: Path, **training: Any) -> str:
    tree["model"] = {"name_or_path": str(demo / "base")}
    tree["dataset"] = {"path": str(demo / "data"), "group_column": "patient_id"}
    tree["training"] = {"max_steps": 2, "report_to": ["tensorboard"]} | training
    tree["evaluation"] = {"max_rows": 4, "max_new_tokens": 4}
    return yaml.safe_dump(tree)


def test_tensorboards_files_are_published(job: Job, tree: dict[str, Any], demo: Path, tmp_path: Path) -> None:
    result = job("run", JOB_SPEC=published(tree, demo))
    assert result.returncode == 0, result.stderr
    files = sorted((tmp_path / "output" / "logs" / "tensorboard").glob("events*"))
    training, results = (file.read_bytes() for file in files)
    assert b"train/loss" in training
    assert b"training.max_steps: 2" in training
    assert b"evaluation/rougeL" in results
    assert b"samples/1" not in results  # texts of rows, which the spec does not send


def test_a_tracker_that_fails_is_told_once_and_left(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """Here for want of a number; elsewhere its server is down, or a key is wrong."""
    tracker = Tracker("tensorboard", Run("chest", "0", CONFIG, tmp_path))
    for _ in range(2):
        tracker.tell("log", 1, {"loss": "none"})
    (told,) = caplog.messages
    assert told.startswith("training.report_to: tensorboard failed, and is disabled for this attempt: ")


def test_mlflow_sees_all_attempts_as_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tmp_path.as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "films")
    monkeypatch.setenv("MLFLOW_TAGS", '{"site": "A"}')
    attempts("mlflow", tmp_path)
    (run,) = mlflow.search_runs(experiment_names=["films"], output_format="list")
    assert (run.info.run_name, run.info.status, run.data.tags["site"]) == ("chest", "FINISHED", "A")
    assert run.data.params["lora.r"] == "8"
    assert run.data.tags["verdict"] == "rougeL: better"
    client = mlflow.MlflowClient()
    assert [each.step for each in client.get_metric_history(run.info.run_id, "train/loss")] == [1, 2, 2, 3]
    history = client.get_metric_history(run.info.run_id, "evaluation/rougeL")
    assert [(each.step, each.value) for each in history] == [(0, 0.25), (3, 0.75)]
    assert {each.path for each in client.list_artifacts(run.info.run_id)} == {"report.html", "samples.jsonl"}


def test_wandb_sees_all_attempts_as_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline: the files that `wandb sync` would send."""
    pytest.importorskip("wandb")
    for name, value in {"MODE": "offline", "DIR": str(tmp_path), "RUN_GROUP": "sweep", "TAGS": "films,A"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    attempts("wandb", tmp_path)
    folders = sorted(tmp_path.glob("wandb/offline-run-*"))
    names = [folder.name.split("-")[3] for folder in folders]  # two of one second get a number at the end
    assert names == ["0123456789abcdef"] * len(folders)
    sent = b"".join(file.read_bytes() for folder in folders for file in folder.glob("*.wandb"))
    for text in (
        "chest",
        "sweep",
        "films",
        "lora.r",
        "train/loss",
        "after/rougeL",
        "verdict",
        "report-0123456789abcdef",
    ):
        assert text.encode() in sent, text


def test_a_whole_job_reports_to_all_three(
    job: Job, tree: dict[str, Any], demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    variables = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "MLFLOW_TRACKING_URI": tmp_path.as_uri()}
    variables |= {"MLFLOW_ALLOW_FILE_STORE": "true"}
    spec = published(tree, demo, report_to=["tensorboard", "wandb", "mlflow"], report_samples=True)
    result = job("run", JOB_SPEC=spec, **variables)
    assert result.returncode == 0, result.stderr
    assert "is disabled for this attempt" not in result.stderr
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(tmp_path.as_uri())
    (run,) = mlflow.search_runs(experiment_names=["vision-lora-job"], output_format="list")
    assert run.data.metrics["train/loss"] > 0
    page = mlflow.artifacts.load_text(f"{run.info.artifact_uri}/report.html")
    assert page == (tmp_path / "output" / "report.html").read_text()
    assert len([*tmp_path.glob("wandb/offline-run-*")]) == 2
    results = b"".join(file.read_bytes() for file in (tmp_path / "output" / "logs" / "tensorboard").glob("events*"))
    assert b"samples/1" in results


@pytest.mark.parametrize(
    ("section", "named", "package", "extra"),
    [
        ("training", {"report_to": ["wandb"]}, "wandb", "trackers"),
        ("training", {"optim": "adamw_8bit"}, "bitsandbytes", "gpu"),
        ("export", {"merged_fp8": True}, "llmcompressor", "fp8"),
    ],
)
def test_a_package_that_is_missing_is_told_before_training(
    section: str, named: dict[str, Any], package: str, extra: str, tree: dict[str, Any]
) -> None:
    if find_spec(package):
        pytest.skip(f"{package} is installed here")
    with pytest.raises(SpecError) as refused:
        check_packages(validate(tree | {section: named}), cuda=False)
    field = f"{section}.{next(iter(named))}"
    assert str(refused.value).startswith(field)
    assert str(refused.value).endswith(
        f" needs the package {package}, which is not installed; install the {extra} extra"
    )
