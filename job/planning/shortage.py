"""Where what is needed and what there is do not fit: one sentence each, with the place, the need, what is free and the cure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from job.errors import SpecError
from job.facts import Facts
from job.planning.limits import SCRATCH_VARIABLE
from job.planning.needs import Need, Range, Training, needs
from job.record import bytes_text
from job.spec import JobSpec

SMALLER = ("merged_4bit", "merged_fp8", "merged_int4", "gguf")
"""Fields of `export` that need merged weights on scratch."""


@dataclass(frozen=True)
class Shortage:
    """`sure`: the job cannot end here, so that `run` refuses it. Else it may just fit."""

    text: str
    sure: bool


@dataclass(frozen=True)
class Foreseen:
    """`scratch_copy` is what `export.scratch_copy: auto` became."""

    scratch_copy: bool
    needs: tuple[Need, ...]
    shortages: tuple[Shortage, ...]


def foresee(spec: JobSpec, facts: Facts, training: Training) -> Foreseen:
    """What the job needs, and what of it is short. Where the spec leaves it open, merged weights go over scratch unless that is
    too small and the output is not."""
    given, export = spec.export.scratch_copy, spec.export
    bound = any(getattr(export, name) for name in SMALLER) or export.hub.merged_repo is not None
    ways = []
    for copied in [given] if given != "auto" else [True] if bound else [True, False]:
        found = needs(spec, facts, training, scratch_copy=copied)
        short = shortages(spec, facts, found, training.precision, scratch_copy=copied)
        ways.append(Foreseen(copied, found, short))
    return min(ways, key=lambda way: (any(each.sure for each in way.shortages), bool(way.shortages)))


def shortages(
    spec: JobSpec, facts: Facts, stages: Sequence[Need], precision: str, *, scratch_copy: bool
) -> tuple[Shortage, ...]:
    """What is short: host memory, and the disks whose room is known."""
    limits = facts.limits
    if limits is None or not stages:
        return ()
    found, memory = list[Shortage | None](), limits.memory
    where = f"host memory ({memory.source}: {bytes_text(memory.limit)})"
    found.append(_short(where, stages, lambda need: need.memory, memory.free, _memory_cure(facts, precision)))
    scratch, output = limits.scratch, limits.output
    cure, output_cure = _scratch_cure(spec, scratch_copy), _output_cure(spec)
    if scratch is not None:
        granted = f" (of {SCRATCH_VARIABLE})" if scratch.room < scratch.free else ""
        found.append(_short(f"scratch {scratch.place}{granted}", stages, lambda need: need.scratch, scratch.room, cure))
    if output is not None:
        found.append(_short(f"output.url {output.place}", stages, lambda need: need.output, output.room, output_cure))
    if limits.one_disk and output is not None and not any(each and each.sure for each in found[1:]):
        where = f"the disk of both scratch and output.url {output.place}"
        both = _short(
            where, stages, lambda need: _sum(need.scratch, need.output), output.room, f"{output_cure}; or {cure}"
        )
        found[1:] = [both] if both else found[1:]
    return tuple(each for each in found if each is not None)


def refuse(found: Sequence[Shortage]) -> None:
    """Raises SpecError, which no scheduler tries again, for what is sure to be short: a full disk, or a small container, is as
    full or as small the next time."""
    if sure := [each.text for each in found if each.sure]:
        raise SpecError("; ".join(sure))


def _short(where: str, stages: Sequence[Need], of: Callable[[Need], Range], room: int, cure: str) -> Shortage | None:
    surest, largest = (max(stages, key=lambda need: of(need)[end]) for end in (0, 1))
    sure = of(surest).least > room
    if not sure and of(largest).most <= room:
        return None
    stage, amount = (surest.stage, of(surest).least) if sure else (largest.stage, of(largest).most)
    needed = f"{'at least' if sure else 'up to'} {bytes_text(amount)}"
    return Shortage(f"{where}: {stage} needs {needed}, and {bytes_text(room)} are free; {cure}", sure)


def _sum(one: Range, other: Range) -> Range:
    return Range(one.least + other.least, one.most + other.most)


def _memory_cure(facts: Facts, precision: str) -> str:
    """No field of `export` helps: training holds as much."""
    if facts.device is None or facts.device.kind == "cuda":
        return "give the job more memory"
    smaller = "set model.precision to 16bit, " if precision == "32bit" else ""
    return f"{smaller}give the job more memory, or take a smaller base"


def _scratch_cure(spec: JobSpec, scratch_copy: bool) -> str:
    made = [name for name in SMALLER if getattr(spec.export, name)]
    first = ""
    if made:
        first = f"set {' and '.join(f'export.{name}' for name in made)} to false, "
    elif spec.export.merged and scratch_copy:
        first = "set export.scratch_copy to auto or false, "
    return f"{first}point JOB_SCRATCH at a larger disk, or remove what is not needed there"


def _output_cure(spec: JobSpec) -> str:
    without = ", or set export.merged to false" if spec.export.merged else ""
    return f"free some space, or name another output.url{without}"
