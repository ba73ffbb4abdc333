"""Checks the fields of a spec, each one and against each other."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

import regex

from job.config.parsing import did_you_mean
from job.config.schema import (
    CHEXBERT,
    FIELD,
    METRICS,
    DatasetSpec,
    EvaluationSpec,
    ExportSpec,
    JobSpec,
    LoraSpec,
    ModelSpec,
    deciding,
    rates,
)
from job.store.urls import unusable

MOST_REPEATED = 10_000
"""Limit on the characters of a label's pattern with its repetitions expanded."""


def differences(old: JobSpec, new: JobSpec) -> list[str]:
    """List the fields that decide the training and differ, as `path: old → new`."""
    before, after = deciding(old), deciding(new)
    paths = sorted(before.keys() | after.keys())
    return [f"{p}: {before.get(p)!r} → {after.get(p)!r}" for p in paths if before.get(p) != after.get(p)]


def contradictions(spec: JobSpec) -> list[str]:
    """Describe, in one sentence each, fields that are valid individually but contradict each other."""
    return [
        *_places(spec),
        *_lora(spec.lora),
        *_model(spec.model),
        *_dataset(spec.dataset),
        *_training(spec),
        *_labels(spec.evaluation),
        *_privacy(spec),
        *_export(spec.export),
        *_evaluation(spec),
        *_output(spec),
    ]


def _places(spec: JobSpec) -> Iterator[str]:
    places = {
        "model.name_or_path": spec.model.name_or_path,
        "lora.init_adapter": spec.lora.init_adapter,
        "dataset.path": spec.dataset.path,
        "dataset.eval_path": spec.dataset.eval_path,
        "evaluation.cache": spec.evaluation.cache,
        "output.url": spec.output.url,
    } | {f"evaluation.extra_metrics.{name}": place for name, place in spec.evaluation.extra_metrics.items()}
    for field, place in places.items():
        if place and (problem := unusable(place)):
            yield f"{field}: {problem}"


def _lora(lora: LoraSpec) -> Iterator[str]:
    if lora.finetune_expert_modules:
        yield (
            "lora: finetune_expert_modules is true, but routed experts are fused tensors, and merge and gate know adapters of "
            "layers only; set it to false"
        )
    if isinstance(lora.target_modules, str):
        yield from _not_an_expression("lora.target_modules", lora.target_modules)
    if lora.target_modules is not None:
        if lora.finetune_connector:
            yield "lora: target_modules replaces finetune_connector; set that to false, and name the connector's layers"
        return
    for one, other in (("vision_layers", "language_layers"), ("attention_modules", "mlp_modules")):
        if not (getattr(lora, f"finetune_{one}") or getattr(lora, f"finetune_{other}") or lora.finetune_connector):
            yield (
                f"lora: finetune_{one} and finetune_{other} are both false, so nothing would be trained; set at least one to "
                "true"
            )


def _model(model: ModelSpec) -> Iterator[str]:
    if model.trust_remote_code and not re.fullmatch(r"[0-9a-f]{40}", model.revision or ""):
        yield "model: trust_remote_code runs code from the hub, so model.revision must be a full commit (40 hex)"
    if model.backend == "unsloth" and model.precision == "32bit":
        yield "model: backend unsloth needs precision 4bit or 16bit, not 32bit"
    if model.backend == "unsloth" and model.attn_implementation == "eager":
        yield "model: backend unsloth chooses its own attention; remove attn_implementation"


