"""The image, built by buildah from docker/Dockerfile and run by podman."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import tarfile
import time
from pathlib import Path

import pytest
import yaml

from job.store import open_store
from job.store.lease import acquire
from tests.docker.build import BAIT, BASE
from tests.docker.conftest import Podman

# As the strictest of schedulers would: any user, no network, nothing to write to but one mount, no capability.
NO_MOUNT = ("--network", "none", "--user", "23456:34567", "--cap-drop", "ALL", "--security-opt", "no-new-privileges")
STRICT = (*NO_MOUNT, "--read-only", "--read-only-tmpfs=false")


def spec(output: str) -> str:
    tree = {"model": {"name_or_path": "/m"}, "dataset": {"path": "/d"}, "output": {"url": output}}
    return json.dumps(tree)


def test_as_any_user_on_a_read_only_root_it_lives_and_leaves_with_75_in_time(image: str, podman: Podman, scratch: Path):
    """It waits, since another writer holds the output; it is process 1, so nobody hears SIGTERM for it."""
    output = scratch.parent / "output"
    with acquire(open_store(str(output)), "another writer", 300, wait=0):
        output.chmod(0o777)
        (output / "lease.json").chmod(0o644)
        mounts = ("--volume", f"{scratch}:/scratch", "--volume", f"{output}:/output")
        options = (*mounts, "--env", f"JOB_SPEC={spec('/output')}")
        started = podman("run", "--detach", *STRICT, *options, "--env", "JOB_LEASE_SECONDS=300", image)
        assert started.returncode == 0, started.stderr
        container = started.stdout.strip()
        try:
            deadline = time.monotonic() + 120
            while "waiting up to" not in podman("logs", container).stderr:
                assert time.monotonic() < deadline, podman("logs", container).stderr
                time.sleep(0.1)
            assert podman("healthcheck", "run", container).returncode == 0
            assert {path.stat().st_uid for path in scratch.iterdir()} == {23456}
            began = time.monotonic()
            podman("stop", "--time", "60", container)
            assert time.monotonic() - began < 50  # it was not killed, however loaded this machine is
            assert podman("wait", container).stdout.strip() == "75"
            last = podman("logs", container).stderr.strip().splitlines()[-1]
            assert last == "exit 75: stopped on SIGTERM; run again to continue"
        finally:
            podman("rm", "--force", container)


def test_without_any_mount_and_with_a_bad_spec_it_ends_with_78(image: str, podman: Podman):
    done = podman("run", "--rm", *NO_MOUNT, "--env", "JOB_SPEC=model: {name_or_path: m}", image)
    assert done.returncode == 78, done.stderr
    assert "dataset" in done.stderr.strip().splitlines()[-1]


def test_where_the_box_is_the_container_it_runs_the_job_and_then_stops_the_box(image: str, podman: Podman):
    options = ("--env", "JOB_SPEC=model: {name_or_path: m}", "--env", "JOB_STOP_COMMAND=echo stopping")
    done = podman("run", "--rm", *NO_MOUNT, *options, "--entrypoint", "bash", image, "/opt/job/rented-box.sh")
    assert (done.returncode, done.stdout) == (78, "stopping\n"), done.stderr


def test_its_caches_all_lie_below_the_one_mount(image: str, podman: Podman, scratch: Path):
    program = (
        "import os, pathlib, tempfile; from job.config.environment import Environment; "
        "from job.runtime.scratch import CACHES, prepare_scratch; prepare_scratch(Environment.read(os.environ), os.environ); "
        "paths = [os.environ[name] for name in CACHES] + [tempfile.gettempdir(), pathlib.Path.home(), os.getcwd()]; "
        "print(*paths, sep='\\n'); import getpass; print('/scratch', getpass.getuser())"
    )
    options = ("--volume", f"{scratch}:/scratch", "--entrypoint", "python")
    done = podman("run", "--rm", *STRICT, *options, image, "-c", program)
    assert done.returncode == 0, done.stderr
    assert all(line.startswith("/scratch") for line in done.stdout.splitlines()), done.stdout


def test_its_settings_are_those_of_a_container_that_a_scheduler_starts(image: str, podman: Podman):
    facts = json.loads(podman("inspect", "--type", "image", image).stdout)[0]
    config = facts["Config"]
    assert config["Entrypoint"] == ["/opt/venv/bin/python", "-m", "job"]
    assert config["Cmd"] == ["run"]
    assert config["User"].split(":")[0].isdigit()
    assert config["User"] != "0"
    assert facts["Healthcheck"]["Test"][0] == "CMD"
    labels = {name.removeprefix("org.opencontainers.image."): value for name, value in config["Labels"].items()}
    assert (labels["version"], labels["revision"], labels["base.name"]) == ("1.2.3", "test", BASE)
    assert "NVIDIA_VISIBLE_DEVICES=all" in config["Env"]


def test_no_layer_holds_bait_history_caches_or_credentials(image: str, tmp_path: Path):
    push = ["buildah", "push", "--quiet", "--disable-compression", image, f"dir:{tmp_path}"]
    subprocess.run(push, check=True)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert BAIT not in (tmp_path / manifest["config"]["digest"].removeprefix("sha256:")).read_text()
    names = set[str]()
    for layer in manifest["layers"]:
        file = tmp_path / layer["digest"].removeprefix("sha256:")
        assert subprocess.run(["grep", "-q", "-a", BAIT, file], check=False).returncode == 1
        with tarfile.open(file) as archive:
            names |= {member.name for member in archive if member.isdir() or member.size}
    ours = r"\.git|\.cache|pip|studio|jupyterlab|notebook|ipykernel|pip\.conf|\.netrc|site\.env"
    unwanted = rf"(^|/)({ours})$|^src/|^var/lib/apt/lists/deb"
    assert [name for name in sorted(names) if re.search(unwanted, name)] == []


def test_the_bill_of_materials_names_every_package_with_its_licence(image: str, podman: Podman):
    listing = (
        "import json; from importlib.metadata import distributions; "
        "print(json.dumps({found.name: found.version for found in distributions()}))"
    )
    done = podman("run", "--rm", "--network", "none", "--entrypoint", "python", image, "-c", listing)
    installed = json.loads(done.stdout)
    done = podman("run", "--rm", "--network", "none", "--entrypoint", "cat", image, "/opt/job/sbom.cdx.json")
    parts = json.loads(done.stdout)["components"]
    python = {part["name"]: part for part in parts if part["purl"].startswith("pkg:pypi/")}
    assert {name: part["version"] for name, part in python.items()} == installed
    assert installed["vision-lora-job"] == importlib.metadata.version("vision-lora-job")
    assert any(part["purl"].startswith("pkg:deb/debian/libc6@") for part in parts)
    licences = {name: part["licenses"][0]["license"]["name"] for name, part in python.items()}
    assert {name for name, licence in licences.items() if "AGPL" in licence or licence == "unknown"} == set()


@pytest.mark.parametrize("variant", ["cpu"])
def test_the_demo_is_published_by_the_image(image: str, podman: Podman, scratch: Path, demo: Path, variant: str):
    """As any user on a read-only root; `make test-image` builds the variant that can."""
    if not image.endswith(variant):
        pytest.skip("the demo needs the cpu variant: make test-image")
    from tests.resume_proof import small_spec

    tree = yaml.safe_load(small_spec(demo, "/output", merged=True))
    tree["model"]["name_or_path"], tree["dataset"]["path"] = "/demo/base", "/demo/data"
    subprocess.run(["chmod", "-R", "a+rX", demo], check=True)
    output = scratch.parent / "output"
    output.mkdir()
    output.chmod(0o1777)
    places = {scratch: "/scratch", output: "/output", demo: "/demo:ro"}
    mounts = [part for here, there in places.items() for part in ("--volume", f"{here}:{there}")]
    options = (*mounts, "--env", "OMP_NUM_THREADS=1")
    done = podman("run", "--rm", *STRICT, *options, "--env", f"JOB_SPEC={json.dumps(tree)}", image, timeout=400)
    assert done.returncode == 0, done.stderr
    result = json.loads((output / "RESULT.json").read_text())
    assert result["lineage"]["packages"]["vision-lora-job"]
