"""A sweep and `slurm/multinode.sh` on a real Slurm."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from job.config.loader import load_spec
from job.render import read_runs, slurm
from tests.cluster.conftest import Cluster
from tests.conftest import ROOT
from tests.resume_proof import small_spec, trajectory

ALL_REDUCE = """
import json, os, signal, time
from pathlib import Path
import torch, torch.distributed as dist
signal.signal(signal.SIGUSR1, lambda *_: os._exit(75))
dist.init_process_group("gloo")
total = torch.tensor([dist.get_rank() + 1])
dist.all_reduce(total)
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "JOB_SCRATCH", "SECRET")
facts = {"total": int(total), "host": os.uname().nodename} | {name: os.environ.get(name) for name in names}
Path(os.environ["JOB__OUTPUT__URL"], f"{dist.get_rank()}.json").write_text(json.dumps(facts))
if os.environ["JOB_SPEC"] == "wait" and os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
    time.sleep(600)
# Not sys.exit: gloo may abort on the way out.
os._exit(int(os.environ["JOB_SPEC"]) if dist.get_rank() == 1 and os.environ["JOB_SPEC"] != "wait" else 0)
"""


def fake(folder: Path, program: str) -> Path:
    """A virtual environment in which `python -m job run` is another program."""
    (folder / "venv/bin").mkdir(parents=True)
    (folder / "program.py").write_text(program)
    python = folder / "venv/bin/python"
    python.write_text(f"#!/bin/sh\nexec {sys.executable} {folder}/program.py\n")
    python.chmod(0o755)
    return folder / "venv"


@pytest.fixture
def site(tmp_path: Path) -> dict[str, str]:
    """Of somebody whose folders have names as people give them."""
    (tmp_path / "it's here").symlink_to(ROOT)
    return {
        "JOB_HOME": str(tmp_path / "it's here"),
        "JOB_RUNTIME": "venv",
        "JOB_NODE_SCRATCH": str(tmp_path / "node"),
        "SBATCH_OUTPUT": str(tmp_path / "%j.log"),
        "SECRET": "of mine",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "JOB_PASS_ENV": "OMP_*",
    }


TELL = """
import json, os, sys
json.dump(dict(os.environ), open(os.environ["JOB__OUTPUT__URL"] + ".json", "w"))
sys.exit(75 if os.environ["JOB__OUTPUT__URL"].endswith("high") and "SLURM_RESTART_COUNT" not in os.environ else 0)
"""


def test_a_sweep_gives_each_row_of_its_table_an_output_of_its_own(
    cluster: Cluster, site: dict[str, str], tmp_path: Path
):
    """The last task is requeued, and it alone, although its number is also that of the whole array."""
    table = tmp_path / "sweep.csv"
    table.write_text('name,training.learning_rate,dataset.instruction\nlow,1e-4,\nhigh,2e-4,"It\'s $HOME, `so`"\n')
    text = "model: {name_or_path: m}\ndataset: {path: d}\noutput: {url: nowhere}\n"
    runs = read_runs({}, text, str(tmp_path), table)
    script = tmp_path / "sweep.sh"
    script.write_text(slurm(runs, {"JOB_IMAGE": str(fake(tmp_path, TELL))}))
    array = cluster.submit("--mem=1G", str(script), **site)
    cluster.until(lambda: (tmp_path / "high.json").exists(), "the second task")
    low, high = (cluster.end(f"{array}_{task}") for task in (1, 2))
    assert high["JobId"] == array
    assert [(task["ExitCode"], task["Restarts"]) for task in (low, high)] == [("0:0", "0"), ("0:0", "1")]
    seen = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("low", "high")]
    assert [load_spec(each) for each in seen] == [run.spec for run in runs]
    assert runs[1].spec.dataset.instruction == "It's $HOME, `so`"
    assert "SECRET" not in seen[0]


def test_ranks_of_two_nodes_meet_and_their_codes_reach_slurm(cluster: Cluster, site: dict[str, str], tmp_path: Path):
    image = fake(tmp_path, ALL_REDUCE)
    more = {"JOB_IMAGE": str(image), "JOB__OUTPUT__URL": str(tmp_path)}
    two = ("--nodes=2", "--ntasks-per-node=1", "--mem=1G", "--gres=none", "slurm/multinode.sh")
    job = cluster.submit(*two, **site | more | {"JOB_SPEC": "wait"})
    cluster.until((tmp_path / "0.json").exists, "the ranks")
    cluster.until((tmp_path / "1.json").exists, "the ranks")
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert [(r["RANK"], r["LOCAL_RANK"], r["WORLD_SIZE"], r["total"]) for r in ranks] == [
        ("0", "0", "2", 3),
        ("1", "0", "2", 3),
    ]
    assert {r["host"] for r in ranks} == {"node1", "node2"}
    assert {r["SECRET"] for r in ranks} == {None}
    cluster.run("scancel", "--batch", "--signal=USR1", job)  # as --signal=B:USR1@180 does
    facts = cluster.end(job)
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1")
    assert list((tmp_path / "node").iterdir()) == []
    failing = cluster.end(cluster.submit(*two, **site | more | {"JOB_SPEC": "70"}))
    assert (failing["ExitCode"], failing["Restarts"]) == ("70:0", "0")


def test_two_nodes_train_one_model(cluster: Cluster, site: dict[str, str], venv: Path, demo: Path, tmp_path: Path):
    """The notice ahead of the time limit reaches both; they go on together and end together."""
    output = tmp_path / "output"
    more = {"JOB_IMAGE": str(venv), "JOB_SPEC": small_spec(demo, str(output)), "JOB_LEASE_SECONDS": "15"}
    two = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--mem=1G", "--gres=none", "slurm/multinode.sh")
    job = cluster.submit(*two, **site | more)
    cluster.until((output / "checkpoints/step-00000005/MANIFEST.json").exists, "a checkpoint", 120)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    facts = cluster.end(job, 240)
    log = (tmp_path / f"{job}.log").read_text()
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), log
    assert "× 2 devices" in log
    assert "stopped on SIGUSR1" in log
    assert [line[0] for line in trajectory((output / "logs/metrics.jsonl").read_bytes())] == list(range(1, 25))
    assert list((tmp_path / "node").iterdir()) == []