def _dataset(data: DatasetSpec) -> Iterator[str]:
    fields = DatasetSpec.model_fields.items()
    given = {name for name, field in fields if getattr(data, name) != field.get_default()}  # a resolved spec sets all
    if data.eval_path is not None and data.eval_split is not None:
        yield "dataset: eval_path and eval_split both name held-out rows; keep one"
    if data.eval_split and data.eval_split.strip().casefold() == data.split.strip().casefold():
        yield f"dataset: eval_split and split both name {data.split}, so every held-out row would be trained on; name another"
    if data.eval_path or data.eval_split:
        for field in sorted({"eval_fraction", "eval_rows", "stratify_column"} & given):
            yield f"dataset: {field} holds out rows of path, but eval_path or eval_split already names held-out rows; remove one"
    if data.eval_rows is not None and "eval_fraction" in given:
        yield "dataset: eval_fraction and eval_rows both set how many rows are held out; keep one"
    for column in [column for column, values in data.filter.items() if values == []]:
        yield f"dataset: filter names no value of {column}, so no row would be left; name one, or remove the column"
    if data.messages_column is not None:
        for field in sorted({"answer", "answer_column", "instruction", "instruction_column"} & given):
            yield f"dataset: {field} has no effect with messages_column; remove one"
    if data.messages_column is None and (told := _told(data)):
        yield f"dataset: {told}, which is also the text to learn, so every prompt would hold its answer; remove it there"
    if data.dicom.series.description is not None:
        yield from _not_an_expression("dataset.dicom.series.description", data.dicom.series.description)
    if data.answer is not None and not re.search(r"\{\w", data.answer):
        yield "dataset.answer: names no column in braces, so every row would have the same answer; add one, as in {findings}"


def _told(data: DatasetSpec) -> str:
    """Say which field of the prompt names the whole answer's columns; empty if none does."""
    learned = set(FIELD.findall(data.answer)) if data.answer else {data.answer_column}
    if data.instruction_column is not None:
        return f"instruction_column is {data.instruction_column}" if learned == {data.instruction_column} else ""
    return f"instruction has {{{min(learned)}}}" if learned and learned <= set(FIELD.findall(data.instruction)) else ""


def _training(spec: JobSpec) -> Iterator[str]:
    training, micro = spec.training, spec.training.per_device_train_batch_size
    if spec.model.backend == "transformers" and training.gradient_checkpointing == "unsloth":
        yield "training: gradient_checkpointing: unsloth does not work with model.backend transformers; set it to true"
    if training.torch_compile is True and not spec.model.by_unsloth:
        yield (
            "training: torch_compile: true needs Unsloth, which model.backend or model.attn_implementation rules out; "
            "remove it"
        )
    if training.shard == "fsdp" and spec.model.precision == "4bit":
        yield "training: shard: fsdp cannot shard a base in 4 bits; set model.precision to 16bit"
    if training.shard == "fsdp" and spec.model.backend == "unsloth":
        yield "training: shard: fsdp does not work with model.backend unsloth, which needs whole weights; set it to transformers"
    if micro != "auto" and training.effective_batch_size % micro:
        yield (
            f"training: effective_batch_size {training.effective_batch_size} is not a multiple of "
            f"per_device_train_batch_size {micro}"
        )


def _labels(evaluation: EvaluationSpec) -> Iterator[str]:
    for name, label in evaluation.labels.items():
        if label.values is not None and label.pattern is not None:
            yield f"evaluation.labels.{name}: give values or pattern, not both"
        if label.pattern is not None and (label.separator or label.uncertain_column):
            yield f"evaluation.labels.{name}: a pattern finds one value; remove separator and uncertain_column"
        if label.pattern is not None:
            yield from _pattern_problem(f"evaluation.labels.{name}.pattern", label.pattern)


def _privacy(spec: JobSpec) -> Iterator[str]:
    if spec.privacy.burned_in == "mask" and spec.privacy.look_for_text is False:
        yield "privacy: burned_in: mask needs a search for text; set look_for_text to auto or true"


def _export(export: ExportSpec) -> Iterator[str]:
    if export.merged and export.scratch_copy:
        return
    why = "set scratch_copy to true" if export.merged else "set merged to true"
    for name in ("merged_4bit", "merged_fp8", "merged_int4", "gguf"):
        if getattr(export, name):
            yield f"export: {name} needs merged weights on scratch; {why}"
    for name, asked in {"hub.merged_repo": export.hub.merged_repo, "serve.engine": export.serve.engine}.items():
        if asked:
            yield f"export: {name} needs merged weights on scratch; {why}"


