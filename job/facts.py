"""What one look at the world found: the facts that a plan is made from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from job.model.fetch import BaseFacts
from job.preemption import DEFAULT_GRACE_SECONDS


@dataclass(frozen=True)
class Device:
    """Where the model will run. `memory` in bytes: the GPU's, or the machine's for a CPU."""

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
    scratch_free: int = 0
    example: str | None = None
    notes: tuple[str, ...] = ()
    checkpoint_seconds: float | None = None
    """From submitted to safe, as the last attempt measured it."""
    grace_seconds: float = DEFAULT_GRACE_SECONDS
