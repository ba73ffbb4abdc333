"""TensorBoard, W&B and MLflow: spec, curves and result. A tracker that fails is logged and disabled; none ends a run.

A tracker sees all attempts of a job as one run: W&B and MLflow continue theirs, and TensorBoard's file is written anew from the
numbers of the checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import yaml

from job.config.schema import flatten
from job.context import RunContext
from job.errors import JobError
from job.evaluate.examples import chosen
from job.evaluate.records import Estimate
from job.layout import EVALUATION, REPORT_KEY, TENSORBOARD
from job.report.contents import Contents
from job.runtime.status import one_line
from job.store import upload_folder

log = logging.getLogger("job")

PROJECT = "vision-lora-job"
"""Where runs go if no variable names a project of W&B or an experiment of MLflow."""
LONGEST_PARAMETER = 500
"""Characters of a value that every version of MLflow takes."""


@dataclass(frozen=True)
class Run:
    """What a tracker is told of a run. `identity` is the same in every attempt; `folder` is on scratch."""

    name: str
    identity: str
    config: Mapping[str, Any]
    folder: Path

    @classmethod
    def of(cls, ctx: RunContext) -> Run:
        identity = hashlib.sha256(f"{ctx.spec.output.url} {ctx.spec.digest}".encode()).hexdigest()[:16]
        return cls(ctx.spec.name, identity, flatten(ctx.spec.model_dump(mode="json")), ctx.scratch)


@dataclass(frozen=True)
class Outcome:
    """What a job measured: metrics `before` and `after` training, `facts` in words, and the `step` that was taken. `report` and
    `samples` (texts by column) show images and texts, so they are empty unless the spec sends them."""

    step: int
    before: Mapping[str, float]
    after: Mapping[str, float]
    facts: Mapping[str, str]
    report: bytes = b""
    samples: list[dict[str, str]] = field(default_factory=list)


class Client(Protocol):
    """One tracker's client, made when its run begins or continues."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def show(self, outcome: Outcome) -> None: ...

    def close(self, *, finished: bool) -> None: ...


class TensorBoard:
    def __init__(self, run: Run) -> None:
        from tensorboardX import SummaryWriter

        self.writer = SummaryWriter(str(run.folder / "tensorboard"))
        self.writer.add_text("spec", "\n".join(f"    {line}" for line in yaml.safe_dump(dict(run.config)).splitlines()))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def show(self, outcome: Outcome) -> None:
        for step, measured in ((0, outcome.before), (outcome.step, outcome.after)):
            self.log(step, {f"{EVALUATION}{name}": value for name, value in measured.items()})
        for name, text in outcome.facts.items():
            self.writer.add_text(name, text)
        for number, row in enumerate(outcome.samples, 1):
            text = "\n\n".join(f"**{column}**: {value}" for column, value in row.items())
            self.writer.add_text(f"samples/{number}", text, outcome.step)

    def close(self, *, finished: bool) -> None:  # noqa: ARG002
        self.writer.close()


class WandB:
    """Reads `WANDB_PROJECT`, `WANDB_ENTITY`, `WANDB_RUN_GROUP`, `WANDB_TAGS`, `WANDB_MODE` and the like by itself."""

    def __init__(self, run: Run) -> None:
        import wandb

        self.wandb, self.identity, self.folder = wandb, run.identity, run.folder
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", run.name),
            id=os.environ.get("WANDB_RUN_ID", run.identity),
            resume="allow",
            settings=wandb.Settings(console="off"),
        )
        self.run.config.update(dict(run.config), allow_val_change=True)
        self.run.define_metric("*", step_metric="step")  # a resumed run repeats steps, which W&B's own counter refuses

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log({**values, "step": step})

    def show(self, outcome: Outcome) -> None:
        measured = {"before": outcome.before, "after": outcome.after}
        self.run.summary.update({f"{when}/{name}": each[name] for when, each in measured.items() for name in each})
        self.run.summary.update(dict(outcome.facts))
        if outcome.report:
            (self.folder / REPORT_KEY).write_bytes(outcome.report)
            artifact = self.wandb.Artifact(f"report-{self.identity}", type="report")
            artifact.add_file(str(self.folder / REPORT_KEY))
            self.run.log_artifact(artifact)
        if outcome.samples:
            columns = list(outcome.samples[0])
            rows = [list(row.values()) for row in outcome.samples]
            self.run.log({"samples": self.wandb.Table(columns=columns, data=rows), "step": outcome.step})

    def close(self, *, finished: bool) -> None:
        self.run.finish(exit_code=0 if finished else 1)


