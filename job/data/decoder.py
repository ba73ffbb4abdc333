"""Decodes DICOM in child processes, so that a damaged file costs one child and one row, not the job.

The native decoders behind pydicom abort on some broken files; those behind Pillow do not, as `make fuzz` counts. Each child is a
new interpreter: nothing is forked from a process with threads or a GPU, and a data loader's worker, which may not have
`multiprocessing` children, can start one. A child decodes one file at a time, so the file that ended it is known.
"""

from __future__ import annotations

import atexit
import json
import math
import os
import resource
import signal
import subprocess
import sys
import threading
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from job.config.schema import DatasetSpec
from job.data.pixels import LARGEST, BadRow, Picture
from job.errors import OutOfMemory

SECONDS, PIXELS = 10, 10**6
"""CPU seconds allowed per file, which other work on the machine does not affect, and pixels that earn one more second: JPEG 2000
is slow."""
SILENCE = 30.0
"""Wall-clock seconds without any work after which a child is given up."""
TRIES = 3
"""Children tried per file if something else kills them: a signal to all processes, or memory taken by others."""
ROOM = 2**29
"""Bytes that a child may map beyond what a file needs: decoder libraries, and what Python keeps."""
PER_PIXEL, PER_BYTE = 40, 4
"""Bytes that a child may map per pixel of the largest image allowed (several float arrays), and per byte of a file."""
FAULTS = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP, signal.SIGSYS)
"""Signals that end a process through a fault in its own code."""
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that schedulers send to every process of a job. The parent decides how to react."""


class Child(NamedTuple):
    process: subprocess.Popen[bytes]
    pipe: Connection

    def end(self, *, kill: bool) -> int:
        """Returns the exit code; if negative, the signal that killed it. A child whose pipe is closed may still be exiting."""
        self.pipe.close()
        if kill:
            self.process.kill()
        return self.process.wait()


class Children(NamedTuple):
    """Idle children, and a semaphore that limits how many work at once."""

    waiting: list[Child]
    room: threading.BoundedSemaphore


_OF_PROCESS: dict[int, Children] = {}


def _children() -> Children:
    """Returns the children of this process: a forked process must not read from its parent's pipes."""
    cores = len(os.sched_getaffinity(0))
    return _OF_PROCESS.setdefault(os.getpid(), Children([], threading.BoundedSemaphore(cores)))


@atexit.register
def dismiss() -> int:
    """Ends idle children to free their memory. Returns how many there were."""
    waiting = _children().waiting
    count = len(waiting)
    while waiting:
        waiting.pop().end(kill=True)
    return count


def decoded_apart(data: bytes, spec: DatasetSpec) -> list[Picture]:
    """Decodes a file with `job.data.dicom.frames` into RGB images. Raises BadRow for a file that is refused or ends its child,
    OutOfMemory if children are killed."""
    children, silent = _children(), False
    with children.room:
        for _ in range(TRIES):
            child = _waiting(children)
            try:
                said, shown = _asked(child, data, spec)
            except (EOFError, OSError) as error:
                silent = isinstance(error, TimeoutError)
                code = child.end(kill=silent)
                if -code in FAULTS:
                    raise BadRow(f"DICOM: its decoder crashed with {signal.Signals(-code).name}") from None
                if code == -signal.SIGXCPU:
                    raise BadRow("DICOM: its decoder does not finish") from None
                continue
            except BaseException:
                child.end(kill=True)
                raise
            children.waiting.append(child)
            if said:
                raise BadRow(said)
            return shown
    if silent:
        raise BadRow(f"DICOM: its decoder hung for {SILENCE:g} s")
    if code == -signal.SIGKILL:
        raise OutOfMemory("dataset: processes that decode images were killed: host memory ran out; give the job more")
    raise RuntimeError(f"processes that decode images exit with {code}")


def _waiting(children: Children) -> Child:
    try:
        return children.waiting.pop()
    except IndexError:
        return _begun()


def _begun() -> Child:
    ours, theirs = Pipe()
    paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    environment = os.environ | one_thread | {"PYTHONPATH": os.pathsep.join(paths)}
    number = theirs.fileno()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-P", "-W", "ignore", "-m", "job.data.decoder", str(number)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,  # decoders print warnings there that quote the file
            env=environment,
            pass_fds=[number],
            start_new_session=True,
        )
    return Child(process, ours)


def _asked(child: Child, data: bytes, spec: DatasetSpec) -> tuple[str, list[Picture]]:
    """Returns the reason for a refusal, or the images. Pixels arrive raw: nothing is unpickled that a hostile file may have
    written. Raises EOFError or OSError if the child ended, TimeoutError if it is silent."""
    child.pipe.send((data, spec))
    worked: list[str] = []
    while not child.pipe.poll(SILENCE):
        if worked == (worked := _worked(child.process.pid)):
            raise TimeoutError
    said: Any = json.loads(child.pipe.recv_bytes())
    if isinstance(said, str):
        return said, []
    shown = []
    for mode, size, info in said:
        picture = Image.frombytes(mode, tuple(size), child.pipe.recv_bytes()).convert("RGB")
        picture.info |= info
        shown.append(picture)
    return "", shown


def _worked(process: int) -> list[str]:
    """Returns its user and system time in ticks (proc(5))."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:13]


def _limit(kind: int, most: int) -> None:
    """Sets only the soft limit, which changes with each file."""
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def serve(pipe: Connection) -> None:
    """Runs a child until the parent closes the pipe or exits."""
    from job.data.dicom import frames, opened

    for stop in STOPS:
        signal.signal(stop, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core dump would hold a patient's image
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()

    def allow(pixels: int, count: int, size: int) -> None:
        """Sets what a file of `size` bytes and `count` frames of `pixels` pixels may still take."""
        _limit(resource.RLIMIT_AS, mapped + ROOM + (PER_PIXEL + 3 * count) * pixels + PER_BYTE * size)
        _limit(resource.RLIMIT_CPU, math.ceil(sum(os.times()[:2])) + SECONDS + pixels * count // PIXELS)

    while True:
        _limit(resource.RLIMIT_AS, mapped + ROOM + PER_BYTE * LARGEST)
        try:
            data, spec = pipe.recv()
        except EOFError:
            return
        allow(spec.max_image_pixels, 1, len(data))
        try:
            header, chosen, stored = opened(data, spec)
            allow(int(header.Rows) * int(header.Columns), len(chosen), len(data) + stored)
            shown = frames(header, chosen, spec)
        except BadRow as reason:
            pipe.send_bytes(json.dumps(str(reason)).encode())
            continue
        facts = [[picture.mode, picture.size, picture.info] for picture in shown]
        pipe.send_bytes(json.dumps(facts).encode())
        for picture in shown:
            pipe.send_bytes(picture.tobytes())


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
