"""Whether an output is apart from all that a job reads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from job.config.environment import Environment
from job.config.loader import validate
from job.errors import SpecError
from job.output.overlap import refuse_overlap
from tests.conftest import ROOT, Job


def refused(tree: dict[str, Any], **environment: str) -> str:
    """The sentence, or an empty string."""
    try:
        refuse_overlap(validate(tree), Environment.read({"JOB_SCRATCH": "/none/scratch", **environment}))
    except SpecError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("field", ["path", "eval_path"])
@pytest.mark.parametrize(
    ("output", "data", "said"),
    [
        ("s3://b/a", "s3://b/a", "is"),
        ("s3://b/a/", "s3://b/a", "is"),
        ("s3://b/a", "s3://b/a/data", "holds"),
        ("s3://b", "s3://b/a/rows.jsonl", "holds"),
        ("s3://b/a/out", "s3://b/a/", "lies in"),
        ("s3://b//a/out", "s3://b/a", "lies in"),
        ("s3://b/a", "s3://b/ab", ""),
        ("s3://b/ab", "s3://b/a", ""),
        ("s3://b/a", "s3://c/a", ""),
        ("s3://b/a", "s3://b/A", ""),
        ("TMP/a", "TMP/a", "is"),
        ("TMP/a/", "TMP/a", "is"),
        ("TMP/a/out", "TMP/a", "lies in"),
        ("TMP", "TMP/a/rows.jsonl", "holds"),
        ("TMP/x/../a", "TMP/a", "is"),
        ("file://TMP/a/new/out", "TMP/a", "lies in"),
        ("TMP/with%20space", "TMP/with space", ""),
        ("file://TMP/with%20space/out", "TMP/with space", "lies in"),
        ("TMP/link/out", "TMP/a", "lies in"),
        ("TMP/a/out", "TMP/link", "lies in"),
        ("TMP/holder", "TMP/holder/inner/rows.jsonl", "holds"),
        ("TMP/ab", "TMP/a", ""),
        ("TMP/A", "TMP/a", ""),
        ("s3://b/a", "TMP/a", ""),
        (".", "nobody/rows", ""),
    ],
)
def test_an_output_that_overlaps_the_rows_is_refused(
    tree: dict[str, Any], tmp_path: Path, field: str, output: str, data: str, said: str
):
    (tmp_path / "a").mkdir()
    (tmp_path / "with space").mkdir()
    (tmp_path / "a" / "rows.jsonl").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "holder").mkdir()
    (tmp_path / "holder" / "inner").symlink_to(tmp_path / "a")
    output, data = (place.replace("TMP", str(tmp_path)) for place in (output, data))
    tree["dataset"] = {"path": "s3://rows/elsewhere"} | {field: data}
    tree["output"]["url"] = output
    sentence = f"output.url: {output} {said} dataset.{field} ({data})"
    assert refused(tree).startswith(sentence) if said else refused(tree) == ""


def test_relative_names_mean_the_folder_that_the_job_is_started_in(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "rows").mkdir()
    monkeypatch.chdir(tmp_path)
    tree["dataset"]["path"], tree["output"]["url"] = "rows", "./rows/../rows/run"
    assert "lies in dataset.path (rows)" in refused(tree)
    tree["dataset"]["path"] = "rows/none"  # nothing is there, so this is the id of a hub
    assert refused(tree) == ""


@pytest.mark.parametrize(
    ("sections", "environment", "named"),
    [
        ({"model": {"name_or_path": "OUT/base"}}, {}, "model.name_or_path"),
        ({"lora": {"init_adapter": "OUT/adapter"}}, {}, "lora.init_adapter"),
        ({"evaluation": {"extra_metrics": {"bertscore": "OUT/m"}}}, {}, "evaluation.extra_metrics.bertscore"),
        ({}, {"JOB_BUNDLE": "OUT/bundle"}, "JOB_BUNDLE"),
        ({}, {"JOB_SCRATCH": "OUT/scratch"}, "JOB_SCRATCH"),
        ({}, {"JOB_SCRATCH": "OUT"}, "JOB_SCRATCH"),
    ],
)
def test_so_is_one_that_overlaps_anything_else_that_is_read(
    tree: dict[str, Any], tmp_path: Path, sections: dict[str, Any], environment: dict[str, str], named: str
):
    out = tree["output"]["url"]
    sections = yaml.safe_load(yaml.safe_dump(sections).replace("OUT", out))
    said = refused(tree | sections, **{name: value.replace("OUT", out) for name, value in environment.items()})
    assert f" {named} ({out}" in said


@pytest.mark.parametrize(("inside", "said"), [("", "is"), ("/.cache/of the job", "lies in"), ("/..", "")])
def test_scratch_and_cache_lie_outside_of_the_rows(tree: dict[str, Any], tmp_path: Path, inside: str, said: str):
    """Their tables would be read as rows by the next attempt; and the rows may well lie on the disk that scratch is on."""
    data = tmp_path / "disk" / "rows"
    data.mkdir(parents=True)
    tree["dataset"]["path"] = str(data)
    place = f"{data}{inside}"
    scratch = refused(tree, JOB_SCRATCH=place)
    tree["evaluation"] = {"cache": place}
    for field, found in (("JOB_SCRATCH", scratch), ("evaluation.cache", refused(tree))):
        assert (
            found.startswith(f"{field}: {place} {said} dataset.path ({data}); choose one apart")
            if said
            else found == ""
        )


def test_all_that_overlaps_is_said_at_once(tree: dict[str, Any], tmp_path: Path):
    tree["output"]["url"] = str(tmp_path)
    assert "holds dataset.path (" in refused(tree)
    assert " and holds model.name_or_path (" in refused(tree)


@pytest.mark.parametrize("how", ["no letter case", "mounted twice"])
def test_two_names_of_one_folder_are_known_by_the_file_system(tree: dict[str, Any], tmp_path: Path, how: str):
    """In a mount namespace of its own, where the machine lets us have one."""
    script = {
        "no letter case": "mount -t tmpfs -o casefold none mnt && mkdir mnt/Data && chattr +F mnt/Data && mkdir mnt/Data/Rows",
        "mounted twice": "mkdir -p mnt/data data/rows && mount --bind data mnt/data",
    }[how]
    names = {"no letter case": ("mnt/Data/rOWS/out", "mnt/Data/Rows"), "mounted twice": ("mnt/data/rows", "data")}[how]
    (tmp_path / "mnt").mkdir()
    tree["output"]["url"], tree["dataset"]["path"] = (str(tmp_path / name) for name in names)
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(tree))
    inside = (
        f"cd {tmp_path} && {script} || exit 9; cd {ROOT} && exec {sys.executable} -m job check {tmp_path}/spec.yaml"
    )
    done = subprocess.run(["unshare", "-rm", "sh", "-c", inside], capture_output=True, text=True, check=False)
    if done.returncode in (1, 9):
        pytest.skip(f"this machine has no such mount: {done.stderr}")
    assert done.returncode == 78
    assert "lies in dataset.path" in done.stderr


@pytest.mark.parametrize("command", ["check", "run"])
def test_check_and_run_refuse_it_alike(job: Job, tree: dict[str, Any], tmp_path: Path, command: str):
    (tmp_path / "data").mkdir()
    tree["output"]["url"] = str(tmp_path / "data" / "run")
    done = job(command, JOB_SPEC=yaml.safe_dump(tree))
    assert done.returncode == 78
    assert "lies in dataset.path" in done.stderr.splitlines()[-1]
    assert list((tmp_path / "data").iterdir()) == []
