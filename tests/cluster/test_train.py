"""`sbatch slurm/train.sh` on a real Slurm."""

from __future__ import annotations

import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from job.errors import EXIT_CODES
from job.store import open_store
from job.store.lease import acquire
from tests.cluster.conftest import Cluster
from tests.planning.conftest import Enter
from tests.resume_proof import outcome, small_spec

TRAIN = "slurm/train.sh"
Waiting = tuple[str, Path]
"""A job's id and its output."""


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


def codes(facts: dict[str, str]) -> list[int]:
    """The exit codes of all starts of a job, from its log."""
    said = re.findall(r"^slurm: (?:exit (\d+)|(done))", Path(facts["StdOut"]).read_text(), re.MULTILINE)
    return [int(code or 0) for code, _ in said]


def publish(whole: Path, output: Path) -> None:
    """Let the next attempt find its work done."""
    shutil.copytree(whole, output, dirs_exist_ok=True, ignore=shutil.ignore_patterns("lease.json"))


# Slurm takes half a minute to see a time limit or a lost node; these two jobs wait for it while other tests run.
@pytest.fixture(scope="module")
def limited(cluster: Cluster, demo: Path, venv: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Waiting]:
    """A job near its time limit."""
    folder = tmp_path_factory.mktemp("limited")
    options = ("--time=5", "--signal=B:USR1@290", "--nodelist=node1", "--mem=1G")
    with waiting(cluster, folder / "output", demo, settings(folder, venv), *options) as job:
        yield job, folder / "output"


@pytest.fixture(scope="module")
def orphaned(cluster: Cluster, demo: Path, venv: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Waiting]:
    """A job whose node has lost its power."""
    folder = tmp_path_factory.mktemp("orphaned")
    with waiting(cluster, folder / "output", demo, settings(folder, venv), "--partition=frail") as job:
        assert cluster.facts(job)["NodeList"] == "node3"
        cluster.power_off("node3")
        yield job, folder / "output"


def test_the_demo_is_published_by_one_sbatch(limited: Waiting, orphaned: Waiting, whole: Path):
    assert (whole / "RESULT.json").exists()


def test_a_preempted_job_is_requeued_and_ends_the_same(
    cluster: Cluster, whole: Path, demo: Path, site: dict[str, str], tmp_path: Path
):
    output = tmp_path / "output"
    options = ("--nodelist=node1", "--mem=150G")
    job = cluster.submit(*options, TRAIN, **site | {"JOB_SPEC": small_spec(demo, str(output))})
    cluster.until((output / "checkpoints/step-00000010/MANIFEST.json").exists, "a checkpoint")
    cluster.end(cluster.submit("--partition=urgent", *options, "--output=/dev/null", "--wrap=true"))
    facts = cluster.end(job)
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1")
    assert outcome(str(output)) == outcome(str(whole))
    assert codes(facts) == [75, 0]


def test_each_exit_code_is_done_stopped_or_requeued_as_the_table_says(
    cluster: Cluster, site: dict[str, str], tmp_path: Path
):
    python = tmp_path / "venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\nexit $JOB_SPEC\n")
    python.chmod(0o755)
    fast = site | {"JOB_IMAGE": str(tmp_path / "venv"), "JOB_MAX_RESTARTS": "1"}
    jobs = {
        row: cluster.submit("--gres=none", "--mem=1G", "--cpus-per-task=1", TRAIN, **fast | {"JOB_SPEC": str(row.code)})
        for row in EXIT_CODES
    }
    for row, job in jobs.items():
        facts = cluster.end(job)
        assert facts["ExitCode"] == f"{row.code}:0", row
        assert facts["JobState"] == ("COMPLETED" if row.slurm == "done" else "FAILED"), row
        assert facts["Restarts"] == ("1" if row.slurm == "requeue" else "0"), row
        assert codes(facts) == [row.code] * (2 if row.slurm == "requeue" else 1), row


DIES = """#!/bin/bash
[ "${SLURM_RESTART_COUNT:-0}" = 0 ] || exit 0
case $JOB_SPEC in
    hungry) exec %s -S -c "bytearray(10**9)" ;;
    *) kill "-$JOB_SPEC" $$ ;;
esac
"""


