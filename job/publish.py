"""The last stage: publishes adapter, measurements, report and merged weights, and `RESULT.json` last of all."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from functools import cache
from importlib import metadata
from pathlib import Path

from job import layout
from job.checkpoint.commit import sha256_of
from job.context import RunContext
from job.data.facts import as_json
from job.errors import GateRefused, JobError, Unavailable
from job.evaluate.answer_cache import base_digest, rows_digest
from job.evaluate.records import Sample
from job.evaluate.stage import Results, pictures, stored_rows
from job.export.stage import Exported
from job.planning.plan import Plan
from job.planning.stage_in import StagedIn
from job.report.contents import BaseModel, Contents, Lineage, Privacy
from job.runtime.status import now, versions
from job.store import Digest, Missing, Store, files_of, take_back, upload_files

TIMES = 3
"""How often a published file is sent before the job concludes that something else writes there."""


def lineage(ctx: RunContext, staged: StagedIn) -> Lineage:
    """Collect the origin of a result."""
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
        foreseen=ctx.record.read("foreseen"),
        seconds=dict(ctx.record.seconds),
        packages=versions(),
        package_lock=layout.LOCK_KEY,
        package_lock_sha256=hashlib.sha256(package_lock()).hexdigest(),
    )


@cache
def package_lock() -> bytes:
    """List every installed package as pip would pin it."""
    found = {f"{package.name}=={package.version}\n" for package in metadata.distributions()}
    return "".join(sorted(found, key=str.lower)).encode()


def commit(base: Path | None) -> str | None:
    """The commit of a base model from the hub, whose cache has one folder per commit."""
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
        gate={**asdict(exported.gate), **exported.losses} if exported.gate else {},
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


def publish(ctx: RunContext, plan: Plan, staged: StagedIn, results: Results, exported: Exported) -> None:
    """Publish adapter, measurements and report; then, if measurements and gate allow it, merged weights and hub; `RESULT.json`
    last.

    Raises GateRefused once everything except `merged/` and `RESULT.json` is in place.
    """
    from job.export import hub
    from job.report import model_card
    from job.report.page import gallery_ids, render

    spec, store, record = ctx.spec, ctx.store, ctx.record
    with record.stage("lineage"):
        contents = report_contents(ctx, staged, plan, results, exported)
    with record.stage("publish") as said:
        metrics = asdict(results.metrics) if contents.after else None
        if metrics:
            store.write(layout.METRICS_KEY, json.dumps(metrics, indent=1).encode())
        refused = unmet_demands(results.unmet) or exported.refused
        if refused is not None:
            contents = replace(contents, gate={**contents.gate, "refused": refused})
        images = pictures(staged.data.evaluation, gallery_ids(contents)) if contents.after else {}
        store.write(layout.REPORT_KEY, render(contents, images).encode())
        keep_for_reports(store, contents, images)
        record.publish_numbers()
        store.write(layout.LOCK_KEY, package_lock())
        files = {f"{layout.MERGED}/{name}": digest for name, digest in exported.sent.items()}
        # A file from an earlier attempt would stay beside its replacement until that is complete, and the disk may have room for
        # only one.
        store.delete([key for key in made_of_merged(store) if key not in files])
        here = dict[str, Path]()
        for name, folder in exported.folders.items():
            if name == "adapter" or refused is None:
                (folder / "README.md").write_text(model_card.render(contents, name))
                here |= {f"{name}/{file}": folder / file for file in files_of(folder)}
                files |= send(store, folder, name)
        if refused is not None:
            store.delete(made_of_merged(store))
            raise GateRefused(refused)
        make_sure(store, files, here)
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
        write_result(ctx, json.dumps(result, indent=1).encode(), files, here)
        said.append(f"{len(files)} files")


def made_of_merged(store: Store) -> list[str]:
    """List the keys of merged weights, and of what is made of them."""
    return [entry.key for entry in store.list() if entry.key.startswith(layout.MADE_OF_MERGED)]


def send(store: Store, folder: Path, prefix: str) -> dict[str, Digest]:
    """Upload the files of a folder to their published keys. Returns digests by key."""
    sent = upload_files(store, folder, {file: f"{prefix}/{file}" for file in files_of(folder)})
    return {f"{prefix}/{file}": digest for file, digest in sent.items()}


def write_result(ctx: RunContext, text: bytes, files: dict[str, Digest], here: dict[str, Path]) -> None:
    """Write `RESULT.json`, then check that the lease was held and the files match it; otherwise remove it."""
    store = ctx.store
    version = store.write(layout.RESULT_KEY, text)
    try:
        ctx.lease.confirm()
        make_sure(store, files, here)
    except JobError as error:
        if ctx.lease.lost or isinstance(error, Unavailable):
            take_back(store, layout.RESULT_KEY, version)
        raise


def make_sure(store: Store, files: dict[str, Digest], here: dict[str, Path]) -> None:
    """Check that every published file is in the store as it was sent. Sends a file that is not once more if it is still
    `here`; raises Unavailable if that does not help."""
    for _ in range(TIMES):
        changed = [key for key, digest in files.items() if not _lies(store, key, digest)]
        if not changed:
            return
        for key in changed:
            if key in here:
                again = store.upload(here[key], key)
                if again.sha256 != files[key].sha256:
                    raise Unavailable(f"{here[key]} is not the file any more that was sent to {key}; run again")
                files[key] = again
    raise Unavailable(
        f"{store.url}: {changed[0]} is not what was sent there ({len(changed)} such files): somebody else writes to this output, "
        "or the store loses bytes; run again"
    )


def _lies(store: Store, key: str, digest: Digest) -> bool:
    """Check the file itself, since a listing may lag."""
    try:
        return store.entry(key).version == digest.version or store.version(key) == digest.sha256
    except Missing:
        return False


def keep_for_reports(store: Store, contents: Contents, images: dict[str, bytes]) -> None:
    """Store what `job report` needs besides the published files, without images if privacy excludes them."""
    store.write(layout.FACTS_KEY, json.dumps(contents.to_json(), indent=1).encode())
    there = {f"{layout.IMAGES}{identity}.jpg": content for identity, content in images.items()}
    store.delete([entry.key for entry in store.list(layout.IMAGES) if entry.key not in there])
    for key, content in there.items():
        store.write(key, content)


def unmet_demands(unmet: list[str]) -> str | None:
    """Explain how a model misses the spec's demands; None if it meets them."""
    if not unmet:
        return None
    return f"the tuned model is not as good as the spec demands: {'; '.join(unmet)}; only the adapter is kept"
