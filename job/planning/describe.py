"""The needs of all stages as a table for people."""

from __future__ import annotations

from collections.abc import Sequence

from job.planning.limits import Limits
from job.planning.needs import Need
from job.record import bytes_text

COLUMNS = ("host memory", "scratch", "output")


def describe_needs(needs: Sequence[Need], limits: Limits | None) -> list[str]:
    """One line a stage with what is foreseen, margins included, and a last one with what is free here. No lines where no need is
    known."""
    if not needs:
        return []
    rows = [
        (need.stage, *(bytes_text(each.most) for each in (need.memory, need.scratch, need.output))) for need in needs
    ]
    if limits is not None:
        disks = [bytes_text(each.room) if each else "not known" for each in (limits.scratch, limits.output)]
        rows.append(("free here", bytes_text(limits.memory.free), *disks))
    head = ("needs", *COLUMNS)
    return [f"{head[0]:<18}" + "".join(f"{name:>13}" for name in head[1:])] + [
        f"  {row[0]:<16}" + "".join(f"{size:>13}" for size in row[1:]) for row in rows
    ]
