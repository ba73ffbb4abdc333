"""Real limits: a cgroup, and disks of a few megabytes."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

Enter = Callable[[], None]


@pytest.fixture
def cgroup() -> Iterator[Callable[[int], Enter]]:
    """`cgroup(bytes)` makes a cgroup with that limit of memory, of version 1 or 2; what it returns puts its caller there."""
    made = list[Path]()

    def make(limit: int) -> Enter:
        for kind, name in (("memory", "memory.limit_in_bytes"), ("", "memory.max")):
            folder = Path("/sys/fs/cgroup") / kind / f"vision-lora-test-{os.getpid()}-{len(made)}"
            try:
                folder.mkdir()
                made.append(folder)
                (folder / name).write_text(str(limit))
            except OSError:
                continue

            def enter(folder: Path = folder) -> None:
                (folder / "cgroup.procs").write_text(str(os.getpid()))

            return enter
        pytest.skip("no cgroup with a limit of memory can be made here")

    yield make
    for folder in made:
        folder.rmdir()


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str, float], Path]]:
    """`mounted(name, bytes)` is a folder with a disk of its own, of at most that size."""
    made = list[Path]()

    def mount(name: str, size: float) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        given = f"size={int(size) // 4096 * 4}k"
        if subprocess.run(["mount", "-t", "tmpfs", "-o", given, "none", folder], capture_output=True).returncode:
            pytest.skip("nothing may be mounted here")
        made.append(folder)
        return folder

    yield mount
    for folder in made:
        subprocess.run(["umount", "--lazy", folder], check=True)
