"""The disk of the node."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from job.config.environment import Environment
from job.errors import NotAllowed, RankEnded, ScratchFilled, SpecError, Unavailable
from job.runtime.preemption import Preemption
from job.runtime.scratch import CACHES, COMPILING, explain_shortages, limit_scratch, prepare_scratch
from job.store import open_store
from job.store.lease import acquire
from tests.conftest import ROOT, Job, job_environment


def test_a_disk_that_is_full_is_no_bug(tmp_path: Path):
    with pytest.raises(Unavailable, match=f"The disk that holds {tmp_path} is full"), explain_shortages(tmp_path):
        Path("/dev/full").write_bytes(b"x")
    with pytest.raises(FileNotFoundError), explain_shortages(tmp_path):
        (tmp_path / "none").read_bytes()


def prepared(variables: dict[str, str]) -> Path:
    return prepare_scratch(Environment.read(variables), variables)


def waits(folder: Path, **settings: str) -> "subprocess.Popen[str]":
    """A job that waits for the lease of another writer, once it does."""
    spec = f"{{model: {{name_or_path: m}}, dataset: {{path: d}}, output: {{url: {folder}/output}}}}"
    environment = job_environment(folder, JOB_SPEC=spec, JOB_LEASE_SECONDS="300", **settings)
    command = [sys.executable, "-m", "job", "run"]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert "lease" in process.stderr.readline()
    return process


@pytest.mark.parametrize("notice", [False, True])
def test_a_job_leaves_for_good_before_its_scratch_is_over_the_limit(tmp_path: Path, notice: bool):
    """A kubelet that was faster sends SIGTERM, and 75 would be tried again without end."""
    with acquire(open_store(f"{tmp_path}/output"), "another writer", 300, wait=0):
        process = waits(tmp_path, JOB_SCRATCH_GB="0.01")
        (tmp_path / "scratch" / "filler").write_bytes(bytes(9_000_000))
        time.sleep(0 if notice else 2.5)
        assert process.poll() is None
        with (tmp_path / "scratch" / "filler").open("ab") as file:
            file.write(bytes(900_000))
        if notice:
            process.terminate()
        _, stderr = process.communicate(timeout=60)
    last = stderr.splitlines()[-1]
    assert (process.returncode, "has grown to 9.9 MB, with 10.0 MB granted; grant more" in last) == (78, True), stderr


def test_scratch_that_is_no_folder_of_this_machine_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for given in ("s3://bucket/scratch", "~no-such-user/scratch"):
        with pytest.raises(SpecError, match=f"JOB_SCRATCH.*{given}"):
            prepared({"JOB_SCRATCH": given})
    assert not list(tmp_path.iterdir())


def test_scratch_and_output_may_begin_with_the_users_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert prepared({"JOB_SCRATCH": "~/scratch"}) == tmp_path / "scratch"
    open_store("~/runs/one").write("key", b"")
    assert (tmp_path / "runs" / "one" / "key").is_file()
    with pytest.raises(SpecError, match="~no-such-user/runs starts with the home of a user that this machine does not"):
        open_store("~no-such-user/runs")


def test_a_cache_that_cannot_be_made_is_refused_and_an_empty_variable_names_none(tmp_path: Path):
    (tmp_path / "file").touch()
    environment = {"JOB_SCRATCH": str(tmp_path), "HF_HOME": f"{tmp_path}/file/cache"}
    with pytest.raises(
        NotAllowed, match=f"HF_HOME is {tmp_path}/file/cache: Not a directory; name a folder that can be"
    ):
        prepared(environment)
    environment["HF_HOME"] = ""
    prepared(environment)
    assert environment["HF_HOME"] == f"{tmp_path}/cache/huggingface"


def test_with_a_bundle_libraries_ask_nothing_of_a_network(tmp_path: Path):
    for bundle, said in (("", None), ("/bundle", "1")):
        variables = {"JOB_SCRATCH": str(tmp_path), "JOB_BUNDLE": bundle}
        prepared(variables)
        assert variables.get("HF_HUB_OFFLINE") == said


def test_without_a_limit_or_below_it_a_notice_is_one(tmp_path: Path):
    with acquire(open_store(f"{tmp_path}/output"), "another writer", 300, wait=0):
        process = waits(tmp_path, JOB_SCRATCH_GB="0.01")
        process.terminate()
        process.communicate(timeout=60)
    assert process.returncode == 75


def test_scratch_that_is_filled_ends_with_78_wherever_the_job_is(tmp_path: Path):
    """Also where it listens for notices only now and then."""
    (tmp_path / "a").write_bytes(bytes(20_000_000))
    preemption = Preemption()
    with limit_scratch(tmp_path, Environment(scratch_gb=0.01), preemption):
        with pytest.raises(ScratchFilled, match="JOB_SCRATCH_GB: scratch"):
            preemption.check()
        preemption.request("SIGTERM")
        with pytest.raises(ScratchFilled):
            preemption.check()
    earlier = Preemption()
    earlier.request("rank 1: the data is wrong", code=65)
    with limit_scratch(tmp_path, Environment(scratch_gb=0.01), earlier), pytest.raises(RankEnded) as ended:
        earlier.check()
    assert ended.value.exit_code == 65


@pytest.fixture
def default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where scratch lies unless it is said."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"vision-lora-job-{os.getuid()}"


def mode(folder: Path) -> str:
    return oct(folder.stat().st_mode & 0o777)


@pytest.mark.parametrize("there", [None, 0o755, 0o777, 0o700])
def test_the_default_scratch_is_this_users_alone(default: Path, there: int | None):
    """Also that of an earlier job that left it open to all."""
    if there is not None:
        default.mkdir()
        default.chmod(there)
        (default / "cache").mkdir(mode=0o755)
    assert prepared({}) == default
    assert {mode(folder) for folder in (default, *default.iterdir())} == {"0o700"}


@pytest.mark.parametrize("kind", ["is a link", "is not a folder", "belongs to user 65534"])
def test_a_default_scratch_of_somebody_else_is_not_used(
    default: Path, tmp_path: Path, tree: dict[str, Any], job: Job, kind: str
):
    """Who put it there could read the data, and change what is trained on."""
    (tmp_path / "theirs").mkdir()
    if kind == "is a link":
        default.symlink_to(tmp_path / "theirs")
    elif kind == "is not a folder":
        default.write_text("")
    else:
        default.mkdir()
        try:
            os.chown(default, 65534, 65534)
        except PermissionError:
            pytest.skip("only root gives folders away")
    sentence = f"scratch folder {default} {kind}; remove it, or set JOB_SCRATCH to a folder of your own"
    with pytest.raises(NotAllowed, match=sentence):
        prepared({})
    for command in ("check", "run"):
        ended = job(command, yaml.safe_dump(tree), JOB_SCRATCH="", TMPDIR=str(tmp_path))
        assert (ended.returncode, ended.stderr.splitlines()[-1]) == (77, f"exit 77: {sentence}")
    assert not list((tmp_path / "theirs").iterdir())


def test_what_lies_on_a_scratch_that_all_may_read_is_this_users_alone(tmp_path: Path):
    """The folder itself stays as its owner made it: it may be a mount."""
    (tmp_path / "scratch").mkdir()
    (tmp_path / "scratch").chmod(0o777)
    with acquire(open_store(f"{tmp_path}/output"), "another writer", 300, wait=0):
        process = waits(tmp_path)
        process.terminate()
        process.communicate(timeout=60)
    assert mode(tmp_path / "scratch") == "0o777"
    below = [each for each in (tmp_path / "scratch").iterdir() if each.name != "heartbeat"]
    assert len(below) > 5
    assert {mode(folder) for folder in below} == {"0o700"}


def test_a_scratch_whose_cache_may_not_be_written_is_told_as_such(tmp_path: Path):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "scratch" / "cache").write_text("")
    with pytest.raises(NotAllowed, match=r"scratch folder .*/scratch/cache: File exists; set JOB_SCRATCH"):
        prepared({"JOB_SCRATCH": str(tmp_path / "scratch")})


# Products of matrices only: torch compiles no C++ for them.
COMPILES = """
import json, torch
from torch._dynamo.utils import counters

