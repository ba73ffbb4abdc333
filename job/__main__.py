"""`python -m job`: the container's entry point. Handles stop signals before it imports anything else."""

import os
import signal
import sys
from typing import Any


def leave(number: int, _frame: Any) -> None:
    """Exit with 75. Without a handler, process 1 of a container would not even die of SIGTERM."""
    try:
        os.write(2, f"exit 75: stopped on {signal.Signals(number).name}; run again to continue\n".encode())
    finally:
        os._exit(75)


def start() -> None:
    """Import the command line, whose own handlers take over, and run it."""
    from job.cli import command_line

    command_line("job" if sys.argv[0].endswith("job") else "python -m job")


def main() -> None:
    """Install the handlers, then start. Every failure ends with a code from the table."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, leave)
    from job.runtime.exit import run_and_exit

    run_and_exit(start, rows=False)


if __name__ == "__main__":
    main()
