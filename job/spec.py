"""The job spec: one frozen tree that says everything about a run. Each field's sentence is also in `job schema`.

Names are upstream's: `learning_rate` and `num_train_epochs` from transformers, `lora_alpha` and `use_rslora` from
PEFT, `finetune_vision_layers` and `train_on_responses_only` from Unsloth, `max_length` from TRL.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveInt

HUB_ID = r"^[\w.-]+/[\w.-]+$"
RADIOGRAPHER = "You are an expert radiographer. Describe accurately what you see in this image."


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, coerce_numbers_to_str=True, protected_namespaces=()
    )


class ModelSpec(Section):
    """The base model."""

    name_or_path: str = Field(min_length=1)
    """A hub id (`unsloth/Llama-3.2-11B-Vision-Instruct`), a local folder, or an `s3://` prefix."""
    revision: str | None = None
    """Branch, tag or commit of a hub model. Pin a commit to make the run repeatable."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Needs `revision` to be a full commit."""
    backend: Literal["auto", "unsloth", "transformers"] = "auto"
    """`auto` takes Unsloth on an NVIDIA GPU where it is installed, and plain transformers + PEFT elsewhere."""
    precision: Literal["auto", "4bit", "16bit", "32bit"] = "auto"
    """How the frozen base is held: `auto` is 16bit on a GPU that has room for it, else 4bit; 32bit on a CPU."""
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """The attention kernel, where it is not Unsloth that chooses; `eager` is for the other backend alone."""

    @property
    def by_unsloth(self) -> bool:
        """Whether Unsloth trains it, where it can: eager attention adds masks, and Unsloth's are bools."""
        return self.backend != "transformers" and self.attn_implementation != "eager"


class LoraSpec(Section):
    """Which layers receive adapters, and of what shape."""

    r: PositiveInt = 16
    """Rank."""
    lora_alpha: float = Field(16, gt=0)
    """Scale: the update is multiplied by lora_alpha / r (by lora_alpha / sqrt(r) with use_rslora)."""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the adapters' input while training. 0 keeps Unsloth's fast kernels."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases are trained too."""
    use_rslora: bool = False
    """Rank-stabilised scaling (Kalajdzievski, 2023)."""
    finetune_vision_layers: bool = True
    """Adapt the vision tower."""
    finetune_language_layers: bool = True
    """Adapt the language model."""
    finetune_attention_modules: bool = True
    """Adapt attention projections."""
    finetune_mlp_modules: bool = True
    """Adapt feed-forward projections."""
    target_modules: str | list[str] | None = None
    """PEFT's own choice of modules (a regular expression or names). Replaces the four `finetune_` choices."""
    init_adapter: str | None = None
    """Start from an earlier adapter: a folder or `s3://` prefix in PEFT's format."""


class DicomSpec(Section):
    """How DICOM files become pictures, and which table holds their reports."""

    reports: str | None = None
    """The table of reports (CSV or JSONL), relative to `dataset.path`. Default: the only table there."""
    report_key: str | None = None
    """Its column that names the images, by study, series or instance UID, accession number, patient or path. Default: the one
    with such a name."""
    frames: Literal["middle", "montage"] | Annotated[list[int], Field(min_length=1)] = "middle"
    """Of a file with many frames, or a CT or MR series: the middle one, a grid of 16, or those at these places (from 0)."""
    window: tuple[float, Annotated[float, Field(gt=0)]] | None = None
    """Center and width of the window, for all files. Default: each file's own."""


