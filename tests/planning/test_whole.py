"""The whole job on disks that are too small, just large enough, and as large as was foreseen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from job.config.environment import Environment
from job.config.loader import validate
from job.errors import SpecError
from job.output.stored import open_output
from job.planning.needs import MARGIN, SMALL, Range
from job.planning.plan import Plan, make_plan
from job.planning.shortage import refuse
from job.planning.survey import survey
from job.runtime.peaks import used_bytes
from tests.conftest import ROOT, job_environment
from tests.forked import Forks
from tests.planning.conftest import Enter
from tests.tiny import picture

WIDTH = 24_576
"""Of the feed-forward layers: 57 MB of weights, beside which what is small is small."""


class Ended(NamedTuple):
    code: int
    log: str
    peaks: dict[str, int]


Run = Callable[..., Ended]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., Path]) -> Path:
    """A model whose weights are most of what a job writes, in several files."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    folder, small = tmp_path_factory.mktemp("base"), tiny("qwen2_5_vl")
    config = AutoConfig.from_pretrained(small)
    config.text_config.intermediate_size = WIDTH
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder, max_shard_size="15MB")
    AutoProcessor.from_pretrained(small).save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    rows = tmp_path_factory.mktemp("rows")
    for number in range(10):
        picture(number, 56, 56).save(rows / f"{number}.png")
    lines = [{"file_name": f"{number}.png", "caption": f"There is a nodule, {number}."} for number in range(10)]
    (rows / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {
        "model": {"name_or_path": str(base)},
        "lora": {"r": 4},
        "dataset": {"path": str(rows), "eval_rows": 2},
        "training": {"max_steps": 5, "effective_batch_size": 1, "learning_rate": 1e-3},
        "checkpoint": {"save_steps": 1, "keep": 1},
        "evaluation": {"max_new_tokens": 2, "explained_rows": 0},
        "export": {"gate": {"rows": 2}},
    }


def to(whole: dict[str, Any], url: Path, **export: Any) -> dict[str, Any]:
    return whole | {"output": {"url": str(url)}, "export": whole["export"] | export}


def planned(tree: dict[str, Any], scratch: Path) -> Plan:
    spec = validate(tree)
    scratch.mkdir(exist_ok=True)
    return make_plan(spec, survey(spec, open_output(spec), scratch, Environment.read(os.environ), fetch=False).facts)


def needed(plan: Plan, of: str) -> Range:
    """The largest of all stages."""
    return Range(*(max(getattr(need, of)[end] for need in plan.foreseen.needs) for end in (0, 1)))


@pytest.fixture
def ran(forks: Forks, tmp_path: Path) -> Run:
    """Run a whole job. Returns the most that was in its scratch and its output at any time, too. What `start` does before the
    job begins needs a process of its own."""

    def run(tree: dict[str, Any], start: Callable[[], None] | None = None, **environment: str) -> Ended:
        environment = job_environment(tmp_path, JOB_SPEC=yaml.safe_dump(tree), **environment)
        folders = {"scratch": environment["JOB_SCRATCH"], "output": tree["output"]["url"]}
        peaks = dict.fromkeys(folders, 0)
        with (tmp_path / "log").open("w") as log:
            command = [sys.executable, "-m", "job", "run"]
            process = (
                subprocess.Popen(command, env=environment, cwd=ROOT, stderr=log, preexec_fn=start)
                if start
                else forks.start(["run"], environment, log)
            )
        while process.poll() is None:
            for name, folder in folders.items():
                peaks[name] = max(peaks[name], used_bytes(Path(folder)))
            time.sleep(0.01)
        return Ended(process.returncode or 0, (tmp_path / "log").read_text(), peaks)

    return run


def assert_foreseen(plan: Plan, peaks: dict[str, int]) -> None:
    """At its peak a job wrote at most what was foreseen, and at least half of it but for the margin."""
    for name, peak in peaks.items():
        foreseen = needed(plan, name).most
        assert (foreseen - SMALL) / MARGIN / 2 <= peak <= foreseen, (name, peak, foreseen)


def test_an_output_without_room_for_merged_weights_is_refused_before_training(
    whole: dict[str, Any], mounted: Callable[[str, float], Path], tmp_path: Path, ran: Run
):
    small = mounted("small", needed(planned(to(whole, tmp_path / "o"), tmp_path / "s"), "output").least - 1_000_000)
    tree = to(whole, small)
    ended = ran(tree)
    last = ended.log.strip().splitlines()[-1]
    assert ended.code == 78, ended.log
    assert last.startswith(f"exit 78: output.url {small}: publish needs at least ")
    assert "MB are free; free some space, or name another output.url, or set export.merged to false" in last
    assert "load:" not in ended.log
    assert not (small / "evaluation").exists()
    told = planned(tree, tmp_path / "s").warnings[-1]  # as `check` does, which may be on another machine
    assert told.startswith(f"run refuses this here: output.url {small}: publish needs at least ")
    assert planned(to(whole, small, merged=False), tmp_path / "s").foreseen.shortages == ()


def test_with_the_room_foreseen_it_publishes_and_a_second_attempt_counts_what_the_first_wrote(
    whole: dict[str, Any], mounted: Callable[[str, float], Path], tmp_path: Path, ran: Run
):
    plan = planned(to(whole, tmp_path / "o"), tmp_path / "s")
    large = mounted("large", needed(plan, "output").most + 8192)
    first = ran(to(whole, large))
    assert first.code == 0, first.log
    assert_foreseen(plan, first.peaks)
    (large / "RESULT.json").unlink()  # as if it was killed at the last moment
    facts = os.statvfs(large)
    assert facts.f_bavail * facts.f_frsize < needed(plan, "output").least
    second = ran(to(whole, large))
    assert second.code == 0, second.log
    assert (large / "RESULT.json").exists()


def test_where_scratch_is_too_small_merged_weights_go_straight_to_the_output(
    whole: dict[str, Any], mounted: Callable[[str, float], Path], tmp_path: Path, ran: Run
):
    copied = planned(to(whole, tmp_path / "o", scratch_copy=True), tmp_path / "s")
    straight = planned(to(whole, tmp_path / "o", scratch_copy=False), tmp_path / "s")
    least = needed(copied, "scratch").least
    assert needed(straight, "scratch").most < least - 1_000_000
    scratch = mounted("small", least - 1_000_000)
    done = ran(to(whole, tmp_path / "output"), JOB_SCRATCH=str(scratch))
    assert done.code == 0, done.log
    assert "merged weights go straight to the output" in done.log
    assert list((tmp_path / "output" / "merged").glob("*.safetensors"))
    assert_foreseen(straight, done.peaks)


def test_an_adapter_alone_writes_what_was_foreseen(whole: dict[str, Any], tmp_path: Path, ran: Run):
    tree = to(whole, tmp_path / "output", merged=False)
    plan = planned(tree, tmp_path / "s")
    ended = ran(tree)
    assert ended.code == 0, ended.log
    assert_foreseen(plan, ended.peaks)


def test_what_was_granted_bounds_scratch_on_a_large_disk(
    whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("JOB_SCRATCH", str(tmp_path / "s"))
    monkeypatch.setenv("JOB_SCRATCH_GB", "0.05")
    plan = planned(to(whole, tmp_path / "output", scratch_copy=True), tmp_path / "s")
    says = rf"scratch {tmp_path}/s \(of JOB_SCRATCH_GB\): export needs at least .*set export.scratch_copy to false"
    with pytest.raises(SpecError, match=says):
        refuse(plan.foreseen.shortages)


def test_a_model_that_a_container_cannot_hold_is_refused_before_it_is_loaded(
    whole: dict[str, Any], cgroup: Callable[[int], Enter], tmp_path: Path, ran: Run
):
    least = needed(planned(to(whole, tmp_path / "o"), tmp_path / "s"), "memory").least
    ended = ran(to(whole, tmp_path / "output"), start=cgroup(least - 10_000_000))
    assert ended.code == 78, ended.log
    last = ended.log.strip().splitlines()[-1]
    assert "host memory (memory.limit_in_bytes of cgroup" in last or "host memory (memory.max of cgroup" in last
    assert "train needs at least" in last
    assert "set model.precision to 16bit, give the job more memory" in last
    assert "load:" not in ended.log
