"""One family of tests/other_families.py, stopped and killed on its way, and some through Unsloth; `make test-families` and `make
test-unsloth` do so with each."""

import os
from pathlib import Path
from typing import TextIO

import pytest

from tests.family_proof import (
    THROUGH_UNSLOTH,
    UNSLOTH,
    environment,
    job,
    logits_agree,
    make_base,
    make_rows,
    prove,
    spec_of,
)
from tests.forked import Forked, Forks


def test_a_family_that_is_stopped_and_killed_ends_published(tmp_path: Path, forks: Forks) -> None:
    """On forks; test_whole_job.py does the same with processes that import their libraries."""

    def start(environment: dict[str, str], log: TextIO) -> Forked:
        return forks.start(["run"], os.environ | environment, log, own_session=True)

    assert prove("idefics3", tmp_path, uncut=False, start=start) == []


@pytest.mark.skipif(not UNSLOTH.exists(), reason="make test brings Unsloth")
@pytest.mark.parametrize("family", ["mllama", "qwen3_vl", "gemma3", "glm4v"])
def test_a_job_through_unsloth_ends_published(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU (tests/unsloth_on_cpu). Unsloth replaces the processor of Gemma 3, and would add a row to GLM's vocabulary."""
    for name in ("base", "rows"):
        (tmp_path / name).mkdir()
    base, rows, output = make_base(family, tmp_path / "base"), make_rows(tmp_path / "rows"), tmp_path / "output"
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    spec = spec_of(base, rows, output)
    spec["model"] |= THROUGH_UNSLOTH
    ended = job("run", spec, tmp_path / "scratch")
    assert ended.returncode == 0, ended.stderr
    assert "Unsloth" in ended.stdout
    assert (output / "RESULT.json").exists()
    logits_agree(base, output)
