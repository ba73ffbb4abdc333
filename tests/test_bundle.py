"""What a spec names, gathered in one place, and a job that needs nothing else: no network at all."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml

from job.bundle import asked_for, prefetch, use_bundle
from job.data.prepare import prepare
from job.errors import SpecError
from job.evaluate.before import base_digest
from job.specfile import validate
from job.store import open_store
from tests.conftest import ROOT, Job, job_environment
from tests.data.test_data import png
from tests.hub import Hub, serve
from tests.tiny import make_encoder

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with serve() as served:
        yield served


@pytest.fixture
def named(tree: dict[str, Any], demo: Path, tmp_path: Path, hub: Hub) -> dict[str, Any]:
    """The demo's base and rows as repositories of a hub, the base pinned and gated."""
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    rows = [json.loads(line) for line in (demo / "data" / "metadata.jsonl").read_text().splitlines()[:24]]
    embedded = [
        row | {"image": {"bytes": (demo / "data" / row["file_name"]).read_bytes(), "path": None}} for row in rows
    ]
    features = Features({"image": ImageFeature(), "caption": Value("string"), "patient_id": Value("string")})
    table = Dataset.from_list([{name: row[name] for name in features} for row in embedded], features=features)
    for split, part in (("train", table.select(range(16))), ("test", table.select(range(16, 24)))):
        part.to_parquet(tmp_path / "repo" / "data" / f"{split}-00000-of-00001.parquet")
    commit = hub.add("models", "lab/base", demo / "base", gated=True)
    hub.add("datasets", "lab/rows", tmp_path / "repo")
    tree["model"] = {"name_or_path": "lab/base", "revision": commit}
    tree["dataset"] = {"path": "lab/rows", "eval_split": "test"}
    tree["training"] = {"max_steps": 2}
    (tmp_path / "encoder").mkdir()
    extra = {"bertscore": str(make_encoder(tmp_path / "encoder"))}
    tree["evaluation"] = {"max_rows": 4, "max_new_tokens": 4, "eval_steps": 1, "extra_metrics": extra}
    return tree


def without_network(command: list[str]) -> list[str] | None:
    """The command in a network namespace of its own, where not even the loopback is up; None where that is not allowed."""
    for own in (["unshare", "-n"], ["unshare", "-r", "-n"]):
        if shutil.which("unshare") and subprocess.run([*own, "true"], capture_output=True, check=False).returncode == 0:
            return [*own, *command]
    return None


def test_a_bundle_runs_where_there_is_no_network(named: dict[str, Any], hub: Hub, job: Job, tmp_path: Path):
    spec, bundle = yaml.safe_dump(named), tmp_path / "bundle"
    gathered = job("prefetch", spec, str(bundle), HF_ENDPOINT=hub.url, HUGGING_FACE_HUB_TOKEN=hub.token)
    assert gathered.returncode == 0, gathered.stderr
    shutil.rmtree(tmp_path / "encoder")
    command = without_network([sys.executable, "-m", "job", "run", "--bundle", str(bundle)])
    if command is None:
        pytest.skip("no network namespaces here")
    environment = job_environment(tmp_path, JOB_SPEC=spec, JOB_SCRATCH=str(tmp_path / "elsewhere"))
    ran = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert ran.returncode == 0, ran.stderr
    result = json.loads((tmp_path / "output" / "RESULT.json").read_text())
    assert (result["steps"], result["spec_digest"]) == (2, validate(named).digest)
    assert (tmp_path / "output" / "merged" / "config.json").exists()
    assert result["metrics"]["after"]["bertscore"]["n"] == 4
    said = (tmp_path / "output" / "evaluation" / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in said] == [1] * 4 + [2] * 4
    lineage = result["lineage"]
    assert (result["taken_step"], lineage["taken_step"], result["taken"]) == (2, 2, "last")
    assert lineage["base_sha256"] == base_digest(bundle / "model")
    assert re.fullmatch("[0-9a-f]{64}", lineage["train_sha256"])
    lock = (tmp_path / "output" / lineage["package_lock"]).read_bytes()
    assert hashlib.sha256(lock).hexdigest() == lineage["package_lock_sha256"]
    assert f"torch=={metadata.version('torch')}\n" in lock.decode()


def bundle_of(folder: Path, spec: dict[str, Any], files: dict[str, bytes], places: dict[str, str]) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    facts = {name: {"size": len(data), "sha256": ""} for name, data in files.items()}
    manifest = {"asked": asked_for(validate(spec)), "places": places, "files": facts}
    (folder / "BUNDLE.json").write_text(json.dumps(manifest))


