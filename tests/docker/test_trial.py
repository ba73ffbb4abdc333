"""docker/pieces.sh and docker/trial.sh: the image in pieces, put together again, and run without a container runtime."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

SPACES = ["unshare", "--mount", "--pid", "--net", "--ipc", "--uts", "--fork"]
MIB = 2**20
WRITTEN = re.compile(r"/(scratch|output|dev/shm|dev/null|proc/self)/")
"""What a job may write to. /output stands for the store."""
WRITES = re.compile(r"open|creat|mk(dir|nod)|rename|(un|sym)?link|rmdir|ch(mod|own)|utime|truncate")
OPENED_TO_WRITE = re.compile(r"O_(WRONLY|RDWR|CREAT|TRUNC)")


def why_not() -> str | None:
    missing = [tool for tool in ("unshare", "zstd", "setpriv") if shutil.which(tool) is None]
    if os.getuid() != 0 or missing:
        return f"a trial needs root, {', '.join(missing)}"
    done = subprocess.run([*SPACES, "true"], capture_output=True, text=True, check=False)
    return done.stderr if done.returncode else None


def trial(
    folder: Path, *arguments: str, traced: Path | None = None, **settings: str
) -> subprocess.CompletedProcess[str]:
    watch = ["strace", "-f", "-y", "--seccomp-bpf", "-e", "trace=%file", "-o", str(traced)] if traced else []
    command = [*watch, ROOT / "docker/trial.sh", folder, *arguments]
    return subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=False, timeout=600)


@pytest.fixture(scope="module")
def folder(image: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the image is put together from pieces of 20 MiB."""
    if reason := why_not():
        pytest.skip(reason)
    made = tmp_path_factory.mktemp("trial")
    cut = [ROOT / "docker/pieces.sh", image, made / "pieces", "20"]
    done = subprocess.run(cut, env=os.environ | {"COMPRESS": "zstd -q -1"}, capture_output=True, text=True, check=True)
    sizes = [piece.stat().st_size for piece in sorted((made / "pieces").glob("image.*"))]
    assert sizes[:-1] == [20 * MIB] * (len(sizes) - 1)
    assert 0 < sizes[-1] <= 20 * MIB
    assert f"{len(sizes)} pieces, {sum(sizes)} bytes" in done.stdout
    unpacked = trial(made, "unpack")
    assert unpacked.returncode == 0, unpacked.stderr
    return made


def test_a_piece_that_did_not_travel_well_is_named_and_nothing_unpacked(folder: Path, tmp_path: Path):
    shutil.copytree(folder / "pieces", tmp_path / "pieces")
    with (tmp_path / "pieces" / "image.tar.zst.001").open("r+b") as piece:
        piece.seek(4711)
        piece.write(b"not what it was")
    done = trial(tmp_path, "unpack")
    assert done.returncode == 1
    assert "image.tar.zst.001: FAILED" in done.stdout
    assert not (tmp_path / "root").exists()


def test_the_command_is_process_1_of_a_plain_user_and_writes_to_scratch_alone(folder: Path):
    shown = (
        "id -u; echo $$ $HOME; touch /x /opt/x /dev/x /trial/x; touch /scratch/x /output/x; grep Cap /proc/self/status"
    )
    done = trial(folder, "start", "look", "A=b", "sh", "-c", f"{shown}; echo $A; ls /sys/class/net; exit 7")
    assert done.returncode == 7, done.stderr
    user, process, *capabilities, given, devices = done.stdout.splitlines()
    assert (user, process, given, devices) == ("23456", "1 /scratch", "b", "lo")
    assert {line.split()[1] for line in capabilities} == {"0" * 16}
    assert re.findall(r"cannot touch '(\S+)'", done.stderr) == ["/x", "/opt/x", "/dev/x", "/trial/x"]
    assert (folder / "scratch-look" / "x").stat().st_uid == 23456
    assert str(folder) not in Path("/proc/mounts").read_text()  # nothing stays mounted


def test_the_exit_code_of_the_job_is_that_of_the_trial(folder: Path):
    done = trial(folder, "start", "bad", "JOB_SPEC=model: {name_or_path: m}", "python", "-m", "job", "run")
    assert done.returncode == 78, done.stderr


