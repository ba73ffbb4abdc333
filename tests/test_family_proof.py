"""One family of tests/other_families.py, stopped and killed on its way, and some through Unsloth; `make test-families` and `make
test-unsloth` do so with each."""

import os
import subprocess
import sys
from pathlib import Path
from typing import TextIO

import pytest

from tests.family_proof import ROOT, UNSLOTH, environment, job, logits_agree, make_both, prove, spec_of
from tests.forked import Forked, Forks

from whole_job_figures import read_lines  # isort: skip  # tests.tiny finds it


def test_a_family_that_is_stopped_and_killed_ends_published(tmp_path: Path, forks: Forks) -> None:
    """On forks; test_whole_job.py does the same with processes that import their libraries."""

    def start(environment: dict[str, str], log: TextIO) -> Forked:
        return forks.start(["run"], os.environ | environment, log, own_session=True)

    assert prove("idefics3", tmp_path, uncut=False, start=start) == []


@pytest.mark.skipif(not UNSLOTH.exists(), reason="make test brings Unsloth")
@pytest.mark.parametrize("family", ["mllama", "qwen3_vl", "gemma3", "glm4v"])
def test_a_job_through_unsloth_ends_published(family: str, tmp_path: Path) -> None:
    """On a CPU (tests/unsloth_on_cpu). Unsloth would replace the processor of Gemma 3, and add a row to GLM's vocabulary. Both
    backends begin with one loss."""
    base, rows = make_both(family, tmp_path)
    losses = []
    for backend in ("unsloth", "transformers"):
        output = tmp_path / backend
        spec = spec_of(base, rows, output)
        spec["model"] |= {"backend": backend, "precision": "16bit"}
        there = environment() if backend == "unsloth" else {}
        ended = job("run", spec, tmp_path / "scratch" / backend, **there)
        assert ended.returncode == 0, ended.stderr
        assert ("Unsloth" in ended.stdout) == (backend == "unsloth")
        assert (output / "RESULT.json").exists()
        losses.append(read_lines(output / "logs" / "metrics.jsonl")[0]["loss"])
    logits_agree(base, tmp_path / "unsloth")
    assert losses[0] == pytest.approx(losses[1], rel=0.01)


@pytest.mark.skipif(not UNSLOTH.exists(), reason="make test brings Unsloth")
def test_4_bits_that_unsloth_makes_16_of_are_refused(tmp_path: Path) -> None:
    """It says so and goes on, where bitsandbytes does not work; the plan, the card and the gate would tell of 4 bits."""
    spec = spec_of(*make_both("qwen3_vl", tmp_path), tmp_path / "output")
    spec["model"] |= {"backend": "unsloth", "precision": "4bit"}
    ended = job("run", spec, tmp_path / "scratch", **environment())
    assert ended.returncode == 78
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith(
        "exit 78: model.precision: Unsloth loaded the base in 16 bits, because bitsandbytes does not work here;"
    )


@pytest.mark.skipif(not UNSLOTH.exists(), reason="make test brings Unsloth")
@pytest.mark.parametrize(
    ("tests", "cases", "passed"),
    [("gpu/test_families.py", "test_families", 20), ("model/test_collator.py", "gemma3", 35)],
    ids=["layers", "rows"],
)
def test_what_unsloth_patches_is_right_beside_it(tests: str, cases: str, passed: int, tmp_path: Path) -> None:
    """Layers of every family, beside Unsloth's own choice; rows of Gemma 3, whose processor it would replace."""
    plain = "-m pytest -o filterwarnings= -p unsloth_first"
    command = [sys.executable, *plain.split(), f"tests/{tests}", "-k", cases]
    there = os.environ | environment() | {"UNSLOTH_COMPILE_LOCATION": str(tmp_path)}
    ended = subprocess.run(command, cwd=ROOT, env=there, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout
    assert f"{passed} passed" in ended.stdout
