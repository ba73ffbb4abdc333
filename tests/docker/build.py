"""Builds the image without a daemon and without a registry: `python -m tests.docker.build VARIANT`. As root on Debian.

The base is a Debian made here, of the suite that runs, in place of the Dockerfile's; everything else is the Dockerfile's own
doing. The context is the repository with bait in it: files that must not reach any layer. Prints the image's name.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
BASE = "localhost/vision-lora-test-base"
BAIT = "not-for-any-layer-4711"
TOOLS = ("buildah", "podman", "mmdebstrap", "runc")


def why_not() -> str | None:
    """Why no image can be built here; None when one can."""
    if os.getuid() != 0:
        return "building an image without a daemon needs root"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    return f"building an image needs {', '.join(missing)}; apt-get install them" if missing else None


def name_of(variant: str) -> str:
    """Of this checkout's own: another's suite may run on the same machine."""
    return f"localhost/vision-lora-test-{zlib.crc32(str(ROOT).encode()):08x}:{variant}"


def make_base() -> None:
    if subprocess.run(["buildah", "inspect", BASE], capture_output=True, check=False).returncode == 0:
        return
    release = re.search(r"VERSION_CODENAME=(\w+)", Path("/etc/os-release").read_text())
    assert release
    with tempfile.TemporaryDirectory() as folder:
        quiet = [f"--dpkgopt=path-exclude=/usr/share/{part}/*" for part in ("man", "doc", "locale")]
        included = "--include=ca-certificates,python3,python3-venv"
        options = ["--variant=apt", included, '--aptopt=Acquire::Languages "none"', *quiet]
        run("mmdebstrap", "--quiet", *options, release[1], f"{folder}/base.tar")
        container = run("buildah", "from", "scratch")
        run("buildah", "add", "--quiet", container, f"{folder}/base.tar", "/")
        run("buildah", "commit", "--quiet", "--rm", container, BASE)


def pip_settings(folder: Path) -> list[str]:
    """Mounts with which pip finds inside the build what it finds out here."""
    listed = run(sys.executable, "-m", "pip", "config", "list")
    found = dict(re.findall(r"^\S+\.([\w-]+)='(.*)'$", listed, re.MULTILINE))
    kept = {key: found[key] for key in ("cert", "index-url", "extra-index-url", "find-links") if key in found}
    mounts = []
    for key, value in list(kept.items()):
        if key == "cert":
            kept[key] = "/run/certificates.crt"  # where the build's own ca-certificates package does not write
            mounts.append(f"{value}:{kept[key]}:ro")
        elif value.startswith("/") and Path(value).is_dir():
            mounts.append(f"{value}:{value}:ro")
        elif not value.startswith("http"):
            del kept[key]
    (folder / "pip.conf").write_text("[global]\n" + "".join(f"{key} = {value}\n" for key, value in kept.items()))
    return [f"--volume={mount}" for mount in [*mounts, f"{folder}/pip.conf:/etc/pip.conf:ro"]]


def copy_context(folder: Path) -> Path:
    """The repository as git would have it, and bait."""
    listed = run("git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard").splitlines()
    for name in listed:
        source, target = ROOT / name, folder / "context" / name
        if source.is_symlink() or source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target, follow_symlinks=False)
    for name in (".env", ".git/config", "slurm/site.env", "docker/id_rsa", "build/data.json"):
        (folder / "context" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "context" / name).write_text(BAIT)
    return folder / "context"


def build_once(variant: str) -> str:
    """Of the processes of one pytest, which all ask for it, the first builds and the others wait."""
    place = ROOT / "build" / "tests" / "image"
    place.parent.mkdir(parents=True, exist_ok=True)
    asked = f"{variant} {os.environ.get('PYTEST_XDIST_TESTRUNUID', os.getpid())}"
    with place.open("a+") as done:
        fcntl.flock(done, fcntl.LOCK_EX)
        done.seek(0)
        if done.read() != asked:
            before = identity(name_of(variant))
            build(variant)
            if before not in ("", identity(name_of(variant))):  # or each run would leave one
                subprocess.run(["buildah", "rmi", before], capture_output=True, check=False)
            done.truncate(0)
            done.write(asked)
    return name_of(variant)


def identity(name: str) -> str:
    listed = subprocess.run(["buildah", "images", "--quiet", name], capture_output=True, text=True, check=False)
    return listed.stdout.strip()


def build(variant: str) -> str:
    make_base()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        context = copy_context(folder)
        arguments = [
            f"--build-arg={key}"
            for key in (f"BASE_IMAGE={BASE}", f"VARIANT={variant}", "REVISION=test", "VERSION=1.2.3")
        ]
        how = ["--format", "docker", "--isolation", "chroot", "--layers=false", "--quiet", *pip_settings(folder)]
        tag = ["--tag", name_of(variant), "--file", str(context / "docker/Dockerfile")]
        run("buildah", "bud", *how, *arguments, *tag, str(context))
    return name_of(variant)


def run(*command: str) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command[:3])} ended with {done.returncode}:\n{done.stdout[-3000:]}")
    return done.stdout.strip()


if __name__ == "__main__":
    print(build_once(sys.argv[1]))
