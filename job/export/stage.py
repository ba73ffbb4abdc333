"""Exports the adapter and merged weights, with the gate between them."""

from __future__ import annotations

import logging
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.errors import GateRefused, SpecError
from job.model.families import family_of
from job.model.loaded import release
from job.model.lora_targets import group_of
from job.model.memory_model import gate_batch
from job.runtime.status import bytes_text
from job.store import Digest

if TYPE_CHECKING:
    from job.config.schema import ExportSpec, JobSpec
    from job.context import RunContext
    from job.data import Data
    from job.evaluate.stage import Results
    from job.export.gain import Smaller
    from job.export.gate import Reference, Verdict
    from job.export.questions import Agreement
    from job.export.serving import Serving
    from job.model.base_model import BaseFacts
    from job.model.loaded import Loaded
    from job.model.transformers_backend import Offload
    from job.model.weight_map import Base

log = logging.getLogger("job")

INT4_GROUP = 128
"""Columns of a weight that share a scale in compressed-tensors' W4A16."""


@dataclass(frozen=True)
class Exported:
    """Folders ready to publish, by the name they are published under: `adapter`, and whatever else the spec requests.

    `sent` are files of `merged` already in the output. `gate` holds the measurements of `merged`, and `smaller` those of each
    format in fewer bits, published or not; `serving` is what a server must be given, and `served` how one answered from each
    folder; `refused` says why only the adapter may be published.
    """

    folders: dict[str, Path]
    sent: dict[str, Digest] = field(default_factory=dict)
    gate: Verdict | None = None
    smaller: dict[str, Smaller] = field(default_factory=dict)
    serving: Serving | None = None
    served: dict[str, Agreement] = field(default_factory=dict)
    refused: str | None = None


def check_export(spec: ExportSpec, base: BaseFacts) -> None:
    """Check that this base can be exported as the spec requests, as far as its files' headers tell. Raises SpecError."""
    from job.export.gguf import converter

    if spec.gguf:
        converter(base.model_type)
    found = {server.name: server for server in family_of(base.model_type).servers}
    if spec.serve.engine is not None and found and "vLLM" not in found:
        raise SpecError(f"export.serve.engine: no vLLM is known to serve {base.model_type}; remove it")
    for name, layer in base.linears.items() if spec.merged_int4 else ():
        if (group_of(name) or "").startswith("language") and layer.in_features % INT4_GROUP:
            raise SpecError(
                f"export.merged_int4: {INT4_GROUP} columns of a weight share a scale, and {name} has {layer.in_features}, "
                "which is not a multiple of that; set it to false, and use merged_fp8 or merged_4bit"
            )


def check_mergeable(spec: JobSpec, loaded: Loaded) -> None:
    """Check that each adapter of the loaded model maps to the base's files, that llama.cpp's converter knows those files, and
    that the server to ask is there. Raises SpecError, before hours are spent."""
    from peft import get_peft_model_state_dict

    from job.export.gguf import converter, rehearse
    from job.export.served import interpreter, server_version
    from job.export.tensor_map import changes
    from job.model.weight_map import read_base

    if spec.export.merged:
        base = read_base(loaded.folder, spec.model.trust_remote_code)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tensors = get_peft_model_state_dict(loaded.model)
        changes(base, loaded.model.peft_config["default"].to_dict(), tensors)
    if spec.export.serve.engine is not None:
        server_version(spec.export.serve, interpreter(spec.export.serve, os.environ))
    if spec.export.gguf:
        rehearse(converter(loaded.model.config.model_type), loaded.folder)


