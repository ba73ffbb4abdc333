"""The errors that end a job, and the exit codes that tell a scheduler what to do.

    JobError
    ├── DataError        65  the data is wrong
    ├── Unavailable      69  a service did not answer after retries
    ├── OutOfMemory      71  nothing smaller is left to try
    ├── Preempted        75  stopped on request; run again to continue
    │   ├── RankEnded        another rank has ended, so this one exits with that rank's code, or 69
    │   └── ScratchFilled    78  scratch has reached JOB_SCRATCH_GB, beyond which the node would end the job
    ├── GateRefused      76  a measurement forbids publishing
    ├── NotAllowed       77  credentials, a gated model, a folder without permission
    ├── SpecError        78  the job spec is wrong
    └── NoProgress       79  several attempts died at the same step

Any other exception is a bug: exit 70, with its traceback.

The numbers are those of sysexits.h, except that 71, 76 and 79 have our own meaning. A message is one or more sentences that
name the place and the cure, and never contains a credential, a caption or a patient's field.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class ExitCode(NamedTuple):
    """One row of the contract with schedulers. `kubernetes` is a podFailurePolicy action; `slurm` is what the wrapper does."""

    code: int
    name: str
    meaning: str
    kubernetes: str
    slurm: str


EXIT_CODES: tuple[ExitCode, ...] = (
    ExitCode(0, "published", "published, or already was", "Complete", "done"),
    ExitCode(65, "data", "the data is wrong", "FailJob", "stop"),
    ExitCode(69, "unavailable", "a service is unavailable after retries", "Count", "requeue"),
    ExitCode(70, "bug", "anything else: a bug, with its traceback", "Count", "stop"),
    ExitCode(71, "memory", "out of memory, with nothing smaller left to try", "FailJob", "stop"),
    ExitCode(75, "preempted", "preempted; run again to continue", "Ignore", "requeue"),
    ExitCode(76, "refused", "a gate refused: merged weights differ, or evaluation got worse", "FailJob", "stop"),
    ExitCode(77, "not_allowed", "not allowed: credentials, or a gated model", "FailJob", "stop"),
    ExitCode(78, "spec", "the spec is wrong", "FailJob", "stop"),
    ExitCode(79, "no_progress", "no progress over the allowed attempts", "FailJob", "stop"),
)
BUG = 70


USER = re.compile(r"(\w://)(?:[^/\s\"'<>]*|[^/\s:]*:(?!\d+/)[^\"'<>@\n]*)@")
"""A password may contain slashes and spaces that should have been escaped. What follows a port is a path."""
QUERY = re.compile(r"(\w://[^\s\"'<>?]*\?)[^\s\"'<>]+")
SECRET = re.compile(
    r"([?&;][\w.%-]*(?:signature|token|secret|password|credential|api_?key|\bsig)=)[^\s&;\"'<>]+", re.IGNORECASE
)


def without_secrets(text: str) -> str:
    """Remove whatever could grant access from the URLs in a text: user and password, and the query, which holds signatures and
    tokens."""
    return SECRET.sub(r"\1…", QUERY.sub(r"\1…", USER.sub(r"\1…@", text)))


class JobError(Exception):
    """A foreseen ending. `str(error)` is the reason for people; `exit_code` is the reason for schedulers."""

    exit_code: int = BUG

    def __init__(self, reason: str = "") -> None:
        super().__init__(without_secrets(reason))


class DataError(JobError):
    exit_code = 65


class Unavailable(JobError):
    exit_code = 69


class OutOfMemory(JobError):
    exit_code = 71


def is_host_memory(error: BaseException) -> bool:
    """Return whether an error from Python, torch or safetensors means that the host ran out of memory."""
    said = str(error)
    return isinstance(error, MemoryError) or "DefaultCPUAllocator" in said or "Cannot allocate memory" in said


class Preempted(JobError):
    exit_code = 75


class RankEnded(Preempted):
    """Raised wherever a preemption notice is. Like a notice, it leaves finished work safe; only the exit code is another
    rank's."""

    def __init__(self, reason: str, exit_code: int) -> None:
        super().__init__(reason)
        self.exit_code = exit_code


class ScratchFilled(Preempted):
    """Leaves finished work safe, as a preemption notice does, but the next attempt would fill scratch again."""

    exit_code = 78


class GateRefused(JobError):
    exit_code = 76


class NotAllowed(JobError):
    exit_code = 77


class SpecError(JobError):
    exit_code = 78


class NoHub(SpecError):
    """The hub cannot be reached from this machine, and what `missing` names may also be a path that does not exist. Retrying
    fixes neither, unless an earlier attempt reached the hub."""

    def __init__(self, missing: str, cure: str) -> None:
        super().__init__(f"{missing}, and the hub cannot be reached from this machine; {cure}")
        self.missing = missing


class NoProgress(JobError):
    exit_code = 79
