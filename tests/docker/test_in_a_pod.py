"""The manifest of `job render kubernetes` with the image itself: its environment, user, read-only root, probes and grace."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from job.render import kubernetes, read_runs
from job.store import open_store
from job.store.lease import acquire
from tests.docker.test_image import spec
from tests.k8s.conftest import documents
from tests.k8s.kubelet import missing, running
from tests.k8s.test_pod import until


def test_the_kubelet_ends_it_in_time_and_learns_why(image: str, unpacked: Path, tmp_path: Path):
    """It waits, since another writer holds the output."""
    if reason := missing(tmp_path / "trial"):
        pytest.skip(f"a container cannot be run here: {reason}")
    config = json.loads(subprocess.run(["buildah", "inspect", image], capture_output=True, check=True).stdout)
    given = dict(entry.split("=", 1) for entry in config["OCIv1"]["config"]["Env"])
    (tmp_path / "spec.yaml").write_text(spec("/output/run").replace('"/', '"/bundle/', 2))
    runs = read_runs({}, str(tmp_path / "spec.yaml"), None, None)
    (tree,) = documents(kubernetes(runs, "example.com/vision-lora-job:0.2.0", ("cpu", "airgapped")))
    pod = tree["spec"]["template"]["spec"]
    container = pod["containers"][0]
    bundle, output = tmp_path / "bundle", tmp_path / "output"
    bundle.mkdir()
    with acquire(open_store(str(output / "run")), "another writer", 300, wait=0):
        for path in (output, *output.rglob("*")):
            os.chown(path, -1, 10001)  # as fsGroup leaves it
            path.chmod(0o2775 if path.is_dir() else 0o664)
        claims = {"vision-lora-bundle": bundle, "vision-lora-output": output}
        with running(pod, tmp_path / "pod", image=unpacked, given=given, claims=claims) as started:
            until(lambda: "waiting up to" in started.log, started)
            until(lambda: started.passes(container["startupProbe"]), started)
            until(lambda: started.passes(container["livenessProbe"]), started)
            code, seconds = started.delete()
    assert code == 75, started.log
    assert seconds < pod["terminationGracePeriodSeconds"]
    assert started.message == "exit 75: stopped on SIGTERM; run again to continue"
