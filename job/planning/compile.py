"""Decides whether torch.compile pays for itself. Pure, like the plan."""

from __future__ import annotations

from job.config.schema import JobSpec
from job.planning.batch_fit import by_unsloth
from job.planning.facts import Facts

START_SECONDS = 70.0
"""Seconds that compiling adds to a start: the first step took 75 to 79 s on a cold machine, and 7.3 s with nothing compiled
(Llama 3.2 11B shape on an H200, 16 bit, micro-batches of 8, November 2026). A restart on a new node compiles again."""
ROW_SECONDS = 0.1 / 8
"""Seconds saved per row: steady steps of those 8 rows took 2.00 s compiled and 2.10 s eager. A smaller model saves less."""
STARTS = 2
"""Starts that must be paid for: the first, and one more, since a job may be preempted."""


def can_compile(spec: JobSpec, facts: Facts) -> bool:
    """Whether anything is wrapped in torch.compile at all: only Unsloth does so here, on a GPU."""
    return facts.device is not None and facts.device.kind == "cuda" and by_unsloth(spec, facts)


def compiles(spec: JobSpec, facts: Facts, total_steps: int | None) -> bool:
    """Whether whole micro-batches of training run compiled.

    Compiled and eager code round differently, so `auto` considers all steps of the job, not those that are left: every attempt
    then decides alike, and a resumed run has the losses of one that was never stopped.
    """
    if not can_compile(spec, facts):
        return False
    given = spec.training.torch_compile
    return _gain(spec, facts, total_steps or 0) > STARTS * START_SECONDS if given == "auto" else given


def compiling_text(spec: JobSpec, facts: Facts, total_steps: int | None) -> str:
    """Describes the decision in one line."""
    state = "on, for whole micro-batches of training" if compiles(spec, facts, total_steps) else "off"
    if spec.training.torch_compile != "auto":
        return f"torch.compile: {state}"
    if total_steps is None:
        return "torch.compile: decided once the steps are known"
    gain = _gain(spec, facts, total_steps)
    return (
        f"torch.compile: {state}; {total_steps} steps would gain about {gain:.0f} s, and compiling costs about "
        f"{START_SECONDS:.0f} s at each start on a new node"
    )


def _gain(spec: JobSpec, facts: Facts, total_steps: int) -> float:
    """Returns seconds, over all rows that one device trains on."""
    return total_steps * spec.training.effective_batch_size / facts.world * ROW_SECONDS