class DatasetSpec(Section):
    """Rows of image and text, and how they are split."""

    path: str = Field(min_length=1)
    """A hub id, a local folder or file, or an `s3://` prefix."""
    name: str | None = None
    """Configuration name of a hub dataset."""
    split: str = "train"
    """Which split to train on."""
    revision: str | None = None
    """Branch, tag or commit of a hub dataset."""
    format: Literal["auto", "imagefolder", "json", "csv", "parquet", "webdataset", "dicom", "hub"] = "auto"
    """How `path` is read. `auto` looks, and says what it took and why."""
    image_column: str | list[str] | None = "image"
    """Column with the image or a list of images: embedded, a URL, or a path from the folder that `path` names (of an image
    folder, from its metadata file). Several columns give several images; null trains on text alone."""
    answer_column: str = "caption"
    """Column with the text to learn."""
    answer: str | None = None
    """A template for it instead: `Findings: {findings}`. Replaces `answer_column`."""
    instruction: str = RADIOGRAPHER
    """What the user turn says beside the image. `{history}` puts in the column of that name; a line whose columns are all empty
    in a row is left out of it."""
    instruction_column: str | None = None
    """Column with an instruction per row. Replaces `instruction`."""
    messages_column: str | None = None
    """Column with whole conversations, OpenAI's `messages` or ShareGPT's and LLaVA's `conversations`. Replaces the four above;
    a column of one of these names is taken by itself unless an answer is named."""
    system_prompt: str | None = None
    """Text of a system turn, where the model has one and the row has none."""
    weight_column: str | None = None
    """Column with a number of at least 0 by which the row's loss is multiplied."""
    eval_path: str | None = None
    """Held-out rows of your own, in the same format. Without it, rows are held out of `path`."""
    eval_split: str | None = None
    """Held-out split of the same hub dataset."""
    eval_fraction: float = Field(0.1, ge=0, lt=1)
    """Share of rows (or groups) held out when there is no `eval_path` or `eval_split`. 0 switches measuring off."""
    eval_rows: PositiveInt | None = None
    """How many rows to hold out instead of a share; whole groups, so it may be a few more."""
    stratify_column: str | None = None
    """Hold out the same share of each value of this column."""
    group_column: str | None = None
    """Rows with the same value here (a patient) are never on both sides of the split."""
    dicom: DicomSpec = DicomSpec()
    """For DICOM files."""
    max_rows: PositiveInt | None = None
    """Use only the first so many rows. For trials."""
    max_bad_fraction: float = Field(0.01, ge=0, le=1)
    """Bad rows are set aside up to this share; above it the job stops with 65."""
    max_image_pixels: PositiveInt = 50_000_000
    """Larger images are bad rows (a decompression bomb is refused before it is decoded)."""
    max_aspect_ratio: float = Field(50.0, gt=1)
    """Images that are longer than so many times their width are bad rows."""
    image_max_side: PositiveInt | Literal["auto"] | None = "auto"
    """Shrink images before the model's own processor: the longer side to so many pixels; `auto` to what that processor keeps, and
    so that a row's images take at most three quarters of training.max_length; null never."""
    cache_gb: float = Field(20.0, ge=0)
    """Shrunken images kept on scratch, so that large files are decoded once and not once an epoch: at most so many gigabytes."""
    over_length: Literal["drop", "fail", "truncate"] = "drop"
    """A row of more than training.max_length tokens: `drop` makes it a bad row, `fail` stops the job, `truncate` cuts its last
    answer, never its images or its prompt."""


