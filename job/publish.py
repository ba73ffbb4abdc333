"""The last stage: everything that people take away goes to the output, `RESULT.json` at the very end."""

from __future__ import annotations

import hashlib
import json
import os
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from job.attempt import Attempt
from job.data import Data
from job.errors import GateRefused, Unavailable
from job.evaluate import Rows, pictures, stored_rows
from job.evaluate.before import base_digest, rows_digest
from job.export import Exported
from job.output import MADE_OF_MERGED, REPORT_KEY, RESULT_KEY
from job.plan import Plan
from job.record import now, versions
from job.report import FACTS_KEY, IMAGES, KEPT, SAMPLES_KEY
from job.store import Digest, Store, upload_folder
from job.survey import Survey

LOCK_KEY = "logs/packages.txt"


def lineage(attempt: Attempt, survey: Survey) -> dict[str, Any]:
    """Where a result comes from; with the adapter that it began from, if it did."""
    spec = attempt.spec
    device = survey.facts.device
    parent = {}
    if survey.adapter is not None:
        with (survey.adapter / "adapter_model.safetensors").open("rb") as weights:
            digest = hashlib.file_digest(weights, "sha256").hexdigest()
        parent = {"parent_adapter": spec.lora.init_adapter, "parent_sha256": digest}
    return parent | {
        "spec_digest": spec.digest,
        "base_model": spec.model.name_or_path,
        "base_revision": commit(survey.base) or spec.model.revision,
        "base_sha256": base_digest(survey.base) if survey.base else None,
        "dataset": spec.dataset.path,
        "dataset_revision": spec.dataset.revision,
        "device": device.name if device else None,
        "image": os.environ.get("JOB_IMAGE_DIGEST"),
        "price_per_hour": os.environ.get("JOB_PRICE_PER_HOUR"),
        "train_sha256": survey.data.facts["train_sha256"] if survey.data else None,
        "held_out_sha256": rows_digest(survey.data.evaluation) if survey.data else None,
        "trained_steps": attempt.record.read("step"),
        "taken_step": attempt.record.read("taken_step"),
        "taken": spec.evaluation.take,
        "attempts": attempt.number,
        "foreseen": attempt.record.read("foreseen"),
        "seconds": dict(attempt.record.seconds),
        "packages": versions(),
        "package_lock": LOCK_KEY,
        "package_lock_sha256": hashlib.sha256(package_lock()).hexdigest(),
    }


@cache
def package_lock() -> bytes:
    """Every installed package as pip would pin it."""
    found = {f"{package.name}=={package.version}\n" for package in metadata.distributions()}
    return "".join(sorted(found, key=str.lower)).encode()


def commit(base: Path | None) -> str | None:
    """The commit of a base from the hub: its cache has a folder for each."""
    return base.name if base is not None and base.parent.name == "snapshots" else None


def report_facts(
    attempt: Attempt,
    survey: Survey,
    plan: Plan,
    before: Rows,
    after: Rows,
    measured: dict[str, Any] | None,
    exported: Exported,
    seen: dict[str, Any],
) -> dict[str, Any]:
    """All that report and cards are made of."""
    spec = attempt.spec
    data = survey.data
    assert data is not None
    return {
        "name": spec.name,
        "metrics": measured,
        "before": before,
        "after": after,
        "samples": stored_rows(attempt.store, SAMPLES_KEY),
        "log": attempt.record.read_numbers(),
        "plan": {
            "steps": plan.total_steps,
            "effective_batch_size": spec.training.effective_batch_size,
            "precision": plan.precision,
            "trainable parameters": plan.groups,
            "learning_rate": spec.training.learning_rate,
            "num_train_epochs": spec.training.num_train_epochs,
            "lora_r": spec.lora.r,
            "lora_alpha": spec.lora.lora_alpha,
        },
        "lineage": lineage(attempt, survey),
        "gate": exported.gate,
        "occlusion": seen,
        "data": data.facts,
        "privacy": {"report_images": spec.privacy.report_images},
        "base": {
            "name_or_path": spec.model.name_or_path,
            "model_type": survey.facts.base.model_type if survey.facts.base else None,
        },
        "instruction": data.facts.get("instruction"),
    }