def export(
    ctx: RunContext, loaded: Loaded, data: Data, results: Results, *, fold: bool, gate_room: int | None
) -> Exported:
    """Write the adapter to scratch and, with `fold`, the merged weights that the spec requests, to scratch or straight to the
    output, measured against the adapter and the evaluation's `results`. `loaded.model` cannot be used afterwards.

    `gate_room`: bytes of a 16-bit model's weights that the GPU holds; None if all of them fit.
    """
    from job.export.serving import serving, spoilt, write_settings
    from job.model.oom_retry import free_cached
    from job.model.transformers_backend import Offload
    from job.model.weight_map import read_base

    spec, record = ctx.spec, ctx.record
    folder = ctx.scratch / "export"
    adapter = folder / "adapter"
    with record.stage("export") as facts, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        free_cached()  # memory left over from training
        shutil.rmtree(adapter, ignore_errors=True)
        loaded.model.save_pretrained(adapter)
        loaded.processor.save_pretrained(adapter)
        write_settings(adapter, loaded, spec, data.bounds)
        served = serving(spec, loaded, data, folder)
        if not fold:
            return Exported({"adapter": adapter}, serving=served)
        base = read_base(loaded.folder, spec.model.trust_remote_code)
        offload = Offload(gate_room, folder / "offloaded") if gate_room is not None else None
        kept: list[Reference] = []
        keep = kept.append if spec.export.serve.engine is not None else lambda _: None  # its logits are gigabytes
        exported, verdict = merged(ctx, loaded, base, folder, data, offload, keep)
        size = sum((base.folder / file).stat().st_size for file in base.files)
        agreed, rounded = verdict.token_agreement, verdict.rounding_token_agreement
        facts += [
            f"merged {bytes_text(size)}",
            f"token agreement {agreed:.4f} where rounding alone leaves {rounded:.4f}",
        ]
        if verdict.warning:
            log.warning("merged/: %s", verdict.warning)
        exported = replace(exported, serving=served)
        if exported.refused is None:
            wrong = spoilt(exported.folders["merged"], loaded, spec, data.bounds)
            exported = replace(exported, refused=wrong)
        if exported.refused is None and spec.export.serve.engine is not None:
            exported = asked(spec, loaded, exported, data, results, kept[0])
        if exported.refused is None:
            exported = smaller(spec, loaded, exported, data, results, offload)
        ctx.preemption.check()  # a library may have swallowed the notice
    return exported


def merged(
    ctx: RunContext,
    loaded: Loaded,
    base: Base,
    folder: Path,
    data: Data,
    offload: Offload | None,
    keep: Callable[[Reference], None],
) -> tuple[Exported, Verdict]:
    """Merge, and judge the result from where it was written. Releases `loaded.model`; `keep` is called with what was measured on
    base + adapter."""
    from job.export.gate import compare, refuse
    from job.export.merge import merge_to_folder, merge_to_store, recipe
    from job.export.read_back import read_back, read_folder
    from job.export.serving import beside_weights
    from job.export.tensor_map import changes, read_adapter
    from job.model.oom_retry import free_cached
    from job.model.transformers_backend import load_processor

    spec, store = ctx.spec, ctx.store
    adapter, into = folder / "adapter", folder / "merged"
    todo = recipe(base, adapter, changes(base, *read_adapter(adapter)), loaded.device)
    sent: dict[str, Digest] = {}
    if spec.export.scratch_copy:
        merge_to_folder(todo, into)
        read_merged = partial(read_folder, spec.model, into, base, loaded.device, offload=offload)
    else:
        shutil.rmtree(into, ignore_errors=True)
        sent = merge_to_store(todo, store, "merged")
        read_merged = partial(read_back, spec.model, into, base, store, "merged", sent, loaded.device, offload=offload)
    processor = load_processor(spec.model, beside_weights(into, loaded, spec, data.bounds))
    free_cached()  # the pieces of the merge
    let_go = partial(release, loaded.model)
    rows = rows_of(data)
    verdict = compare(
        spec, loaded, base, read_merged, rows, processor=processor, let_go=let_go, offload=offload, keep=keep
    )
    refused = None
    try:
        refuse(verdict, spec.export.gate)
    except GateRefused as error:
        refused = str(error)
    return Exported({"adapter": adapter, "merged": into}, sent, verdict, refused=refused), verdict


