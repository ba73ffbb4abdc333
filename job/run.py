"""The story of one job, top to bottom: `lead` is that of the one process, or of the first of many, `follow` that of others."""

from __future__ import annotations

import importlib
import logging
import os
import shutil
import socket
from collections.abc import MutableMapping
from contextlib import ExitStack, nullcontext
from pathlib import Path

from job import output
from job.attempt import Attempt
from job.bundle import bundle_named, use_bundle
from job.data import NEAR_KEY, QUARANTINE_KEY, BadRows, as_jsonl
from job.errors import SpecError
from job.export import check_mergeable, hub
from job.metrics import serving, writing
from job.model import choose_backend, import_first, load_model
from job.packages import check_packages
from job.plan import Plan, decided, describe, make_plan
from job.planning.describe import foreseen_bytes
from job.planning.shortage import refuse
from job.preemption import Preemption, positive
from job.ranks import Ranks, joined
from job.record import Record
from job.scratch import breathing, check_kernels, full_disk_told, job_folder, prepare_scratch
from job.spec import JobSpec
from job.spot import watching
from job.store import ReadOnly, Store, check_writable, open_store
from job.store.lease import Lease, acquire
from job.survey import Survey, arriving, find_device, keep_within, survey, torch_device

log = logging.getLogger("job")

LEASE_SECONDS = 60.0
"""How long a killed job keeps its successor waiting, and a rank the others; `JOB_LEASE_SECONDS` overrides it."""


def run(spec: JobSpec, environment: MutableMapping[str, str], preemption: Preemption) -> None:
    """From spec to `RESULT.json`. Returns when it is there; raises a JobError for every other foreseen ending.

    Run again after any ending, it does what is missing and nothing else.
    """
    root = prepare_scratch(environment)
    if "mlflow" not in spec.training.report_to:
        environment.setdefault("DISABLE_MLFLOW_INTEGRATION", "TRUE")  # or TRL imports it, for a second
    own = job_folder(root, spec)
    own.mkdir(exist_ok=True)
    ttl = positive(environment, "JOB_LEASE_SECONDS", LEASE_SECONDS)
    with breathing(root), joined(environment, preemption, own, ttl, f"{spec.digest} {spec.output.url}") as ranks:
        scratch = root / ranks.shared("scratch", own.name)  # some network file systems give each process other inodes
        scratch.mkdir(exist_ok=True)
        story = follow if ranks.rank else lead
        story(spec, environment, ranks, scratch, ttl)


def lead(spec: JobSpec, environment: MutableMapping[str, str], ranks: Ranks, scratch: Path, ttl: float) -> None:
    preemption = ranks.preemption
    with ExitStack() as stack:
        with preemption.leave_at_once():
            store = output.open_output(spec)
            if output.is_published(store, spec):
                log.info("published already: %s", spec.output.url)
                return
            check_writable(store)
            holder = f"{socket.gethostname()}:{os.getpid()}"
            lease = stack.enter_context(acquire(store, holder, ttl, wait=ttl + 5, on_loss=preemption.request))
        stack.enter_context(watching(spec.preemption.spot_notices, preemption, environment))
        number = ranks.shared("attempt", output.begin(store, spec))
        record = stack.enter_context(Record(store, scratch, name=spec.name, attempt=number, ranks=ranks.world).kept())
        stack.enter_context(full_disk_told(scratch))
        ranks.where, preemption.last_words = record.where, record.leave
        stack.enter_context(serving(record, environment))
        stack.enter_context(writing(record, environment))
        with preemption.leave_at_once():
            with record.stage("stage in"):
                hub.check_token(spec.export.hub)
                try:
                    found, backend = stage_in(spec, environment, store, scratch, ranks)
                except BadRows as error:
                    store.write(QUARANTINE_KEY, as_jsonl(error.rows))
                    raise
            plan = make_plan(spec, found.facts)
            log.info("%s", describe(spec, plan, found.facts))
            record.update(foreseen=foreseen_bytes(plan.foreseen.needs, plan.device_memory))
            refuse(plan.foreseen.shortages)
            plan, spec = ranks.shared("plan", plan), decided(spec, plan)
            attempt = Attempt(spec, store, lease, scratch, record, preemption, number, ranks)
            data, base = found.data, found.base
            assert data is not None
            assert base is not None
            store.write(QUARANTINE_KEY, as_jsonl(data.quarantined))
            store.write(NEAR_KEY, as_jsonl(data.near))
            with record.stage("load"):
                # Imported here: a published job, and one that waits for the lease, need none of the training libraries.
                from job.evaluate import judge, looked_at, measure, values
                from job.evaluate.before import read_base_ahead
                from job.evaluate.extra import scored
                from job.export import export
                from job.publish import publish, report_facts
                from job.train.fit import fit

                loaded = load_model(spec, base, torch_device(), backend, plan.precision, plan.kept, found.adapter)
                check_mergeable(spec, loaded)
        before = measure(attempt, loaded, data, "before")
        read_base_ahead(base)
        ranks.ask("train")
        fit(attempt, plan, loaded, data)
        after = measure(attempt, loaded, data, "after")
        scored(attempt, before, after)
        with record.stage("compare"), preemption.leave_at_once():
            measured, refused = judge(spec, data, before, after)
        record.update(measured=values(measured))
        seen = looked_at(attempt, loaded, data, measured, before, after)
        with preemption.leave_at_once():
            fold = spec.export.merged and not refused
            exported = export(attempt, loaded, data, fold=fold, gate_room=plan.gate_room)
            with record.stage("lineage"):
                facts = report_facts(attempt, found, plan, before, after, measured, exported, seen)
            publish(attempt, data, exported, facts, refused)
        log.info("published: %s", spec.output.url)


