"""The last stage: publishes adapter, measurements, report and merged model, and writes `RESULT.json` at the very end."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from job import layout
from job.checkpoint.commit import sha256_of
from job.config.schema import ExportSpec
from job.context import RunContext
from job.data.facts import as_json
from job.errors import GateRefused, JobError, Unavailable
from job.evaluate.answer_cache import base_digest, rows_digest
from job.evaluate.records import Sample
from job.evaluate.stage import Results, pictures, stored_rows
from job.export.gate import least_agreement, limits
from job.export.stage import Exported
from job.planning.plan import Plan
from job.planning.stage_in import StagedIn
from job.report.contents import BaseModel, Contents, Lineage, Privacy
from job.runtime.status import now, versions
from job.store import Digest, Missing, Store, files_of, take_back, upload_files
from job.train.trackers import show_result

MAX_CHECKS = 3
"""How often the published files are checked, and sent again if they differ, before the job gives up."""


def lineage(ctx: RunContext, staged: StagedIn) -> Lineage:
    """Collect where a result comes from: inputs, versions, digests, steps, times."""
    spec, device, parent = ctx.spec, staged.facts.device, staged.adapter
    return Lineage(
        parent_adapter=spec.lora.init_adapter if parent else None,
        parent_sha256=sha256_of(parent / "adapter_model.safetensors") if parent else None,
        spec_digest=spec.digest,
        base_model=spec.model.name_or_path,
        base_revision=commit(staged.base) or spec.model.revision,
        base_sha256=base_digest(staged.base),
        dataset=spec.dataset.path,
        dataset_revision=spec.dataset.revision,
        device=device.name if device else None,
        image=ctx.environment.image_digest,
        price_per_hour=ctx.environment.price_per_hour,
        train_sha256=staged.data.facts.train_sha256,
        held_out_sha256=rows_digest(staged.data.evaluation),
        trained_steps=ctx.record.read("step"),
        taken_step=ctx.record.read("taken_step"),
        taken=spec.evaluation.take,
        attempts=ctx.number,
        written=now(),
        foreseen=ctx.record.read("foreseen"),
        seconds=dict(ctx.record.seconds),
        packages=versions(),
        package_lock=layout.LOCK_KEY,
        package_lock_sha256=hashlib.sha256(package_lock()).hexdigest(),
    )


@cache
def package_lock() -> bytes:
    """Return every installed package, pinned as by `pip freeze`: one `name==version` per line."""
    found = {f"{package.name}=={package.version}\n" for package in metadata.distributions()}
    return "".join(sorted(found, key=str.lower)).encode()


def commit(base: Path | None) -> str | None:
    """Return the commit of a base model in the hub's cache, which has one folder per commit; None for any other folder."""
    return base.name if base is not None and base.parent.name == "snapshots" else None


def report_contents(ctx: RunContext, staged: StagedIn, plan: Plan, results: Results, exported: Exported) -> Contents:
    """Collect everything that the report and the model cards are made from."""
    from job.model.generation import left_out

    spec = ctx.spec
    data = staged.data
    return Contents(
        name=spec.name,
        plan={
            "steps": plan.total_steps,
            "effective_batch_size": spec.training.effective_batch_size,
            "precision": plan.precision,
            "trainable parameters": plan.groups,
            "learning_rate": spec.training.learning_rate,
            "num_train_epochs": spec.training.num_train_epochs,
            "lora_r": spec.lora.r,
            "lora_alpha": spec.lora.lora_alpha,
        },
        lineage=lineage(ctx, staged),
        requirements=results.requirements,
        gate=gate_facts(exported, spec.export),
        occlusion=results.maps,
        data=as_json(data.facts),
        privacy=Privacy(spec.privacy.report_images),
        base=BaseModel(spec.model.name_or_path, staged.facts.base.model_type if staged.facts.base else None),
        instruction=data.facts.instruction,
        metrics=results.metrics,
        before=results.before,
        after=results.after,
        samples=stored_rows(ctx.store, layout.SAMPLES_KEY, Sample),
        log=ctx.record.read_numbers(),
        max_new_tokens=spec.evaluation.max_new_tokens,
        left_out=tuple(left_out(staged.base)),
        **(vars(exported.serving) if exported.serving else {}),
    )


def gate_facts(exported: Exported, spec: ExportSpec) -> dict[str, Any]:
    """Return what the gate measured of the merged weights, of those in fewer bits and of servers, and the limits of all three."""
    if exported.gate is None:
        return {}
    smaller = {name: asdict(each) for name, each in exported.smaller.items()}
    losses = {f"loss_{name}": each.pop("loss") for name, each in smaller.items()}
    measured = {name: loss for name, loss in losses.items() if loss is not None}
    served = {f"served_{name}": asdict(found) for name, found in exported.served.items()}
    most, least = limits(exported.gate, spec.gate)
    bounds = {"mean_logit_difference": most, "token_agreement": least}
    bounds |= {"gain_kept": spec.gate.min_gain_kept} if smaller else {}
    if served:
        rounded, tokens = exported.gate.rounding_token_agreement, min(each.tokens for each in exported.served.values())
        bounds["served_agreement"] = least_agreement(spec.serve.min_agreement, spec.gate, rounded, tokens)
    found = {**asdict(exported.gate), "limits": bounds, **measured}
    return {**found, **({"smaller": smaller} if smaller else {}), **served}


