"""`sbatch slurm/train.sh` with container runtimes: the image of these tests on the Slurm of tests/cluster."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from job.store import open_store
from job.store.lease import acquire
from tests.cluster.conftest import Cluster, cluster
from tests.cluster.test_train import codes
from tests.docker.test_image import spec

__all__ = ["cluster"]


PROGRAMS = {"charliecloud": "ch-run", "podman": "podman", "apptainer": "apptainer"}


@pytest.fixture(params=PROGRAMS)
def site(request: pytest.FixtureRequest, podman_environment: dict[str, str], tmp_path: Path) -> dict[str, str]:
    if shutil.which(PROGRAMS[request.param]) is None:
        pytest.skip(f"there is no {PROGRAMS[request.param]}")
    image = request.getfixturevalue("image" if request.param == "podman" else "unpacked")
    return podman_environment | {
        "JOB_RUNTIME": request.param,
        "JOB_IMAGE": str(image),
        "JOB_NODE_SCRATCH": str(tmp_path / "node"),
        "JOB_MOUNTS": str(tmp_path),
        "JOB_LEASE_SECONDS": "300",
        "SBATCH_OUTPUT": str(tmp_path / "%j.log"),
        "SECRET": "of mine",
        "AWS_REGION": "eu-central-1",
        "JOB__DATASET__INSTRUCTION": ODD,
    }


ODD = """What's in "it"? $(touch /scratch/oh-no) `id` $HOME \\ ü"""


def test_the_job_in_a_container_hears_slurm_and_sees_only_what_it_may(
    cluster: Cluster, site: dict[str, str], tmp_path: Path
):
    output = tmp_path / "output"
    job_spec = tmp_path / "home" / "spec.yaml"
    job_spec.parent.mkdir()
    job_spec.write_text(spec(str(output)))
    with acquire(open_store(str(output)), "another writer", 300, wait=0):
        options = ["--gres=none", "--mem=1G", "--nodelist=node2", "slurm/train.sh"]
        if site["JOB_RUNTIME"] == "apptainer":  # it wants what root has not in every container: an ordinary user
            options = ["--uid=daemon", *options]
            site |= {"HOME": str(tmp_path / "home"), "USER": "daemon"}
            hand_over(tmp_path)
        job = cluster.submit(*options, **site | {"JOB_SPEC": str(job_spec)})
        log = tmp_path / f"{job}.log"
        cluster.until(lambda: log.exists() and "waiting up to" in log.read_text(), "the wait for the lease")
        process = inside(tmp_path)
        seen = process_environment(process)
        assert (seen["JOB_SCRATCH"], seen["AWS_REGION"], seen["SLURM_JOB_ID"]) == ("/scratch", "eu-central-1", job)
        assert "SECRET" not in seen
        assert seen["JOB__DATASET__INSTRUCTION"] == ODD
        assert not (tmp_path / f"node/vision-lora-{job}/oh-no").exists()
        mounted = {line.split()[1] for line in Path(f"/proc/{process}/mounts").read_text().splitlines()}
        assert {"/scratch", str(tmp_path)} <= mounted
        assert not {"/root", "/home", "/home/root", str(Path.home())} & mounted
        assert (tmp_path / f"node/vision-lora-{job}/heartbeat").exists()
        cluster.run("scancel", "--batch", "--signal=USR1", job)  # as --signal=B:USR1@180 does
        cluster.until(lambda: cluster.facts(job)["Restarts"] == "1", "the requeue")
        cluster.until(lambda: log.read_text().count("waiting up to") == 2, "the second start")
        cluster.run("scancel", job)
        facts = cluster.end(job)
        cluster.until(lambda: inside(tmp_path) is None, "the end of its processes", 60)
    assert facts["JobState"] == "CANCELLED"
    assert codes(facts) == [75, 75]
    cluster.until(lambda: not list((tmp_path / "node").iterdir()), "the removal of scratch", 60)


def hand_over(folder: Path) -> None:
    """Give a folder to the user daemon, and let it find the way."""
    subprocess.run(["chown", "-R", "daemon", folder], check=True)
    for parent in [folder, *folder.parents[:2]]:
        parent.chmod(0o755)


def inside(folder: Path) -> int | None:
    """The number of the job's own process, as the host counts. Its spec names the folder: that of another suite does not."""
    found = subprocess.run(
        ["pgrep", "-f", "^/opt/venv/bin/python -m job run"], capture_output=True, text=True, check=False
    )
    ours = [
        int(number) for number in found.stdout.split() if str(folder) in process_environment(number).get("JOB_SPEC", "")
    ]
    return ours[-1] if ours else None


def process_environment(process: int | str | None) -> dict[str, str]:
    """Of a process; empty when it has ended."""
    try:
        lines = Path(f"/proc/{process}/environ").read_bytes().decode().split("\0")
    except (FileNotFoundError, ProcessLookupError):
        return {}
    return dict(line.split("=", 1) for line in lines if "=" in line)
