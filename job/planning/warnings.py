"""Warns of what a plan's reader should know before the job runs. Pure, like the plan."""

from __future__ import annotations

from pathlib import PurePosixPath

from job.config.schema import JobSpec
from job.data.facts import DataFacts
from job.data.layouts import listed, split_of
from job.model.lora_targets import unreached
from job.model.memory_model import Memory, last_cure
from job.planning.batch_fit import fits
from job.planning.facts import Facts
from job.planning.shortage import Foreseen
from job.runtime.preemption import FITS
from job.runtime.status import bytes_text

FEW_ROWS, FEW_GROUPS = 20, 10


def warnings(
    spec: JobSpec, facts: Facts, chosen: list[str], total: int | None, memory: Memory | None, cure: str, precision: str
) -> list[str]:
    """Returns what to know before this runs. `chosen` names the layers that get an adapter; `cure` comes first if memory is short
    in this `precision`."""
    found = list(facts.notes)
    if facts.data is not None:
        found += _data_warnings(spec, facts.data)
    if facts.checkpoint_seconds is not None and facts.checkpoint_seconds > FITS * facts.environment.grace_seconds:
        found.append(
            f"a checkpoint took {facts.checkpoint_seconds:.0f} s to reach the store earlier, and a preemption notice leaves "
            f"{facts.environment.grace_seconds:.0f} s (JOB_GRACE_SECONDS): give more time, or lower checkpoint.save_steps"
        )
    if total is not None and spec.checkpoint.save_steps > total:
        found.append(
            f"checkpoint.save_steps {spec.checkpoint.save_steps} exceeds the {total} steps: one checkpoint, at the end"
        )
    if facts.base is not None:
        found += [
            f"{100 * share:.0f} % of the weights in the {tower} layers get no adapter, since no group reaches them (see `without "
            "adapters`); lora.target_modules can name linear layers among them"
            for tower, share in unreached(spec.lora, facts.base.matrices, chosen).items()
        ]
    device = facts.device
    if device is not None and device.kind == "cuda" and memory is not None and not fits(memory, device, 1):
        found.append(
            f"a micro-batch of one row needs about {bytes_text(memory.of(1))} ({bytes_text(memory.weights)} of it weights), and "
            f"{device.name} has {bytes_text(device.memory)}; {cure}shrink images with "
            f"dataset.image_max_side, {last_cure(precision)}"
        )
    return found


def _data_warnings(spec: JobSpec, data: DataFacts) -> list[str]:
    dataset = spec.dataset
    own = bool(dataset.eval_path or dataset.eval_split)
    split, named = split_of(dataset.split), split_of(PurePosixPath(dataset.path).name)
    others = " and ".join(f"{count} rows {other}" for other, count in data.other_splits.items())
    found = {
        "no rows are held out, so nothing will be measured": data.evaluation == 0,
        f"only {data.evaluation} rows are held out: intervals will be wide": 0 < data.evaluation < FEW_ROWS,
        f"only {data.validation} rows of {data.validation_groups} groups (patients) choose the step, so chance chooses it "
        "as much as the loss does; give more rows, or set evaluation.take to last and remove patience": data.validation
        is not None
        and (data.validation < FEW_ROWS or (data.validation_groups or 0) < FEW_GROUPS),
        f"{data.same_in_both} groups or images are in both training and held-out rows": data.same_in_both,
        f"{data.near_duplicates} held-out images are nearly the same as a training image "
        "(data/near_duplicates.jsonl)": data.near_duplicates,
        "dataset.group_column is not set: rows of one patient may be on both sides of the split": not (
            data.grouped or dataset.group_column or own
        ),
        f"{data.alike_groups} groups of rows are named like another one but for leading zeros or a .0 (first: rows "
        f"{listed(list(map(str, data.alike_rows or ())))}) and count as different patients; if they are not, write them alike in "
        f"{f'column {dataset.group_column}' if dataset.group_column else 'the DICOM files'}": data.alike_groups,
        f"dataset.path is named after a {named} split, and its rows are trained on": named and named != split,
        f"{listed(data.left_out)}: named after a split other than {dataset.split}, and not read; "
        "to evaluate on one, name it in dataset.eval_split": data.left_out and not own,
        f"bad rows set aside: {data.quarantined} (data/quarantine.jsonl)": data.quarantined,
        f"{data.blank} rows have an image of one grey throughout; job look shows them": data.blank,
        f"{data.default_window} rows have CT images without a window, which are shown with center 40 and width 400; "
        "dataset.dicom.window sets another": data.default_window,
        f"{data.without_images} rows have no image, and are trained on text alone": data.without_images
        and dataset.image_column is not None,
        f"dataset.path: its column {data.split_column} calls {others}, which are used like all other rows; write a table "
        "for each split, and name the held-out one in dataset.eval_path": others,
        f"{data.lossy} rows contain U+FFFD (\ufffd) in place of a lost character, and would teach it": data.lossy,
        f"{data.over_length} rows exceed training.max_length: their answers are truncated": data.over_length,
        f"{data.burned_in_yes} rows say that text is burned into their pixels: check it for names": data.burned_in_yes,
        f"{data.burned_in_maybe} rows do not say whether text is burned into their pixels; install the burned-in "
        "extra to search them for it": data.burned_in_maybe,
    }
    return [text for text, holds in found.items() if holds]


def short_of(foreseen: Foreseen) -> list[str]:
    """Reports what `run` refuses as a warning only: `check` may run on a machine that is not the job's."""
    return [f"run refuses this here: {each.text}" if each.sure else each.text for each in foreseen.shortages]