class TrainingSpec(Section):
    """The optimisation."""

    num_train_epochs: PositiveInt = 3
    """Passes over the training rows."""
    max_steps: PositiveInt | None = None
    """Stop after so many optimizer steps, whatever the epochs say."""
    learning_rate: float = Field(2e-4, gt=0, lt=1)
    """Peak learning rate."""
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    """Its course."""
    warmup_ratio: float = Field(0.05, ge=0, lt=1)
    """Share of all steps over which it rises."""
    weight_decay: float = Field(0.01, ge=0)
    """AdamW's decay."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Gradient clipping. 0 is none."""
    optim: Literal["adamw_torch", "adamw_torch_fused", "adamw_8bit"] = "adamw_torch"
    """Optimizer, by transformers' name."""
    effective_batch_size: PositiveInt = 8
    """Samples per optimizer step, over all devices and accumulation."""
    per_device_train_batch_size: PositiveInt | Literal["auto"] = "auto"
    """Samples per forward pass on one device. `auto` fits it to the card; accumulation is derived."""
    gradient_checkpointing: bool | Literal["auto", "unsloth"] = "auto"
    """Recompute activations to save memory: `true` keeps the layers' inputs on the card, `unsloth` moves them to the host's
    memory, `false` keeps everything. `auto` puts as many rows through at once as any of these allows, and with so many
    recomputes and moves only what it must; nothing on a CPU."""
    torch_compile: bool | Literal["auto"] = "auto"
    """Run training through torch.compile, where Unsloth trains. `auto` does where all steps together gain more than compiling
    costs, as docs/gpus.md says; the numbers differ by rounding. Evaluation and short batches are never compiled."""
    vision_cache_gb: NonNegativeFloat | Literal["auto"] = "auto"
    """Scratch for the features of a vision tower that is not trained, so that each picture goes through it once. `auto`
    takes up to half of what is free; 0 keeps none."""
    max_length: PositiveInt = 2048
    """Tokens per sample, image tokens included. `dataset.over_length` says what becomes of a longer one."""
    train_on_responses_only: bool = True
    """Loss on the answer only, not on the prompt."""
    seed: int = Field(3407, ge=0, lt=2**32)
    """Seed of adapters, order and dropout."""
    dataloader_num_workers: Annotated[int, Field(ge=0, le=64)] | Literal["auto"] = "auto"
    """Processes that prepare batches ahead. `auto` is up to 4 with a GPU, none without."""
    logging_steps: PositiveInt = 1
    """Steps between lines of `logs/metrics.jsonl`; each holds the mean loss since the line before. Checkpoints and the
    last step have one too."""
    report_to: list[Literal["tensorboard", "wandb", "mlflow"]] = []
    """Also tell these, each with its own package and its own variables (`WANDB_API_KEY`, `MLFLOW_TRACKING_URI`).
    TensorBoard's files are published under `logs/tensorboard/`."""


class CheckpointSpec(Section):
    """How often the run is made safe."""

    save_steps: PositiveInt = 50
    """Optimizer steps between checkpoints. Preemption saves at once, whatever this says."""
    keep: PositiveInt = 2
    """Newest checkpoints to keep."""
    keep_every: PositiveInt | None = None
    """Also keep each checkpoint whose step is a multiple of this."""


class PreemptionSpec(Section):
    """How the job hears that it must go, and when it gives up."""

    spot_notices: Literal["aws", "gcp", "azure"] | None = None
    """Also ask this cloud's metadata service for its notice of taking the machine away."""
    max_attempts_without_progress: PositiveInt = 3
    """Stop with 79 when so many attempts died (not: were preempted) and none left a newer checkpoint or more answers."""


class LabelSpec(Section):
    """A fact that a caption states, and how to read it from the text."""

    column: str
    """Column with the true value."""
    values: list[str] | None = None
    """Words to look for; right when exactly the true one is found. Default: all values of the column."""
    pattern: str | None = None
    """A regular expression instead, whose first group is the value."""


_WORDING = ("rougeL", "rouge1", "rouge2", "bleu", "chrf", "exact_match", "token_f1", "length_ratio")
METRICS = (*_WORDING, "empty", "repeated", "loss", "perplexity")


class RequirementSpec(Section):
    """What one metric must reach, in its own unit: shares, ROUGE and F1 from 0 to 1, BLEU and chrF from 0 to 100."""

    min_change: float | None = None
    """Least change from before to after. 0 says: not worse."""
    max_change: float | None = None
    """Most change, for a metric of which less is better (loss, empty, repeated)."""
    min_value: float | None = None
    """Least value after."""
    max_value: float | None = None
    """Most value after."""
    judged_by: Literal["value", "interval"] = "value"
    """What must meet the bounds: what was measured, or the whole of its interval, which chance can hardly explain."""