class MLflow:
    """Reads `MLFLOW_TRACKING_URI`, `MLFLOW_EXPERIMENT_NAME`, `MLFLOW_RUN_ID` by itself, and tags as JSON from `MLFLOW_TAGS`."""

    TAG = "vision-lora-job.run"

    def __init__(self, run: Run) -> None:
        import mlflow

        self.mlflow = mlflow
        if "MLFLOW_EXPERIMENT_ID" not in os.environ:
            mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
        known = mlflow.search_runs(filter_string=f"tags.`{self.TAG}` = '{run.identity}'", output_format="list")
        earlier = os.environ.get("MLFLOW_RUN_ID") or (known[0].info.run_id if known else None)
        mlflow.start_run(run_id=earlier, run_name=run.name)
        mlflow.set_tags({**json.loads(os.environ.get("MLFLOW_TAGS") or "{}"), self.TAG: run.identity})
        if not earlier:  # parameters cannot be changed
            mlflow.log_params({name: str(value)[:LONGEST_PARAMETER] for name, value in run.config.items()})

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.mlflow.log_metrics(dict(values), step=step)

    def show(self, outcome: Outcome) -> None:
        for step, measured in ((0, outcome.before), (outcome.step, outcome.after)):
            self.log(step, {f"{EVALUATION}{name}": value for name, value in measured.items()})
        self.mlflow.set_tags(dict(outcome.facts))
        if outcome.report:
            self.mlflow.log_text(outcome.report.decode(), REPORT_KEY)
        if outcome.samples:
            self.mlflow.log_text("".join(f"{json.dumps(row)}\n" for row in outcome.samples), "samples.jsonl")

    def close(self, *, finished: bool) -> None:
        self.mlflow.end_run("FINISHED" if finished else "KILLED")


CLIENTS: dict[str, Callable[[Run], Client]] = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}


class Tracker:
    """The tracker `name`, until it fails, as when a server is down or a key is missing.

    `logs/metrics.jsonl` has everything that it receives.
    """

    def __init__(self, name: str, run: Run) -> None:
        self.name = name
        self.client: Client | None = None

        def begin() -> None:
            self.client = CLIENTS[name](run)

        self._guarded(begin)

    def numbers(self, line: Mapping[str, Any]) -> None:
        """Send a line of `logs/metrics.jsonl`."""
        values = {
            f"train/{name}": value
            for name, value in line.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and name != "step"
        }
        self.tell("log", line["step"], values)

    def tell(self, what: str, *given: Any, **named: Any) -> None:
        if self.client is not None:
            self._guarded(getattr(self.client, what), *given, **named)

    def _guarded(self, do: Callable[..., None], *given: Any, **named: Any) -> None:
        try:
            do(*given, **named)
        except JobError:
            raise
        except Exception as error:
            self.client = None
            log.warning(
                "training.report_to: %s failed, and is disabled for this attempt: %s", self.name, one_line(error)
            )


@contextmanager
def tracked(ctx: RunContext) -> Iterator[None]:
    """Send every line of `logs/metrics.jsonl` that is written in the block to the trackers that the spec names."""
    shutil.rmtree(ctx.scratch / "tensorboard", ignore_errors=True)
    trackers = [Tracker(name, Run.of(ctx)) for name in ctx.spec.training.report_to if not ctx.ranks.rank]
    for line in ctx.record.read_numbers():
        for tracker in trackers:
            if tracker.name == "tensorboard":
                tracker.numbers(line)

    def hear(line: Mapping[str, Any]) -> None:
        for tracker in trackers:
            tracker.numbers(line)

    ctx.record.heard = hear
    finished = False
    try:
        yield
        finished = True
    finally:
        ctx.record.heard = None
        for tracker in trackers:
            tracker.tell("close", finished=finished)


def publish_tensorboard(ctx: RunContext) -> None:
    """Upload TensorBoard's files of training, if any, in place of those of earlier attempts."""
    earlier = {entry.key for entry in ctx.store.list(f"{TENSORBOARD}/")}
    if sent := _upload_tensorboard(ctx):
        ctx.store.delete(earlier - sent)


def _upload_tensorboard(ctx: RunContext) -> set[str]:
    folder = ctx.scratch / "tensorboard"
    return (
        {f"{TENSORBOARD}/{name}" for name in upload_folder(ctx.store, folder, TENSORBOARD)}
        if folder.exists()
        else set()
    )


def show_result(ctx: RunContext, contents: Contents, page: bytes) -> None:
    """Send the metrics and the verdict to the trackers that the spec names, and if it allows that, the report and its samples."""
    names, metrics = ctx.spec.training.report_to, contents.metrics
    if not names or not contents.after:
        return
    shown = ctx.spec.training.report_samples
    facts = {"output": ctx.spec.output.url, "verdict": f"{metrics.verdict.metric}: {metrics.verdict.said}"}
    outcome = Outcome(
        step=contents.lineage.taken_step or contents.lineage.trained_steps or 0,
        before=_values(metrics.before),
        after=_values(metrics.after),
        facts=facts | {name: str(contents.gate[name]) for name in ("refused",) if name in contents.gate},
        report=page if shown else b"",
        samples=_samples(contents) if shown and contents.privacy.report_images else [],
    )
    for name in names:
        tracker = Tracker(name, Run.of(ctx))
        tracker.tell("show", outcome)
        tracker.tell("close", finished=True)
    _upload_tensorboard(ctx)


def _values(metrics: Mapping[str, Estimate]) -> dict[str, float]:
    return {name: each.value for name, each in metrics.items() if each.value is not None}


def _samples(contents: Contents) -> list[dict[str, str]]:
    """The rows of the report's gallery, in its order."""
    rows = [index for part in chosen(contents.before, contents.after, contents.metrics).values() for index in part]
    pairs = [(contents.before[index], contents.after[index]) for index in rows]
    return [
        {"id": old.id, "reference": old.reference, "before": old.generated, "after": new.generated}
        for old, new in pairs
    ]
