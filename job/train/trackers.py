"""TensorBoard, W&B and MLflow through upstream's callbacks. A tracker that fails is logged and disabled; none ends a run."""

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

from job.context import RunContext
from job.errors import JobError
from job.runtime.status import one_line

log = logging.getLogger("job")


class Tracker(TrainerCallback):
    """Upstream's callback for the tracker `name`, until it fails, as when a server is down or a key is missing.

    `logs/metrics.jsonl` has everything that it receives.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.theirs: Any = None
        self._guarded(self._make)

    def _make(self) -> None:
        (made,) = get_reporting_integration_callbacks([self.name])
        self.theirs = made()

    def close(self) -> None:
        """Finish W&B, which waits for the interpreter's exit, but the job never reaches that."""
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
                "training.report_to: %s failed, and is disabled for this attempt: %s", self.name, one_line(error)
            )


for event in (name for name in dir(TrainerCallback) if name.startswith("on_")):
    setattr(Tracker, event, partialmethod(Tracker._told, event))


@contextmanager
def tracked(names: Iterable[str], ctx: RunContext) -> Iterator[list[TrainerCallback]]:
    """Yield callbacks for the named trackers and close them after the block. W&B sees all attempts as one run."""
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(ctx.scratch / "tensorboard")
    run = f"{ctx.spec.output.url} {ctx.spec.digest}"
    os.environ.setdefault("WANDB_RUN_ID", hashlib.sha256(run.encode()).hexdigest()[:16])
    os.environ.setdefault("WANDB_RESUME", "allow")
    found = [Tracker(name) for name in names]
    try:
        yield [*found]
    finally:
        for tracker in found:
            tracker.close()