class EvaluationSpec(Section):
    """The measurement before and after."""

    max_rows: PositiveInt = 200
    """Held-out rows to generate for, spread evenly over all of them."""
    max_new_tokens: PositiveInt = 128
    """Longest answer."""
    batch_size: PositiveInt | Literal["auto"] = "auto"
    """Rows generated at once. `auto` takes as many as the GPU has room for, up to 32: a batch takes hardly longer than a row."""
    labels: dict[str, LabelSpec] = Field(default_factory=dict)
    """Facts to score: `finding: {column: finding}` gives `finding_accuracy` and `finding_macro_f1`."""
    groups: list[str] = Field(default_factory=list)
    """Columns to report on separately (modality, sex, site)."""
    extra_metrics: dict[Literal["bertscore", "radgraph", "chexbert", "green"], str] = Field(default_factory=dict)
    """Metrics that need a model of their own, each with that model's folder or `s3://` prefix: for bertscore an encoder
    (`bertscore: /models/roberta-large`), for the others RadEval's cache of models. docs/evaluation.md says how to make it."""
    bootstrap_samples: int = Field(1000, ge=100, le=100_000)
    """Resamples for the intervals."""
    confidence: float = Field(0.95, gt=0.5, lt=1)
    """Level of the intervals."""
    explained_rows: NonNegativeInt = 3
    """Samples of the report with a map of where the model looked; each takes 37 forward passes. 0 makes none."""
    eval_steps: PositiveInt | None = None
    """Optimizer steps between measurements of held-out loss while training; the last step is measured too. Without it, none
    are made."""
    eval_loss_rows: PositiveInt = 64
    """Held-out rows for that, spread evenly over those that are generated for."""
    eval_samples: NonNegativeInt = 4
    """How many of them are also answered each time, for `evaluation/samples.jsonl` and the report; always the same ones."""
    take: Literal["last", "best"] = "last"
    """Which step becomes the tuned model: the last, or the one with the lowest held-out loss."""
    patience: PositiveInt | None = None
    """Stop training after so many measurements in a row that are no better than the best one."""
    require: dict[str, RequirementSpec] = Field(default_factory=dict)
    """What the tuned model must reach to be published: `finding_accuracy: {min_change: 0.0}`. Else the job ends with 76;
    adapter and report are there, merged weights and `RESULT.json` are not. It may be changed and the job run again."""
    cache: str | None = None
    """`s3://bucket/prefix` or a folder where runs share what the base says, so that the runs of a sweep measure it once. It
    holds texts generated from your images. Jobs on one node share it through their scratch anyway."""

    @property
    def batch(self) -> int:
        """Rows at once; 8 where nothing decided what `auto` is."""
        return 8 if self.batch_size == "auto" else self.batch_size


class GateSpec(Section):
    """How far merged weights may be from base + adapter."""

    rows: PositiveInt = 16
    """Held-out rows to compare on."""
    max_mean_logit_difference: float = Field(0.05, gt=0)
    """Mean absolute difference of logits over answer tokens, as a share of the logits' standard deviation."""
    min_token_agreement: float = Field(0.97, gt=0, le=1)
    """Share of answer tokens at which both put the same token first; one within the logit bound of the first counts."""
    rounding_allowance: float = Field(2.0, ge=0)
    """A model that amplifies rounding may cross both bounds, by so many times what rounding alone does to it."""


class HubSpec(Section):
    """Where else to publish: a model hub. Needs a token that may write, in `HF_TOKEN`."""

    adapter_repo: str | None = Field(None, pattern=HUB_ID)
    """Hub id to push the adapter to."""
    merged_repo: str | None = Field(None, pattern=HUB_ID)
    """Hub id to push merged weights to, once the gate has let them through."""
    private: bool = True
    """Make the repositories private. One that is public already is then refused."""


class ExportSpec(Section):
    """What is published. The adapter always is."""

    merged: bool = True
    """Also publish the base's weights with the adapter folded in, in the base's own precision, names and files."""
    scratch_copy: bool | Literal["auto"] = "auto"
    """Keep merged weights on scratch until they are published. False sends them straight to the output as they are made; `auto`
    does so where scratch has no room for them."""
    merged_4bit: bool = False
    """Also publish merged weights in 4 bits (bitsandbytes nf4). Needs a GPU."""
    merged_fp8: bool = False
    """Also publish merged weights in FP8 for vLLM and SGLang. Needs the fp8 extra."""
    merged_int4: bool = False
    """Also publish merged weights in INT4 (W4A16, groups of 128) for vLLM and SGLang. Needs the fp8 extra."""
    gguf: bool = False
    """Also publish GGUF files for llama.cpp, made by the converter in the folder that LLAMA_CPP names."""
    gate: GateSpec = GateSpec()
    """When merged weights are refused."""
    hub: HubSpec = HubSpec()
    """Where else to publish."""


