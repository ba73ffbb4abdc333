"""What a spec names, gathered in one place, and a job that needs nothing else: no network at all."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from job.bundle import asked_for, use_bundle
from job.errors import SpecError
from job.specfile import validate
from tests.conftest import ROOT, Job, job_environment
from tests.data.test_data import png
from tests.hub import Hub, serve

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
    tree["evaluation"] = {"max_rows": 4, "max_new_tokens": 4}
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
    command = without_network([sys.executable, "-m", "job", "run", "--bundle", str(bundle)])
    if command is None:
        pytest.skip("no network namespaces here")
    environment = job_environment(tmp_path, JOB_SPEC=spec, JOB_SCRATCH=str(tmp_path / "elsewhere"))
    ran = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert ran.returncode == 0, ran.stderr
    result = json.loads((tmp_path / "output" / "RESULT.json").read_text())
    assert (result["steps"], result["spec_digest"]) == (2, validate(named).digest)
    assert (tmp_path / "output" / "merged" / "config.json").exists()


def test_a_gated_base_is_not_allowed_without_the_token(named: dict[str, Any], hub: Hub, job: Job, tmp_path: Path):
    refused = job("run", JOB_SPEC=yaml.safe_dump(named), HF_ENDPOINT=hub.url)
    assert refused.returncode == 77
    page = "https://huggingface.co/lab/base"
    assert f"lab/base is gated; accept its terms at {page} and set HF_TOKEN" in refused.stderr


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
    tree: dict[str, Any], tmp_path: Path, bucket: str, job: Job, demo: Path
):
    """A table alone brings the images that it names, and nothing else of its folder."""
    (tmp_path / "rows").mkdir()
    for number in range(6):
        (tmp_path / "rows" / f"{number}.png").write_bytes(png(number, (32, 32)))
    (tmp_path / "rows" / "private.txt").write_text("not named")
    lines = [json.dumps({"image": f"{number}.png", "caption": f"c {number}"}) for number in range(5)]
    (tmp_path / "rows" / "table.jsonl").write_text("\n".join(lines))
    tree["model"]["name_or_path"] = str(demo / "base")
    tree["dataset"]["path"] = str(tmp_path / "rows" / "table.jsonl")
    environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    gathered = job("prefetch", yaml.safe_dump(tree), f"s3://{bucket}/b", **environment)
    assert gathered.returncode == 0, gathered.stderr
    shutil.rmtree(tmp_path / "rows")
    checked = job("check", yaml.safe_dump(tree), "--bundle", f"s3://{bucket}/b", **environment)
    assert checked.returncode == 0, checked.stderr
    assert "data: 5 rows (json: 1 .jsonl file(s); answers in caption, images in image)" in checked.stdout
    from job.store import open_store

    names = [entry.key for entry in open_store(f"s3://{bucket}/b").list("dataset/")]
    assert names == [*(f"dataset/{number}.png" for number in range(5)), "dataset/table.jsonl"]