def _evaluation(spec: JobSpec) -> Iterator[str]:
    data, evaluation = spec.dataset, spec.evaluation
    held = data.eval_fraction or data.eval_rows or data.eval_path or data.eval_split
    if evaluation.eval_steps is None:
        needing = {"take: best": evaluation.take == "best", "patience": evaluation.patience}
        yield from (f"evaluation: {name} needs eval_steps" for name, asked in needing.items() if asked)
    elif not held and not evaluation.chooses_step:
        yield "evaluation: eval_steps needs held-out rows, and dataset.eval_fraction is 0"
    known = {*METRICS, *evaluation.extra_metrics, *(CHEXBERT if "chexbert" in evaluation.extra_metrics else ())}
    kinds = ("accuracy", "macro_f1", "micro_f1", "uncertain_f1")
    known |= {
        f"{name}_{kind}" for name, label in evaluation.labels.items() for kind in kinds[: 2 if label.pattern else None]
    }
    if evaluation.primary_metric and evaluation.primary_metric not in known:
        yield f"evaluation.primary_metric: no metric {evaluation.primary_metric}{_metrics(evaluation.primary_metric, known)}"
    chexbert = "chexbert" in evaluation.extra_metrics
    bounded = known | {name for label in evaluation.labels.values() for name in rates(label.values or (), chexbert)}
    open_ended = any(not label.pattern and not label.values for label in evaluation.labels.values())
    for metric, demand in evaluation.require.items():
        if metric not in bounded and not (open_ended and metric.endswith(tuple(rates([""], chexbert)))):
            yield f"evaluation.require.{metric}: no such metric{_metrics(metric, bounded)}"
        if demand.model_dump(exclude={"judged_by"}, exclude_none=True) == {}:
            yield f"evaluation.require.{metric}: sets no bound; give min_change, max_change, min_value or max_value"
    if evaluation.require and not held:
        yield "evaluation.require: no rows are held out (dataset.eval_fraction is 0), so nothing can be required"


def _metrics(name: str, known: set[str]) -> str:
    """Offer the nearest metric; of a finding's rates, one whose finding is near. Without one, list all."""
    rate = max((end for end in rates([""], True) if name.endswith(end)), key=len, default="")
    stems = [each.removesuffix(rate) for each in sorted(known) if each.endswith(rate)]
    return did_you_mean(name.removesuffix(rate), stems, after=rate) or f"; the metrics are {', '.join(sorted(known))}"


def _output(spec: JobSpec) -> Iterator[str]:
    if spec.output.sse_kms_key_id and spec.output.sse != "aws:kms":
        yield "output: sse_kms_key_id needs sse: aws:kms"
    if spec.output.sse and not spec.output.url.startswith("s3://"):
        yield "output: sse needs an s3:// store"


def _pattern_problem(where: str, pattern: str) -> list[str]:
    """Check a label's pattern with the package regex, which also runs it later. regex expands repetitions."""
    repeated = math.prod(max(int(least[:9] or 0), 1) for least in re.findall(r"\{(\d*)", pattern))
    if len(pattern) > MOST_REPEATED or repeated > MOST_REPEATED:
        return [f"{where}: longer than {MOST_REPEATED:,} characters with its repetitions expanded; shorten it"]
    try:
        groups = regex.compile(pattern, regex.IGNORECASE).groups
    except (regex.error, ValueError, OverflowError, RecursionError, MemoryError) as error:
        return [f"{where}: not a regular expression ({error or type(error).__name__})"]
    return [] if groups else [f"{where}: has no group; put the value in parentheses"]


def _not_an_expression(where: str, pattern: str) -> list[str]:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError, MemoryError) as error:
        return [f"{where}: not a regular expression ({error or type(error).__name__})"]
    return []
