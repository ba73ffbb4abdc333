"""Exports the adapter and merged weights, with the gate between them."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.errors import GateRefused, SpecError
from job.layout import answers_key
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
    from job.export.gate import Reference, Verdict
    from job.export.questions import Agreement
    from job.export.serving import Serving
    from job.export.tensor_map import Base
    from job.model.base_model import BaseFacts
    from job.model.loaded import Loaded
    from job.model.transformers_backend import Offload


INT4_GROUP = 128
"""Columns of a weight that share a scale in compressed-tensors' W4A16."""


@dataclass(frozen=True)
class Exported:
    """Folders ready to publish, by the name they are published under: `adapter`, and whatever else the spec requests.

    `sent` are files of `merged` already in the output. `gate` holds the measurements of `merged`, and `losses` those of fewer
    bits, as `loss_NAME`; `serving` is what a server must be given, and `served` how one answered from each folder; `refused`
    says why only the adapter may be published.
    """

    folders: dict[str, Path]
    sent: dict[str, Digest] = field(default_factory=dict)
    gate: Verdict | None = None
    losses: dict[str, float] = field(default_factory=dict)
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
    from job.export.tensor_map import changes, read_base

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


def export(ctx: RunContext, loaded: Loaded, data: Data, *, fold: bool, gate_room: int | None) -> Exported:
    """Write the adapter to scratch and, with `fold`, the merged weights that the spec requests, to scratch or straight to the
    output, measured against the adapter. `loaded.model` cannot be used afterwards.

    `gate_room`: bytes of a 16-bit model's weights that the GPU holds; None if all of them fit.
    """
    from job.export.serving import serving, spoilt, write_settings
    from job.export.tensor_map import read_base
    from job.model.oom_retry import free_cached
    from job.model.transformers_backend import Offload

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
        exported, verdict = merged(ctx, loaded, base, folder, data, offload, kept.append)
        size = sum((base.folder / file).stat().st_size for file in base.files)
        agreed, rounded = verdict.token_agreement, verdict.rounding_token_agreement
        facts += [
            f"merged {bytes_text(size)}",
            f"token agreement {agreed:.4f} where rounding alone leaves {rounded:.4f}",
        ]
        exported = replace(exported, serving=served)
        if exported.refused is None:
            wrong = spoilt(exported.folders["merged"], loaded, spec, data.bounds)
            exported = replace(exported, refused=wrong)
        if exported.refused is None and spec.export.serve.engine is not None:
            exported = asked(ctx, loaded, exported, data, kept[0])
        if exported.refused is None:
            exported = smaller(spec, loaded, exported, data, offload)
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
    from job.export.read_back import read_back
    from job.export.serving import beside_weights
    from job.export.tensor_map import changes, read_adapter
    from job.model.oom_retry import free_cached
    from job.model.transformers_backend import load_processor, load_weights

    spec, store = ctx.spec, ctx.store
    adapter, into = folder / "adapter", folder / "merged"
    todo = recipe(base, adapter, changes(base, *read_adapter(adapter)), loaded.device)
    sent: dict[str, Digest] = {}
    if spec.export.scratch_copy:
        merge_to_folder(todo, into)
        read_merged = partial(load_weights, spec.model, into, loaded.device, offload=offload)
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


def asked(ctx: RunContext, loaded: Loaded, exported: Exported, data: Data, reference: Reference) -> Exported:
    """Ask a server about the gate's rows, from `merged/` and, if it can serve the family's adapters, from `adapter/`."""
    from job.evaluate.records import Answer
    from job.evaluate.stage import stored_rows
    from job.export.questions import rows_to_ask
    from job.export.served import ask_server, folders_to_serve, refuse_served

    spec, serving = ctx.spec, exported.serving
    served: dict[str, Agreement] = {}
    assert serving is not None
    after = stored_rows(ctx.store, answers_key("after"), Answer) if loaded.precision != "4bit" else []
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


def smaller(spec: JobSpec, loaded: Loaded, exported: Exported, data: Data, offload: Offload | None) -> Exported:
    """Write quantised merged weights if the spec requests them, and measure them on the gate's rows."""
    from job.export.gate import micro_batches
    from job.export.gguf import converter, write_gguf
    from job.export.logits import answers, loss, spread_rows
    from job.export.quantise import write_compressed, write_nf4

    kinds: dict[str, Any] = {
        "merged_4bit": write_nf4,
        "merged_fp8": partial(write_compressed, "FP8_DYNAMIC", offload=offload),
        "merged_int4": partial(write_compressed, "W4A16", offload=offload),
    }
    folders, losses = dict(exported.folders), dict[str, float]()
    batches = spread_rows(rows_of(data), spec.export.gate.rows, gate_batch(spec))
    for name, write in kinds.items():
        if getattr(spec.export, name):
            folders[name] = folders["merged"].with_name(name)
            shutil.rmtree(folders[name], ignore_errors=True)
            model = write(spec.model, folders["merged"], folders[name], loaded.device)
            small = replace(loaded, model=model, precision="16bit", backend="transformers")
            losses[f"loss_{name}"] = loss(answers(small, batches, spec, micro_batches(spec, loaded)))
            release(model)
    if spec.export.gguf:
        folders["gguf"] = folders["merged"].with_name("gguf")
        write_gguf(converter(loaded.model.config.model_type), folders["merged"], folders["gguf"])
    return replace(exported, folders=folders, losses=losses)


def rows_of(data: Data) -> Any:
    """Return the rows that the gate compares on: held-out ones if there are any."""
    return data.evaluation if len(data.evaluation) else data.train
