"""Measures the peaks of a stage in device memory, host memory and scratch."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

SAMPLE_SECONDS = 0.5
"""Interval between samples of anonymous memory, for which the kernel keeps no peak."""
WALK_SECONDS = 1.0
"""Scratch is not counted if counting takes longer (a million files, a slow network)."""


class Peaks:
    """Peaks since `begin`, in bytes. `end` leaves out a figure that this machine does not report.

    `device_peak` and `device_reserved` are what torch allocated and reserved on the current CUDA device. `host_peak` is the
    resident memory of this process (VmHWM), including mapped weight files, which the kernel can drop; `host_anonymous` is the
    part that no file backs (RssAnon and RssShmem of /proc/self/status), sampled every `SAMPLE_SECONDS`. If /proc/self/clear_refs
    is not writable, `host_peak` counts from the start of the process. `scratch` is the size of everything below the scratch
    folder, in file system blocks.
    """

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._found: dict[str, int] = {}
        self._lock = threading.Lock()

    def begin(self) -> None:
        self.take_device()
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM: proc_pid_clear_refs(5)
        with self._lock:
            self._found = {}

    def end(self) -> dict[str, int]:
        self.take_device()
        self.sample()
        self.walk()
        self._raise("host_peak", _status("VmHWM"))
        names = ("device_peak", "device_reserved", "host_peak", "host_anonymous", "scratch")
        return {name: self._found[name] for name in names if name in self._found}

    def take_device(self) -> tuple[int, int] | None:
        """Return the allocated and reserved peaks since the last call, and reset them; None if CUDA is not in use."""
        cuda = sys.modules.get("torch.cuda")  # importing torch takes seconds; light commands never do
        if cuda is None or not hasattr(cuda, "is_initialized") or not cuda.is_initialized():  # half imported, or unused
            return None
        found = int(cuda.max_memory_allocated()), int(cuda.max_memory_reserved())
        cuda.reset_peak_memory_stats()
        self._raise("device_peak", found[0])
        self._raise("device_reserved", found[1])
        return found

    def sample(self) -> None:
        """Sample anonymous memory."""
        self._raise("host_anonymous", _status("RssAnon", "RssShmem"))

    def walk(self) -> None:
        """Measure scratch, unless that takes longer than `WALK_SECONDS`."""
        deadline, total = time.monotonic() + WALK_SECONDS, 0
        for size in file_bytes(self._scratch):
            total += size
            if time.monotonic() > deadline:
                return
        self._raise("scratch", total)

    def _raise(self, name: str, value: int | None) -> None:
        if value is not None:
            with self._lock:
                self._found[name] = max(value, self._found.get(name, 0))


def used_bytes(folder: Path) -> int:
    """Bytes of disk below a folder, as `du` and the kubelet count them."""
    return sum(file_bytes(folder))


def file_bytes(folder: Path) -> Iterator[int]:
    """Yield the bytes of disk of each file below a folder, counting hard links once. A file that vanishes meanwhile is
    skipped."""
    linked = set[int]()
    for place, _, files in os.walk(folder):
        for name in files:
            try:
                entry = os.lstat(os.path.join(place, name))  # noqa: PTH118 - a Path for each of many files is slow
            except OSError:
                continue
            if entry.st_nlink == 1 or entry.st_ino not in linked:
                yield entry.st_blocks * 512
            if entry.st_nlink > 1:
                linked.add(entry.st_ino)


def _status(*names: str) -> int | None:
    """Sum these lines of /proc/self/status, in bytes; None if the file or a line is missing."""
    with suppress(OSError):
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        if all(name in lines for name in names):
            return sum(int(lines[name].split()[0]) for name in names) * 1024
    return None
