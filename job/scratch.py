"""The one writable place on the node. Every cache of every library below us goes there."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager, suppress
from pathlib import Path

from job.errors import NotAllowed, Unavailable
from job.repeat import repeating
from job.spec import JobSpec
from job.store import LocalStore, open_store

HEARTBEAT = "heartbeat"
BREATH_SECONDS = 15.0
LITTLE_BYTES = 2**20
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
QUIET = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "UNSLOTH_DISABLE_STATISTICS": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    # Threads that wait for each other sleep instead of spinning: on a shared CPU spinning costs five times the time.
    "OMP_WAIT_POLICY": "passive",
    "GOMP_SPINCOUNT": "0",
}
COMPILING = {
    # Unsloth's layers in 4 bits are autograd functions of its own. Unless asked, torch compiles graphs that hold such ones
    # in every process again, be they in its cache; the key that it looks them up by knows their backward.
    "TORCHINDUCTOR_AUTOGRAD_CACHE_ALLOW_CUSTOM_AUTOGRAD": "1",
    # Unsloth's own copy of what was compiled, below the home folder, written while a job is leaving.
    "UNSLOTH_MEGA_CACHE": "0",
}


def scratch_folder(environment: Mapping[str, str]) -> Path:
    """`JOB_SCRATCH`, else a folder of this user under the system's temporary one."""
    given = environment.get("JOB_SCRATCH", "").strip()
    return Path(given) if given else Path(tempfile.gettempdir()) / f"vision-lora-job-{os.getuid()}"


def prepare_scratch(environment: MutableMapping[str, str]) -> Path:
    """Makes the scratch folder and points every cache below it, before any of those libraries is imported.

    Raises NotAllowed when it cannot be written, Unavailable when the disk is full.
    """
    scratch = scratch_folder(environment)
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        probe = scratch / f".probe-{os.getpid()}"
        probe.write_bytes(b"x")
        probe.unlink(missing_ok=True)  # containers that share scratch may share process ids too
    except OSError as error:
        kind = Unavailable if error.errno == errno.ENOSPC else NotAllowed
        raise kind(f"scratch folder {scratch}: {error.strerror}; set JOB_SCRATCH to a folder with room") from error
    for variable, folder in CACHES.items():
        environment.setdefault(variable, str(scratch / "cache" / folder))
        Path(environment[variable]).mkdir(parents=True, exist_ok=True)  # torch makes none of its own
    bars = (
        {} if sys.stderr.isatty() else {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    )
    for variable, value in (QUIET | COMPILING | bars).items():
        environment.setdefault(variable, value)
    return scratch


def job_folder(root: Path, spec: JobSpec, *, make: bool = True) -> Path:
    """The folder below `root` that belongs to this spec and this output alone: numbers, checkpoints and exports in the
    making. Every attempt at the output finds the same one. Other jobs of the node may run at the same time with the same
    spec, so the output is part of its name.

    The folder of an output is known by its inode too: containers that share scratch may all call their own `/output`. For
    that it is made here, before the first attempt writes to it; not without `make`, for who only looks.
    """
    output = spec.output.url.rstrip("/")
    store = None if output.startswith("s3://") else open_store(spec.output.url)
    if isinstance(store, LocalStore):
        with suppress(OSError):  # who may not write there is told by `job.store.check_writable`
            if make:
                store.root.mkdir(parents=True, exist_ok=True)
            output = f"{store.root.resolve()} {store.root.stat().st_ino}"
    return root / f"{spec.digest[:16]}-{hashlib.sha256(output.encode()).hexdigest()[:8]}"


def check_kernels(environment: Mapping[str, str]) -> None:
    """Whether what is compiled for a GPU can be loaded from its folder. Raises NotAllowed for a mount without the right to
    execute, where the loader fails with "failed to map segment from shared object"."""
    for folder in (environment["TRITON_CACHE_DIR"], environment["TORCHINDUCTOR_CACHE_DIR"]):
        if os.statvfs(folder).f_flag & os.ST_NOEXEC:
            raise NotAllowed(
                f"scratch folder {folder} is mounted noexec, and kernels for the GPU are compiled and loaded there; set "
                "JOB_SCRATCH to a folder of another mount"
            )


@contextmanager
def breathing(scratch: Path) -> Iterator[None]:
    """Touch `heartbeat` in scratch every `BREATH_SECONDS` from a thread: what the probes of containers look at.

    It asks nothing of the store, so a store that is away does not make the job look dead.
    """

    def breathe() -> None:
        with suppress(OSError):
            (scratch / HEARTBEAT).touch()

    breathe()
    with repeating(breathe, BREATH_SECONDS, "breath"):
        yield


@contextmanager
def full_disk_told(scratch: Path) -> Iterator[None]:
    """Whatever any library makes of a full disk while the block runs becomes Unavailable, with the place."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # the second is torch's
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or free_bytes(scratch) < LITTLE_BYTES:
            where = getattr(error, "filename", None) or scratch
            raise Unavailable(f"The disk that holds {where} is full; free some space and run again.") from error
        raise


def free_bytes(scratch: Path) -> int:
    """Room left on scratch, in bytes; of its nearest parent that exists when it does not yet."""
    while not scratch.exists():
        scratch = scratch.parent
    return shutil.disk_usage(scratch).free
