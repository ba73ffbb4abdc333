"""One attempt at a job: what every stage is given."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from job.preemption import Preemption
from job.ranks import ONE, Ranks
from job.record import Record
from job.spec import JobSpec
from job.store import Store
from job.store.lease import Lease


@dataclass(frozen=True)
class Attempt:
    """`number` counts from 1 over all attempts at this output; `scratch` is this job's own folder on the node; `ranks`
    are this process and those it works with."""

    spec: JobSpec
    store: Store
    lease: Lease
    scratch: Path
    record: Record
    preemption: Preemption
    number: int
    ranks: Ranks = ONE
