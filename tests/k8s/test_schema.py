"""Every manifest is one that the API's own schemas take, in the oldest release that we promise and in the newest."""

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.k8s.conftest import BUILDS, K8S, Tree, built, documents

NEWEST = kubernetes_validate.latest_version()
RELEASES = ("1.31", "1.34", NEWEST)
CRDS: dict[str, Tree] = yaml.safe_load((K8S.parent / "tests" / "k8s" / "crds.yaml").read_text())


def test_no_file_gives_a_key_twice():
    files = list(K8S.rglob("*.yaml"))
    assert len(files) > 30
    for path in files:
        assert documents(path.read_text()), path


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("build", [*BUILDS, "setup/namespace.yaml", "setup/kueue/clusterqueue.yaml"])
def test_every_object_is_valid(build: str, release: str):
    trees = documents((K8S / build).read_text()) if build.endswith(".yaml") else built(build)
    assert trees
    for tree in trees:
        check(tree, release)


def check(tree: Tree, release: str) -> None:
    custom = CRDS.get(f"{tree['apiVersion']}/{tree['kind']}")
    if custom is None:
        kubernetes_validate.validate(tree, release, strict=True)
        return
    assert set(tree) <= {"apiVersion", "kind", "metadata", "spec"}
    jsonschema.Draft202012Validator(custom).validate(tree.get("spec", {}))
    for job in tree.get("spec", {}).get("template", {}).get("spec", {}).get("replicatedJobs", []):
        kubernetes_validate.validate({"apiVersion": "batch/v1", "kind": "Job"} | job["template"], release, strict=True)
    for variable in tree.get("spec", {}).get("trainer", {}).get("env", []):
        pod = {"containers": [{"name": "node", "env": [variable]}]}
        kubernetes_validate.validate({"apiVersion": "v1", "kind": "Pod", "spec": pod}, release, strict=True)


def test_what_is_wrong_is_found():
    job = next(tree for tree in built("base") if tree["kind"] == "Job")
    with pytest.raises(kubernetes_validate.ValidationError):
        check(job | {"spec": job["spec"] | {"podReplacmentPolicy": "Failed"}}, NEWEST)
    with pytest.raises(jsonschema.ValidationError):
        check(
            {"apiVersion": "kueue.x-k8s.io/v1beta2", "kind": "LocalQueue", "metadata": {}, "spec": {"queue": "x"}},
            NEWEST,
        )
