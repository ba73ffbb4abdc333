"""What the manifests are once Kustomize has built them."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from tests.conftest import CACHE, ROOT

K8S = ROOT / "k8s"
OVERLAYS = sorted(path.name for path in (K8S / "overlays").iterdir())
SETUPS = ["setup", *(f"setup/{path.name}" for path in sorted((K8S / "setup").iterdir()) if path.is_dir())]
BUILDS = ["base", *(f"overlays/{name}" for name in OVERLAYS), *SETUPS]
Tree = dict[str, Any]


class Strict(yaml.SafeLoader):
    """YAML that refuses a key given twice, of which Kustomize and kubectl would silently take one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"a key is given twice: {keys}, {node.start_mark}"
        return super().construct_mapping(node, deep)


def documents(text: str) -> list[Tree]:
    return [tree for tree in yaml.load_all(text, Loader=Strict) if tree is not None]


@functools.cache
def kustomize() -> list[str]:
    """The command that builds: kubectl's Kustomize 5 or newer, else one of Debian's, fetched into build/ and kept."""
    if shutil.which("kubectl"):
        said = subprocess.run(["kubectl", "version", "--client"], capture_output=True, text=True, check=False).stdout
        if re.search(r"Kustomize Version: v([5-9]|\d\d)", said):
            return ["kubectl", "kustomize"]
    own = CACHE / "kustomize" / "kustomize"
    if not own.exists() and not shutil.which("kustomize"):
        if not (shutil.which("apt-get") and shutil.which("dpkg")):
            pytest.skip("there is no kubectl or kustomize with Kustomize 5, and no apt-get to fetch one")
        script = ["sh", str(Path(__file__).parent / "kustomize.sh"), str(own.parent)]
        fetched = subprocess.run(script, capture_output=True, text=True, check=False)
        if fetched.returncode != 0:
            pytest.skip(f"Debian's kustomize cannot be fetched: {fetched.stderr.strip()[-300:]}")
    return [str(own) if own.exists() else "kustomize", "build"]


@functools.cache
def built(name: str) -> tuple[Tree, ...]:
    """All objects that `kubectl apply -k k8s/NAME` would apply."""
    command = [*kustomize(), str(K8S / name)]
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"KUBECONFIG": "/dev/null"}
    )
    assert result.returncode == 0, result.stderr
    return tuple(documents(result.stdout))


def of_kind(name: str, kind: str) -> list[Tree]:
    return [tree for tree in built(name) if tree["kind"] == kind]


class Pods(NamedTuple):
    """A Job's spec, where it is from, and the container of ours in its pods."""

    build: str
    job: Tree

    @property
    def template(self) -> Tree:
        return self.job["template"]

    @property
    def pod(self) -> Tree:
        return self.job["template"]["spec"]

    @property
    def container(self) -> Tree:
        return self.pod["containers"][0]


def pods(build: str) -> Iterator[Pods]:
    """Every Job of a build; a TrainingRuntime's Jobs too."""
    for tree in built(build):
        if tree["kind"] == "Job":
            yield Pods(build, tree["spec"])
        if tree["kind"] == "TrainingRuntime":
            for replicated in tree["spec"]["template"]["spec"]["replicatedJobs"]:
                yield Pods(build, replicated["template"]["spec"])


@pytest.fixture(params=["base", *(f"overlays/{name}" for name in OVERLAYS)], scope="session")
def run(request: pytest.FixtureRequest) -> Pods:
    """The Job of each build in turn."""
    (found,) = pods(request.param)
    return found
