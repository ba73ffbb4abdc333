"""The context that every stage receives, and how an attempt opens it."""

from __future__ import annotations

import logging
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from job.config.environment import Environment
from job.config.schema import JobSpec
from job.distributed.ranks import ONE, Ranks, join_ranks
from job.output.overlap import refuse_overlap
from job.output.ownership import begin, check_owner, is_published
from job.output.stored import open_output
from job.runtime.preemption import Preemption
from job.runtime.prometheus import serve_metrics
from job.runtime.scratch import explain_shortages, heartbeat, job_folder, limit_scratch, make_private, prepare_scratch
from job.runtime.spot import watch_spot_notices
from job.runtime.status import Record
from job.store import OwnedStore, ReadOnly, Store, check_writable, open_store
from job.store.disk import disk
from job.store.lease import Lease, acquire

log = logging.getLogger("job")


@dataclass(frozen=True)
class RunContext:
    """What every stage receives.

    `number` counts the attempts at this output from 1. `scratch` is this job's folder on the node. `ranks` is this process and
    those it works with. Only rank 0 can write to `store`: the other ranks have it read-only, and keep status, numbers and lease
    in a private folder.
    """

    spec: JobSpec
    store: Store
    lease: Lease
    scratch: Path
    record: Record
    preemption: Preemption
    number: int
    ranks: Ranks = ONE
    environment: Environment = field(default_factory=Environment)


@contextmanager
def open_run(spec: JobSpec, environment: Environment, preemption: Preemption) -> Iterator[RunContext | None]:
    """Open this attempt and yield its context, or None if the job is already published."""
    refuse_overlap(spec, environment)
    root = prepare_scratch(environment, os.environ)
    if "mlflow" not in spec.training.report_to:
        os.environ.setdefault("DISABLE_MLFLOW_INTEGRATION", "TRUE")  # TRL would import it, which takes a second
    own = job_folder(root, spec)
    with disk(own):
        make_private(own)
    ttl = environment.lease_seconds
    with (
        explain_shortages(root),
        heartbeat(root),
        join_ranks(os.environ, preemption, own, ttl, f"{spec.digest} {spec.output.url}") as ranks,
    ):
        scratch = root / ranks.shared("scratch", own.name)  # on some network file systems inodes differ per process
        make_private(scratch)
        opened = _follow if ranks.rank else _lead
        with (
            nullcontext() if ranks.place.local_rank else limit_scratch(root, environment, preemption),
            opened(spec, environment, ranks, scratch, ttl) as context,
        ):
            yield context


def take_lease(store: OwnedStore, ttl: float, preemption: Preemption) -> Lease:
    """Acquire the lease of an output, waiting for a dead holder's to expire, and have the store write under it. Raises Preempted
    while another job holds it, and what `check_writable` raises."""
    can = check_writable(store)
    holder = f"{socket.gethostname()}:{os.getpid()}"
    lease = acquire(store.inner, holder, ttl, wait=ttl + 5, on_loss=preemption.request)
    store.hold(lease, can)
    return lease


@contextmanager
def _lead(
    spec: JobSpec, environment: Environment, ranks: Ranks, scratch: Path, ttl: float
) -> Iterator[RunContext | None]:
    """As rank 0, take the lease of the output and begin an attempt there."""
    preemption = ranks.preemption
    with ExitStack() as stack:
        with preemption.leave_at_once():
            store = open_output(spec)
            published = is_published(store, spec)
            if not published:
                check_owner(store, spec)
                lease = stack.enter_context(take_lease(store, ttl, preemption))
        if published:
            yield None
            return
        stack.enter_context(watch_spot_notices(spec.preemption.spot_notices, preemption, os.environ))
        number = ranks.shared("attempt", begin(store, spec))
        record = stack.enter_context(Record(store, scratch, name=spec.name, attempt=number, ranks=ranks.world).kept())
        stack.enter_context(explain_shortages(scratch))
        ranks.where, preemption.last_words = record.where, record.leave
        stack.enter_context(serve_metrics(record, environment.metrics_port))
        yield RunContext(spec, store, lease, scratch, record, preemption, number, ranks, environment)


@contextmanager
def _follow(spec: JobSpec, environment: Environment, ranks: Ranks, scratch: Path, ttl: float) -> Iterator[RunContext]:
    """As any other rank, wait until rank 0 has begun the attempt."""
    preemption, own = ranks.preemption, scratch.with_suffix(f".rank-{ranks.rank}")
    with ExitStack() as stack:
        if ranks.place.local_rank == 0:  # not on rank 0's machine
            stack.enter_context(watch_spot_notices(spec.preemption.spot_notices, preemption, os.environ))
        number = ranks.shared("attempt", 0)  # until rank 0 has the lease, another attempt may be using `own`
        shutil.rmtree(own, ignore_errors=True)
        make_private(own)
        store = open_store(str(own))
        record = stack.enter_context(Record(store, own, name=spec.name, rank=ranks.rank).kept())
        stack.enter_context(explain_shortages(own))
        ranks.where = record.where
        lease = Lease(store, f"rank {ranks.rank}", ttl)
        yield RunContext(spec, ReadOnly(open_output(spec)), lease, own, record, preemption, number, ranks, environment)
