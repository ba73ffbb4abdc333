"""A real Slurm of two nodes for these tests, and ways to look at its jobs."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.planning.conftest import cgroup

__all__ = ["cgroup"]

TOOLS = ("sbatch", "slurmctld", "slurmd", "munged", "unshare")


@dataclass(frozen=True)
class Cluster:
    """A running cluster. `folder` holds its configuration and logs."""

    folder: Path

    def run(self, *command: str, **environment: str) -> str:
        """What a client says."""
        done = subprocess.run(command, env=self.environment(**environment), cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def environment(self, **more: str) -> dict[str, str]:
        return os.environ | {"SLURM_CONF": str(self.folder / "slurm.conf"), "USER": "root"} | more

    def submit(self, *arguments: str, **environment: str) -> str:
        """The id of a job submitted from the repository's folder."""
        return self.run("sbatch", "--parsable", *arguments, **environment)

    def facts(self, job: str) -> dict[str, str]:
        """What Slurm knows of a job: JobState, Restarts, ExitCode, NodeList, …"""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "show", "job", "-o", job)))

    def until(self, true: Callable[[], object], what: str, seconds: float = 180) -> None:
        """Wait for something that is bound to come."""
        deadline = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < deadline, f"{what} did not come; {self.run('squeue', '-l')}"
            time.sleep(0.05)

    def end(self, job: str, seconds: float = 240) -> dict[str, str]:
        """The facts of a job that has ended for good."""
        final = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.until(lambda: self.facts(job)["JobState"] in final, f"the end of job {job}", seconds)
        return self.facts(job)

    def power_off(self, node: str) -> None:
        """End all of a node at once. Slurm learns it later."""
        os.kill(int((self.folder / f"{node}.pid").read_text()), signal.SIGKILL)

    def processes(self, node: str) -> list[str]:
        """Command lines of what runs on a node beside its slurmd."""
        pid = (self.folder / f"{node}.pid").read_text().strip()
        inside = subprocess.run(["pgrep", "-P", pid], capture_output=True, text=True, check=True).stdout.strip()
        found = subprocess.run(["pgrep", "--ns", inside, "--nslist", "pid", "-a"], capture_output=True, text=True)
        return [line for line in found.stdout.splitlines() if "slurmd -D -N" not in line]


def why_not() -> str | None:
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if os.getuid() != 0:
        return "a private Slurm needs root"
    return f"a private Slurm needs {', '.join(missing)}; apt-get install slurm-wlm munge" if missing else None


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    command = [ROOT / "tests/cluster/slurm.sh", "bash", "-c", "echo $CLUSTER; cat"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        folder = process.stdout.readline().strip()
        assert folder, "the cluster did not start"
        yield Cluster(Path(folder))


@pytest.fixture(scope="session")
def venv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment as a site would name it: the Python that runs these tests."""
    folder = tmp_path_factory.mktemp("venv")
    (folder / "bin").mkdir()
    python = folder / "bin/python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return folder
