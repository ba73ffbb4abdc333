"""Adapter, merged weights and the gate between them."""

from __future__ import annotations

import shutil
import warnings
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.errors import GateRefused, SpecError
from job.model import release
from job.model.lora import group_of
from job.model.memory import gate_batch
from job.record import bytes_text
from job.store import Digest

if TYPE_CHECKING:
    from job.attempt import Attempt
    from job.data import Data
    from job.export.places import Base
    from job.model import Loaded
    from job.model.fetch import BaseFacts
    from job.model.transformers_backend import Offload
    from job.spec import ExportSpec, JobSpec


INT4_GROUP = 128
"""Columns of a weight that share a scale in compressed-tensors' W4A16."""


@dataclass(frozen=True)
class Exported:
    """Folders ready to publish, by the name they are published under: `adapter`, and what the spec asks for besides.

    `sent` are files of `merged` that are in the output already. `gate` holds what was measured; `refused` says why
    nothing but the adapter may be published.
    """

    folders: dict[str, Path]
    sent: dict[str, Digest] = field(default_factory=dict)
    gate: dict[str, Any] = field(default_factory=dict)
    refused: str | None = None


def check_export(spec: ExportSpec, base: BaseFacts) -> None:
    """Whether this base can become what the spec asks for, as far as its files' headers tell. Raises SpecError."""
    from job.export.gguf import converter

    if spec.gguf:
        converter(base.model_type)
    for name, layer in base.linears.items() if spec.merged_int4 else ():
        if (group_of(name) or "").startswith("language") and layer.in_features % INT4_GROUP:
            raise SpecError(
                f"export.merged_int4: it scales {INT4_GROUP} columns of a weight together, and {name} has {layer.in_features}, "
                "which is no multiple of that; set it to false, and take merged_fp8 or merged_4bit"
            )


def check_mergeable(spec: JobSpec, loaded: Loaded) -> None:
    """Whether each adapter of the loaded model has its place in the base's files, and the files are what llama.cpp's converter
    knows. Raises SpecError, before hours are spent."""
    from peft import get_peft_model_state_dict

    from job.export.gguf import converter, rehearse
    from job.export.places import changes, read_base

    if spec.export.merged:
        base = read_base(loaded.folder, spec.model.trust_remote_code)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tensors = get_peft_model_state_dict(loaded.model)
        changes(base, loaded.model.peft_config["default"].to_dict(), tensors)
    if spec.export.gguf:
        rehearse(converter(loaded.model.config.model_type), loaded.folder)


def export(attempt: Attempt, loaded: Loaded, data: Data, *, fold: bool, gate_room: int | None) -> Exported:
    """Write the adapter to scratch and, where it shall `fold` it in, what the spec asks for of merged weights, to scratch or
    straight to the output, measured against the adapter. `loaded.model` cannot be used afterwards.

    `gate_room`: bytes of weights that the GPU holds of a model in 16 bits; None where all of it fits.
    """
    from job.export.places import read_base
    from job.model.oom_retry import free_cached
    from job.model.transformers_backend import Offload

    spec, record = attempt.spec, attempt.record
    folder = attempt.scratch / "export"
    adapter = folder / "adapter"
    with record.stage("export") as facts, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        free_cached()  # what training left
        shutil.rmtree(adapter, ignore_errors=True)
        loaded.model.save_pretrained(adapter)
        loaded.processor.save_pretrained(adapter)
        if not fold:
            return Exported({"adapter": adapter})
        base = read_base(loaded.folder, spec.model.trust_remote_code)
        offload = Offload(gate_room, folder / "offloaded") if gate_room is not None else None
        exported = merged(attempt, loaded, base, folder, data, offload)
        size = sum((base.folder / file).stat().st_size for file in base.files)
        facts += [f"merged {bytes_text(size)}", f"token agreement {exported.gate['token_agreement']:.4f}"]
        if exported.refused is None:
            exported = smaller(spec, loaded, exported, data, offload)
        attempt.preemption.check()  # a library on the way may have swallowed the notice
    return exported


def merged(attempt: Attempt, loaded: Loaded, base: Base, folder: Path, data: Data, offload: Offload | None) -> Exported:
    """Fold, and judge what came out from where it lies. `loaded.model` is let go on the way."""
    from job.export.gate import compare, refuse
    from job.export.merge import copy_rest, merge_to_folder, merge_to_store, recipe
    from job.export.places import changes, read_adapter
    from job.export.served import read_back
    from job.model.oom_retry import free_cached
    from job.model.transformers_backend import load_weights

    spec, store = attempt.spec, attempt.store
    adapter, into = folder / "adapter", folder / "merged"
    todo = recipe(base, adapter, changes(base, *read_adapter(adapter)), loaded.device)
    sent: dict[str, Digest] = {}
    if spec.export.scratch_copy:
        merge_to_folder(todo, into)
        read_merged = partial(load_weights, spec.model, into, loaded.device, offload=offload)
    else:
        shutil.rmtree(into, ignore_errors=True)
        sent = merge_to_store(todo, store, "merged", attempt.lease.check)
        read_merged = partial(read_back, spec.model, into, base, store, "merged", sent, loaded.device, offload=offload)
    copy_rest(base.folder, into)
    free_cached()  # the pieces of the merge
    let_go = partial(release, loaded.model)
    verdict = compare(spec, loaded, base, read_merged, rows_of(data), let_go=let_go, offload=offload)
    refused = None
    try:
        refuse(verdict, spec.export.gate)
    except GateRefused as error:
        refused = str(error)
    return Exported({"adapter": adapter, "merged": into}, sent, verdict.facts(), refused)


def smaller(spec: JobSpec, loaded: Loaded, exported: Exported, data: Data, offload: Offload | None) -> Exported:
    """Write merged weights in fewer bits, where the spec asks for them, and measure them on the gate's rows."""
    from job.export.answers import answers, loss, spread_rows
    from job.export.gate import micro_batches
    from job.export.gguf import converter, write_gguf
    from job.export.quantised import write_compressed, write_nf4

    kinds: dict[str, Any] = {
        "merged_4bit": write_nf4,
        "merged_fp8": partial(write_compressed, "FP8_DYNAMIC", offload=offload),
        "merged_int4": partial(write_compressed, "W4A16", offload=offload),
    }
    folders, gate = dict(exported.folders), dict(exported.gate)
    batches = spread_rows(rows_of(data), spec.export.gate.rows, gate_batch(spec))
    for name, write in kinds.items():
        if getattr(spec.export, name):
            folders[name] = folders["merged"].with_name(name)
            shutil.rmtree(folders[name], ignore_errors=True)
            model = write(spec.model, folders["merged"], folders[name], loaded.device)
            small = replace(loaded, model=model, precision="16bit", backend="transformers")
            gate[f"loss_{name}"] = loss(answers(small, batches, spec, micro_batches(spec, loaded)))
            release(model)
    if spec.export.gguf:
        folders["gguf"] = folders["merged"].with_name("gguf")
        write_gguf(converter(loaded.model.config.model_type), folders["merged"], folders["gguf"])
    return replace(exported, folders=folders, gate=gate)


def rows_of(data: Data) -> Any:
    """The rows that are compared on: held-out ones where there are any."""
    return data.evaluation if len(data.evaluation) else data.train
