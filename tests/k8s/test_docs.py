"""What docs/kubernetes.md promises is there."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from job.runtime.prometheus import GAUGES
from tests.conftest import ROOT
from tests.k8s.conftest import K8S, documents, kustomize

PAGE = (ROOT / "docs" / "kubernetes.md").read_text()


def test_every_path_is_there():
    paths = set(re.findall(r"k8s/[\w./-]*\w", PAGE))
    assert len(paths) > 10
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_the_table_has_every_component_and_every_overlay_is_told():
    rows = re.findall(r"^\| `([a-z-]+)` \|", PAGE, re.MULTILINE)
    assert sorted(rows) == sorted(path.name for path in (K8S / "components").iterdir())
    told = {*rows, "dev", "trainjob"}
    assert {path.name for path in (K8S / "overlays").iterdir()} <= told


def test_the_folder_of_a_run_builds(tmp_path: Path):
    (text,) = re.findall(r"```yaml\n(# runs/chest-1/kustomization.yaml.*?)```", PAGE, re.DOTALL)
    folder = tmp_path / "runs" / "chest-1"
    folder.mkdir(parents=True)
    shutil.copytree(K8S, tmp_path / "k8s")
    (folder / "kustomization.yaml").write_text(text.replace("sha256:…", f"sha256:{'a' * 64}"))
    (folder / "spec.yaml").write_text(yaml.safe_dump({"name": "mine"}))
    built = subprocess.run([*kustomize(), str(folder)], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    config, job = documents(built.stdout)
    assert yaml.safe_load(config["data"]["spec.yaml"]) == {"name": "mine"}
    assert job["metadata"]["name"] == "vision-lora-chest-1"
    container = job["spec"]["template"]["spec"]["containers"][0]
    assert container["env"][0]["valueFrom"]["configMapKeyRef"]["name"] == config["metadata"]["name"]
    assert container["image"].endswith(f"@sha256:{'a' * 64}")
    assert job["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] == 30


STAND_IN = """#!/bin/sh
echo "${{0##*/}} $*" >>{calls}
case "$*" in *logs*) echo "train: step 1/2" ;; *inspect*) echo sha256:abc ;; esac
case "$*" in *--for=condition*) exit {ends} ;; *"get crd"*) exit 1 ;; esac
"""


@pytest.mark.parametrize("ends", [0, 1])
def test_the_script_for_kind_tries_every_overlay_and_leaves_nothing(ends: int, tmp_path: Path):
    """With stand-ins for kind, kubectl and docker; the demo completes, or does not."""
    calls = tmp_path / "calls"
    for name in ("kind", "kubectl", "docker"):
        (tmp_path / name).write_text(STAND_IN.format(calls=calls, ends=ends))
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TMPDIR": str(tmp_path)}
    done = subprocess.run([K8S / "try-on-kind.sh"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == ends, done.stderr
    called = calls.read_text()
    admitted = {path.name for path in (K8S / "overlays").iterdir()} - {"dev", "trainjob"}
    assert set(re.findall(r"--dry-run=server .*k8s/overlays/(\S+)", called)) == admitted
    assert called.splitlines()[-1] == "kind delete cluster --name vision-lora-try"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calls", "docker", "kind", "kubectl"]


def test_the_numbers_for_prometheus_are_those_that_are_served():
    told = set(re.findall(r"`(?:vision_lora_job)?_([a-z_]+)`", PAGE))
    assert {*GAUGES, "started_timestamp_seconds", "info", "metric"} == told