DRIVER = """
set -e
mount -t tmpfs tmpfs /usr/local
rm -rf devices
mkdir -p /usr/local/nvidia/lib64 /usr/local/nvidia/bin devices
echo 'int x;' | gcc -shared -Wl,-soname,libcuda.so.1 -x c - -o /usr/local/nvidia/lib64/libcuda.so.580.1
ln -s libcuda.so.580.1 /usr/local/nvidia/lib64/libcuda.so.1
printf '#!/bin/sh\necho a GPU\n' >/usr/local/nvidia/bin/nvidia-smi
chmod +x /usr/local/nvidia/bin/nvidia-smi
cp -a /dev/null /dev/zero /dev/full /dev/random /dev/urandom devices/
mknod devices/nvidia0 c 195 0
mount --bind devices /dev
exec "$@"
"""
"""A machine with something like a driver, in a mount namespace of its own."""
MACHINE = ["unshare", "--mount", "--propagation", "private", "sh", "-c", DRIVER, "sh"]


@pytest.mark.skipif(shutil.which("gcc") is None, reason="it takes gcc")
def test_the_driver_of_the_machine_is_bound_in_and_found(folder: Path, tmp_path: Path):
    machine = [*MACHINE, ROOT / "docker/trial.sh", folder]
    done = subprocess.run([*machine, "smi"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "a GPU\n"), done.stderr
    shown = ["start", "driver", "sh", "-c", "/sbin/ldconfig -p | grep libcuda; ls -l /dev/nvidia0"]
    done = subprocess.run([*machine, *shown], cwd=tmp_path, capture_output=True, text=True, check=False)
    library, device = done.stdout.splitlines()
    assert library.endswith("=> /lib/x86_64-linux-gnu/libcuda.so.1")
    assert device.startswith("c")


@pytest.fixture
def cpu(image: str, folder: Path) -> Path:
    if not image.endswith("cpu"):
        pytest.skip("training needs the cpu variant: make test-image")
    return folder


def test_a_job_stopped_by_sigterm_to_process_1_is_published_by_a_second_start(cpu: Path):
    settings = {"FAMILY": "qwen2_5_vl", "SIZE": "tiny", "OMP_NUM_THREADS": "1"}
    done = trial(cpu, "smi", "imports", "stop", **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "trial: notice: SIGTERM to process 1, exit 75 after" in done.stdout
    assert "trial: again: published after" in done.stdout
    assert (cpu / "output/stop/output/RESULT.json").exists()


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace shows what the kernel was asked for")
def test_a_job_tries_to_write_nowhere_but_to_scratch_and_the_store(cpu: Path, tmp_path: Path):
    prepared = trial(
        cpu,
        "start",
        "base",
        *["python", "/trial/benchmarks/image.py", "prepare", "/output/traced", "qwen2_5_vl", "tiny"],
    )
    assert prepared.returncode == 0, prepared.stderr
    spec = (cpu / "output/traced/spec.yaml").read_text()
    done = trial(cpu, "start", "traced", f"JOB_SPEC={spec}", *["python", "-m", "job", "run"], traced=tmp_path / "calls")
    assert done.returncode == 0, done.stderr
    calls = whole_calls((tmp_path / "calls").read_text().splitlines())
    first = next(n for n, call in enumerate(calls) if "execve" in call and '["python", "-m", "job"' in call)
    written = {path for call in calls[first + 1 :] for path in paths_written(call)}
    assert {path.split("/")[1] for path in written} >= {"scratch", "output"}
    assert {path for path in written if not WRITTEN.match(path.removeprefix(str(cpu / "root")) + "/")} == set()


def whole_calls(lines: list[str]) -> list[str]:
    """Each call in one line, where it ends."""
    begun, calls = dict[str, str](), list[str]()
    for line in lines:
        process, rest = line.split(maxsplit=1)
        if rest.endswith("<unfinished ...>"):
            begun[process] = rest.removesuffix("<unfinished ...>")
        else:
            calls.append(re.sub(r"^<\.\.\. \w+ resumed>", lambda _: begun.pop(process, ""), rest))  # noqa: B023 - used at once
    return calls


def paths_written(call: str) -> list[str]:
    """The paths that a call asks to write to, or to make or delete, whether it may or not."""
    name, _, arguments = call.partition("(")
    if not WRITES.search(name) or name.startswith("readlink"):
        return []
    if name.startswith("open") and not OPENED_TO_WRITE.search(arguments):
        return []
    found = re.findall(r'(?:<([^>]*)>, )?"([^"]*)"', arguments)
    return [path if path.startswith("/") else f"{place}/{path}" for place, path in found]