def test_a_bundle_that_is_not_whole_or_for_another_spec_is_refused(tree: dict[str, Any], tmp_path: Path):
    bundle, scratch = tmp_path / "bundle", tmp_path / "scratch"
    environment = {"JOB_BUNDLE": str(bundle)}
    bundle.mkdir()
    with pytest.raises(SpecError, match="no whole bundle; make it with job prefetch"):
        use_bundle(validate(tree), environment, scratch)
    bundle_of(bundle, tree, {"model/config.json": b"{}"}, {"model.name_or_path": "model"})
    use_bundle(validate(tree), environment, scratch)
    assert (environment["HF_HUB_OFFLINE"], (scratch / "bundle" / "model" / "config.json").exists()) == ("1", True)
    (bundle / "model" / "config.json").write_bytes(b"{")
    with pytest.raises(SpecError, match=r"model/config\.json is missing or cut short"):
        use_bundle(validate(tree), environment, scratch)
    tree["dataset"]["split"] = "other"
    with pytest.raises(SpecError, match=r"made for another dataset\.path \(.*train\); this spec says .*other"):
        use_bundle(validate(tree), environment, scratch)
    use_bundle(validate(tree), {}, scratch)
    assert not (scratch / "bundle").exists()


def test_a_bundle_in_a_bucket_holds_local_rows_with_their_images(
    tree: dict[str, Any], tmp_path: Path, bucket: str, demo: Path
):
    """A table alone brings the images that it names, and nothing else of its folder."""
    (tmp_path / "rows").mkdir()
    for number in range(6):
        (tmp_path / "rows" / f"{number}.png").write_bytes(png(number, (32, 32)))
    (tmp_path / "rows" / "private.txt").write_text("not named")
    lines = [json.dumps({"image": f"{number}.png", "caption": f"c {number}"}) for number in range(5)]
    (tmp_path / "rows" / "table.jsonl").write_text("\n".join(lines))
    tree["model"]["name_or_path"] = str(demo / "base")
    tree["dataset"] = {"path": str(tmp_path / "rows" / "table.jsonl"), "eval_fraction": 0}
    spec, url = validate(tree), f"s3://{bucket}/b"
    prefetch(spec, url, tmp_path / "here")
    shutil.rmtree(tmp_path / "rows")
    names = [entry.key for entry in open_store(url).list("dataset/")]
    assert names == [*(f"dataset/{number}.png" for number in range(5)), "dataset/table.jsonl"]
    use_bundle(spec, {"JOB_BUNDLE": url}, tmp_path / "there")
    rows = prepare(spec, tmp_path / "there").train
    assert [row["images"][0].getpixel((0, 0))[0] for row in rows] == list(range(5))


ENDINGS = """
import sys
from importlib import metadata
from pathlib import Path
from job.data.sources import open_source
from job.errors import JobError
from job.model.fetch import fetch_base
from job.spec import DatasetSpec, ModelSpec
for kind, name, revision in (line.split() for line in sys.stdin):
    pinned = {} if revision == "-" else {"revision": revision}
    try:
        if kind == "model":
            fetch_base(ModelSpec(name_or_path=name, **pinned), Path(sys.argv[1]))
        else:
            open_source(DatasetSpec(path=name, **pinned), name, "train", Path(sys.argv[1]))
        print(0)
    except JobError as error:
        print(error.exit_code, error)
"""


def endings(hub: Hub, scratch: Path, asked: list[str], **environment: str) -> list[str]:
    """How each line of `asked` (kind, name, revision) ends, in a process of its own: the libraries read settings once."""
    said = subprocess.run(
        [sys.executable, "-c", ENDINGS, str(scratch)],
        input="\n".join(asked),
        env=job_environment(scratch, HF_ENDPOINT=hub.url, HF_HOME=str(scratch / "hf"), **environment),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    return said.stdout.splitlines()


def test_what_the_hub_refuses_ends_as_the_contract_says(named: dict[str, Any], hub: Hub, tmp_path: Path):
    hub.add("datasets", "lab/closed", tmp_path / "repo", gated=True)
    asked = ["model lab/base -", "model lab/none -", "data lab/closed -", "data lab/none -", "data lab/rows -"]
    found = endings(hub, tmp_path, asked)
    assert found[0].startswith(
        "77 model.name_or_path: lab/base is gated; accept its terms at https://huggingface.co/lab/base"
    )
    assert found[1] == "78 model.name_or_path: the hub has no lab/none that this token may see"
    page = "https://huggingface.co/datasets/lab/closed"
    assert found[2] == f"77 dataset.path: lab/closed is gated; ask for access at {page} and set HF_TOKEN"
    assert found[3] == "65 dataset.path: there is no folder and no hub dataset lab/none that this token may see"
    assert found[4] == "0"
    found = endings(hub, tmp_path, ["model lab/base no-such", "data lab/rows no-such"], HF_TOKEN=hub.token)
    assert found == [
        "78 model.revision: lab/base has no revision no-such",
        "65 dataset.revision: lab/rows has no revision no-such",
    ]


def test_offline_without_a_bundle_is_told_what_to_do(hub: Hub, tmp_path: Path):
    found = endings(hub, tmp_path, ["model lab/base -", "data lab/rows -"], HF_HUB_OFFLINE="1")
    assert [line[:3] for line in found] == ["78 ", "65 "]
    assert all("HF_HUB_OFFLINE is set" in line and "job prefetch" in line for line in found)


def test_a_hub_that_is_down_is_unavailable(named: dict[str, Any], hub: Hub, tmp_path: Path):
    hub.down = True
    try:
        assert endings(hub, tmp_path, ["model lab/other -"])[0].startswith(
            "69 model.name_or_path: lab/other is no folder"
        )
    finally:
        hub.down = False
