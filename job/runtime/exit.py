"""Ends the process: the one place that turns an error into an exit code and one sentence."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from job.errors import BUG, JobError, SpecError, without_secrets
from job.runtime.preemption import NOTICES
from job.runtime.status import last_word, on_terminal, one_line, start_logging
from job.store.disk import FAILING, FULL, disk_fault

log = logging.getLogger("job")


def run_and_exit(work: Callable[[], None], *, rows: bool = True) -> NoReturn:
    """Do the work and exit with the code for its outcome.

    `rows` means that the work may have read patients' rows, so the message of an unforeseen error may contain some of their text:
    it is then shown on a terminal only.
    """
    start_logging()
    try:
        work()
    except JobError as error:
        if len(str(error).splitlines()) > 1:
            log.error("%s", error)
        end(error.exit_code, one_line(error))
    except ModuleNotFoundError as error:
        if (error.name or "job").partition(".")[0] == "job":
            _bug(error, show=True)
        end(
            SpecError.exit_code,
            f"the package {error.name} is not installed here; run the image, or install the train extra: "
            "pip install '.[train]' in a checkout of vision-lora-job",
        )
    except (Exception, SystemExit) as error:
        if isinstance(error, OSError) and error.errno in FULL | FAILING:
            fault = disk_fault(error, Path(error.filename or "."))
            end(fault.exit_code, one_line(fault))
        _bug(error, show=on_terminal() or not rows)
    end(0, None)


def _bug(error: BaseException, *, show: bool) -> NoReturn:
    with contextlib.suppress(OSError):
        sys.stderr.write(traced(error, show=show))
    said = f": {without_secrets(one_line(error))}" if show else ""
    end(BUG, f"a bug: {type(error).__name__}{said}")


def traced(error: BaseException, *, show: bool) -> str:
    """Format the traceback of an error and of its causes, with their messages or with only their types."""
    if show:
        return without_secrets("".join(traceback.format_exception(error)))
    parts = list[str]()
    one: BaseException | None = error
    while one is not None:
        places = "".join(traceback.format_tb(one.__traceback__))
        parts.insert(0, f"Traceback (most recent call last):\n{places}{type(one).__name__}\n")
        one = one.__cause__ or (None if one.__suppress_context__ else one.__context__)
    return "\n".join(parts)


def end(code: int, reason: str | None) -> NoReturn:
    """Exit now. The interpreter's own exit takes a second with torch loaded, and any signal kills it on the way."""
    for number in NOTICES:
        signal.signal(number, signal.SIG_IGN)
    if reason is not None:
        tell(code, reason)
    logging.shutdown()
    with contextlib.suppress(OSError):  # nobody reads it any more, or its disk is full
        sys.stdout.flush()
    os._exit(code)


def tell(code: int, reason: str) -> None:
    """Write the reason as the last line on stderr and for the kubelet."""
    line = f"exit {code}: {reason}"
    last_word(line)
    with contextlib.suppress(OSError):  # a full disk behind the log must not change the code
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()
