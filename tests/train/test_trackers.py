"""Trackers get the numbers, and none of them ends a run; nor does a package that nobody installed, hours later."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from job.config.loader import validate
from job.errors import SpecError
from job.planning.optional_packages import check_packages
from job.train.trackers import Tracker
from tests.conftest import Job


def test_tensorboards_files_are_published(job: Job, tree: dict[str, Any], demo: Path, tmp_path: Path) -> None:
    tree["model"] = {"name_or_path": str(demo / "base")}
    tree["dataset"] = {"path": str(demo / "data"), "group_column": "patient_id"}
    tree["training"] = {"max_steps": 2, "report_to": ["tensorboard"]}
    tree["evaluation"] = {"max_rows": 4, "max_new_tokens": 4}
    result = job("run", JOB_SPEC=yaml.safe_dump(tree))
    assert result.returncode == 0, result.stderr
    (events,) = (tmp_path / "output" / "logs" / "tensorboard").glob("events*")
    assert b"train/loss" in events.read_bytes()


def test_a_tracker_that_fails_is_told_once_and_left(caplog: pytest.LogCaptureFixture) -> None:
    """Here for want of a state of training; elsewhere its server is down, or a key is wrong."""
    tracker = Tracker("tensorboard")
    for _ in range(2):
        tracker.on_log(None, None, None, logs={"loss": 1.0})
    (told,) = caplog.messages
    assert told.startswith("training.report_to: tensorboard failed, and is disabled for this attempt: ")


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
