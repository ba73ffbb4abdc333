"""Jobs that share a node and its scratch, at the same time or one after the other."""

import json
from pathlib import Path

import pytest
import yaml

from job.config.environment import Environment
from job.config.loader import validate
from job.planning.survey import survey
from job.runtime.scratch import job_folder
from job.store import open_store
from tests.conftest import job_environment
from tests.forked import Forks
from tests.resume_proof import small_spec
from tests.tiny import job_spec


def folder_of(url: str, **sections: object) -> str:
    return job_folder(Path("/scratch"), job_spec(output={"url": url}, **sections)).name


def test_every_attempt_at_an_output_finds_the_folder_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    ways = ["out", "./out/", f"{tmp_path}/out", f"file://{tmp_path}/out", f"{tmp_path}/link/out"]
    assert len({folder_of(way) for way in ways}) == 1
    assert folder_of("s3://bucket/run") == folder_of("s3://bucket/run/")
    assert folder_of("out", name="another") == folder_of("out")  # what may change between attempts


def test_jobs_with_other_outputs_or_other_specs_have_other_folders(tmp_path: Path):
    inside, outside = tmp_path / "output", tmp_path / "output of another container"
    found = [folder_of(str(inside)), folder_of(str(outside)), folder_of(str(inside), lora={"r": 4})]
    found += [folder_of("s3://bucket/run"), folder_of("s3://bucket/run-2")]
    inside.rename(tmp_path / "output of the first container")
    outside.rename(inside)  # as a mount has it: another folder by the same name
    assert len({*found, folder_of(str(inside))}) == 6


def test_check_finds_what_an_attempt_left_on_scratch_and_makes_no_folder(demo: Path, tmp_path: Path):
    spec = validate(yaml.safe_load(small_spec(demo, str(tmp_path / "output"))))
    scratch = tmp_path / "scratch"

    def left() -> dict[str, int]:
        return dict(survey(spec, open_store(spec.output.url), scratch, Environment(), fetch=False).facts.left)

    assert left() == {}
    assert not (tmp_path / "output").exists()
    merged = job_folder(scratch, spec) / "export" / "merged"
    merged.mkdir(parents=True)
    (merged / "model.safetensors").write_bytes(bytes(1_000_000))
    assert left()["export/merged"] >= 1_000_000


def test_two_jobs_of_one_spec_at_once_on_one_scratch_keep_their_numbers_apart(demo: Path, tmp_path: Path, forks: Forks):
    jobs = []
    for name in ("one", "other"):
        tree = yaml.safe_load(small_spec(demo, str(tmp_path / name)))
        tree["training"]["max_steps"], tree["evaluation"]["max_rows"] = 8, 1
        environment = job_environment(tmp_path, JOB_SPEC=yaml.safe_dump(tree))
        with (tmp_path / f"{name}.log").open("w") as log:
            jobs.append(forks.start(["run"], environment, log))
    assert [each.wait(200) for each in jobs] == [0, 0], (tmp_path / "one.log").read_text()
    for name in ("one", "other"):
        lines = map(json.loads, (tmp_path / name / "logs" / "metrics.jsonl").read_text().splitlines())
        assert [line["step"] for line in lines] == list(range(1, 9))
