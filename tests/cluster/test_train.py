"""`sbatch slurm/train.sh` on a real Slurm."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from job.errors import EXIT_CODES
from job.store import open_store
from job.store.lease import acquire
from tests.cluster.conftest import Cluster
from tests.conftest import ROOT
from tests.resume_proof import outcome, small_spec

TRAIN = "slurm/train.sh"


def settings(folder: Path, venv: Path) -> dict[str, str]:
    """Settings of a site, as in slurm/site.env."""
    (folder / "node").mkdir()
    return {
        "JOB_RUNTIME": "venv",
        "JOB_IMAGE": str(venv),
        "JOB_NODE_SCRATCH": str(folder / "node"),
        "JOB_LEASE_SECONDS": "6",
        "SBATCH_OUTPUT": str(folder / "%j.log"),
        "OMP_NUM_THREADS": "1",
        "JOB_PASS_ENV": "OMP_* GOMP_*",
    }


@pytest.fixture
def site(tmp_path: Path, venv: Path) -> dict[str, str]:
    return settings(tmp_path, venv)


@pytest.fixture(scope="module")
def whole(cluster: Cluster, demo: Path, venv: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a job that nobody disturbed, made through Slurm."""
    folder = tmp_path_factory.mktemp("whole")
    spec = folder / "spec.yaml"
    spec.write_text(small_spec(demo, str(folder / "output")))
    job = cluster.submit(TRAIN, **settings(folder, venv) | {"JOB_SPEC": str(spec)})
    facts = cluster.end(job)
    assert facts["JobState"] == "COMPLETED", (folder / f"{job}.log").read_text()
    assert list((folder / "node").iterdir()) == []
    return folder / "output"


@contextmanager
def waiting(cluster: Cluster, output: Path, demo: Path, site: dict[str, str], *arguments: str) -> Iterator[str]:
    """A job that waits, idle, because another writer holds its output; within the block it does so."""
    spec = small_spec(demo, str(output))
    with acquire(open_store(str(output)), "another writer", 300, wait=0):
        job = cluster.submit(*arguments, TRAIN, **site | {"JOB_SPEC": spec, "JOB_LEASE_SECONDS": "300"})
        log = Path(site["SBATCH_OUTPUT"].replace("%j", job))
        cluster.until(lambda: log.exists() and "lease" in log.read_text(), "the wait for the lease")
        yield job


def publish(whole: Path, output: Path) -> None:
    """Let the next attempt find its work done."""
    shutil.copytree(whole, output, dirs_exist_ok=True, ignore=shutil.ignore_patterns("lease.json"))


def test_the_demo_is_published_by_one_sbatch(whole: Path):
    assert (whole / "RESULT.json").exists()


def test_a_preempted_job_is_requeued_and_ends_the_same(
    cluster: Cluster, whole: Path, demo: Path, site: dict[str, str], tmp_path: Path
):
    output = tmp_path / "output"
    job = cluster.submit(
        "--nodelist=node1", "--mem=150G", TRAIN, **site | {"JOB_SPEC": small_spec(demo, str(output))}
    )
    saved = output / "checkpoints/step-00000010/MANIFEST.json"
    cluster.until(saved.exists, "a checkpoint")
    urgent = cluster.submit("--partition=urgent", "--nodelist=node1", "--mem=150G", "--wrap=true")
    cluster.end(urgent)
    facts = cluster.end(job)
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1")
    assert outcome(str(output)) == outcome(str(whole))
    assert re.findall(r"^exit (\d+):", Path(facts["StdOut"]).read_text(), re.MULTILINE) == ["75"]
