"""A path that nothing is at is the spec's fault, and never a service that is asked again and again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from job.config.loader import validate
from job.config.schema import ModelSpec
from job.data.prepare import prepare
from job.errors import SpecError
from job.model.base_model import fetch_base
from job.output.identity import Identity
from job.output.ownership import take_data
from job.output.stored import open_output
from job.planning.survey import elsewhere, is_local
from job.runtime.hub import is_hub_id
from tests.conftest import ROOT, Job, job_environment
from tests.hub import serve


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("data/rows.csv", r"data/rows\.csv does not exist \(looked in /"),
        ("rows.jsonl", r"rows\.jsonl does not exist \(looked in /"),
        ("chest.zip", r"chest\.zip does not exist \(looked in /"),
        ("chest/v1..2", r"chest/v1\.\.2 does not exist \(looked in /"),
        ("my-data/chest--ct", r"my-data/chest--ct does not exist \(looked in /"),
        ("a/b/c", r"a/b/c does not exist \(looked in /"),
        ("../chest", r"\.\./chest does not exist \(looked in /"),
        ("/no/such/place", "/no/such/place does not exist$"),
        ("file:///no/such/place", "no/such/place does not exist$"),
        ("gs://bucket/rows", "; name a path, s3://bucket/prefix or a hub id"),
        ("https://example.org/rows.csv", "this job cannot read https://example.org/rows.csv"),
        ("~nobody-of-this-name/rows", "the home of a user that this machine does not have"),
        ("/" + "x" * 300, "cannot be used: File name too long"),
    ],
)
def test_what_is_no_hub_id_is_refused_without_asking(tree: dict[str, Any], tmp_path: Path, path: str, says: str):
    tree["dataset"] = {"path": path}
    with pytest.raises(SpecError, match=says) as refused:
        prepare(validate(tree), tmp_path)
    assert refused.value.exit_code == 78
    with pytest.raises(SpecError, match=says):  # as check does
        prepare(validate(tree), tmp_path) if is_local(path) else elsewhere(path, "dataset.path")


def test_held_out_rows_that_are_not_there_are_told_of_their_field(tree: dict[str, Any], tmp_path: Path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.jsonl").write_text('{"image": [], "caption": "c"}\n')
    tree["dataset"] |= {"eval_path": "held.jsonl", "image_column": None}
    with pytest.raises(SpecError, match=r"dataset\.eval_path: held\.jsonl does not exist \(looked in"):
        prepare(validate(tree), tmp_path / "scratch")


def test_ids_of_the_hub_are_told_from_files():
    assert all(map(is_hub_id, ("lab/chest", "squad", "lab/chest-v1.5", "a_b/c.d")))
    assert not any(map(is_hub_id, ("lab/chest.csv", "chest.parquet", "a/b/c", "./a", "a b/c", "s3://a/b", "x.tar", "")))


ASK = """
import sys, time
from pathlib import Path
time.sleep = lambda seconds: None  # the library waits half a minute between its questions
from job.data.hub import from_hub
from job.errors import JobError
from job.model.base_model import fetch_base
from job.config.schema import DatasetSpec, ModelSpec
from job.planning.survey import elsewhere
here = Path(sys.argv[1])
for ask in (
    lambda: from_hub(DatasetSpec(path="data/chest"), "data/chest", "train", here, "dataset.path"),
    lambda: fetch_base(ModelSpec(name_or_path="models/llama"), here),
    lambda: print(0, elsewhere("data/chest", "dataset.path")),
):
    try:
        ask()
    except JobError as error:
        print(error.exit_code, error)
"""


def asked(tmp_path: Path, here: Path = ROOT, **settings: str) -> list[str]:
    variables = job_environment(tmp_path, HF_HOME=str(tmp_path / "hf"), **settings)
    command = [sys.executable, "-c", ASK, str(tmp_path)]
    variables["PYTHONPATH"] = str(ROOT)
    ran = subprocess.run(command, env=variables, cwd=here, capture_output=True, text=True, timeout=200, check=True)
    return ran.stdout.splitlines()


def test_where_the_hub_is_out_of_reach_a_name_may_be_a_wrong_path(tmp_path: Path):
    data, model, check = asked(tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    where = f"(looked in {ROOT}), and the hub cannot be reached"
    assert data.startswith(f"78 dataset.path: there is no file or folder data/chest here {where}")
    assert model.startswith(f"78 model.name_or_path: there is no folder models/llama here {where}")
    assert check.startswith(f"0 run refuses this here: {data[3:]}")
    (tmp_path / "data").mkdir()
    *_, check = asked(tmp_path, tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert check.startswith("78 dataset.path: there is no file or folder data/chest here")


def test_a_hub_out_of_reach_is_an_outage_where_an_earlier_attempt_found_all_of_it(
    job: Job, tree: dict[str, Any], tmp_path: Path
):
    tree["model"] = {"name_or_path": "lab/base"}
    settings = {"JOB_SPEC": yaml.safe_dump(tree), "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hf")}
    assert job("run", **settings).returncode == 78
    take_data(open_output(validate(tree)), validate(tree), Identity(b"train", b"held out"))
    again = job("run", **settings)
    assert again.returncode == 69, again.stderr
    last = again.stderr.splitlines()[-1]
    assert "no folder lab/base here" in last
    assert last.endswith("where an earlier attempt found it, cannot be reached now; run again once it can")


@pytest.mark.parametrize(
    "variable", ["HF_ENDPOINT=hub.example.org", "HTTPS_PROXY=proxy://10.0.0.1", "SSL_CERT_FILE=/none/ca.pem"]
)
def test_a_variable_by_which_the_hub_cannot_be_asked_is_no_service_to_try_again(tmp_path: Path, variable: str):
    name, _, value = variable.partition("=")
    said = asked(tmp_path, **{"HF_ENDPOINT": "https://127.0.0.1:9", name: value})
    assert [line[:3] for line in said] == ["65 " if name == "HTTPS_PROXY" else "78 ", "78 ", "78 "]
    assert said[1].startswith(
        f"78 model.name_or_path: there is no folder models/llama here (looked in {ROOT}), and the hub cannot be asked: "
    )
    assert all(line.endswith("; check HF_ENDPOINT, HTTPS_PROXY and SSL_CERT_FILE") for line in said[1:])


def test_a_folder_that_no_hub_could_name_is_no_model(tmp_path: Path):
    for name in ("models/llama--11b", "models/my llama", "models/llama.git"):
        with pytest.raises(
            SpecError, match=f"{name} is not a folder; name a model folder, an s3:// prefix or a hub id"
        ):
            fetch_base(ModelSpec(name_or_path=name), tmp_path)


def test_a_hub_that_does_not_answer_is_a_service_to_try_again(tmp_path: Path):
    with serve() as hub:
        hub.down = True
        data, model, check = asked(tmp_path, HF_ENDPOINT=hub.url)
        assert data.startswith("69 dataset.path: there is no file or folder data/chest here")
        assert model.startswith(
            f"69 model.name_or_path: there is no folder models/llama here (looked in {ROOT}), and the hub"
        )
        assert check.startswith("0 data/chest cannot be read from here")
        hub.down = False
        data, _, check = asked(tmp_path, HF_ENDPOINT=hub.url)
    assert data.startswith(
        f"78 dataset.path: there is no file or folder data/chest here (looked in {ROOT}), and the hub has"
    )
    assert check == data
