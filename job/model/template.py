"""Refuses chat templates that do not end. A template is a program shipped with the model, and no thread that runs it can be
stopped."""

from __future__ import annotations

import gc
import os
import resource
import select
import signal
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from job.errors import DataError, SpecError
from job.model.collator import Messages, render

SECONDS, SECONDS_AGAIN = 1.0, 0.2
"""CPU seconds for a conversation of two words: the first time, when the template is compiled, and again if that produced text.
A valid template takes at most a tenth on an idle core, and a busy hyperthread triples that: 20 KB of template take 0.1 s to
compile, an endless recursion 0.03 s until Python ends it, and a second text less than a millisecond."""
PATIENCE = 30.0
"""Wall-clock seconds after which the trial is abandoned without a verdict: the machine is busy, and a looping template would
have used up its CPU seconds long before."""
CHARACTERS = 100_000
"""Maximum characters of the rendered text."""
BYTES = 2**29
"""Maximum bytes of memory beyond what the process already has."""
FITS, ENDLESS = 0, 1
TRIAL: Messages = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "."}]},
]


_tried: set[str] = set()
"""Templates that this process has tried. Later a model may be on the GPU, and forking is no longer safe."""


def refuse_endless(processor: Any, folder: Path) -> None:
    """Render a small conversation in a child process, once per template. Raises SpecError when that takes more than `SECONDS`,
    `BYTES` or `CHARACTERS`. Conversations that a template refuses are reported later, with the rows."""
    template = str(processor.chat_template)
    if template in _tried:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the child only runs the template, whatever other threads hold
        process = os.fork()
    if process == 0:
        _try(processor)
    watch = os.pidfd_open(process)
    try:
        if given_up := not select.select([watch], [], [], PATIENCE)[0]:
            os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
    finally:
        os.close(watch)
    if not given_up and os.waitstatus_to_exitcode(status) != FITS:
        raise SpecError(
            f"model.name_or_path: the chat template of {folder} takes seconds, {BYTES // 2**20} MB or "
            f"{CHARACTERS:,} characters for a conversation of two words; use the published template"
        )
    _tried.add(template)


def _ending(processor: Any) -> int:
    """Return `ENDLESS` when the text is too long or exhausts memory; ordinary errors are reported later, with the rows."""
    for seconds in (SECONDS, SECONDS_AGAIN):
        signal.setitimer(signal.ITIMER_PROF, seconds)  # its signal ends this process
        try:
            if len(render(processor, TRIAL)) > CHARACTERS:
                return ENDLESS
        except DataError as error:
            ordinary = isinstance(error.__cause__, Exception) and not isinstance(error.__cause__, MemoryError)
            return FITS if ordinary else ENDLESS
    return FITS


def _try(processor: Any) -> NoReturn:
    ending = ENDLESS
    with suppress(BaseException):
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        for limit, most in ((resource.RLIMIT_AS, pages * resource.getpagesize() + BYTES), (resource.RLIMIT_CORE, 0)):
            resource.setrlimit(limit, (most, resource.getrlimit(limit)[1]))
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        gc.freeze()  # a collection over all the libraries' objects takes a quarter of a second
        ending = _ending(processor)
    os._exit(ending)
