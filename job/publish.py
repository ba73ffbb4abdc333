"""The last stage: everything that people take away goes to the output, `RESULT.json` at the very end."""

from __future__ import annotations

import json
import os
from typing import Any

from job.attempt import Attempt
from job.data import Data, as_jsonl
from job.errors import GateRefused
from job.evaluate import Rows, pictures
from job.evaluate.before import rows_digest
from job.export import Exported
from job.output import REPORT_KEY, RESULT_KEY
from job.plan import Plan
from job.record import now, versions
from job.report import FACTS_KEY, IMAGES, KEPT
from job.spec import JobSpec
from job.store import Digest, Store, upload_folder
from job.survey import Survey


def lineage(attempt: Attempt, survey: Survey) -> dict[str, Any]:
    """Where a result comes from."""
    spec = attempt.spec
    device = survey.facts.device
    return {
        "spec_digest": spec.digest,
        "base_model": spec.model.name_or_path,
        "base_revision": spec.model.revision,
        "dataset": spec.dataset.path,
        "dataset_revision": spec.dataset.revision,
        "device": device.name if device else None,
        "image": os.environ.get("JOB_IMAGE_DIGEST"),
        "price_per_hour": os.environ.get("JOB_PRICE_PER_HOUR"),
        "held_out_sha256": rows_digest(survey.data.evaluation) if survey.data else None,
        "attempts": attempt.number,
        "seconds": dict(attempt.record.seconds),
        "packages": versions(),
    }


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
        "instruction": spec.dataset.instruction,
    }


def publish(attempt: Attempt, data: Data, exported: Exported, facts: dict[str, Any], unmet: list[str]) -> None:
    """Adapter, measurements and report; then, if measurement and gate let them, merged weights; `RESULT.json` last.

    `unmet` says which demands of `evaluation.require` are not met. Raises GateRefused, with everything but `merged/` and
    `RESULT.json` in its place.
    """
    from job.evaluate.report import gallery_ids, render
    from job.export import card

    spec, store, record = attempt.spec, attempt.store, attempt.record
    with record.stage("publish") as said:
        store.write("data/quarantine.jsonl", as_jsonl(data.quarantined))
        store.write("data/near_duplicates.jsonl", as_jsonl(data.near))
        if facts["metrics"]:
            store.write("evaluation/metrics.json", json.dumps(facts["metrics"], indent=1).encode())
        refused = refusal(spec, exported, unmet)
        if refused is not None:
            facts["gate"] = facts["gate"] | {"refused": str(refused)}
        images = pictures(data.evaluation, gallery_ids(facts)) if facts["after"] else {}
        store.write(REPORT_KEY, render(facts, images).encode())
        keep_for_reports(store, facts, images)
        record.publish_numbers()
        (exported.adapter / "README.md").write_text(card.render(facts, "adapter"))
        files = _upload(store, exported.adapter, "adapter")
        if refused is not None:
            raise refused
        if exported.merged is not None:
            (exported.merged / "README.md").write_text(card.render(facts, "merged"))
            files |= _upload(store, exported.merged, "merged")
        attempt.lease.confirm()
        result = {
            "name": spec.name,
            "spec_digest": spec.digest,
            "published": now(),
            "steps": facts["plan"]["steps"],
            "metrics": facts["metrics"] and {k: facts["metrics"][k] for k in ("before", "after", "change")},
            "gate": exported.gate,
            "lineage": facts["lineage"],
            "files": {key: digest._asdict() for key, digest in files.items()},
        }
        store.write(RESULT_KEY, json.dumps(result, indent=1).encode())
        said.append(f"{len(files)} files")


def keep_for_reports(store: Store, facts: dict[str, Any], images: dict[str, bytes]) -> None:
    """What `job report` needs beside the files that are there anyway; no image where privacy keeps them out."""
    store.write(FACTS_KEY, json.dumps({name: facts[name] for name in KEPT}, indent=1).encode())
    there = {f"{IMAGES}{identity}.png": content for identity, content in images.items()}
    store.delete([entry.key for entry in store.list(IMAGES) if entry.key not in there])
    for key, content in there.items():
        store.write(key, content)


def refusal(spec: JobSpec, exported: Exported, unmet: list[str]) -> GateRefused | None:
    """Why the model is not published: it is not as good as demanded, or merged is not the adapter. None when it may be."""
    from job.export.gate import Verdict, refuse

    if unmet:
        return GateRefused(
            f"the tuned model is not as good as the spec demands: {'; '.join(unmet)}; only the adapter is kept"
        )
    if exported.merged is None:
        return None
    try:
        refuse(Verdict(**exported.gate), spec.export.gate)
    except GateRefused as error:
        return error
    return None


def _upload(store: Store, folder: Any, prefix: str) -> dict[str, Digest]:
    return {f"{prefix}/{name}": digest for name, digest in upload_folder(store, folder, prefix).items()}
