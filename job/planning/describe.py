"""The needs of all stages as a table for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from job.planning.limits import Limits
from job.planning.needs import Need, Range
from job.record import bytes_text

COLUMNS = ("GPU memory", "host memory", "scratch", "output")


def describe_needs(needs: Sequence[Need], limits: Limits | None, device: Mapping[str, int]) -> list[str]:
    """One line a stage with what is foreseen, margins included, and a last one with what is free here. `device` has the GPU
    memory of stages that use one. No lines where no need is known."""
    if not needs:
        return []
    rows = [
        (need.stage, size_text(device.get(need.stage)), *(bytes_text(each.most) for each in sizes_of(need)))
        for need in needs
    ]
    if limits is not None:
        disks = [bytes_text(each.room) if each else "not known" for each in (limits.scratch, limits.output)]
        rows.append(("free here", "", bytes_text(limits.memory.free), *disks))
    head = ("needs", *COLUMNS)
    return [f"{head[0]:<18}" + "".join(f"{name:>13}" for name in head[1:])] + [
        f"  {row[0]:<16}" + "".join(f"{size:>13}" for size in row[1:]) for row in rows
    ]


def foreseen_bytes(needs: Sequence[Need], device: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """The same for machines: by stage, bytes of `host`, `scratch` and `output`, and of `device` where there is a GPU."""
    found = {
        need.stage: dict(zip(("host", "scratch", "output"), (each.most for each in sizes_of(need)), strict=True))
        for need in needs
    }
    for stage, size in device.items():
        found.setdefault(stage, {})["device"] = size
    return found


def sizes_of(need: Need) -> tuple[Range, Range, Range]:
    return need.memory, need.scratch, need.output


def size_text(size: int | None) -> str:
    return bytes_text(size) if size else ""
