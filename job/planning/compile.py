"""Whether torch.compile pays for itself. Pure, as the plan is."""

from __future__ import annotations

from job.facts import Facts
from job.room import by_unsloth
from job.spec import JobSpec

START_SECONDS = 70.0
"""What compiling adds to a start: a first step of 75 to 79 s on a cold machine, and of 7.3 s with nothing compiled (Llama 3.2
11B shape on an H200, 16 bit, 8 rows a micro-batch, November 2026). A restart on a new node compiles again."""
ROW_SECONDS = 0.1 / 8
"""What a row gains: steady steps of those 8 rows took 2.00 s compiled and 2.10 s not. A smaller model gains less."""
STARTS = 2
"""So many starts must be paid for: the first, and one more, since a job may be preempted."""


def can_compile(spec: JobSpec, facts: Facts) -> bool:
    """Whether anything is wrapped in torch.compile at all: Unsloth does that, on a GPU, and nothing else here does."""
    return facts.device is not None and facts.device.kind == "cuda" and by_unsloth(spec, facts)


def compiles(spec: JobSpec, facts: Facts, total_steps: int | None) -> bool:
    """Whether whole micro-batches of training run compiled.

    Compiled and eager code round differently, so `auto` asks for all steps of the job and not for those that are left: each
    attempt then decides alike, and a resumed run has the losses of one that was never stopped.
    """
    if not can_compile(spec, facts):
        return False
    given = spec.training.torch_compile
    return _gain(spec, facts, total_steps or 0) > STARTS * START_SECONDS if given == "auto" else given


def compiling_text(spec: JobSpec, facts: Facts, total_steps: int | None) -> str:
    """The decision for people, in one line."""
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
    """Seconds, over all rows that one device trains on."""
    return total_steps * spec.training.effective_batch_size / facts.world * ROW_SECONDS
