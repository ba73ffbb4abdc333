"""Every way a job can end badly, and the exit code that tells a scheduler what to do about it.

    JobError
    ├── DataError        65  the data is wrong
    ├── Unavailable      69  a service did not answer after retries
    ├── OutOfMemory      71  nothing smaller is left to try
    ├── Preempted        75  stopped on request; run again to continue
    │   └── RankEnded        another process of this run has ended, and this one goes with it: with its code, or 69
    ├── GateRefused      76  a measurement says: do not publish this
    ├── NotAllowed       77  credentials, a gated model, a folder without permission
    ├── SpecError        78  the job spec is wrong
    └── NoProgress       79  several attempts died at the same step

Anything else that escapes is a bug: exit 70, with its traceback.

The numbers are those of sysexits.h, with 71, 76 and 79 put to our own use. A message is one or more sentences
that name the place and the cure, and never holds a credential, a caption or a patient's field.
"""

from __future__ import annotations

from typing import NamedTuple


class ExitCode(NamedTuple):
    """One row of the contract with schedulers. `kubernetes` is a podFailurePolicy action, `slurm` what the wrapper does."""

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
    ExitCode(71, "memory", "out of memory, and nothing smaller to try", "FailJob", "stop"),
    ExitCode(75, "preempted", "preempted; run again to continue", "Ignore", "requeue"),
    ExitCode(76, "refused", "a gate refused: merged weights differ, or evaluation got worse", "FailJob", "stop"),
    ExitCode(77, "not_allowed", "not allowed: credentials, or a gated model", "FailJob", "stop"),
    ExitCode(78, "spec", "the spec is wrong", "FailJob", "stop"),
    ExitCode(79, "no_progress", "no progress over the allowed attempts", "FailJob", "stop"),
)
BUG = 70


class JobError(Exception):
    """An ending that we foresaw. `str(error)` is the reason given to people; `exit_code` the one given to schedulers."""

    exit_code: int = BUG


class DataError(JobError):
    exit_code = 65


class Unavailable(JobError):
    exit_code = 69


class OutOfMemory(JobError):
    exit_code = 71


class Preempted(JobError):
    exit_code = 75


class RankEnded(Preempted):
    """Raised wherever a notice is, and as a notice leaves what is finished safe; only the code is another's."""

    def __init__(self, reason: str, exit_code: int) -> None:
        super().__init__(reason)
        self.exit_code = exit_code


class GateRefused(JobError):
    exit_code = 76


class NotAllowed(JobError):
    exit_code = 77


class SpecError(JobError):
    exit_code = 78


class NoProgress(JobError):
    exit_code = 79
