"""What all tests share: a clean environment, the smallest spec, tiny models, and one that has learned to look."""

from __future__ import annotations

import fcntl
import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

from tests.families import FAMILIES
from tests.forked import Forks
from tests.s3 import bucket, new_bucket, s3, s3_server, store

if TYPE_CHECKING:
    from job.model.loaded import Loaded

__all__ = ["bucket", "new_bucket", "s3", "s3_server", "store"]

sys.dont_write_bytecode = False  # or each of hundreds of processes would compile the job anew
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are so small that more only wait for each other

# On a busy machine an example may take seconds, and that is no fault of what is tested.
settings.register_profile("busy machine", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy machine")

ROOT = Path(__file__).parent.parent
CACHE = ROOT / "build" / "tests"


ONE_AT_A_TIME = ("cluster", "docker")
"""Folders whose tests share what a machine has once (a Slurm, the store of images): one process runs them all."""


LONGEST = (
    "cluster",  # makes the demo first; the next two do not need it
    "checkpoint/test_bad_days.py",
    "planning/test_whole.py",
    "test_job.py",
    "test_stop.py",
    "distributed/test_ranks.py",
    "docker",  # by now the image is built
    "export/test_fewer_bits.py",
    "export/test_host_memory.py",
    "test_fence_proof.py",
    "test_family_proof.py",
    "export/test_gate.py",
    "planning/test_remote_headers.py",
    "train/test_resume.py",
    "train/test_eval_callback.py",
    "test_whole_job.py",
    "train/test_train_oom_retry.py",
    "data/test_burned_in.py",
    "test_torchrun.py",
    "test_prefetch.py",
    "model/test_adapters.py",
    "checkpoint/test_kill_proof.py",
    "data/test_paths.py",
    "data/test_dicom.py",
    "export/test_merge.py",
)
"""What begins first, so that no process is left with minutes of one file when the others have ended, and none waits for what
another makes. By the processor seconds of each, longest first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _scope(item.nodeid) in ONE_AT_A_TIME:
            item.add_marker(pytest.mark.timeout(900))  # an image and a cluster are made within the first of them
        elif "demo" in getattr(item, "fixturenames", ()) and not item.get_closest_marker("timeout"):
            item.add_marker(
                pytest.mark.timeout(600)
            )  # the first of them makes the demo, or waits while another process does
    rank = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(_scope(item.nodeid), len(LONGEST)))


def pytest_collection_finish() -> None:
    """Leave what was imported out of the search for garbage, which accelerate asks for behind each training."""
    gc.collect()
    gc.freeze()


def _scope(nodeid: str) -> str:
    """The file below tests/, or a folder that one process runs: `tests/store/test_s3.py::test_x[a/b]` is in store/test_s3.py."""
    place = Path(nodeid.split("::")[0]).parts[1:]
    return place[0] if place[0] in ONE_AT_A_TIME else "/".join(place)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With several processes (pytest -n), tests of one file stay together, and so do those of a whole such folder.

    So what a file makes once is made once. xdist's own groups are lost: pytest 9.2 gives no test the name they are kept in.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _scope(nodeid)

    return ByFile(config, log)


@pytest.fixture(autouse=True)
def _clean_environment() -> Iterator[None]:
    """No variable of the person who runs the tests reaches the job, and none of what libraries set in one test (accelerate does,
    for each trainer) the next, whose jobs could then not be forked."""
    before = dict(os.environ)
    for name in before:
        if name.startswith(("JOB_", "AWS_", "SLURM_", "HF_TOKEN")):
            del os.environ[name]
    os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    """The smallest spec: what has no default."""
    return {
        "model": {"name_or_path": str(tmp_path / "base")},
        "dataset": {"path": str(tmp_path / "data")},
        "output": {"url": str(tmp_path / "output")},
    }


@pytest.fixture(scope="session")
def demo() -> Path:
    """`base/`, a tiny model that describes drawn radiographs in house style, and `data/`, images in radiologist style.

    Made once and kept in build/ until its maker changes.
    """
    folder = CACHE / "demo"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:  # of several test processes, one makes it
        fcntl.flock(lock, fcntl.LOCK_EX)
        subprocess.run([sys.executable, "examples/make_demo.py", str(folder), "--small"], cwd=ROOT, check=True)
    return folder


Job = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    forks = Forks()
    yield forks
    forks.close()


@pytest.fixture
def job(tmp_path: Path, forks: Forks) -> Job:
    """Run `python -m job …` as a scheduler would: a process of its own, settings in the environment."""

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        there = job_environment(tmp_path, **environment)
        if forks.suits(there):
            return forks.run(list(arguments), there, timeout=600)
        command = [sys.executable, "-m", "job", *arguments]
        return subprocess.run(command, env=there, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)

    return run


def job_environment(tmp_path: Path, **environment: str) -> dict[str, str]:
    """A scheduler's environment: this one without settings of ours, and a scratch folder of its own."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("JOB_")}
    ours = {"JOB_SCRATCH": str(tmp_path / "scratch"), "JOB_LEASE_SECONDS": "6"}
    return clean | ours | environment


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny(family, dtype)` is a checkpoint folder of a model with random weights, made once."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    from tests.tiny import make_model

    disable_progress_bar()
    torch.set_num_threads(1)  # more only get in each other's way on tensors this small
    made: dict[Any, Path] = {}

    def get(family: str, dtype: Any = torch.float32) -> Path:
        if (family, dtype) not in made:
            made[family, dtype] = make_model(family, tmp_path_factory.mktemp(family), dtype=dtype)
        return made[family, dtype]

    return get


@pytest.fixture(params=FAMILIES, scope="session")
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def folder(family: str, tiny: Callable[..., Path]) -> Path:
    return tiny(family)


@pytest.fixture(scope="session")
def loaded(folder: Path) -> Loaded:
    """Base and adapters that have something to say. Shared: leave it as it is."""
    from tests.tiny import load_tiny, perturb

    return perturb(load_tiny(folder))
