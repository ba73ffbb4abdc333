"""`job render kubernetes`: the very Job that Kustomize would make, with the spec inside."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from job.config.loader import load_spec
from job.errors import SpecError
from job.render import LATER, kubernetes, read_job, read_runs
from tests.conftest import ROOT
from tests.k8s.conftest import Strict, Tree, documents, of_kind
from tests.k8s.kubelet import variables
from tests.k8s.test_schema import RELEASES

IMAGE = "registry.example.com/vision-lora-job:0.2.0"
SPEC: dict[str, Any] = {
    "name": "Chest 1, größer",
    "model": {"name_or_path": "s3://bucket/base"},
    "dataset": {"path": "s3://bucket/chest", "instruction": "Costs $$5 at $(HOME); $(date) 'ünd' \"so\" #1"},
    "output": {"url": "s3://bucket/runs/1"},
}
OVERLAYS = {
    "spot": ("spot",),
    "kueue": ("kueue",),
    "airgapped": ("airgapped",),
    "monitoring": ("monitoring",),
    "multi-gpu": ("multi-gpu",),
    "multi-node": ("multi-gpu", "multi-node"),
}


def rendered(spec: Tree, *components: str, image: str = IMAGE, **environment: str) -> Tree:
    runs = read_runs(environment, yaml.safe_dump(spec), None, None)
    (job,) = documents(kubernetes(runs, image, components))
    return job


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_it_patches_as_kustomize_does(overlay: str):
    (theirs,) = copy.deepcopy(of_kind(f"overlays/{overlay}", "Job"))
    ours = read_job(OVERLAYS[overlay])
    for entry in theirs["spec"]["template"]["spec"]["containers"][0]["env"]:
        if reference := entry.get("valueFrom", {}).get("configMapKeyRef"):
            reference["name"] = reference["name"].rpartition("-")[0]  # the hash of its content
    assert ours == theirs


def test_every_component_is_of_the_kind_that_it_reads():
    files = [*(ROOT / "k8s" / "components").glob("*/kustomization.yaml")]
    assert files
    for file in files:
        tree = yaml.load(file.read_text(), Loader=Strict)
        assert set(tree) == {"apiVersion", "kind", "patches"}, file
        assert tree["patches"] == [{"path": "patch.yaml", "target": {"kind": "Job", "name": "vision-lora"}}], file


def test_the_job_reads_the_spec_that_was_given():
    """Through YAML twice and through the kubelet, which would take `$(HOME)` for a variable."""
    job = rendered(SPEC, JOB__LORA__R="8", JOB__DATASET__SYSTEM_PROMPT="$(HOME) $$")
    container = job["spec"]["template"]["spec"]["containers"][0]
    seen = variables(container, {})
    assert load_spec(seen) == load_spec(
        {"JOB__LORA__R": "8", "JOB__DATASET__SYSTEM_PROMPT": "$(HOME) $$"}, yaml.safe_dump(SPEC)
    )


@pytest.mark.parametrize("text", ["1e-4", "y", "0o17", "1e3", "-.5", "no", "8"])
def test_what_looks_like_a_number_stays_text_for_kubectl_too(text: str):
    """A variable that is a number is one that the API refuses."""
    (run,) = read_runs({}, yaml.safe_dump(SPEC), None, None)
    written = kubernetes([replace(run, variables={"JOB__NAME": text})], IMAGE, ())
    assert re.search(rf"value: ['\"]{re.escape(text)}['\"]\n", written)


@pytest.mark.parametrize(
    "components",
    [(), ("spot", "kueue", "monitoring", "scratch-volume"), ("multi-gpu", "multi-node", "hub"), ("spot", "cpu")],
)
def test_components_go_together_and_the_api_takes_them(components: tuple[str, ...]):
    job = rendered(SPEC, *components)
    for release in RELEASES:
        kubernetes_validate.validate(job, release, strict=True)
    assert job["metadata"]["generateName"] == "chest-1-gr-er-"
    assert "name" not in job["metadata"]
    assert job["metadata"]["annotations"]["vision-lora-job/output"] == "s3://bucket/runs/1"


@pytest.mark.parametrize(
    ("components", "sentence"),
    [
        (("cpu", "multi-gpu"), "--with cpu: cannot be combined with multi-gpu"),
        (("airgapped", "hub"), "--with airgapped: cannot be combined with hub"),
        (("spots",), "--with spots: no such component; there are airgapped, cpu, hub,"),
    ],
)
def test_components_that_do_not_go_together_are_refused(components: tuple[str, ...], sentence: str):
    with pytest.raises(SpecError, match=f"^{sentence}"):
        rendered(SPEC, *components)


def test_the_order_in_which_components_are_named_does_not_matter():
    every = tuple(sorted({path.name for path in (ROOT / "k8s" / "components").iterdir()} - {"cpu", "airgapped"}))
    assert read_job(every) == read_job(every[::-1])
    assert read_job(("spot", "cpu", "airgapped")) == read_job(("airgapped", "cpu", "spot"))
    page = (ROOT / "docs" / "kubernetes.md").read_text()
    assert ", ".join(f"`{name}`" for name in LATER) in " ".join(page.split())


@pytest.mark.parametrize(
    "image", ["vision-lora-job", "registry.example.com:5000/vision-lora-job", f"{IMAGE[:-6]}:latest"]
)
def test_an_image_that_may_change_is_refused(image: str):
    with pytest.raises(SpecError, match="a tag other than latest, or a digest"):
        rendered(SPEC, image=image)


def test_the_image_s_digest_is_handed_on_for_the_lineage():
    digest = f"sha256:{'a' * 64}"
    env = rendered(SPEC, image=f"r.example.com/job@{digest}")["spec"]["template"]["spec"]["containers"][0]["env"]
    assert {"name": "JOB_IMAGE_DIGEST", "value": digest} in env


def test_the_hub_is_let_in_when_the_spec_names_it_and_not_otherwise():
    def egress(spec: Tree) -> str:
        return str(rendered(spec)["spec"]["template"]["metadata"]["labels"]["vision-lora-job/egress"])

    assert egress(SPEC) == "store"
    assert egress(SPEC | {"model": {"name_or_path": "unsloth/Llama-3.2-11B-Vision-Instruct"}}) == "hub"
    assert egress(SPEC | {"export": {"hub": {"adapter_repo": "clinic/chest"}}}) == "hub"


def test_folders_that_no_pod_sees_are_refused_all_at_once(tmp_path: Path):
    spec = SPEC | {"model": {"name_or_path": str(tmp_path)}, "output": {"url": "/output/run"}}
    with pytest.raises(SpecError) as caught:
        rendered(spec)
    assert "model.name_or_path: pods cannot see" in str(caught.value)
    assert "output.url: pods cannot see /output/run; put it on s3://" in str(caught.value)
    with pytest.raises(SpecError, match="put it below /bundle or /output"):
        rendered(spec, "airgapped")
    rendered(spec | {"model": {"name_or_path": "/bundle/base"}}, "airgapped")


def test_a_bundle_is_handed_on_and_stands_for_all_that_the_spec_names(tmp_path: Path):
    spec = SPEC | {"model": {"name_or_path": "org/name"}, "dataset": {"path": str(tmp_path)}}
    spec |= {"output": {"url": "/output/run"}}
    job = rendered(spec, "airgapped", JOB_BUNDLE="/bundle/chest")
    env = job["spec"]["template"]["spec"]["containers"][0]["env"]
    assert {"name": "JOB_BUNDLE", "value": "/bundle/chest"} in env
    from_store = rendered(SPEC | {"model": {"name_or_path": "org/name"}}, JOB_BUNDLE="s3://bucket/chest")
    assert from_store["spec"]["template"]["metadata"]["labels"]["vision-lora-job/egress"] == "store"
    with pytest.raises(SpecError, match="JOB_BUNDLE: pods cannot see /lustre/chest; put it below /bundle or /output"):
        rendered(spec, "airgapped", JOB_BUNDLE="/lustre/chest")


def test_each_row_of_a_sweep_is_a_job_of_its_own(tmp_path: Path):
    (tmp_path / "runs.csv").write_text("name,lora.target_modules\nq,.*[qk]_proj\n,$(HOME)\n")
    runs = read_runs({}, yaml.safe_dump(SPEC), "s3://b/sweep", tmp_path / "runs.csv")
    jobs = documents(kubernetes(runs, IMAGE, ("multi-gpu",)))
    labels = [job["spec"]["template"]["metadata"]["labels"] for job in jobs]
    assert [job["metadata"]["generateName"] for job in jobs] == ["chest-1-gr-er-q-", "chest-1-gr-er-2-"]
    assert {label["app.kubernetes.io/part-of"] for label in labels} == {"chest-1-gr-er"}
    specs = [load_spec(variables(job["spec"]["template"]["spec"]["containers"][0], {})) for job in jobs]
    assert [spec.lora.target_modules for spec in specs] == [".*[qk]_proj", "$(HOME)"]
    assert [spec.output.url for spec in specs] == ["s3://b/sweep/q", "s3://b/sweep/2"]
