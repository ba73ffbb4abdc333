"""TensorBoard, W&B and MLflow, by upstream's own callbacks. None of them can end a run: what fails is told, and left."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partialmethod
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks

from job.attempt import Attempt
from job.errors import JobError
from job.record import one_line

log = logging.getLogger("job")


class Tracker(TrainerCallback):
    """Upstream's callback for the tracker `name`, until it fails: a server that is down, a key that is missing.

    `logs/metrics.jsonl` has all that it is told.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.theirs: Any = None
        self._guarded(self._make)

    def _make(self) -> None:
        (made,) = get_reporting_integration_callbacks([self.name])
        self.theirs = made()

    def close(self) -> None:
        """W&B waits for the interpreter's own end, which never comes here."""
        if self.name == "wandb" and self.theirs is not None:
            import wandb

            self._guarded(wandb.finish)

    def _told(self, event: str, *given: Any, **named: Any) -> None:
        if self.theirs is not None:
            self._guarded(getattr(self.theirs, event), *given, **named)

    def _guarded(self, do: Any, *given: Any, **named: Any) -> None:
        try:
            do(*given, **named)
        except JobError:
            raise
        except Exception as error:
            self.theirs = None
            log.warning(
                "training.report_to: %s fails, and gets nothing more from this attempt: %s", self.name, one_line(error)
            )


for event in (name for name in dir(TrainerCallback) if name.startswith("on_")):
    setattr(Tracker, event, partialmethod(Tracker._told, event))


@contextmanager
def tracked(names: Iterable[str], attempt: Attempt) -> Iterator[list[TrainerCallback]]:
    """Callbacks for the trackers named, closed behind the block. To W&B all attempts of a run are one."""
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(attempt.scratch / "tensorboard")
    run = f"{attempt.spec.output.url} {attempt.spec.digest}"
    os.environ.setdefault("WANDB_RUN_ID", hashlib.sha256(run.encode()).hexdigest()[:16])
    os.environ.setdefault("WANDB_RESUME", "allow")
    found = [Tracker(name) for name in names]
    try:
        yield [*found]
    finally:
        for tracker in found:
            tracker.close()
