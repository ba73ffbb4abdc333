"""A disk that is full, fails or is read-only is told as that, whatever a library makes of it; what is written lasts."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from job.config.environment import Environment
from job.errors import SpecError, Unavailable
from job.runtime.scratch import explain_shortages, prepare_scratch
from job.store import check_writable, open_store
from tests.conftest import ROOT, Job
from tests.disk_proof import FAULTS, line, shim, tried


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What makes a disk fail, see `disk_proof`."""
    if shutil.which("cc") is None:
        pytest.skip("a C compiler makes the disk fail")
    return shim(tmp_path_factory.mktemp("library"))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one megabyte, mounted for the test."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", folder], capture_output=True).returncode:
        pytest.skip("nothing may be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def read_only(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)


def saves(folder: Path) -> None:
    """What a Rust library says of a disk is no OSError."""
    import numpy as np
    from safetensors.numpy import save_file

    save_file({"weights": np.zeros(2**21, dtype=np.uint8)}, folder / "model.safetensors")


def test_a_library_that_hides_what_the_disk_said_is_seen_through(disk: Path) -> None:
    (disk / "filler").write_bytes(bytes(2**20 - 8192))
    with pytest.raises(Unavailable, match=f"The disk that holds {disk}.* is full"), explain_shortages(disk):
        saves(disk)
    (disk / "filler").unlink()
    (disk / "model.safetensors").unlink(missing_ok=True)
    read_only(disk)
    with pytest.raises(Unavailable, match=f"The file system of {disk}.* is read-only"), explain_shortages(disk):
        saves(disk)
    with pytest.raises(ValueError, match="of its own"), explain_shortages(disk.parent):
        raise ValueError("a fault of its own")


def test_an_output_that_is_read_only_from_the_beginning_is_a_wrong_spec_and_one_that_becomes_so_an_outage(
    disk: Path,
) -> None:
    store = open_store(str(disk / "output"))
    check_writable(store)
    read_only(disk)
    with pytest.raises(Unavailable, match="is read-only; remount it, or choose another folder"):
        store.write("key", b"x")
    with pytest.raises(SpecError, match="is on a read-only file system; choose another folder"):
        check_writable(open_store(str(disk / "another")))


def test_standard_output_on_a_full_disk_is_no_bug(job: Job) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "job", "schema"],
            cwd=ROOT,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 69
    assert done.stderr.startswith("exit 69: Cannot write to standard output (No space left on device); free some space")


def test_an_endpoint_of_the_hub_that_no_library_can_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="HF_ENDPOINT is not a URL .Invalid IPv6 URL.; write https://host, or unset it"):
        prepare_scratch(Environment(scratch=tmp_path), {"HF_ENDPOINT": "http://[::1"})


WRITES = """
import sys
from pathlib import Path
from job.store import open_store
store = open_store(sys.argv[1])
store.write("a/b/c", b"x")
store.write("a/b/d", b"x", if_absent=True)
store.upload(Path(sys.argv[0]), "e/f")
"""


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace shows what the kernel was asked for")
def test_every_new_folder_lasts_as_its_files_do(tmp_path: Path) -> None:
    """By the system calls themselves: behind each mkdir, its parent is synced before the first rename into it."""
    (script := tmp_path / "writes.py").write_text(WRITES)
    log, root = tmp_path / "calls", tmp_path / "made" / "output"
    watched = ["strace", "-f", "-y", "-e", "trace=mkdir,mkdirat,fsync,rename,renameat,link,linkat", "-o", log]
    subprocess.run([*watched, sys.executable, script, root], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    calls = [call for call in log.read_text().splitlines() if str(tmp_path) in call and call.endswith("= 0")]
    made = {found[1]: n for n, call in enumerate(calls) if (found := re.search(r'mkdir\w*\(.*"([^"]+)"', call))}
    assert set(made) == {str(root.parent), *(str(root / name) for name in ("", "a", "a/b", "e"))}
    for folder, at in made.items():
        synced = [
            n for n, call in enumerate(calls) if f"<{Path(folder).parent}>" in call and "fsync(" in call and n > at
        ]
        used = [n for n, call in enumerate(calls) if re.search(rf'(rename|link)\w*\(.*"{folder}/', call)]
        assert synced
        assert not used or synced[0] < used[0]


def under(fault: str, folder: Path, library: Path, work: str) -> tuple[int, str]:
    """The code and the last line of a process that does `work` while calls below `folder`/scratch fail."""
    code = f"""
from pathlib import Path
from job.data.images import Place, read
from job.runtime.exit import run_and_exit
from job.runtime.scratch import explain_shortages
scratch = Path({str(folder / "scratch")!r})
def work():
    with explain_shortages(scratch):
        {work}
run_and_exit(work)
"""
    (folder / "scratch.errno").write_text(str(FAULTS[fault]))
    environment = os.environ | {"LD_PRELOAD": str(library), "DYING": str(folder / "scratch")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, check=False
    )
    return done.returncode, done.stderr.splitlines()[-1]


@pytest.mark.parametrize("fault", FAULTS)
def test_whatever_the_kernel_says_of_a_disk_is_told(tmp_path: Path, library: Path, fault: str) -> None:
    (tmp_path / "scratch").mkdir()
    code, said = under(fault, tmp_path, library, "(scratch / 'a' / 'b').mkdir(parents=True)")
    assert (code, str(tmp_path / "scratch") in said) == (69, True), said


def test_a_picture_on_a_disk_that_fails_is_no_bad_row(tmp_path: Path, library: Path) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "scratch" / "a.png").write_bytes(b"x")
    code, said = under("dies", tmp_path, library, "read(Place(str(scratch / 'a.png')))")
    assert (code, f"The file system failed at {tmp_path}/scratch/a.png" in said) == (69, True), said


def test_a_scratch_that_dies_while_the_job_trains_is_an_outage(tmp_path: Path, library: Path, demo: Path) -> None:
    ending = tried(tmp_path, library, demo, "train", "dies")
    assert (ending.code, "The file system failed at" in ending.said) == (69, True), line(ending)
