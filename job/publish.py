"""The output folder as a whole: whose it is, what the last file in it says, and writing that file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import yaml

from job.attempt import Attempt
from job.data import Data, quarantine_jsonl
from job.errors import JobError, Preempted, SpecError
from job.evaluate import Rows, metrics, pictures
from job.export import Exported
from job.plan import Plan
from job.record import STATUS_KEY, now, versions
from job.spec import JobSpec, differences
from job.specfile import parse, validate
from job.store import Digest, Store, upload_folder
from job.survey import Survey

RESULT_KEY, SPEC_KEY, REPORT_KEY = "RESULT.json", "spec.yaml", "report.html"
OURS = ("checkpoints/", "evaluation/", "adapter/", "merged/", "data/", "logs/")
OUR_FILES = (RESULT_KEY, REPORT_KEY, STATUS_KEY, SPEC_KEY)


def read_json(store: Store, key: str) -> dict[str, Any] | None:
    """An object of the output, None when it is not there (or is not JSON, which only another's hand can cause)."""
    try:
        tree = json.loads(store.read(key))
    except Preempted:
        raise
    except (JobError, ValueError) as error:
        if isinstance(error, ValueError) or error.exit_code == 65:
            return None
        raise
    return tree if isinstance(tree, dict) else None


def is_published(store: Store, spec: JobSpec) -> bool:
    """Whether this very job ended well here. Raises SpecError when another one did and the spec says refuse."""
    result = read_json(store, RESULT_KEY)
    if result is None:
        return False
    if result.get("spec_digest") == spec.digest:
        return True
    if spec.output.on_conflict == "refuse":
        raise SpecError(_conflict(store, spec))
    return False


def check_owner(store: Store, spec: JobSpec) -> bool:
    """Whether the output holds a run of another spec, to be deleted. Raises SpecError when the spec does not say so."""
    stored = stored_spec(store)
    if stored is None or stored.digest == spec.digest:
        return False
    if spec.output.on_conflict == "refuse":
        raise SpecError(_conflict(store, spec))
    return True


def begin(store: Store, spec: JobSpec) -> int:
    """Make the output this spec's and return the attempt's number, from 1.

    Raises SpecError when it holds a run of another spec, unless `on_conflict` is restart: then that run is deleted.
    """
    if check_owner(store, spec):
        store.delete([RESULT_KEY])
        entries = [entry.key for entry in store.list() if entry.key.startswith(OURS) or entry.key in OUR_FILES]
        store.delete(sorted(entries, key=lambda key: not key.endswith("MANIFEST.json")))
    last = read_json(store, STATUS_KEY) or {}
    text = f"# sha256 of what decides the result: {spec.digest}\n" + yaml.safe_dump(
        spec.model_dump(mode="json", exclude_unset=False), sort_keys=False, allow_unicode=True
    )
    store.write(SPEC_KEY, text.encode())
    return int(last.get("attempt", 0)) + 1


def stored_spec(store: Store) -> JobSpec | None:
    """The spec of the run that the output holds."""
    try:
        text = store.read(SPEC_KEY).decode()
    except Preempted:
        raise
    except JobError as error:
        if error.exit_code == 65:
            return None
        raise
    tree = parse(text)
    if tree.get("dataset", {}).get("eval_path") or tree.get("dataset", {}).get("eval_split"):
        tree["dataset"].pop("eval_fraction", None)  # a default written out, not a choice
    return validate(tree)


def _conflict(store: Store, spec: JobSpec) -> str:
    stored = stored_spec(store)
    fields = "; ".join(differences(stored, spec)) if stored is not None else "its spec.yaml is gone"
    return (
        f"output.url: {spec.output.url} holds a run of another spec ({fields}). Choose another output, put the fields "
        "back, or set output.on_conflict to restart, which deletes that run"
    )


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
        "attempts": attempt.number,
        "seconds": dict(attempt.record.seconds),
        "packages": versions(),
    }


def report_facts(
    attempt: Attempt, survey: Survey, plan: Plan, before: Rows, after: Rows, exported: Exported
) -> dict[str, Any]:
    """All that report and cards are made of."""
    spec = attempt.spec
    data = survey.data
    assert data is not None
    return {
        "name": spec.name,
        "metrics": metrics(spec, data, before, after) if after else None,
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
        "data": data.facts,
        "privacy": {"report_images": spec.privacy.report_images},
        "base": {
            "name_or_path": spec.model.name_or_path,
            "model_type": survey.facts.base.model_type if survey.facts.base else None,
        },
        "instruction": spec.dataset.instruction,
    }


def publish(attempt: Attempt, data: Data, exported: Exported, facts: Mapping[str, Any]) -> None:
    """Adapter, measurements and report; then, if the gate lets them, merged weights; `RESULT.json` last.

    Raises GateRefused, with everything but `merged/` and `RESULT.json` in its place.
    """
    from job.evaluate.report import gallery_ids, render
    from job.export import card

    spec, store, record = attempt.spec, attempt.store, attempt.record
    with record.stage("publish") as said:
        store.write("data/quarantine.jsonl", quarantine_jsonl(data))
        if facts["metrics"]:
            store.write("evaluation/metrics.json", json.dumps(facts["metrics"], indent=1).encode())
        images = pictures(data.evaluation, gallery_ids(facts)) if facts["after"] else {}
        store.write(REPORT_KEY, render(facts, images).encode())
        record.publish_numbers()
        (exported.adapter / "README.md").write_text(card.render(facts, "adapter"))
        files = _upload(store, exported.adapter, "adapter")
        if exported.merged is not None:
            _judge(spec, exported)
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


def _judge(spec: JobSpec, exported: Exported) -> None:
    from job.export.gate import Verdict, refuse

    refuse(Verdict(**exported.gate), spec.export.gate)


def _upload(store: Store, folder: Any, prefix: str) -> dict[str, Digest]:
    return {f"{prefix}/{name}": digest for name, digest in upload_folder(store, folder, prefix).items()}