def follow(spec: JobSpec, environment: MutableMapping[str, str], ranks: Ranks, scratch: Path, ttl: float) -> None:
    """Train and answer when rank 0 asks for it, until it ends. Its status and its numbers are in a folder of its own."""
    preemption = ranks.preemption
    store, own = ReadOnly(output.open_output(spec)), scratch.with_suffix(f".rank-{ranks.rank}")
    with ExitStack() as stack:
        if ranks.place.local_rank == 0:  # on another machine than rank 0
            stack.enter_context(watching(spec.preemption.spot_notices, preemption, environment))
        # Rank 0 says it once it has the lease. Until then another attempt may be at work in `own`.
        number = ranks.shared("attempt", 0)
        shutil.rmtree(own, ignore_errors=True)
        own.mkdir()
        record = stack.enter_context(Record(open_store(str(own)), own, name=spec.name, rank=ranks.rank).kept())
        stack.enter_context(full_disk_told(own))
        ranks.where = record.where
        with preemption.leave_at_once():
            with record.stage("stage in"):
                found, backend = stage_in(spec, environment, store, scratch, ranks)
            plan: Plan | None = ranks.shared("plan", None)
            assert found.data is not None
            assert found.base is not None
            assert plan is not None
            spec = decided(spec, plan)
            with record.stage("load"):
                from job.evaluate import answer_for
                from job.train.fit import fit

                loaded = load_model(spec, found.base, torch_device(), backend, plan.precision, plan.kept, found.adapter)
        lease = Lease(open_store(str(own)), f"rank {ranks.rank}", ttl)
        attempt = Attempt(spec, store, lease, own, record, preemption, number, ranks)
        for task, details in ranks.asked():
            if task == "train":
                fit(attempt, plan, loaded, found.data)
            else:
                answer_for(attempt, loaded, found.data, *details)


def stage_in(
    spec: JobSpec, environment: MutableMapping[str, str], store: Store, scratch: Path, ranks: Ranks
) -> tuple[Survey, str]:
    """Base and data, brought to `scratch` once a node, with the backend imported meanwhile."""
    bundle_named(environment)
    ranks.once_per_node(scratch, "bundle", lambda: use_bundle(spec, environment, scratch))
    with nullcontext() if ranks.place.local_rank else arriving(spec, scratch):
        device = find_device(has_torch=True)
        check_packages(spec, device.kind == "cuda")  # `survey` does too, behind gigabytes
        if device.kind == "cuda":
            check_kernels(environment)
            keep_within(device)
        if ranks.shared("device", device.kind) != device.kind:
            raise SpecError(
                f"rank {ranks.rank} on {socket.gethostname()} has a {device.kind} and rank 0 has none of these: start as many "
                "processes on a node as it has GPUs"
            )
        backend = choose_backend(spec.model, device.kind == "cuda")
        import_first(backend)
    if ranks.rank:
        importlib.import_module("job.train.fit")  # while rank 0 looks at the rows
    look = ranks.once_per_node(
        scratch,
        "rows",
        lambda: survey(spec, store, scratch, fetch=True, world=ranks.world, on_this_node=ranks.on_this_node()),
    )
    return look, backend
