"""What a spec names, gathered in one place, and a job that needs nothing else: no network at all."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml

from job.config.loader import validate
from job.data import sources
from job.data.prepare import prepare
from job.errors import DataError, SpecError
from job.evaluate.answer_cache import base_digest
from job.output.ownership import check_owner
from job.output.stored import open_output
from job.prefetch import asked_for, prefetch, use_bundle
from job.runtime.staging import BUNDLE
from job.store import OwnedStore, open_store
from job.store.owned import BUNDLES
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


FILES = {"model/config.json": b"{}", "model/model.safetensors": bytes(999), "dataset/rows.jsonl": b"{}"}
PLACES = {"model.name_or_path": "model", "dataset.path": "dataset"}


def bundle_of(folder: Path, spec: dict[str, Any], files: dict[str, bytes], places: dict[str, str]) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    facts = {name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    manifest = {"asked": asked_for(validate(spec)), "places": places, "files": facts}
    (folder / "BUNDLE.json").write_text(json.dumps(manifest))


def test_a_bundle_that_is_not_whole_or_for_another_spec_is_refused(tree: dict[str, Any], tmp_path: Path):
    bundle, scratch = tmp_path / "bundle", tmp_path / "scratch"
    bundle.mkdir()
    with pytest.raises(SpecError, match="not a complete bundle; make it again with job prefetch"):
        use_bundle(validate(tree), str(bundle), scratch)
    bundle_of(bundle, tree, FILES, PLACES)
    use_bundle(validate(tree), str(bundle), scratch)
    assert (scratch / BUNDLE / "model" / "config.json").exists()
    (bundle / "model" / "config.json").write_bytes(b"{")
    with pytest.raises(SpecError, match=r"model/config\.json is missing or cut short"):
        use_bundle(validate(tree), str(bundle), scratch)
    tree["dataset"]["split"] = "other"
    with pytest.raises(SpecError, match=r"made for another dataset\.path \(.*train\); this spec says .*other"):
        use_bundle(validate(tree), str(bundle), scratch)
    use_bundle(validate(tree), "", scratch)
    assert not (scratch / BUNDLE).exists()


def test_a_bundle_with_one_false_bit_is_not_used(tree: dict[str, Any], tmp_path: Path, job: Job):
    """In weights and in rows; sizes alone, which `check` compares, do not tell."""
    bundle = str(tmp_path / "bundle")
    for name in FILES:
        bundle_of(tmp_path / "bundle", tree, FILES, PLACES)
        false = bytearray(FILES[name])
        false[-1] ^= 1
        (tmp_path / "bundle" / name).write_bytes(false)
        use_bundle(validate(tree), bundle, tmp_path / "scratch", hashed=False)
        with pytest.raises(SpecError, match=rf"JOB_BUNDLE: .*bundle: {name} is damaged \(its SHA-256 differs\); copy"):
            use_bundle(validate(tree), bundle, tmp_path / "scratch")
        assert not (tmp_path / "scratch" / BUNDLE).exists()
    for command in (["check", "--data"], ["run"]):
        ended = job(*command, "--bundle", str(tmp_path / "bundle"), yaml.safe_dump(tree))
        assert (ended.returncode, "dataset/rows.jsonl is damaged" in ended.stderr) == (78, True), ended.stderr


@pytest.mark.parametrize(
    "place", ["../theirs", "/etc", "model/../../theirs", ".", "", "linked", "linked/inner", "model\0", "none", 7, None]
)
@pytest.mark.parametrize("field", PLACES)
def test_no_place_of_a_bundle_is_outside_of_it(tree: dict[str, Any], tmp_path: Path, field: str, place: Any):
    (tmp_path / "theirs" / "inner").mkdir(parents=True)
    (tmp_path / "theirs" / "inner" / "config.json").write_bytes(b"{}")
    bundle_of(tmp_path / "bundle", tree, FILES, PLACES | {field: place})
    (tmp_path / "bundle" / "linked").symlink_to(tmp_path / "theirs")
    with pytest.raises(SpecError, match=rf"JOB_BUNDLE: .*: this bundle has nothing for {field}; make it again"):
        use_bundle(validate(tree), str(tmp_path / "bundle"), tmp_path / "scratch")


def test_a_bundle_sets_links_for_what_the_spec_names_alone(tree: dict[str, Any], tmp_path: Path):
    bundle_of(tmp_path / "bundle", tree, FILES, PLACES | {"../../escaped": "model", "lora.init_adapter": "model"})
    use_bundle(validate(tree), str(tmp_path / "bundle"), tmp_path / "scratch")
    assert {link.name for link in (tmp_path / "scratch" / BUNDLE).iterdir()} == {"model", "dataset"}
    assert not (tmp_path / "escaped").is_symlink()


def test_a_bundle_holds_no_link_and_no_file_that_was_not_gathered(tree: dict[str, Any], tmp_path: Path):
    """A copy over an older bundle keeps the rows of a patient who has been withdrawn since."""
    bundle = tmp_path / "bundle"
    bundle_of(bundle, tree, FILES, PLACES)
    for name in ("notes.txt", "dataset/.DS_Store"):  # which nothing reads
        (bundle / name).write_text("mine")
    use_bundle(validate(tree), str(bundle), tmp_path / "scratch")
    (bundle / "dataset" / "old.jsonl").write_text("{}")
    with pytest.raises(SpecError, match=r"dataset/old\.jsonl is not listed in BUNDLE\.json; remove it from the bundle"):
        use_bundle(validate(tree), str(bundle), tmp_path / "scratch")
    (bundle / "dataset" / "old.jsonl").unlink()
    (bundle / "dataset" / "rows.jsonl").rename(tmp_path / "rows.jsonl")
    (bundle / "dataset" / "rows.jsonl").symlink_to(tmp_path / "rows.jsonl")
    with pytest.raises(SpecError, match=r"dataset/rows\.jsonl is a link; copy the bundle again"):
        use_bundle(validate(tree), str(bundle), tmp_path / "scratch")


@pytest.mark.parametrize(
    "what",
    [
        "[]",
        "{",
        '{"asked": {}, "places": {}}',
        '{"asked": 1, "places": {}, "files": {}}',
        '{"asked": {}, "places": {}, "files": {"a": {"size": "?"}}}',
        "[" * 9999,
    ],
)
def test_a_bundle_json_that_says_nothing_is_no_bundle(tree: dict[str, Any], tmp_path: Path, what: str):
    (tmp_path / "BUNDLE.json").write_text(what)
    with pytest.raises(SpecError, match=r"has no BUNDLE\.json, so it is not a complete bundle"):
        use_bundle(validate(tree), str(tmp_path), tmp_path / "scratch")


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
    use_bundle(spec, url, tmp_path / "there")
    rows = prepare(spec, tmp_path / "there").train
    assert [row["images"][0].getpixel((0, 0))[0] for row in rows] == list(range(5))


@pytest.mark.parametrize("packed", [False, True])
def test_a_bundle_of_a_table_beside_its_images_reads_the_same_rows(
    tree: dict[str, Any], tmp_path: Path, demo: Path, packed: bool
):
    """The images lie in another folder than the table, or in an archive there."""
    folder = tmp_path / "set"
    (folder / "annotations").mkdir(parents=True)
    (folder / "images").mkdir()
    with zipfile.ZipFile(folder / "images" / "all.zip", "w") as archive:
        for number in range(6):
            if packed:
                archive.writestr(f"film{number}.png", png(number, (32, 32)))
            else:
                (folder / "images" / f"film{number}.png").write_bytes(png(number, (32, 32)))
    (folder / "private.txt").write_text("not named")
    lines = [json.dumps({"image": f"film{number}.png", "caption": f"c {number}"}) for number in range(5)]
    (folder / "annotations" / "rows.jsonl").write_text("\n".join(lines))
    tree["model"]["name_or_path"] = str(demo / "base")
    tree["dataset"] = {"path": str(folder / "annotations" / "rows.jsonl"), "eval_fraction": 0}
    spec = validate(tree)
    prefetch(spec, str(tmp_path / "bundle"), tmp_path / "here")
    shutil.rmtree(folder)
    names = [entry.key for entry in open_store(str(tmp_path / "bundle")).list("dataset/")]
    images = ["dataset/images/all.zip"] if packed else [f"dataset/images/film{number}.png" for number in range(5)]
    assert names == ["dataset/annotations/rows.jsonl", *images]
    use_bundle(spec, str(tmp_path / "bundle"), tmp_path / "there")
    rows = prepare(spec, tmp_path / "there").train
    assert [row["images"][0].getpixel((0, 0))[0] for row in rows] == list(range(5))


def test_a_bundle_holds_the_pictures_of_its_own_rows_alone(
    tree: dict[str, Any], tmp_path: Path, bucket: str, demo: Path, monkeypatch: pytest.MonkeyPatch
):
    """Those behind URLs that another spec, or a table before a patient was withdrawn, left on the same scratch are not in it."""
    tree["model"]["name_or_path"] = str(demo / "base")
    tree["dataset"] = {"path": str(tmp_path / "rows.jsonl"), "eval_fraction": 0}
    monkeypatch.chdir(tmp_path)
    store = open_store(f"s3://{bucket}/pictures")
    urls = [f"{store.url}/{number}.png" for number in range(3)]
    for number, url in enumerate(urls):
        store.write(url.rpartition("/")[2], png(number, (32, 32)))
    for some in (urls[:2], urls[1:]):
        lines = [json.dumps({"image": url, "caption": "c"}) for url in some]
        (tmp_path / "rows.jsonl").write_text("\n".join(lines))
        prefetch(validate(tree), str(tmp_path / "bundle"), Path("scratch"))
        held = {file.name for file in (tmp_path / "bundle" / "images").iterdir()}
        assert held == {hashlib.sha256(url.encode()).hexdigest() for url in some}


def test_no_bundle_is_made_of_what_could_not_be_used_from_it(tree: dict[str, Any], tmp_path: Path, demo: Path):
    """Images by absolute paths, and half a base."""
    rows, base = tmp_path / "rows", tmp_path / "base"
    rows.mkdir()
    (rows / "1.png").write_bytes(png(1, (32, 32)))
    (rows / "metadata.jsonl").write_text(json.dumps({"file_name": str(rows / "1.png"), "caption": "c"}))
    shutil.copytree(demo / "base", base)
    tree["model"]["name_or_path"] = str(base)
    tree["dataset"] = {"path": str(rows), "eval_fraction": 0}
    assert len(prepare(validate(tree), tmp_path / "scratch").train) == 1
    with pytest.raises(DataError, match="1 rows name images by absolute paths.*relative to the folder of their table"):
        prefetch(validate(tree), str(tmp_path / "bundle"), tmp_path / "scratch")
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(SpecError, match="model.name_or_path: .*not all of it"):
        prefetch(validate(tree), str(tmp_path / "bundle"), tmp_path / "scratch")
    assert not (tmp_path / "bundle" / "BUNDLE.json").exists()


def test_rows_are_opened_once_for_a_bundle(
    tree: dict[str, Any], tmp_path: Path, demo: Path, monkeypatch: pytest.MonkeyPatch
):
    rows = tmp_path / "rows"
    rows.mkdir()
    (rows / "1.png").write_bytes(png(1, (32, 32)))
    (rows / "table.jsonl").write_text(json.dumps({"image": "1.png", "caption": "c"}))
    (tmp_path / "scratch" / "fetched" / "images").mkdir(parents=True)
    tree["model"]["name_or_path"] = str(demo / "base")
    tree["dataset"] = {"path": str(rows / "table.jsonl"), "eval_fraction": 0}
    opened, own = list[str](), sources.read_table  # type: ignore[attr-defined]

    def counted(*given: Any) -> Any:
        opened.append(given[2])
        return own(*given)

    monkeypatch.setattr(sources, "read_table", counted)
    prefetch(validate(tree), str(tmp_path / "bundle"), tmp_path / "scratch")
    assert opened == ["dataset.path"]
    assert (tmp_path / "bundle" / "dataset" / "1.png").exists()


def test_a_bundle_is_renewed_without_what_it_held_before(tree: dict[str, Any], tmp_path: Path, bucket: str, demo: Path):
    """In a folder and in a bucket; what somebody put beside its files stays."""
    rows = tmp_path / "rows"
    rows.mkdir()
    tree["model"]["name_or_path"] = str(demo / "base")
    tree["dataset"] = {"path": str(rows), "eval_fraction": 0}
    spec, urls = validate(tree), (str(tmp_path / "bundle"), f"s3://{bucket}/b")
    for number in range(2):
        (rows / f"{number}.png").write_bytes(png(number, (32, 32)))
        (rows / "metadata.jsonl").write_text(json.dumps({"file_name": f"{number}.png", "caption": "c"}))
        for url in urls:
            prefetch(spec, url, tmp_path / "scratch")
            if not number:
                open_store(url).write("notes.txt", b"mine")
        (rows / f"{number}.png").unlink()
    for url in urls:
        held = [entry.key for entry in open_store(url).list()]
        assert [key for key in held if key.startswith("dataset/")] == ["dataset/1.png", "dataset/metadata.jsonl"]
        assert "notes.txt" in held


@pytest.mark.parametrize("where", ["", "dataset", "in the dataset"])
def test_a_bundle_is_made_of_nothing_that_it_would_replace(tree: dict[str, Any], tmp_path: Path, where: str):
    """Into the folder that holds the rows, into the rows, or below them: each is refused, and every file stays."""
    rows = tmp_path / "dataset"
    rows.mkdir()
    (rows / "metadata.jsonl").write_text("{}")
    tree["dataset"] = {"path": str(rows)}
    target = rows / "bundle" if "in" in where else tmp_path / where
    with pytest.raises(SpecError, match=r"FOLDER: .* (is|holds|lies in) dataset.path"):
        prefetch(validate(tree), str(target), tmp_path / "scratch")
    assert (rows / "metadata.jsonl").read_text() == "{}"


def test_a_folder_with_other_files_is_no_place_for_a_bundle(tree: dict[str, Any], tmp_path: Path):
    (tmp_path / "full" / "model").mkdir(parents=True)
    (tmp_path / "full" / "model" / "mine.bin").write_text("mine")
    with pytest.raises(SpecError, match=r"is not empty \(model/mine.bin\) and holds no bundle"):
        prefetch(validate(tree), str(tmp_path / "full"), tmp_path / "scratch")
    assert (tmp_path / "full" / "model" / "mine.bin").exists()


def test_no_bundle_is_made_in_an_output_and_no_job_is_run_in_a_bundle(tree: dict[str, Any], tmp_path: Path):
    """Each deletes what its record names; the one that is there is of the other."""
    for folder in ("run", "bundle"):
        tree["output"] = {"url": str(tmp_path / folder), "on_conflict": "restart"}
        store = (
            open_output(validate(tree)) if folder == "run" else OwnedStore(open_store(str(tmp_path / folder)), BUNDLES)
        )
        store.write("adapter/adapter_model.safetensors", b"days of work")
        files = {path: path.read_bytes() for path in (tmp_path / folder).rglob("*") if path.is_file()}
        with pytest.raises(SpecError, match="not empty"):
            if folder == "run":
                prefetch(validate(tree), str(tmp_path / folder), tmp_path / "scratch")
            else:
                check_owner(open_output(validate(tree)), validate(tree))
        assert {path: path.read_bytes() for path in (tmp_path / folder).rglob("*") if path.is_file()} == files


def test_a_bundle_that_lies_in_the_scratch_folder_stays(tree: dict[str, Any], tmp_path: Path):
    scratch = tmp_path / "scratch"
    for folder in ("bundle", BUNDLE):
        bundle_of(scratch / folder, tree, FILES, PLACES)
    with pytest.raises(SpecError, match="is not a link to a bundle"):
        use_bundle(validate(tree), "", scratch)
    assert all((scratch / folder / "BUNDLE.json").exists() for folder in ("bundle", BUNDLE))


ENDINGS = """
import sys
from importlib import metadata
from pathlib import Path
from job.data.sources import open_source
from job.errors import JobError
from job.model.base_model import fetch_base
from job.config.schema import DatasetSpec, ModelSpec
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
    assert found[1].startswith("78 model.name_or_path: there is no folder lab/none here (looked in ")
    assert found[1].endswith("), and the hub has no model of that name that this token may see")
    page = "https://huggingface.co/datasets/lab/closed"
    assert found[2] == f"77 dataset.path: lab/closed is gated; accept its terms at {page} and set HF_TOKEN"
    assert found[3].startswith("78 dataset.path: there is no file or folder lab/none here (looked in ")
    assert found[3].endswith("), and the hub has no dataset of that name that this token may see")
    assert found[4] == "0"
    found = endings(hub, tmp_path, ["model lab/base no-such", "data lab/rows no-such"], HF_TOKEN=hub.token)
    assert found == [
        "78 model.revision: lab/base has no revision no-such",
        "78 dataset.revision: lab/rows has no revision no-such",
    ]


def test_offline_without_a_bundle_is_told_what_to_do(hub: Hub, tmp_path: Path):
    found = endings(hub, tmp_path, ["model lab/base -", "data lab/rows -"], HF_HUB_OFFLINE="1")
    assert [line[:3] for line in found] == ["78 ", "78 "]
    assert all("HF_HUB_OFFLINE is set" in line and "job prefetch" in line for line in found)


def test_a_hub_that_is_down_is_unavailable(named: dict[str, Any], hub: Hub, tmp_path: Path):
    hub.down = True
    try:
        assert endings(hub, tmp_path, ["model lab/other -"])[0].startswith(
            "69 model.name_or_path: there is no folder lab/other here"
        )
    finally:
        hub.down = False
