"""`python -m job.torchrun …` runs torchrun and exits with the code of the worker that failed first.

torchrun itself exits with 1 whatever its workers' codes, which tells a scheduler nothing. Takes torchrun's own arguments and
`PET_*` variables, as in `--standalone --nproc-per-node=4 -m job run`.
"""

from __future__ import annotations

import os
import signal
import sys
from argparse import Namespace
from typing import Any

from job.__main__ import leave
from job.config.environment import Environment
from job.errors import BUG, EXIT_CODES, OutOfMemory, Preempted, RankEnded, SpecError, Unavailable
from job.runtime.exit import end, run_and_exit
from job.runtime.limits import kills


def main() -> None:
    """Run torchrun. It passes SIGTERM on to the workers and gives them the full grace period before they are killed."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, leave)  # until torchrun installs its own handlers
    run_and_exit(run, rows=False)


def run() -> None:
    """Run torchrun. Raises SpecError if no process can start with its arguments, Unavailable if the nodes do not meet, and
    otherwise the ending of the worker that failed first."""
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(int(Environment.read(os.environ).grace_seconds)))
    from torch.distributed import DistNetworkError, DistStoreError
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError

    arguments, launcher = prepared()
    before = kills()
    try:
        launcher.run(arguments)
    except SignalException as error:
        raise Preempted(f"stopped on {error.sigval.name}; run again to continue") from error
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise worker_ended(rank, failure.exitcode, short=kills() > before) from error
    except (RendezvousError, DistNetworkError, DistStoreError) as error:
        said = str(error) or "timed out"
        raise Unavailable(f"torchrun: the nodes of this run did not meet ({type(error).__name__}: {said})") from error
    except (ValueError, AssertionError, FileNotFoundError, NotADirectoryError, PermissionError) as error:
        raise SpecError(_unfit(arguments, error)) from error  # torchrun checks these only at the start


def prepared() -> tuple[Namespace, Any]:
    """Return torchrun's arguments, with ours added, and torchrun. Raises SpecError for arguments that it cannot parse."""
    from torch.distributed import run as torchrun

    launcher: Any = torchrun  # it has no type annotations
    try:
        arguments = launcher.parse_args(sys.argv[1:])
    except SystemExit as error:
        if not error.code:  # --help
            end(0, None)
        raise SpecError("torchrun: wrong arguments; its message is above") from error
    arguments.signals_to_handle += ",SIGUSR1"  # Slurm's early notice
    try:
        here = launcher.determine_local_world_size(arguments.nproc_per_node)
        # Otherwise torchrun gives each process one core, however many there are.
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // max(1, here))))
        launcher.config_from_args(arguments)
    except (ValueError, AssertionError) as error:
        raise SpecError(_unfit(arguments, error)) from error
    return arguments, launcher


def _unfit(arguments: Namespace, error: Exception) -> str:
    asked = arguments.nproc_per_node
    if asked == "gpu" and "not available" in str(error):
        return (
            "torchrun: --nproc-per-node is gpu, and this machine has no usable CUDA GPU; give the job GPUs that the "
            "node's driver supports, or set a number of processes"
        )
    said = str(error) or "no process could be started"
    return f"torchrun: --nnodes {arguments.nnodes}, --nproc-per-node {asked}: {said}"


def worker_ended(rank: int, code: int, *, short: bool) -> RankEnded | OutOfMemory:
    """Return how the run ends after a worker exited with `code`, or was killed by signal `-code`. `short` means that the
    kernel killed a process during the run for lack of memory."""
    if code == -signal.SIGKILL and short:
        return OutOfMemory(f"the kernel killed rank {rank} because host memory ran out; give the job more memory")
    return RankEnded(f"rank {rank} exited with {code}; the last line of its log says why", translated(code))


def translated(code: int) -> int:
    """Translate a worker's exit code: codes of the table stay, signals become 128 + n as in a shell, anything else is a bug."""
    if code < 0:
        return 128 - code
    return code if code in {row.code for row in EXIT_CODES} else BUG


if __name__ == "__main__":
    main()
