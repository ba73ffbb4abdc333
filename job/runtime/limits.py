"""Measures the host memory, processors and disk that this process may really use: its container's limits, not the machine's.

Every function takes the root below which `/proc` and the cgroup file systems are, so that a folder can stand in for them.
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

ROOT = Path("/")


@dataclass(frozen=True)
class HostMemory:
    """Bytes. `limit` is the smallest of all limits and `source` names it. `free` is what this process may hold in total,
    including what it holds already; it is less than `limit` if others use the same memory."""

    limit: int
    free: int
    source: str
    mine: int = 0
    """What this process holds already."""

    @property
    def used(self) -> int:
        """The part of the limit that this process and others hold and cannot give up."""
        return self.limit - self.free + self.mine


@dataclass(frozen=True)
class Disk:
    """Bytes that may still be written to `place`: `free` on its file system, which `device` identifies, and `granted` by a
    limit that the file system does not know; None without one."""

    place: Path
    free: int
    device: int
    granted: int | None = None

    @property
    def room(self) -> int:
        return self.free if self.granted is None else min(self.free, self.granted)


@dataclass(frozen=True)
class Limits:
    """What is available where the job will run. A disk is None if unknown (`s3://`, some FUSE mounts)."""

    memory: HostMemory
    scratch: Disk | None
    output: Disk | None

    @property
    def one_disk(self) -> bool:
        """Whether scratch and output share their free space."""
        return self.scratch is not None and self.output is not None and self.scratch.device == self.output.device


class Bound(NamedTuple):
    """One memory limit: its bytes, how many of them others have taken, and its name."""

    limit: int
    taken: int
    source: str


def host_memory(root: Path = ROOT) -> HostMemory:
    """Find the smallest of the machine's memory, every cgroup limit above this process (v2: `memory.max` and `memory.high`, above
    which the kernel slows a process down; v1: `memory.limit_in_bytes`), RLIMIT_AS and RLIMIT_DATA.

    Memory that others in a cgroup use is not free. Memory that this process holds itself is, since a plan's estimate includes it.
    So is the page cache, which the kernel gives up before it kills anything; a tmpfs counts as used, since it cannot be given up.
    Swap is left out: a model in it would train for weeks. RLIMIT_AS also counts mappings that are never touched; those that exist
    already count as taken.
    """
    own = _kilobytes(root / "proc/self/status")
    mine = own.get("RssAnon", 0) + own.get("RssShmem", 0)
    bounds = [_machine(root, mine), *_cgroup_bounds(root, mine), *_rlimit_bounds(root, own, mine)]
    least = min(bounds, key=lambda bound: bound.limit)
    free = min(max(0, bound.limit - bound.taken) for bound in bounds)
    return HostMemory(least.limit, free, least.source, mine)


def cores(root: Path = ROOT) -> int:
    """Count the processors that this process may use: those it may run on, or fewer if a cgroup grants less of their time."""
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


def kills(root: Path = ROOT) -> int:
    """Count the processes in this cgroup that the kernel has killed for lack of memory (`oom_kill` in v2's `memory.events` or
    v1's `memory.oom_control`); 0 where it does not say."""
    own = next(_cgroups(root, "memory"), root)
    return sum(_pairs(own / name).get("oom_kill", 0) for name in ("memory.events", "memory.oom_control"))


def disk(folder: Path, granted: int | None = None) -> Disk | None:
    """Return the disk that holds, or will hold, `folder`, with the space free for a user who is not root. None if the file
    system does not report its size."""
    place = folder
    while not place.exists():
        place = place.parent
    facts = os.statvfs(place)
    if not facts.f_blocks:
        return None
    return Disk(folder, facts.f_bavail * facts.f_frsize, place.stat().st_dev, granted)


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
        )  # v1: includes limits above that are not visible here
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
    """Yield the cgroup folders of this process, its own first and then those above, as far as they are visible here: v2's, and
    v1's for a controller."""
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
    """Parse the lines of a kernel file, such as `MemTotal:  1024 kB`, into bytes."""
    found = re.findall(r"^(\w+):\s+(\d+) kB$", _text(file), re.MULTILINE)
    return {name: int(count) * 1024 for name, count in found}


def _pairs(file: Path) -> dict[str, int]:
    return {name: int(count) for name, count in re.findall(r"^(\w+) (\d+)$", _text(file), re.MULTILINE)}


def _number(file: Path) -> int | None:
    """Read a number; None if there is no such file, or no limit (`max`)."""
    text = _text(file).strip()
    return int(text) if text.isdigit() else None


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