def asked(
    spec: JobSpec, loaded: Loaded, exported: Exported, data: Data, results: Results, reference: Reference
) -> Exported:
    """Ask a server about the gate's rows, from `merged/` and, if it can serve the family's adapters, from `adapter/`."""
    from job.export.questions import rows_to_ask
    from job.export.served import ask_server, folders_to_serve, refuse_served

    serving = exported.serving
    served: dict[str, Agreement] = {}
    assert serving is not None
    after = results.after if loaded.precision != "4bit" else []
    rows = rows_to_ask(
        reference, loaded, spec, data, {answer.id: (answer.generated, answer.tokens) for answer in after}
    )
    try:
        for folder in folders_to_serve(spec, loaded, exported.folders):
            name = folder.folder.name
            served[name] = ask_server(spec, loaded, serving, reference, rows, folder)
            refuse_served(served[name], name, spec, reference)
    except GateRefused as error:
        return replace(exported, served=served, refused=str(error))
    return replace(exported, served=served)


def smaller(
    spec: JobSpec, loaded: Loaded, exported: Exported, data: Data, results: Results, offload: Offload | None
) -> Exported:
    """Write merged weights in fewer bits if the spec requests them, and measure what they keep of the adapter's gain. A format
    that keeps too little of it is not among the folders that are published."""
    from job.export.gain import Smaller, judge, label_shares
    from job.export.gate import micro_batches
    from job.export.logits import answers, loss, spread_rows

    assert exported.gate is not None
    folders = dict(exported.folders)
    measured: dict[str, Smaller] = {}
    batches = spread_rows(rows_of(data), spec.export.gate.rows, gate_batch(spec))
    for name, write in _formats(spec, loaded, data, offload).items():
        if not getattr(spec.export, name):
            continue
        folder = folders["merged"].with_name(name)
        shutil.rmtree(folder, ignore_errors=True)
        try:
            model = write(folders["merged"], folder)
        except GateRefused as error:
            measured[name] = Smaller(refused=str(error))
        else:
            small = replace(loaded, model=model, precision="16bit", backend="transformers")
            lost = loss(answers(small, batches, spec, micro_batches(spec, loaded)))
            shares = label_shares(small, data, spec, results)
            release(model)
            measured[name] = judge(name, lost, shares, exported.gate, spec.export.gate)
        if said := measured[name].refused or measured[name].note:
            log.warning("%s", said)
        if not measured[name].refused:
            folders[name] = folder
    return replace(exported, folders=folders, smaller=measured)


def _formats(spec: JobSpec, loaded: Loaded, data: Data, offload: Offload | None) -> dict[str, Callable[..., Any]]:
    """Return what writes each format in fewer bits, from one folder to another, and returns the model that it wrote."""
    from job.export.gguf import converter, write_gguf
    from job.export.gguf_numbers import strange_numbers
    from job.export.quantise import calibration_rows, write_fp8, write_int4, write_nf4
    from job.model.transformers_backend import load_weights

    model, device = spec.model, loaded.device

    def int4(merged: Path, into: Path) -> Any:
        calibration = calibration_rows(loaded, data.train, spec)
        return write_int4(model, merged, into, device, loaded.processor, calibration, offload)

    def gguf(merged: Path, into: Path) -> Any:
        program = converter(loaded.model.config.model_type)
        write_gguf(program, merged, into)
        if strange := strange_numbers(program, merged, into):
            raise GateRefused(
                f"gguf/ is not published: {strange:,} of its numbers are not those of merged/; run again, or with other sources "
                "in LLAMA_CPP, or set export.gguf to false"
            )
        return load_weights(model, merged, device, "16bit", offload)  # GGUF holds the same numbers in bfloat16

    return {
        "merged_4bit": lambda merged, into: write_nf4(model, merged, into, device),
        "merged_fp8": lambda merged, into: write_fp8(model, merged, into, device, offload),
        "merged_int4": int4,
        "gguf": gguf,
    }


def rows_of(data: Data) -> Any:
    """Return the rows that the gate compares on: held-out ones if there are any."""
    return data.evaluation if len(data.evaluation) else data.train