class OutputSpec(Section):
    """Where everything goes."""

    url: str = Field(min_length=1)
    """`s3://bucket/prefix`, `file:///folder` or a folder. One run owns it."""
    on_conflict: Literal["refuse", "restart"] = "refuse"
    """When `url` holds a run of a different spec: stop, or begin again from nothing."""
    sse: Literal["AES256", "aws:kms"] | None = None
    """Server-side encryption to demand of an `s3://` store."""
    sse_kms_key_id: str | None = None
    """Key for `aws:kms`."""


class PrivacySpec(Section):
    """What may be shown."""

    report_images: bool = True
    """Put held-out images and captions into the report. False leaves both out."""


class JobSpec(Section):
    """One fine-tuning job."""

    name: str = "vision-lora"
    """A label for logs, cards and reports."""
    model: ModelSpec
    lora: LoraSpec = LoraSpec()
    dataset: DatasetSpec
    training: TrainingSpec = TrainingSpec()
    checkpoint: CheckpointSpec = CheckpointSpec()
    preemption: PreemptionSpec = PreemptionSpec()
    evaluation: EvaluationSpec = EvaluationSpec()
    export: ExportSpec = ExportSpec()
    output: OutputSpec
    privacy: PrivacySpec = PrivacySpec()

    @property
    def digest(self) -> str:
        """SHA-256 of what decides the result. Fields in `HARMLESS` may change between attempts."""
        tree = {path: value for path, value in flatten(self.model_dump(mode="json")).items() if _decides(path)}
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


HARMLESS = frozenset(
    {
        "name",
        "dataset.cache_gb",
        "training.logging_steps",
        "training.report_to",
        "training.dataloader_num_workers",
        "training.vision_cache_gb",
        "checkpoint.save_steps",
        "checkpoint.keep",
        "checkpoint.keep_every",
        "preemption.spot_notices",
        "preemption.max_attempts_without_progress",
        "export.scratch_copy",
        "evaluation.batch_size",
        "evaluation.cache",
        "evaluation.explained_rows",
        "evaluation.eval_samples",
        "evaluation.extra_metrics",
        "evaluation.require",
        "output.url",
        "output.on_conflict",
        "privacy.report_images",
    }
)


def _decides(path: str) -> bool:
    return path not in HARMLESS and not path.startswith(("evaluation.require.", "evaluation.extra_metrics."))


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves by dotted path; lists and empty dicts are leaves."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            leaves |= flatten(value, f"{path}.")
        else:
            leaves[path] = value
    return leaves


def differences(old: JobSpec, new: JobSpec) -> list[str]:
    """Fields that decide the result and differ, as `path: old → new`."""
    before, after = flatten(old.model_dump(mode="json")), flatten(new.model_dump(mode="json"))
    paths = sorted(filter(_decides, before.keys() | after.keys()))
    return [f"{p}: {before.get(p)!r} → {after.get(p)!r}" for p in paths if before.get(p) != after.get(p)]


