"""The manifest's own container, run for real with its environment, user, read-only root, volumes, probes and grace."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from job.render import kubernetes, read_runs
from tests.conftest import ROOT
from tests.k8s.conftest import documents
from tests.k8s.kubelet import Container, missing, running
from tests.k8s.test_policy import action

CHECKOUT, PYTHON = ROOT.resolve(), Path(sys.prefix).resolve()
# What an image brings: an interpreter that has the job, on the path.
IMAGE = {
    "PATH": f"{PYTHON}/bin:/usr/bin:/bin",
    "PYTHONPATH": str(CHECKOUT),
    "PYTHONDONTWRITEBYTECODE": "1",
}


def shown() -> list[Path]:
    """Folders that this interpreter needs, wherever they lie: in a clone below /tmp, the pod's own /tmp would cover them."""
    named = [CHECKOUT, PYTHON, Path(sys.base_prefix), *map(Path, sys.path)]
    places = {place.resolve() for place in named if place.is_absolute() and place.is_dir()}
    return [place for place in sorted(places) if not places & set(place.parents)]


def test_evicted_it_leaves_with_75_and_its_next_pod_publishes(demo: Path, tmp_path: Path):
    """Without a network, as the overlay airgapped has it: base and data from one volume, results to another."""
    if reason := missing(tmp_path / "trial"):
        pytest.skip(f"a container cannot be run here: {reason}")
    bundle = shutil.copytree(demo, tmp_path / "bundle")
    (bundle / "base" / "model.safetensors").chmod(0o644)  # transformers writes it for its own user alone
    output = tmp_path / "output"
    output.mkdir()
    os.chown(output, -1, 10001)
    output.chmod(0o2775)  # as fsGroup leaves it
    spec = {
        "model": {"name_or_path": "/bundle/base"},
        "dataset": {"path": "/bundle/data", "group_column": "patient_id", "max_rows": 40},
        "training": {"max_steps": 30, "effective_batch_size": 1},
        "evaluation": {"max_rows": 4, "max_new_tokens": 4, "batch_size": 4},
        "export": {"gate": {"rows": 2}},
        "output": {"url": "/output/run"},
    }
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    runs = read_runs({}, str(tmp_path / "spec.yaml"), None, None)
    (tree,) = documents(kubernetes(runs, "example.com/vision-lora-job:0.2.0", ("cpu", "airgapped")))
    job, pod = tree["spec"], tree["spec"]["template"]["spec"]
    container = pod["containers"][0]
    claims = {"vision-lora-bundle": bundle, "vision-lora-output": output}

    with running(pod, tmp_path / "first", image=Path("/"), given=IMAGE, claims=claims, shown=shown()) as first:
        until(lambda: first.passes(container["startupProbe"]), first)
        until(lambda: first.passes(container["livenessProbe"]), first)
        until(lambda: status(output).get("stage") == "train", first)
        assert re.fullmatch(r"no exit was reported; last seen at \S+Z in stage train.*", first.message)
        code, seconds = first.delete()
        assert code == 75, first.log
        assert seconds < pod["terminationGracePeriodSeconds"]
        assert first.message == "exit 75: stopped on SIGTERM; run again to continue"
    assert action(job, code, disrupted=False) == "Ignore"
    assert not (output / "run" / "RESULT.json").exists()

    with running(pod, tmp_path / "second", image=Path("/"), given=IMAGE, claims=claims, shown=shown()) as second:
        assert second.process.wait(120) == 0, second.log
    assert status(output)["attempt"] == 2
    assert (output / "run" / "RESULT.json").exists()


def until(condition: Callable[[], bool], container: Container) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert container.process.poll() is None, container.log
        assert time.monotonic() < deadline
        time.sleep(0.2)


def status(output: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((output / "run" / "status.json").read_text())
    except (OSError, ValueError):
        return {}
    return found
