"""Defines the facts that a plan is made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from job.config.environment import Environment
from job.data.facts import DataFacts
from job.model.base_model import BaseFacts
from job.model.memory_model import ANSWER
from job.runtime.limits import Limits


@dataclass(frozen=True)
class Device:
    """The device the model will run on. `memory` is in bytes: the GPU's or, for a CPU, the host memory this process may hold."""

    kind: Literal["cuda", "cpu"]
    name: str
    memory: int


@dataclass(frozen=True)
class Facts:
    """The facts that a survey found. None means not known here (another machine, a library not installed)."""

    keys: frozenset[str] = frozenset()
    checkpoints: tuple[int, ...] = ()
    data: DataFacts | None = None
    base: BaseFacts | None = None
    device: Device | None = None
    backend: str | None = None
    world: int = 1
    """Number of processes, each with a device like this one."""
    shards: int = 1
    """Over how many of them the plan shards the base."""
    on_this_node: int = 1
    """How many of them share this node's memory and scratch."""
    limits: Limits | None = None
    written: Mapping[str, int] = field(default_factory=dict)
    """Bytes in the output, by the first part of their keys."""
    left: Mapping[str, int] = field(default_factory=dict)
    """Bytes that an earlier attempt left in this job's scratch: `trainer`, and `export/NAME` for what is published."""
    to_fetch: int = 0
    """Bytes of the base that are still to be fetched to scratch."""
    example: str | None = None
    notes: tuple[str, ...] = ()
    checkpoint_seconds: float | None = None
    """From submitting it until it is safe, as the last attempt measured it."""
    environment: Environment = field(default_factory=Environment)

    def longest_row(self, most: int) -> tuple[int, int]:
        """Returns the tokens (at most `most`) and images of the longest row; `most` and one if no rows were examined."""
        tokens, images = (self.data.tokens, self.data.images) if self.data else (None, None)
        return min(tokens.longest, most) if tokens else most, images.most if images else 1

    def most_learned(self, most: int) -> int:
        """Returns the largest number of a row's tokens (at most `most`) whose loss is taken; `ANSWER` if none were counted."""
        return min((self.data and self.data.tokens and self.data.tokens.learned) or ANSWER, most)

    def held_out(self, most: int) -> int:
        """Returns the number of held-out rows, at most `most`; `most` if there are none or they were not counted."""
        return min(self.data.evaluation or most, most) if self.data else most
