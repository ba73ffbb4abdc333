"""What this process may really use of host memory, of processors and of disks: the limits of its container, not the machine's.

Every function takes the root below which `/proc` and the cgroup file systems lie, so that a folder can stand in for them.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from job.peaks import used_bytes
from job.preemption import positive

ROOT = Path("/")
SCRATCH_VARIABLE = "JOB_SCRATCH_GB"


@dataclass(frozen=True)
class HostMemory:
    """Bytes. `limit` is the least of all limits and `source` names it; `free` is what this process may hold in all, with what
    it holds already: less than `limit` where others use the same memory."""

    limit: int
    free: int
    source: str


@dataclass(frozen=True)
class Disk:
    """Bytes that may still be written to `place`: `free` on its file system, which `device` tells from others, and `granted`
    of a limit that the file system does not know; None without one."""

    place: Path
    free: int
    device: int
    granted: int | None = None

    @property
    def room(self) -> int:
        return self.free if self.granted is None else min(self.free, self.granted)


@dataclass(frozen=True)
class Limits:
    """What there is where the job will run. None for a disk: nobody knows (`s3://`, some FUSE mounts)."""

    memory: HostMemory
    scratch: Disk | None
    output: Disk | None

    @property
    def one_disk(self) -> bool:
        """Whether scratch and output take each other's room."""
        return self.scratch is not None and self.output is not None and self.scratch.device == self.output.device


class Bound(NamedTuple):
    """One limit of memory: bytes, how many of them are taken by others, and its name."""

    limit: int
    taken: int
    source: str


def host_memory(root: Path = ROOT) -> HostMemory:
    """The least of the machine's memory, of every cgroup limit above this process (v2: `memory.max` and `memory.high`, above
    which the kernel slows a process down; v1: `memory.limit_in_bytes`), and of RLIMIT_AS and RLIMIT_DATA.

    What others in a cgroup use is not free. What this process holds itself is, since what a plan foresees includes it. So is the
    cache of files, which the kernel gives up before it kills anybody; a tmpfs counts as used, since it cannot be given up. Swap
    is left out: a model in it would train for weeks. RLIMIT_AS also counts what is mapped and never touched; what of that is
    there already counts as taken.
    """
    own = _kilobytes(root / "proc/self/status")
    mine = own.get("RssAnon", 0) + own.get("RssShmem", 0)
    bounds = [_machine(root, mine), *_cgroup_bounds(root, mine), *_rlimit_bounds(root, own, mine)]
    least = min(bounds, key=lambda bound: bound.limit)
    return HostMemory(least.limit, min(max(0, bound.limit - bound.taken) for bound in bounds), least.source)


def cores(root: Path = ROOT) -> int:
    """Processors that this process may use: those that it may run on, or fewer where a cgroup grants less of their time."""
    found = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    for folder in _cgroups(root, "cpu"):
        with suppress(OSError, ValueError):
            if (folder / "cpu.max").exists():
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            if quota != "max" and int(quota) > 0:
                found = min(found, int(quota) / int(period))
    return max(1, math.ceil(found))


def disk(folder: Path, granted: int | None = None) -> Disk | None:
    """The disk that holds `folder`, or will; what is free there for a user who is not root. None where the file system does not
    say how large it is."""
    place = folder
    while not place.exists():
        place = place.parent
    facts = os.statvfs(place)
    if not facts.f_blocks:
        return None
    return Disk(folder, facts.f_bavail * facts.f_frsize, place.stat().st_dev, granted)


def scratch_disk(scratch: Path, environment: Mapping[str, str]) -> Disk | None:
    """The disk of the scratch folder. Where `JOB_SCRATCH_GB` says how large the folder may grow (an emptyDir's `sizeLimit`, a
    quota), that less what lies in it bounds it too.

    Raises SpecError for a variable that holds no such number.
    """
    if not environment.get(SCRATCH_VARIABLE, "").strip():
        return disk(scratch)
    size = positive(environment, SCRATCH_VARIABLE, 1, "gigabytes")
    return disk(scratch, max(0, int(size * 1e9) - used_bytes(scratch)))


def _machine(root: Path, mine: int) -> Bound:
    there = _kilobytes(root / "proc/meminfo")
    total = there.get("MemTotal") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Bound(total, max(0, total - there.get("MemAvailable", total) - mine), "the machine")


def _cgroup_bounds(root: Path, mine: int) -> Iterator[Bound]:
    for folder in _cgroups(root, "memory"):
        limits = [(_number(folder / name), name) for name in ("memory.max", "memory.high", "memory.limit_in_bytes")]
        stat = _pairs(folder / "memory.stat")
        limits.append(
            (stat.get("hierarchical_memory_limit"), "memory.stat")
        )  # v1: of those above that are not shown here
        known = [(limit, name) for limit, name in limits if limit is not None]
        used = _number(folder / "memory.current") or _number(folder / "memory.usage_in_bytes") or 0
        v1 = (folder / "memory.limit_in_bytes").exists()
        caches = (
            ("total_active_file", "total_inactive_file") if v1 else ("active_file", "inactive_file", "slab_reclaimable")
        )
        taken = max(0, used - sum(stat.get(name, 0) for name in caches) - mine)
        if known:
            limit, name = min(known)
            yield Bound(limit, taken, f"{name} of cgroup {folder.name or '/'}")


def _rlimit_bounds(root: Path, own: Mapping[str, int], mine: int) -> Iterator[Bound]:
    text = _text(root / "proc/self/limits")
    for name, title, counted in (
        ("RLIMIT_AS", "Max address space", "VmSize"),
        ("RLIMIT_DATA", "Max data size", "VmData"),
    ):
        if found := re.search(rf"^{title}\s+(\d+)", text, re.MULTILINE):
            yield Bound(int(found[1]), max(0, own.get(counted, 0) - mine), name)


def _cgroups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of the cgroups that this process is in, its own first and then those above, as far as they are shown here:
    v2's, and v1's for a controller."""
    own = dict[str, str]()
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        own |= {"cgroup2": path} if not controllers else dict.fromkeys(controllers.split(","), path)
    for line in _text(root / "proc/self/mountinfo").splitlines():
        mount, _, kind = line.partition(" - ")
        top, point = (re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), part) for part in mount.split(" ")[3:5])
        system, _, options = kind.split(" ")[:3]
        if system not in ("cgroup", "cgroup2") or (system == "cgroup" and controller not in options.split(",")):
            continue
        path = own.get("cgroup2" if system == "cgroup2" else controller, top)
        shown = root / point.lstrip("/")
        inside = os.path.relpath(path, top)
        folder = shown if inside.startswith("..") or ".." in path else shown / inside  # else it is above what is shown
        yield from (each for each in (folder, *folder.parents) if each.is_relative_to(shown))


def _kilobytes(file: Path) -> dict[str, int]:
    """The lines of a file of the kernel's like `MemTotal:  1024 kB`, in bytes."""
    found = re.findall(r"^(\w+):\s+(\d+) kB$", _text(file), re.MULTILINE)
    return {name: int(count) * 1024 for name, count in found}


def _pairs(file: Path) -> dict[str, int]:
    return {name: int(count) for name, count in re.findall(r"^(\w+) (\d+)$", _text(file), re.MULTILINE)}


def _number(file: Path) -> int | None:
    """None where there is no such file, or no limit (`max`)."""
    text = _text(file).strip()
    return int(text) if text.isdigit() else None


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
