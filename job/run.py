"""The story of one job, top to bottom."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import MutableMapping
from contextlib import ExitStack

from job import output
from job.attempt import Attempt
from job.bundle import use_bundle
from job.data import NEAR_KEY, QUARANTINE_KEY, BadRows, as_jsonl
from job.export import check_mergeable, hub
from job.metrics import serving, writing
from job.model import choose_backend, import_first, load_model
from job.plan import describe, make_plan
from job.preemption import Preemption
from job.record import Record
from job.scratch import breathing, prepare_scratch
from job.spec import JobSpec
from job.spot import watching
from job.store import check_writable
from job.store.lease import acquire
from job.survey import arriving, find_device, restored_cache, survey, torch_device

log = logging.getLogger("job")

LEASE_SECONDS = 60.0
"""How long a killed job keeps its successor waiting; `JOB_LEASE_SECONDS` overrides it."""


def run(spec: JobSpec, environment: MutableMapping[str, str], preemption: Preemption) -> None:
    """From spec to `RESULT.json`. Returns when it is there; raises a JobError for every other foreseen ending.

    Run again after any ending, it does what is missing and nothing else.
    """
    root = prepare_scratch(environment)
    scratch = root / spec.digest[:16]
    scratch.mkdir(exist_ok=True)
    with ExitStack() as stack:
        stack.enter_context(breathing(root))
        with preemption.leave_at_once():
            store = output.open_output(spec)
            if output.is_published(store, spec):
                log.info("published already: %s", spec.output.url)
                return
            check_writable(store)
            ttl = float(environment.get("JOB_LEASE_SECONDS") or LEASE_SECONDS)
            holder = f"{socket.gethostname()}:{os.getpid()}"
            lease = stack.enter_context(acquire(store, holder, ttl, wait=ttl + 5))
        stack.enter_context(watching(spec.preemption.spot_notices, preemption, environment))
        number = output.begin(store, spec)
        record = stack.enter_context(Record(store, scratch, name=spec.name, attempt=number).kept())
        stack.enter_context(serving(record, environment))
        stack.enter_context(writing(record, environment))
        with preemption.leave_at_once():
            with record.stage("stage in"):
                use_bundle(spec, environment, scratch)
                hub.check_token(spec.export.hub)
                with arriving(spec, scratch):
                    device = find_device(has_torch=True)
                    compiled = restored_cache(spec, store, scratch.parent, device)
                    backend = choose_backend(spec.model, device.kind == "cuda")
                    import_first(backend)
                try:
                    found = survey(spec, store, scratch, fetch=True)
                except BadRows as error:
                    store.write(QUARANTINE_KEY, as_jsonl(error.rows))
                    raise
            attempt = Attempt(spec, store, lease, scratch, record, preemption, number, compiled)
            plan = make_plan(spec, found.facts)
            log.info("%s", describe(spec, plan, found.facts))
            data, base = found.data, found.base
            assert data is not None
            assert base is not None
            store.write(QUARANTINE_KEY, as_jsonl(data.quarantined))
            store.write(NEAR_KEY, as_jsonl(data.near))
            with record.stage("load"):
                # Imported here: a published job, and one that waits for the lease, need none of the training libraries.
                from job.evaluate import judge, looked_at, measure, values
                from job.evaluate.extra import scored
                from job.export import export
                from job.publish import publish, report_facts
                from job.train.fit import fit

                loaded = load_model(spec, base, torch_device(), backend, plan.precision, found.adapter)
                check_mergeable(spec, loaded)
        before = measure(attempt, loaded, data, "before")
        fit(attempt, plan, loaded, data)
        after = measure(attempt, loaded, data, "after")
        scored(attempt, before, after)
        measured, refused = judge(spec, data, before, after)
        record.update(measured=values(measured))
        seen = looked_at(attempt, loaded, data, measured, before, after)
        with preemption.leave_at_once():
            exported = export(attempt, loaded, data, fold=spec.export.merged and not refused)
            facts = report_facts(attempt, found, plan, before, after, measured, exported, seen)
            publish(attempt, data, exported, facts, refused)
        log.info("published: %s", spec.output.url)
