"""`python -m job.torchrun …` is torchrun that ends with the exit code of the worker that failed first.

torchrun itself ends with 1 whatever its workers ended with, and a scheduler would learn nothing from that. Takes
torchrun's own arguments and `PET_*` variables, as in `--standalone --nproc-per-node=4 -m job run`.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from job.__main__ import leave
from job.errors import BUG, EXIT_CODES, Preempted, SpecError
from job.preemption import grace_seconds


def main() -> None:
    """Run torchrun. On SIGTERM the workers get it too, and all the grace there is before they are killed."""
    signal.signal(signal.SIGTERM, leave)  # until torchrun's own handlers are there
    try:
        os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(int(grace_seconds(os.environ))))
    except SpecError as error:
        _end(error.exit_code, str(error))

    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    launcher: Any = torchrun  # it carries no types
    arguments = launcher.parse_args(sys.argv[1:])
    arguments.signals_to_handle += ",SIGUSR1"  # Slurm's notice ahead of the end
    here = launcher.determine_local_world_size(arguments.nproc_per_node)
    # Else torchrun gives each process one core, however many there are.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // here)))
    try:
        launcher.run(arguments)
    except SignalException as error:
        _end(Preempted.exit_code, f"stopped on {error.sigval.name}; run again to continue")
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        _end(translated(failure.exitcode), f"rank {rank} ended with {failure.exitcode}; its own line says why")


def translated(code: int) -> int:
    """A worker's exit code as ours: one of the table as it is, -9 as a shell says it, anything else a bug."""
    if code < 0:
        return 128 - code
    return code if code in {row.code for row in EXIT_CODES} else BUG


def _end(code: int, reason: str) -> None:
    sys.stderr.write(f"exit {code}: {reason}\n")
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