class Layer(torch.autograd.Function):  # as Unsloth's for weights in 4 bits
    @staticmethod
    def forward(ctx, x, weight):
        ctx.weight = weight
        return x @ weight

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ ctx.weight.T, None

def applied(function, *inputs):
    return function.apply(*inputs)

@torch.compile
def layers(x, weight):
    return applied(Layer, x @ weight, weight)

x = torch.ones(4, 4, requires_grad=True)
layers(x, torch.full((4, 4), 0.5)).backward(torch.ones(4, 4))
found = {name.removeprefix("autograd_cache_"): count for name, count in counters["aot_autograd"].items() if "cache" in name}
print(json.dumps([x.grad[0, 0].item(), found]))
"""


def compiling(folder: Path) -> list[object]:
    """The gradient, and what torch found in its cache, in a process with scratch in `folder`."""
    environment = {name: value for name, value in os.environ.items() if name not in CACHES | COMPILING}
    environment["JOB_SCRATCH"] = str(folder)
    prepared(environment)
    ended = subprocess.run(
        [sys.executable, "-c", COMPILES], env=environment, capture_output=True, text=True, check=True
    )
    found: list[object] = json.loads(ended.stdout.splitlines()[-1])
    return found


def test_a_restart_on_the_same_node_takes_unsloths_own_functions_from_torchs_cache(tmp_path: Path):
    assert compiling(tmp_path) == [4, {"miss": 1, "saved": 1}]
    assert compiling(tmp_path) == [4, {"hit": 1}]
