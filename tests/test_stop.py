"""A notice in every stage: leave with 75, go on from there, end with the same result."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from job.store import open_store
from tests.conftest import ROOT, job_environment
from tests.forked import Forked, Forks
from tests.resume_proof import outcome, prove, small_spec
from tests.s3 import make_bucket

STAGES = ("stage in", "load", "evaluate before", "train", "evaluate after", "export", "publish")
PROCESS_ONE = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]


def stage_of(output: Path) -> str | None:
    try:
        status = json.loads((output / "status.json").read_text())
    except (OSError, ValueError):
        return None
    return str(status["stage"]) if status["state"] == "running" else None


def run(command: list[str], spec: str, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        env=job_environment(folder, JOB_SPEC=spec),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def fork(forks: Forks, spec: str, folder: Path, own_session: bool = False) -> Forked:
    """The same without importing its libraries."""
    return forks.start(["run"], job_environment(folder, JOB_SPEC=spec), own_session=own_session)


JOB = [sys.executable, "-m", "job", "run"]
WAYS = {
    "to the process": JOB,
    "to its process group": JOB,
    "through bash": ["bash", "-c", 'trap "kill -TERM \\$pid" TERM; "$@" & pid=$!; wait $pid; wait $pid', "bash", *JOB],
    "as process 1": [*PROCESS_ONE, *JOB],
}


def end(process: subprocess.Popen[str] | Forked, timeout: float = 200) -> tuple[int, str]:
    """Exit code and stderr."""
    _, stderr = process.communicate(timeout=timeout)
    return process.wait(), stderr


def finish(forks: Forks, spec: str, folder: Path) -> None:
    code, stderr = end(fork(forks, spec, folder))
    assert code == 0, stderr


def stop(process: subprocess.Popen[str] | Forked, way: str) -> None:
    if way == "to its process group":
        os.killpg(process.pid, signal.SIGTERM)
    elif way == "as process 1":
        inside = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0]
        os.kill(int(inside), signal.SIGTERM)
    else:
        process.send_signal(signal.SIGTERM)


def can_be_process_one() -> bool:
    return bool(shutil.which("unshare")) and subprocess.run([*PROCESS_ONE, "true"], check=False).returncode == 0


def test_stopped_in_every_stage_it_leaves_with_75_and_ends_the_same(demo: Path, tmp_path: Path, forks: Forks):
    """One output; every attempt is stopped in a later stage than the one before, each time in another way; only a way that had
    its turn is tried on a fork. The base's own files name another end of an answer than its template: what training makes of them
    in the undisturbed job, the attempt that only measures never makes."""
    finish(forks, ending_otherwise(demo, tmp_path, tmp_path / "whole"), tmp_path)
    output = tmp_path / "output"
    spec = ending_otherwise(demo, tmp_path, output)
    ways = [way for way in WAYS if way != "as process 1" or can_be_process_one()]
    for number, stage in enumerate(STAGES):
        way = ways[number % len(ways)]
        if number >= len(ways) and WAYS[way] == JOB:
            process: subprocess.Popen[str] | Forked = fork(forks, spec, tmp_path, own_session=True)
        else:
            process = run(WAYS[way], spec, tmp_path)
        deadline = time.monotonic() + 120
        while stage_of(output) != stage and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        stop(process, way)
        code, stderr = end(process, 60)
        last = stderr.strip().splitlines()[-1]
        if stage == "publish" and code == 0:
            assert "published" in last  # it was faster than the signal
        else:
            assert (code, last) == (75, "exit 75: stopped on SIGTERM; run again to continue"), (stage, way, stderr)
    finish(forks, spec, tmp_path)
    assert outcome(str(output)) == outcome(str(tmp_path / "whole"))
    ends = [
        json.loads(line)["tokens"] < 40 for line in (output / "evaluation" / "after.jsonl").read_text().splitlines()
    ]
    assert sum(ends) > 4


def ending_otherwise(demo: Path, folder: Path, output: Path) -> str:
    """The small job, with room for whole answers, on a base whose generation config stops at the end of text alone."""
    base = Path(shutil.copytree(demo / "base", folder / "base", dirs_exist_ok=True))
    (base / "generation_config.json").write_text('{"eos_token_id": 494}')
    spec = yaml.safe_load(small_spec(demo, str(output), merged=True))
    spec["evaluation"]["max_new_tokens"] = 40
    return yaml.safe_dump(spec | {"model": {"name_or_path": str(base)}})


def test_a_job_whose_output_another_took_over_leaves_at_once(demo: Path, tmp_path: Path, forks: Forks):
    """Else it would train for hours for a checkpoint that it may not commit."""
    output = tmp_path / "output"
    process = fork(forks, small_spec(demo, str(output)), tmp_path)
    while stage_of(output) is None and process.poll() is None:
        time.sleep(0.002)
    open_store(str(output)).write("lease.json", b'{"holder": "another", "token": 9, "ttl": 60}')
    code, stderr = end(process)
    reasons = (
        f"exit 75: stopped on the loss of the lease on {output} to another; run again to continue",
        f"exit 75: The lease on {output} was taken over by another.",
    )
    assert code == 75, stderr
    assert stderr.strip().splitlines()[-1] in reasons


@pytest.mark.timeout(600)
def test_a_sample_of_killed_jobs_is_identical_to_the_undisturbed_one(demo: Path, s3: str, forks: Forks):
    """`make resume-proof N=50` is the long version, with processes that import their libraries, where they may be killed too."""
    assert prove(3, demo, make_bucket(), s3, seed=5, start=lambda there: forks.start(["run"], there)) == 3


def test_workers_change_neither_order_nor_losses(demo: Path, tmp_path: Path, forks: Forks):
    """Stopped with two workers, ended with none."""
    whole, output = tmp_path / "whole", tmp_path / "output"
    finish(forks, small_spec(demo, str(whole)), tmp_path)
    spec = yaml.safe_load(small_spec(demo, str(output)))
    spec["training"]["dataloader_num_workers"] = 2
    process = fork(forks, yaml.safe_dump(spec), tmp_path)
    store = open_store(str(output))
    while not any("step-00000010/MANIFEST" in entry.key for entry in store.list("checkpoints/")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    process.terminate()
    code, stderr = end(process, 60)
    assert code == 75, stderr
    spec["training"]["dataloader_num_workers"] = 0
    finish(forks, yaml.safe_dump(spec), tmp_path)
    assert outcome(str(output)) == outcome(str(whole))