def publish(attempt: Attempt, data: Data, exported: Exported, facts: dict[str, Any], unmet: list[str]) -> None:
    """Adapter, measurements and report; then, if measurement and gate let them, merged weights and hub; `RESULT.json` last.

    `unmet` says which demands of `evaluation.require` are not met. Raises GateRefused, with everything but `merged/` and
    `RESULT.json` in its place.
    """
    from job.evaluate.report import gallery_ids, render
    from job.export import card, hub

    spec, store, record = attempt.spec, attempt.store, attempt.record
    with record.stage("publish") as said:
        if facts["metrics"]:
            store.write("evaluation/metrics.json", json.dumps(facts["metrics"], indent=1).encode())
        refused = unmet_demands(unmet) or exported.refused
        if refused is not None:
            facts["gate"] = facts["gate"] | {"refused": refused}
        images = pictures(data.evaluation, gallery_ids(facts)) if facts["after"] else {}
        store.write(REPORT_KEY, render(facts, images).encode())
        keep_for_reports(store, facts, images)
        record.publish_numbers()
        store.write(LOCK_KEY, package_lock())
        files = {f"merged/{name}": digest for name, digest in exported.sent.items()}
        # What an earlier attempt sent would lie beside each new file until that is whole, and the disk may hold it but once.
        stale = [entry.key for prefix in MADE_OF_MERGED for entry in store.list(prefix) if entry.key not in files]
        store.delete(stale)
        for name, folder in exported.folders.items():
            if name == "adapter" or refused is None:
                (folder / "README.md").write_text(card.render(facts, name))
                files |= {f"{name}/{file}": digest for file, digest in upload_folder(store, folder, name).items()}
        if refused is not None:
            store.delete([entry.key for prefix in MADE_OF_MERGED for entry in store.list(prefix)])
            raise GateRefused(refused)
        verify(store, files)
        pushed = hub.push(spec.export.hub, exported.folders)
        attempt.lease.confirm()
        result = {
            "name": spec.name,
            "spec_digest": spec.digest,
            "published": now(),
            "steps": facts["lineage"]["trained_steps"],
            "taken_step": facts["lineage"]["taken_step"],
            "taken": facts["lineage"]["taken"],
            "metrics": facts["metrics"] and {k: facts["metrics"][k] for k in ("before", "after", "change")},
            "gate": exported.gate,
            "lineage": facts["lineage"] | {"stages": dict(record.stages)},
            "hub": pushed,
            "files": {key: digest._asdict() for key, digest in files.items()},
        }
        store.write(RESULT_KEY, json.dumps(result, indent=1).encode())
        said.append(f"{len(files)} files")


def verify(store: Store, files: dict[str, Digest]) -> None:
    """Whether every published file lies in the store, whole. What it holds was checked as it was sent."""
    there = {entry.key: entry.size for prefix in ("adapter/", *MADE_OF_MERGED) for entry in store.list(prefix)}
    for key, digest in files.items():
        if there.get(key) != digest.size:
            raise Unavailable(
                f"{store.url}: {key} was sent with {digest.size} bytes and lies there with {there.get(key)}"
            )


def keep_for_reports(store: Store, facts: dict[str, Any], images: dict[str, bytes]) -> None:
    """What `job report` needs beside the files that are there anyway; no image where privacy keeps them out."""
    store.write(FACTS_KEY, json.dumps({name: facts[name] for name in KEPT}, indent=1).encode())
    there = {f"{IMAGES}{identity}.jpg": content for identity, content in images.items()}
    store.delete([entry.key for entry in store.list(IMAGES) if entry.key not in there])
    for key, content in there.items():
        store.write(key, content)


def unmet_demands(unmet: list[str]) -> str | None:
    """The sentence for a model that is not as good as demanded; None for one that is."""
    if not unmet:
        return None
    return f"the tuned model is not as good as the spec demands: {'; '.join(unmet)}; only the adapter is kept"