def dies(tmp_path: Path) -> str:
    """A virtual environment whose Python dies at its first start, of the signal or the hunger that JOB_SPEC names."""
    python = tmp_path / "venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(DIES % sys.executable)
    python.chmod(0o755)
    return str(tmp_path / "venv")


def test_a_killed_job_is_requeued_as_on_kubernetes_it_is_counted(
    cluster: Cluster, site: dict[str, str], tmp_path: Path
):
    """The no-progress guard (79), not the script, ends a job that is killed again and again."""
    site |= {"JOB_IMAGE": dies(tmp_path)}
    small = ("--gres=none", "--mem=1G", "--cpus-per-task=1", TRAIN)
    jobs = {name: cluster.submit(*small, **site | {"JOB_SPEC": name}) for name in ("KILL", "ABRT")}
    for name, job in jobs.items():
        facts = cluster.end(job)
        assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), name
        assert codes(facts) == [128 + signal.Signals[f"SIG{name}"], 0]


def test_a_job_that_the_kernel_kills_for_want_of_memory_stops_with_71(
    cluster: Cluster, site: dict[str, str], tmp_path: Path, cgroup: Callable[[int], Enter]
):
    """The site's own settings put the batch script into a cgroup of 100 MB, as Slurm's task/cgroup does for --mem."""
    (place,) = cgroup(100 * 2**20).__defaults__ or ()
    (tmp_path / "site.env").write_text(f"echo $$ >{place}/cgroup.procs\n")
    more = {"JOB_IMAGE": dies(tmp_path), "JOB_SITE": str(tmp_path / "site.env"), "JOB_SPEC": "hungry"}
    facts = cluster.end(cluster.submit("--gres=none", "--mem=1G", "--cpus-per-task=1", TRAIN, **site | more))
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", "71:0", "0")
    assert codes(facts) == [71]
    assert "host memory ran out; raise --mem" in Path(facts["StdOut"]).read_text()


def test_a_bad_spec_ends_with_its_reason_and_is_not_requeued(cluster: Cluster, site: dict[str, str]):
    job = cluster.submit(TRAIN, **site | {"JOB_SPEC": "model: {name_or_path: m}"})
    facts = cluster.end(job)
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", "78:0", "0")
    assert "dataset" in Path(facts["StdOut"]).read_text()


def test_a_cancelled_job_leaves_nothing_running_and_stays_cancelled(
    cluster: Cluster, demo: Path, site: dict[str, str], tmp_path: Path
):
    with waiting(cluster, tmp_path / "output", demo, site, "--nodelist=node2") as job:
        assert any("-m job run" in line for line in cluster.processes("node2"))
        cluster.run("scancel", job)
        facts = cluster.end(job)
        cluster.until(lambda: "-m job run" not in str(cluster.processes("node2")), "the end of its processes", 60)
    assert codes(facts) == [75]
    assert (facts["JobState"], facts["Restarts"]) == ("CANCELLED", "0")
    cluster.until(lambda: cluster.processes("node2") == [], "the end of the rest", 60)
    assert list((tmp_path / "node").iterdir()) == []


def test_a_job_that_needs_more_than_its_time_limit_goes_on_in_the_next(cluster: Cluster, whole: Path, limited: Waiting):
    job, output = limited
    cluster.until(lambda: cluster.facts(job)["Restarts"] != "0", "the notice ahead of the time limit")
    publish(whole, output)
    facts = cluster.end(job)
    assert facts["JobState"] == "COMPLETED"
    assert codes(facts) == [75] * int(facts["Restarts"]) + [0]


def test_a_job_of_a_node_that_dies_goes_on_elsewhere(cluster: Cluster, whole: Path, orphaned: Waiting):
    job, output = orphaned
    publish(whole, output)
    facts = cluster.end(job)
    assert int(facts["Restarts"]) > 0
    assert (facts["JobState"], facts["NodeList"], codes(facts)[-1]) == ("COMPLETED", "node1", 0)
