"""The image that these tests are about, and a podman to run it with.

`TEST_IMAGE_VARIANT=cpu` builds the larger one; `TEST_IMAGE` names one that is there already.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.docker.build import why_not

BUILT = os.environ.get("TEST_IMAGE")
VARIANT = os.environ.get("TEST_IMAGE_VARIANT", "light")
BUILDING = pytest.StashKey[subprocess.Popen[str]]()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Begin to build as soon as it is known that the image will be wanted: the other tests leave a core free."""
    if (
        BUILT is None
        and why_not() is None
        and any("image" in getattr(item, "fixturenames", ()) for item in session.items)
    ):
        session.config.stash[BUILDING] = begin()


def begin() -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["nice", sys.executable, "-m", "tests.docker.build", VARIANT],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="session")
def image(request: pytest.FixtureRequest) -> str:
    """Name of the image, built for these tests."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    if BUILT is not None:
        return BUILT
    building = request.config.stash.get(BUILDING, None) or begin()  # `site` asks for it in a way that no list shows
    said, _ = building.communicate(timeout=1200)
    assert building.returncode == 0, said
    return str(said.strip().splitlines()[-1])


@pytest.fixture(scope="session")
def unpacked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The image as a folder, which Charliecloud and Apptainer can start. `TEST_UNPACKED` names one that is there."""
    if "TEST_UNPACKED" in os.environ:
        return Path(os.environ["TEST_UNPACKED"])
    image = request.getfixturevalue("image")
    folder = tmp_path_factory.mktemp("unpacked") / "image"
    container = subprocess.run(["buildah", "from", image], capture_output=True, text=True, check=True).stdout.strip()
    mounted = subprocess.run(["buildah", "mount", container], capture_output=True, text=True, check=True).stdout.strip()
    subprocess.run(["cp", "-a", mounted, folder], check=True)
    subprocess.run(["buildah", "rm", container], capture_output=True, check=True)
    return folder


Podman = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def podman_environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What lets podman run where there is no systemd."""
    settings = tmp_path_factory.mktemp("podman") / "containers.conf"
    settings.write_text(
        '[containers]\ndefault_ulimits = ["nofile=20000:20000", "nproc=16384:16384"]\n'
        '[engine]\nruntime = "runc"\nlock_type = "file"\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\n'
    )
    return {"CONTAINERS_CONF": str(settings), "DISABLE_HC_SYSTEMD": "true"}


@pytest.fixture
def podman(podman_environment: dict[str, str]) -> Podman:
    """Run a podman command."""

    def run(*arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        environment = os.environ | podman_environment
        return subprocess.run(
            ["podman", *arguments], env=environment, capture_output=True, text=True, check=False, timeout=timeout
        )

    return run


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    """A folder that any user may write to, as the one mount of a container."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    folder.chmod(0o1777)
    for parent in tmp_path.parents[:2]:
        parent.chmod(0o755)
    return folder
