"""What the image is made from, and compose.yaml: what can be seen in the files themselves."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT

LOCK = (ROOT / "docker/gpu.lock").read_text()
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)", LOCK, re.MULTILINE))


def test_the_lock_holds_what_the_project_asks_for_and_a_hash_for_each():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = [each for name in ("train", "gpu", "dicom", "trackers", "fp8") for each in extras[name]]
    exact = dict(re.findall(r"([\w-]+)==([\d.]+)", " ".join(asked).lower()))
    assert {name: PINS[name] for name in exact} == exact
    names = {re.match(r"[\w-]+", each)[0].lower() for each in [*project["dependencies"], *asked]}  # type: ignore[index]
    assert names - {"vision-lora-job"} <= set(PINS)
    tested = re.search(r"^torch=([\d.]+) torchvision=([\d.]+)", (ROOT / ".ci/venv").read_text(), re.MULTILINE)
    assert tested
    assert (PINS["torch"], PINS["torchvision"]) == tested.groups()
    for block in re.split(r"\n(?=[\w.-]+==)", LOCK)[1:]:
        assert "--hash=sha256:" in block, block.splitlines()[0]
    assert "--index-url" not in LOCK


def test_the_dockerfile_and_the_scripts_are_clean():
    subprocess.run([Path(sys.executable).with_name("hadolint"), ROOT / "docker/Dockerfile"], check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("there is no shellcheck; apt-get install shellcheck")
    scripts = [*(ROOT / "docker").glob("*.sh"), *(ROOT / "slurm").glob("*.sh"), ROOT / "tests/cluster/slurm.sh"]
    scripts += (ROOT / "k8s").glob("*.sh")
    subprocess.run(["shellcheck", "-x", *scripts], cwd=ROOT, check=True)


BUILDER = """#!/bin/sh
[ "$*" = "buildx version" ] && exit {buildx}
case "$*" in *inspect*) echo sha256:{digest} ;; *) echo "${{0##*/}} $*" ;; esac
"""


@pytest.mark.parametrize(
    ("installed", "buildx", "expected"),
    [
        ("docker podman buildah", 0, "docker build"),
        ("docker podman skopeo", 1, "podman build --format docker"),
        ("buildah skopeo", 1, "buildah bud --format docker --isolation chroot --layers"),
        ("docker", 1, None),
        ("podman", 1, None),
    ],
)
def test_the_image_is_built_by_what_can(installed: str, buildx: int, expected: str | None, tmp_path: Path):
    """Stand-ins print how they were called; podman alone cannot look up a digest."""
    digest, shell = "a" * 64, ("sh", "sed", "git", "dirname")
    for name in installed.split():
        (tmp_path / name).write_text(BUILDER.format(buildx=buildx, digest=digest))
        (tmp_path / name).chmod(0o755)
    for name in shell:
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    arguments = ["sh", ROOT / "docker/build.sh", "--build-arg", "VARIANT=cpu"]
    done = subprocess.run(arguments, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False)
    if expected is None:
        assert done.returncode == 1
        assert (
            "install one of them" in done.stderr or "set BASE_IMAGE to docker.io/library/debian@sha256" in done.stderr
        )
        return
    assert done.returncode == 0, done.stderr
    called = done.stdout.splitlines()[-1]
    assert called.startswith(f"{expected} --build-arg VARIANT=cpu --tag vision-lora-job:gpu")
    assert f"BASE_IMAGE=docker.io/library/debian@sha256:{digest}" in called
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"--build-arg VERSION={version}" in called


def test_scripts_of_slurm_are_short_and_say_what_to_edit():
    scripts = [*(ROOT / "slurm").glob("*.sh")]
    assert ROOT / "slurm/train.sh" in scripts
    for script in scripts:
        lines = script.read_text().splitlines()
        assert len(lines) < 100, script.name
        head = "\n".join(line for line in lines[:20] if line.startswith("#"))
        assert re.search(r"\b[Ee]dit below|nothing to edit|settings are in slurm/site.env", head, re.IGNORECASE), (
            script.name
        )


def test_the_dockerfile_names_its_base_in_full_and_nothing_of_the_latest():
    text = (ROOT / "docker/Dockerfile").read_text()
    base = re.search(r"^ARG BASE_IMAGE=(\S+)$", text, re.MULTILINE)
    assert base
    assert re.fullmatch(r"docker\.io/[\w/]+:\d+\.\d+-slim", base[1])
    assert "latest" not in text
    assert not re.search(r"^(ENTRYPOINT|CMD) [^\[]", text, re.MULTILINE)


def test_compose_runs_the_job_as_strictly_as_the_image_allows():
    text = (ROOT / "docker/compose.yaml").read_text()
    services = yaml.safe_load(text)["services"]
    job = services["job"]
    assert (job["read_only"], job["cap_drop"], job["security_opt"]) == (True, ["ALL"], ["no-new-privileges:true"])
    assert int(job["environment"]["JOB_GRACE_SECONDS"]) < int(job["stop_grace_period"].removesuffix("s"))
    assert job["environment"]["AWS_SECRET_ACCESS_KEY"] == services["store"]["environment"]["ROOT_SECRET_KEY"]
    assert any(volume.endswith(":/scratch") for volume in job["volumes"])
    assert re.search(r"versitygw:v\d+\.\d+\.\d+", services["store"]["image"])
