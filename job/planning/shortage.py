"""Finds shortages: one sentence each, with the place, what is needed, what is free and the cure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from job.config.schema import JobSpec
from job.errors import SpecError
from job.layout import SMALLER
from job.planning.facts import Facts
from job.planning.needs import Need, Range, Training, needs
from job.runtime.status import bytes_text


@dataclass(frozen=True)
class Shortage:
    """If `sure`, the job cannot finish here, so `run` refuses it. Otherwise it may just fit."""

    text: str
    sure: bool


@dataclass(frozen=True)
class Foreseen:
    """`scratch_copy` is the resolved value of `export.scratch_copy`."""

    scratch_copy: bool
    needs: tuple[Need, ...]
    shortages: tuple[Shortage, ...]


def foresee(spec: JobSpec, facts: Facts, training: Training) -> Foreseen:
    """Returns what the job needs and what is short of it. If the spec leaves it open, merged weights go through scratch unless
    that is too small and the output is not."""
    given = spec.export.scratch_copy
    ways = []
    for copied in [given] if given != "auto" else [True] if _over_scratch(spec) else [True, False]:
        found = needs(spec, facts, training, scratch_copy=copied)
        short = shortages(spec, facts, found, training.precision, scratch_copy=copied)
        ways.append(Foreseen(copied, found, short))
    return min(ways, key=lambda way: (any(each.sure for each in way.shortages), bool(way.shortages)))


def shortages(
    spec: JobSpec, facts: Facts, stages: Sequence[Need], precision: str, *, scratch_copy: bool
) -> tuple[Shortage, ...]:
    """Checks host memory, and the disks whose free space is known."""
    limits = facts.limits
    if limits is None or not stages:
        return ()
    found, memory = list[Shortage | None](), limits.memory
    where = f"host memory ({memory.source}: {bytes_text(memory.limit)})"
    found.append(_short(where, stages, lambda need: need.memory, memory.free, lambda _: _memory_cure(facts, precision)))
    scratch, output = limits.scratch, limits.output

    def cure(stage: str) -> str:
        return _scratch_cure(spec, stage, scratch_copy)

    def output_cure(stage: str) -> str:
        return _output_cure(spec, stage)

    if scratch is not None:
        granted = " (of JOB_SCRATCH_GB)" if scratch.room < scratch.free else ""
        found.append(_short(f"scratch {scratch.place}{granted}", stages, lambda need: need.scratch, scratch.room, cure))
    if output is not None:
        found.append(_short(f"output.url {output.place}", stages, lambda need: need.output, output.room, output_cure))
    if limits.one_disk and output is not None and not any(each and each.sure for each in found[1:]):
        where = f"the disk of both scratch and output.url {output.place}"
        both = _short(
            where,
            stages,
            lambda need: _sum(need.scratch, need.output),
            output.room,
            lambda stage: f"{output_cure(stage)}; or {cure(stage)}",
        )
        found[1:] = [both] if both else found[1:]
    return tuple(each for each in found if each is not None)


def refuse(found: Sequence[Shortage]) -> None:
    """Raises SpecError, which no scheduler retries, for certain shortages: a full disk or a small container will be no larger
    next time."""
    if sure := [each.text for each in found if each.sure]:
        raise SpecError("; ".join(sure))


def _short(
    where: str, stages: Sequence[Need], of: Callable[[Need], Range], room: int, cure: Callable[[str], str]
) -> Shortage | None:
    surest, largest = (max(stages, key=lambda need: of(need)[end]) for end in (0, 1))
    sure = of(surest).least > room
    if not sure and of(largest).most <= room:
        return None
    stage, amount = (surest.stage, of(surest).least) if sure else (largest.stage, of(largest).most)
    needed = f"{'at least' if sure else 'up to'} {bytes_text(amount)}"
    return Shortage(f"{where}: {stage} needs {needed}, and {bytes_text(room)} are free; {cure(stage)}", sure)


def _sum(one: Range, other: Range) -> Range:
    return Range(one.least + other.least, one.most + other.most)


def _memory_cure(facts: Facts, precision: str) -> str:
    """No field of `export` helps: training holds as much."""
    if facts.device is None or facts.device.kind == "cuda":
        return "give the job more memory"
    smaller = "set model.precision to 16bit, " if precision == "32bit" else ""
    return f"{smaller}give the job more memory, or use a smaller base model"


def _over_scratch(spec: JobSpec) -> list[str]:
    """Returns the fields of `export` that need merged weights on scratch and are set."""
    export = spec.export
    others = {"hub.merged_repo": export.hub.merged_repo is not None, "serve.engine": export.serve.engine is not None}
    return [name for name in SMALLER if getattr(export, name)] + [name for name, asked in others.items() if asked]


def _scratch_cure(spec: JobSpec, stage: str, scratch_copy: bool) -> str:
    first = ""
    if stage == "export" and (bound := _over_scratch(spec)):
        first = f"leave out {' and '.join(f'export.{name}' for name in bound)}, "
    elif stage == "export" and spec.export.merged and scratch_copy and spec.export.scratch_copy is True:
        first = "set export.scratch_copy to false, "
    return f"{first}point JOB_SCRATCH at a larger disk, or free some space there"


def _output_cure(spec: JobSpec, stage: str) -> str:
    without = ""
    if stage == "train" and spec.checkpoint.keep > 1:
        without = ", or lower checkpoint.keep"
    elif stage != "train" and spec.export.merged:
        without = ", or set export.merged to false"
    return f"free some space, or name another output.url{without}"
