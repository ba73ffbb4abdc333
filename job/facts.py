"""What one look at the world found: the facts that a plan is made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from job.model.fetch import BaseFacts
from job.planning.limits import Limits
from job.preemption import DEFAULT_GRACE_SECONDS


@dataclass(frozen=True)
class Device:
    """Where the model will run. `memory` in bytes: the GPU's, or for a CPU what this process may hold of the host's."""

    kind: Literal["cuda", "cpu"]
    name: str
    memory: int


@dataclass(frozen=True)
class Facts:
    """What one look at the world found. None means not known here (another machine, a library not installed)."""

    keys: frozenset[str] = frozenset()
    checkpoints: tuple[int, ...] = ()
    data: dict[str, Any] | None = None
    base: BaseFacts | None = None
    device: Device | None = None
    backend: str | None = None
    world: int = 1
    """Processes, each with a device like this one."""
    on_this_node: int = 1
    """How many of them share this node's memory and scratch."""
    limits: Limits | None = None
    written: Mapping[str, int] = field(default_factory=dict)
    """Bytes in the output, by the first part of their keys."""
    left: Mapping[str, int] = field(default_factory=dict)
    """Bytes that an earlier attempt left in this job's scratch: `trainer`, and `export/NAME` for what is published."""
    to_fetch: int = 0
    """Bytes of the base that are still to come to scratch."""
    example: str | None = None
    notes: tuple[str, ...] = ()
    checkpoint_seconds: float | None = None
    """From submitted to safe, as the last attempt measured it."""
    grace_seconds: float = DEFAULT_GRACE_SECONDS

    def longest_row(self, most: int) -> tuple[int, int]:
        """Tokens, `most` at most, and pictures of the longest row; where rows were not looked at, `most` and one."""
        data = self.data or {}
        return min(data.get("tokens", {}).get("longest", most), most), data.get("images", {}).get("most", 1)