def contradictions(spec: JobSpec) -> list[str]:
    """Fields that are each valid and cannot hold together, one sentence each."""
    found: list[str] = []
    lora, data, training = spec.lora, spec.dataset, spec.training
    if lora.target_modules is None:
        if not (lora.finetune_vision_layers or lora.finetune_language_layers):
            found.append(
                "lora: finetune_vision_layers and finetune_language_layers are both false, so nothing would be "
                "trained; set at least one to true"
            )
        if not (lora.finetune_attention_modules or lora.finetune_mlp_modules):
            found.append(
                "lora: finetune_attention_modules and finetune_mlp_modules are both false, so nothing would be "
                "trained; set at least one to true"
            )
    if isinstance(lora.target_modules, str):
        try:
            re.compile(lora.target_modules)
        except re.error as error:
            found.append(f"lora.target_modules: not a regular expression ({error})")
    if spec.model.trust_remote_code and not re.fullmatch(r"[0-9a-f]{40}", spec.model.revision or ""):
        found.append(
            "model: trust_remote_code runs code from the hub, so model.revision must be a full commit (40 hex)"
        )
    if spec.model.backend == "unsloth" and spec.model.precision == "32bit":
        found.append("model: backend unsloth trains on a 4bit or 16bit base; precision is 32bit")
    if spec.model.backend == "unsloth" and spec.model.attn_implementation == "eager":
        found.append("model: backend unsloth chooses its attention itself; leave attn_implementation out")
    if spec.model.backend == "transformers" and training.gradient_checkpointing == "unsloth":
        found.append("training: gradient_checkpointing: unsloth is not for model.backend transformers; say true")
    if training.torch_compile is True and not spec.model.by_unsloth:
        found.append(
            "training: torch_compile: true is for Unsloth, which model.backend or model.attn_implementation rules out; "
            "leave it out"
        )
    if data.eval_path is not None and data.eval_split is not None:
        found.append("dataset: eval_path and eval_split both name held-out rows; keep one")
    fields = DatasetSpec.model_fields.items()
    given = {name for name, field in fields if getattr(data, name) != field.get_default()}  # a resolved spec names all
    for field in sorted({"eval_fraction", "eval_rows", "stratify_column"} & given):
        if data.eval_path or data.eval_split:
            found.append(f"dataset: {field} holds rows out of path, but held-out rows are named already; remove one")
    if data.eval_rows is not None and "eval_fraction" in given:
        found.append("dataset: eval_fraction and eval_rows both say how much is held out; keep one")
    if data.messages_column is not None:
        for field in sorted({"answer", "answer_column", "instruction", "instruction_column"} & given):
            found.append(f"dataset: {field} has no use beside messages_column; remove one")
    if data.answer is not None and not re.search(r"\{\w", data.answer):
        found.append("dataset.answer: has no column in braces, so every row would learn the same; write {findings}")
    micro = training.per_device_train_batch_size
    if micro != "auto" and training.effective_batch_size % micro:
        found.append(
            f"training: effective_batch_size {training.effective_batch_size} is not a multiple of "
            f"per_device_train_batch_size {micro}"
        )
    for name, label in spec.evaluation.labels.items():
        if label.values is not None and label.pattern is not None:
            found.append(f"evaluation.labels.{name}: give values or pattern, not both")
        if label.pattern is not None:
            found += _pattern_problem(f"evaluation.labels.{name}.pattern", label.pattern)
    export = spec.export
    if not (export.merged and export.scratch_copy):
        why = "set scratch_copy to true: it is made from that" if export.merged else "set merged to true"
        asked = {
            "merged_4bit": export.merged_4bit,
            "merged_fp8": export.merged_fp8,
            "merged_int4": export.merged_int4,
            "gguf": export.gguf,
            "hub.merged_repo": export.hub.merged_repo,
        }
        found += [f"export: {name} needs merged weights on scratch; {why}" for name, on in asked.items() if on]
    held = data.eval_fraction or data.eval_rows or data.eval_path or data.eval_split
    if spec.evaluation.eval_steps is None:
        needing = {"take: best": spec.evaluation.take == "best", "patience": spec.evaluation.patience}
        found += [f"evaluation: {name} needs eval_steps" for name, asked in needing.items() if asked]
    elif not held:
        found.append("evaluation: eval_steps needs held-out rows, and dataset.eval_fraction is 0")
    known = {*METRICS, *spec.evaluation.extra_metrics}
    known |= {*(f"{name}_{kind}" for name in spec.evaluation.labels for kind in ("accuracy", "macro_f1"))}
    for metric, demand in spec.evaluation.require.items():
        if metric not in known:
            found.append(f"evaluation.require.{metric}: no such metric; measured are {', '.join(sorted(known))}")
        if demand.model_dump(exclude={"judged_by"}, exclude_none=True) == {}:
            found.append(
                f"evaluation.require.{metric}: says no bound; give min_change, max_change, min_value or max_value"
            )
    if spec.evaluation.require and not held:
        found.append(
            "evaluation.require: no rows are held out (dataset.eval_fraction is 0), so nothing can be required"
        )
    if spec.output.sse_kms_key_id and spec.output.sse != "aws:kms":
        found.append("output: sse_kms_key_id needs sse: aws:kms")
    if spec.output.sse and not spec.output.url.startswith("s3://"):
        found.append("output: sse is for s3:// stores")
    return found


def _pattern_problem(where: str, pattern: str) -> list[str]:
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        return [f"{where}: not a regular expression ({error})"]
    return [] if groups else [f"{where}: has no group; put the value in parentheses"]
