"""Prepares scratch, the one writable folder on the node. Every cache of every library goes there."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

from job.config.environment import Environment
from job.config.schema import JobSpec
from job.errors import JobError, NotAllowed, OutOfMemory, SpecError, Unavailable, is_host_memory
from job.runtime.limits import Disk, disk, kills
from job.runtime.peaks import used_bytes
from job.runtime.periodic import repeating
from job.runtime.preemption import Preemption
from job.runtime.status import bytes_text
from job.store import LocalStore, open_store
from job.store.disk import FAILING, FULL, disk_fault

HEARTBEAT = "heartbeat"
BREATH_SECONDS = 15.0
LOOK_SECONDS = 2.0
LOOKING = 20
"""The pause between looks at scratch, as a multiple of how long the last one took: there may be a million files."""
PROBE_BYTES = 2**16
FILLED = 0.98
"""Share of `JOB_SCRATCH_GB` that the job takes: whoever enforces the limit measures at another moment."""
CACHES = {
    "HF_HOME": "huggingface",
    "HF_DATASETS_CACHE": "datasets",
    "TORCH_HOME": "torch",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
    "UNSLOTH_COMPILE_LOCATION": "unsloth",
    "XDG_CACHE_HOME": "xdg",
    "MPLCONFIGDIR": "matplotlib",
    "NLTK_DATA": "nltk",
    "WANDB_DIR": "wandb",
}
KEPT = ("cache", "fetched", "glimpses", "before", "features", ".bundle-made")
"""Folders on scratch beside those of jobs. They contain rows, images and answers."""
OTHERS = stat.S_IRWXG | stat.S_IRWXO
QUIET = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "UNSLOTH_DISABLE_STATISTICS": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    # Threads that wait for each other sleep instead of spinning; on a shared CPU spinning takes five times as long.
    "OMP_WAIT_POLICY": "passive",
    "GOMP_SPINCOUNT": "0",
}
OFFLINE = dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"), "1")
COMPILING = {
    # Unsloth's 4-bit layers are custom autograd functions. By default torch compiles graphs with these again in every process,
    # even if they are in its cache. The cache key covers their backward.
    "TORCHINDUCTOR_AUTOGRAD_CACHE_ALLOW_CUSTOM_AUTOGRAD": "1",
    # Unsloth's own copy of compiled code, below the home folder, written while a job is leaving.
    "UNSLOTH_MEGA_CACHE": "0",
}


def scratch_folder(environment: Environment) -> Path:
    """Return `JOB_SCRATCH`, else this user's folder under the system's temporary one. Raises NotAllowed if there is none."""
    try:
        return environment.scratch or Path(tempfile.gettempdir()) / f"vision-lora-job-{os.getuid()}"
    except FileNotFoundError as none:  # no temporary folder is writable
        raise NotAllowed(f"scratch: {none.strerror}; set JOB_SCRATCH to a folder with room") from none


def granted_scratch(environment: Environment) -> int | None:
    """Bytes that scratch may hold if `JOB_SCRATCH_GB` says how large the folder may grow (an emptyDir's `sizeLimit`, a quota),
    less a small margin; None if it is not set."""
    return None if environment.scratch_gb is None else int(environment.scratch_gb * 1e9 * FILLED)


def disk_of(folder: Path, environment: Environment) -> Disk | None:
    """Return the disk of a folder. Scratch and everything in it is also bounded by what is granted less what scratch holds."""
    root, granted = scratch_folder(environment), granted_scratch(environment)
    if not folder.is_relative_to(root):
        return disk(folder)
    return disk(root, None if granted is None else max(0, granted - used_bytes(root)))


def prepare_scratch(environment: Environment, variables: MutableMapping[str, str]) -> Path:
    """Create the scratch folder and point the `variables` of every cache below it, before any of those libraries is imported.
    With a bundle, the variables also keep the libraries off the network. Only this user may look into what is on scratch.

    Raises NotAllowed if it is not writable, or the default one is not this user's; Unavailable if the disk is full or failing;
    SpecError for a variable with which no library can be imported.
    """
    scratch = scratch_folder(environment)
    try:
        urlsplit(variables.get("HF_ENDPOINT", ""))
    except ValueError as error:  # the hub's library would raise it on import
        raise SpecError(f"HF_ENDPOINT is not a URL ({error}); write https://host, or unset it") from error
    try:
        if environment.scratch:
            scratch.mkdir(mode=0o700, parents=True, exist_ok=True)  # an existing one, such as a mount, stays as it is
        else:
            _make_default(scratch)
        if fault := trouble(scratch):
            raise fault
        for name in KEPT:
            make_private(scratch / name)
    except OSError as error:
        kind = Unavailable if error.errno in FULL | FAILING else NotAllowed
        where = error.filename or scratch
        raise kind(
            f"scratch folder {where}: {error.strerror}; set JOB_SCRATCH to a folder of your own with room"
        ) from error
    for variable, folder in CACHES.items():
        cache = variables[variable] = variables.get(variable) or str(scratch / "cache" / folder)
        try:
            Path(cache).mkdir(parents=True, exist_ok=True)  # torch does not create it
        except OSError as error:
            kind = Unavailable if error.errno in FULL | FAILING else NotAllowed
            raise kind(
                f"{variable} is {cache}: {error.strerror}; name a folder that can be created, or unset it"
            ) from error
    bars = (
        {} if sys.stderr.isatty() else {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    )
    for variable, value in (QUIET | COMPILING | bars).items():
        variables.setdefault(variable, value)
    variables.update(OFFLINE if environment.bundle else {})
    return scratch


def _make_default(folder: Path) -> None:
    """Create the default scratch folder. Others may write to the temporary folder, and whoever created this one could read and
    change its contents. Raises NotAllowed unless it is a folder of this user."""
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700, parents=True)
    there = folder.lstat()
    if stat.S_ISDIR(there.st_mode) and there.st_uid == os.getuid():
        make_private(folder)
        return
    kind = "is a link" if stat.S_ISLNK(there.st_mode) else "is not a folder"
    kind = f"belongs to user {there.st_uid}" if stat.S_ISDIR(there.st_mode) else kind
    raise NotAllowed(f"scratch folder {folder} {kind}; remove it, or set JOB_SCRATCH to a folder of your own")


def make_private(folder: Path) -> Path:
    """Create a folder that no other user may look into. An existing folder of this user is closed to others."""
    folder.mkdir(mode=0o700, exist_ok=True)
    mode = stat.S_IMODE(folder.stat().st_mode)
    if mode & OTHERS:
        with suppress(OSError):  # another user's, or a mount that keeps no modes
            folder.chmod(mode & ~OTHERS)
    return folder


def job_folder(root: Path, spec: JobSpec, *, make: bool = True) -> Path:
    """Return the folder below `root` that belongs only to this spec and this output: numbers, checkpoints and unfinished exports.
    Every attempt at the output finds the same one. Other jobs on the node may run the same spec at the same time, so the output
    is part of the name.

    An output folder is also identified by its inode, because containers that share scratch may all call theirs `/output`. So it
    is created here, before the first attempt writes to it, except without `make`, for a caller that only looks.
    """
    output = spec.output.url.rstrip("/")
    store = None if output.startswith("s3://") else open_store(spec.output.url)
    if isinstance(store, LocalStore):
        with suppress(OSError):  # `job.store.check_writable` reports a missing permission
            if make:
                store.root.mkdir(parents=True, exist_ok=True)
            output = f"{store.root.resolve()} {store.root.stat().st_ino}"
    return root / f"{spec.digest[:16]}-{hashlib.sha256(output.encode()).hexdigest()[:8]}"


def check_kernels(variables: Mapping[str, str]) -> None:
    """Check that compiled GPU kernels can be loaded from their folders. Raises NotAllowed for a noexec mount, where the loader
    fails with "failed to map segment from shared object"."""
    for folder in (variables["TRITON_CACHE_DIR"], variables["TORCHINDUCTOR_CACHE_DIR"]):
        if os.statvfs(folder).f_flag & os.ST_NOEXEC:
            raise NotAllowed(
                f"scratch folder {folder} is mounted noexec, but GPU kernels are compiled and loaded there; set "
                "JOB_SCRATCH to a folder on another mount"
            )


@contextmanager
def heartbeat(scratch: Path) -> Iterator[None]:
    """Touch `heartbeat` in scratch every `BREATH_SECONDS` from a thread, for the probes of containers.

    It does not contact the store, so an unreachable store does not make the job look dead.
    """

    def breathe() -> None:
        with suppress(OSError):
            (scratch / HEARTBEAT).touch()

    breathe()
    with repeating(breathe, BREATH_SECONDS, "breath"):
        yield


@contextmanager
def explain_shortages(scratch: Path) -> Iterator[None]:
    """Raise Unavailable, with the place, for any library's error on a full, failing or read-only disk while the block runs,
    and OutOfMemory for its errors on exhausted memory, even if the kernel killed one of the job's processes for that."""
    before = kills()
    try:
        yield
    except JobError:
        raise
    except Exception as error:
        fault = error if isinstance(error, OSError) and error.errno in FULL | FAILING else trouble(scratch)
        if fault is not None:
            raise disk_fault(fault, Path(fault.filename or scratch)) from error
        if type(error).__name__ == "OutOfMemoryError":
            raise OutOfMemory("GPU memory ran out; use a smaller base model, or a GPU with more memory") from error
        if is_host_memory(error) or (isinstance(error, OSError | RuntimeError) and kills() > before):
            raise OutOfMemory("host memory ran out; give the job more memory") from error
        raise


def trouble(scratch: Path) -> OSError | None:
    """Return the error of scratch's disk on writing a small file, which libraries do not always pass on; None if it succeeds."""
    probe = scratch / f".probe-{os.getpid()}"
    try:
        with probe.open("wb") as file:
            file.write(bytes(PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
        probe.unlink(missing_ok=True)  # containers that share scratch may share process ids too
    except OSError as error:
        with suppress(OSError):
            probe.unlink()
        return error
    return None


@contextmanager
def limit_scratch(scratch: Path, environment: Environment, preemption: Preemption) -> Iterator[None]:
    """Ask the job to stop with ScratchFilled before scratch has grown to `JOB_SCRATCH_GB`. If an emptyDir exceeds its
    `sizeLimit`, a kubelet ends the pod with SIGTERM and a kill a second later, and the next pod ends the same way."""
    granted = granted_scratch(environment)
    if granted is None:
        yield
        return

    def over() -> str | None:
        used = used_bytes(scratch)
        if used <= granted:
            return None
        return (
            f"JOB_SCRATCH_GB: scratch {scratch} has grown to {bytes_text(used)}, with {bytes_text(granted / FILLED)} granted;"
            " grant more, here and in an emptyDir's sizeLimit, or point JOB_SCRATCH at a larger disk"
        )

    due = 0.0

    def look() -> None:
        nonlocal due
        if (began := time.monotonic()) < due:
            return
        if why := over():
            preemption.fill(why)
        due = time.monotonic() + LOOKING * (time.monotonic() - began)

    preemption.over = over
    look()
    with repeating(look, LOOK_SECONDS, "scratch"):
        yield


def free_bytes(scratch: Path) -> int:
    """Free bytes on scratch, or on its nearest existing parent."""
    while not scratch.exists():
        scratch = scratch.parent
    return shutil.disk_usage(scratch).free