def publish(ctx: RunContext, plan: Plan, staged: StagedIn, results: Results, exported: Exported) -> None:
    """Publish adapter, measurements and report. If the requirements and the gate are met, also publish the merged model, push to
    the hub, and write `RESULT.json` at the very end.

    Otherwise raises GateRefused, after adapter, measurements and report are published.
    """
    from job.export import hub
    from job.report import model_card
    from job.report.page import gallery_ids, render

    spec, store, record = ctx.spec, ctx.store, ctx.record
    with record.stage("lineage"):
        contents = report_contents(ctx, staged, plan, results, exported)
    with record.stage("publish") as facts:
        metrics = asdict(results.metrics) if contents.after else None
        if metrics:
            store.write(layout.METRICS_KEY, json.dumps(metrics, indent=1).encode())
        refused = unmet_requirements(results.unmet) or exported.refused
        if refused is not None:
            contents = replace(contents, gate={**contents.gate, "refused": refused})
        images = pictures(staged.data.evaluation, gallery_ids(contents)) if contents.after else {}
        page = render(contents, images).encode()
        store.write(layout.REPORT_KEY, page)
        keep_for_reports(store, contents, images)
        show_result(ctx, contents, page)
        record.publish_numbers()
        store.write(layout.LOCK_KEY, package_lock())
        files = {f"{layout.MERGED}/{name}": digest for name, digest in exported.sent.items()}
        # An upload keeps the file of an earlier attempt until the new one is complete, and the disk may have room for only one of
        # them.
        store.delete([key for key in merged_keys(store) if key not in files])
        local = dict[str, Path]()
        for name, folder in exported.folders.items():
            if name == "adapter" or refused is None:
                (folder / "README.md").write_text(model_card.render(contents, name))
                local |= {f"{name}/{file}": folder / file for file in files_of(folder)}
                files |= send(store, folder, name)
        if refused is not None:
            store.delete(merged_keys(store))
            raise GateRefused(refused)
        ensure_published(store, files, local)
        ctx.lease.assure()  # the hub has no conditional writes
        pushed = hub.push(spec.export.hub, exported.folders)
        result = {
            "name": spec.name,
            "spec_digest": spec.digest,
            "result_digest": spec.result_digest,
            "published": now(),
            "steps": contents.lineage.trained_steps,
            "taken_step": contents.lineage.taken_step,
            "taken": contents.lineage.taken,
            "verdict": metrics and metrics["verdict"],
            "metrics": metrics and {name: metrics[name] for name in ("before", "after", "change")},
            "gate": contents.gate,
            "measured_with": {
                "precision": plan.precision,
                "instruction": contents.instruction,
                "image_bounds": contents.bounds,
            },
            "lineage": contents.to_json()["lineage"] | {"stages": dict(record.stages)},
            "hub": pushed,
            "files": {key: {"size": digest.size, "sha256": digest.sha256} for key, digest in files.items()},
        }
        write_result(ctx, json.dumps(result, indent=1).encode(), files, local)
        facts.append(f"{len(files)} files")


def merged_keys(store: Store) -> list[str]:
    """List the keys of the merged model, and of the formats that are made from it."""
    return [entry.key for entry in store.list() if entry.key.startswith(layout.MADE_OF_MERGED)]


def send(store: Store, folder: Path, prefix: str) -> dict[str, Digest]:
    """Upload the files of a folder under `prefix`. Returns their digests by key."""
    sent = upload_files(store, folder, {file: f"{prefix}/{file}" for file in files_of(folder)})
    return {f"{prefix}/{file}": digest for file, digest in sent.items()}


def write_result(ctx: RunContext, text: bytes, files: dict[str, Digest], local: dict[str, Path]) -> None:
    """Write `RESULT.json`, then check that the job still holds the lease and that the files are as sent. If not, remove it and
    raise."""
    store = ctx.store
    version = store.write(layout.RESULT_KEY, text)
    try:
        ctx.lease.confirm()
        ensure_published(store, files, local)
    except JobError as error:
        if ctx.lease.lost or isinstance(error, Unavailable):
            take_back(store, layout.RESULT_KEY, version)
        raise


def ensure_published(store: Store, files: dict[str, Digest], local: dict[str, Path]) -> None:
    """Check that the store holds every file as it was sent. A file that differs is sent again if `local` has its path; its new
    digest is entered in `files`. Raises Unavailable if files still differ after that."""
    for _ in range(MAX_CHECKS):
        changed = [key for key, digest in files.items() if not _is_as_sent(store, key, digest)]
        if not changed:
            return
        for key in changed:
            if key in local:
                again = store.upload(local[key], key)
                if again.sha256 != files[key].sha256:
                    raise Unavailable(f"{local[key]} has changed since it was sent to {key}; run again")
                files[key] = again
    raise Unavailable(
        f"{store.url}: {changed[0]} is not the file that was sent ({len(changed)} such files): something else writes to this "
        "output, or the store loses data; run again"
    )


def _is_as_sent(store: Store, key: str, digest: Digest) -> bool:
    """Check the file itself rather than a listing, which may be out of date."""
    try:
        return store.entry(key).version == digest.version or store.version(key) == digest.sha256
    except Missing:
        return False


def keep_for_reports(store: Store, contents: Contents, images: dict[str, bytes]) -> None:
    """Store what `job report` needs in addition to the published files. `images` is empty if the spec withholds them."""
    store.write(layout.FACTS_KEY, json.dumps(contents.to_json(), indent=1).encode())
    by_key = {f"{layout.IMAGES}{identity}.jpg": content for identity, content in images.items()}
    store.delete([entry.key for entry in store.list(layout.IMAGES) if entry.key not in by_key])
    for key, content in by_key.items():
        store.write(key, content)


def unmet_requirements(unmet: list[str]) -> str | None:
    """Return a sentence on the requirements that the tuned model does not meet; None if it meets all."""
    if not unmet:
        return None
    return f"the tuned model does not meet the spec's requirements: {'; '.join(unmet)}; only the adapter is published"
