"""`python -m job`: the container's entry point. A notice is heard before anything else is imported."""

import os
import signal
import sys
from typing import Any


def leave(number: int, _frame: Any) -> None:
    """As process 1 of a container we would not even die of SIGTERM without a handler."""
    try:
        os.write(2, f"exit 75: stopped on {signal.Signals(number).name}; run again to continue\n".encode())
    finally:
        os._exit(75)


def main() -> None:
    """Listen, then import the command line, whose own handlers take over."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, leave)
    from job.cli import main as command_line

    command_line(prog_name="job" if sys.argv[0].endswith("job") else "python -m job")


if __name__ == "__main__":
    main()
