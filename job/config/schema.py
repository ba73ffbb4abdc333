"""The job spec: one frozen tree that describes a run completely.

`docs/spec.md` and `job schema` show each field's docstring; after a change here run `python -m tests.spec_reference`.

Names are upstream's: `learning_rate` and `num_train_epochs` from transformers, `lora_alpha` and `use_rslora` from PEFT,
`finetune_vision_layers` and `train_on_responses_only` from Unsloth, `max_length` from TRL.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat

Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
CountOrZero = Annotated[int, Field(ge=0, le=2**31 - 1)]
FIELD = re.compile(r"(?<!\{)\{([^\W\d][\w ./()-]*)\}(?!\})")
"""A column in a template."""
HUB_ID = r"^[\w.-]+/[\w.-]+$"
RADIOGRAPHER = "You are an expert radiographer. Describe accurately what you see in this image."


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        coerce_numbers_to_str=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )


class ModelSpec(Section):
    """The base model."""

    name_or_path: str = Field(min_length=1)
    """A hub id (`unsloth/Llama-3.2-11B-Vision-Instruct`), a local folder, or an `s3://` prefix."""
    revision: str | None = None
    """Branch, tag or commit of a hub model. Pin a commit to make the run repeatable."""
    trust_remote_code: bool = False
    """Run code that comes with the model. `revision` must then be a full commit."""
    backend: Literal["auto", "unsloth", "transformers"] = "auto"
    """`auto` uses Unsloth on an NVIDIA GPU if it is installed, and plain transformers + PEFT elsewhere."""
    precision: Literal["auto", "4bit", "16bit", "32bit"] = "auto"
    """Precision of the frozen base model. `auto` is 16bit on a GPU that has room for a micro-batch of four
    with it, else 4bit; 32bit on a CPU."""
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention kernel, unless Unsloth chooses one. Unsloth cannot train with `eager`."""

    @property
    def by_unsloth(self) -> bool:
        """Whether Unsloth, where available, trains the model. Not with eager attention: it adds masks, and Unsloth's are
        boolean."""
        return self.backend != "transformers" and self.attn_implementation != "eager"


class LoraSpec(Section):
    """Which layers receive adapters, and the adapters' shape."""

    r: int = Field(16, ge=1, le=2**14)
    """Rank of the adapters."""
    lora_alpha: float = Field(16, gt=0)
    """Scale: the update is multiplied by lora_alpha / r (by lora_alpha / sqrt(r) with use_rslora)."""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the adapters' input during training. 0 keeps Unsloth's fast kernels."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Biases to train as well: none, all, or those of adapted layers."""
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
    finetune_connector: bool = False
    """Adapt the linear layers between vision tower and language model (projector, merger)."""
    finetune_expert_modules: bool = False
    """Adapt routed experts. Not possible yet: they are fused tensors, and merge and gate know layers only."""
    target_modules: str | list[str] | None = None
    """Modules to adapt, as in PEFT: a regular expression or a list of names. Replaces the `finetune_` fields."""
    init_adapter: str | None = None
    """An earlier adapter to start from: a folder or `s3://` prefix in PEFT's format. It must be plain LoRA on the same layers
    with a rank of at most `r`. Its scale may differ: training still begins at its loss."""


class SeriesSpec(Section):
    """Which series become images when a report names a study, an accession number or a patient. A report that names series or
    files gets exactly those."""

    every_kind: bool = False
    """Also take localizers, secondary captures (screens, dose pages), segmentations and RT doses. By default they are left
    out."""
    modality: list[str] | None = None
    """Take only these modalities: `[CT]`."""
    body_part: list[str] | None = None
    """Take only images of these body parts (BodyPartExamined): `[CHEST]`; case is ignored."""
    orientation: list[Literal["axial", "coronal", "sagittal"]] | None = None
    """Take only slices in these planes; oblique ones count as the nearest."""
    image_type: list[str] | None = None
    """Take only images whose ImageType has all these values: `[ORIGINAL, PRIMARY]`."""
    description: str | None = None
    """Take only series whose description matches this regular expression anywhere; case is ignored."""
    take: Literal["all", "largest", "first"] = "all"
    """Which of the remaining series to take: all, the one with the most images, or the one with the lowest number."""


class DicomSpec(Section):
    """How DICOM files become images, and which table holds their reports."""

    reports: str | None = None
    """The table of reports (CSV or JSONL), relative to `dataset.path`. Default: the only table there."""
    report_key: str | None = None
    """The column of that table that identifies the images: by study, series or instance UID, accession number, patient or
    path. Default: the column with such a name."""
    frames: Literal["middle", "montage", "medgemma"] | Count | Annotated[list[int], Field(min_length=1)] = "middle"
    """Which frames of a multi-frame file or slices of a series to take: the middle one, a grid of 16, that many evenly spread, or
    those at the given indices, counted from 0 in the direction of the slices' normal. `medgemma` shows volumes as MedGemma 1.5
    was shown them: up to 85 slices with their numbers, CT in three windows as red, green and blue."""
    window: tuple[float, Annotated[float, Field(gt=0)]] | None = None
    """Center and width of the grey-level window for all files. Default: each file's own; 40 and 400 for CT without one."""
    prior: bool = False
    """Also show the patient's study before, of the same modality, if there is one: its images first, each study announced. Needs
    StudyDate in the files."""
    series: SeriesSpec = SeriesSpec()
    """Which series of a study become images."""


class DatasetSpec(Section):
    """Rows of image and text, and how they are split."""

    path: str = Field(min_length=1)
    """A hub id, a local folder or file, or an `s3://` prefix."""
    name: str | None = None
    """Configuration name of a hub dataset."""
    split: str = "train"
    """The split to train on."""
    revision: str | None = None
    """Branch, tag or commit of a hub dataset."""
    format: Literal["auto", "imagefolder", "json", "csv", "excel", "parquet", "arrow", "webdataset", "dicom", "hub"] = (
        "auto"
    )
    """Format of `path`. `auto` detects it and logs what it chose and why."""
    join: str | None = None
    """Column that CSV, JSON or Excel tables of different columns share (a study): rows with an answer get the other tables'
    columns, as lists if several rows have the same value. Default: tables are stacked, and must have the same columns."""
    image_column: str | list[str] | None = "image"
    """Column with the image or a list of images: embedded, a URL, or a path or name of a file in the folder that `path` names (in
    an image folder, in that of its metadata file). `images/{patient}/{name}.png` makes the path from columns. Several columns
    give several images; null trains on text only."""
    image_hosts: list[str] = []
    """Host names in your own network from which images may be fetched by URL. Any other host whose address is not public is
    refused, also behind a redirect."""
    answer_column: str = "caption"
    """Column with the text to learn."""
    answer: str | None = None
    """Template for the text to learn: `Findings: {findings}`. Replaces `answer_column`."""
    instruction: str = RADIOGRAPHER
    """Text of the user turn beside the image. `{history}` inserts the column of that name; a line whose columns are all empty
    in a row is left out."""
    instruction_column: str | None = None
    """Column with an instruction per row. Replaces `instruction`."""
    messages_column: str | None = None
    """Column with whole conversations: OpenAI's `messages`, or the `conversations` of ShareGPT and LLaVA. Replaces the answer
    and instruction fields. A column with one of these names is used automatically unless an answer is named."""
    system_prompt: str | None = None
    """Text of the system turn, for models that have one and rows that bring none."""
    weight_column: str | None = None
    """Column with the weight of each row's loss, at least 0."""
    eval_path: str | None = None
    """Your own held-out rows, in the same format. Without this, rows of `path` are held out."""
    eval_split: str | None = None
    """Held-out split of the same hub dataset."""
    eval_fraction: float = Field(0.1, ge=0, lt=1)
    """Share of rows (or groups) to hold out without `eval_path` or `eval_split`. 0 disables evaluation."""
    eval_rows: Count | None = None
    """Number of rows to hold out, instead of a share. Groups stay whole, so it may be a few more."""
    stratify_column: str | None = None
    """Hold out the same share of each value of this column."""
    group_column: str | None = None
    """Rows with the same value in this column (a patient) are never on both sides of the split."""
    dicom: DicomSpec = DicomSpec()
    """Options for DICOM files."""
    filter: dict[str, str | bool | list[str | bool]] = {}
    """Use only rows whose columns have these values: `{q_lang: en, view: [PA, AP]}`. Letter case does not matter, and a list in a
    cell needs one of them. Holds for held-out rows too."""
    dropna: list[str] = []
    """Use only rows in which none of these columns is empty, as pandas' `dropna(subset=…)`. Holds for held-out rows too."""
    max_rows: Count | None = None
    """Use only this many rows from the start, for a trial."""
    max_bad_fraction: float = Field(0.01, ge=0, le=1)
    """Largest share of bad rows to set aside. With more, the job exits with 65."""
    max_image_pixels: Count = 50_000_000
    """Largest number of pixels in an image. A row with a larger one is bad; its pixels are never decoded."""
    image_max_side: Count | Literal["auto"] | None = "auto"
    """Longest side, in pixels, to which images are shrunk before the model's own processor sees them. `auto` shrinks to what
    that processor keeps, and until a row's images take at most three quarters of `training.max_length`; null never shrinks."""
    cache_gb: float = Field(20.0, ge=0)
    """Size limit of the image cache in gigabytes. It keeps shrunken images on scratch, so that large files are decoded once
    rather than once per epoch."""
    over_length: Literal["drop", "fail", "truncate"] = "drop"
    """What to do with a row of more than `training.max_length` tokens: `drop` makes it a bad row, `fail` stops the job,
    `truncate` shortens its last answer, never its images or prompt."""


class TrainingSpec(Section):
    """Schedule, optimizer, batches and logging of the training."""

    num_train_epochs: Count = 3
    """Passes over the training rows."""
    max_steps: Count | None = None
    """Stop after this many optimizer steps, regardless of the epochs."""
    learning_rate: float = Field(2e-4, gt=0, lt=1)
    """Peak learning rate."""
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    """Learning rate schedule."""
    warmup_ratio: float = Field(0.05, ge=0, lt=1)
    """Share of all steps over which the learning rate warms up."""
    weight_decay: float = Field(0.01, ge=0)
    """AdamW's weight decay."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Gradient norm to clip to. 0 disables clipping."""
    optim: Literal["adamw_torch", "adamw_torch_fused", "adamw_8bit"] = "adamw_torch"
    """Optimizer, by its name in transformers."""
    effective_batch_size: Count = 8
    """Samples per optimizer step, summed over devices and gradient accumulation."""
    per_device_train_batch_size: Count | Literal["auto"] = "auto"
    """Micro-batch: samples per forward pass on one device. `auto` fits it to GPU memory; gradient accumulation is derived."""
    gradient_checkpointing: bool | Literal["auto", "unsloth"] = "auto"
    """Activation checkpointing: `true` keeps only the layers' inputs on the GPU, `unsloth` offloads them to host memory,
    `false` keeps all activations. `auto` takes the largest micro-batch that any of these allows, then recomputes and offloads
    no more than that batch needs; it is `false` on a CPU."""
    torch_compile: bool | Literal["auto"] = "auto"
    """Whether to train through torch.compile with Unsloth. `auto` compiles if all steps together gain more than compiling
    costs (docs/one-gpu.md). Compiled results differ by rounding. Evaluation and short batches are never compiled."""
    vision_cache_gb: NonNegativeFloat | Literal["auto"] = "auto"
    """Gigabytes of scratch for the vision cache: the features of a frozen vision tower, so that each image passes through it
    once. `auto` takes up to half of the free space; 0 disables the cache."""
    max_length: Count = 2048
    """Most tokens of a sample, including image tokens. `dataset.over_length` says what happens to longer ones."""
    train_on_responses_only: bool = True
    """Compute the loss on the answer only, not on the prompt."""
    seed: int = Field(3407, ge=0, lt=2**32)
    """Seed for the adapters' initial weights, the order of samples and dropout."""
    shard: Literal["auto", "none", "fsdp"] = "auto"
    """Whether the devices share the frozen base's weights among them (docs/gpus.md). `auto` does so if one device cannot hold the
    base, the adapters and one row, and all devices together can; `fsdp` whenever there are several. Results differ by
    rounding."""
    dataloader_num_workers: Annotated[int, Field(ge=0, le=64)] | Literal["auto"] = "auto"
    """Processes that prepare batches ahead. `auto` is up to 4 with a GPU, none without."""
    logging_steps: Count = 1
    """Steps between lines of `logs/metrics.jsonl`. Each line holds the mean loss since the previous one. Checkpoints and the
    last step also get a line."""
    report_to: list[Literal["tensorboard", "wandb", "mlflow"]] = []
    """Also send spec, curves and metrics to these trackers, each with its own package and variables (`WANDB_API_KEY`,
    `MLFLOW_TRACKING_URI`). TensorBoard's files are published under `logs/tensorboard/`."""
    report_samples: bool = False
    """Whether trackers also get the report and sample answers. These show images and texts of rows: send them only to a server
    that may hold patient data."""


class CheckpointSpec(Section):
    """How often a checkpoint is saved, and how many are kept."""

    save_steps: Count = 50
    """Optimizer steps between checkpoints. Preemption always saves at once."""
    keep: Count = 2
    """Number of newest checkpoints to keep."""


class PreemptionSpec(Section):
    """Where preemption notices come from, and when the job gives up."""

    spot_notices: Literal["aws", "gcp", "azure"] | None = None
    """Also poll this cloud's metadata service for a spot notice."""
    max_attempts_without_progress: Count = 3
    """Exit with 79 after this many attempts have died, rather than been preempted, without a newer checkpoint or more answers."""


class LabelSpec(Section):
    """A fact that a caption states, and how to extract it from the text."""

    column: str
    """Column with the true value, or with several: a list, or text with a `separator`. An empty list means none of them; an empty
    cell means that the truth is not known."""
    separator: str | None = Field(None, min_length=1)
    """What separates several values in a cell of the column: `;`."""
    uncertain_column: str | None = None
    """Column with the values that the truth leaves open, in the same form. Only where a row may have several."""
    values: list[str] | None = Field(None, min_length=1)
    """Values to look for; no others count, neither in texts nor in the column. An answer is right if it states the true one
    and no other. Default: all values of the column."""
    pattern: str | None = None
    """A regular expression to use instead; its first group is the value."""


def uncertain_key(label: str) -> str:
    """Return the key of the values of a label that the truth leaves open."""
    return f"{label} (uncertain)"


_WORDING = ("rougeL", "rouge1", "rouge2", "bleu", "chrf", "exact_match", "token_f1", "length_ratio")
_CLOSED = ("closed_accuracy", "open_recall", "open_token_f1")
METRICS = (*_WORDING, *_CLOSED, "empty", "repeated", "loss", "perplexity")


RATES = ("sensitivity", "specificity", "ppv", "npv")
"""Metrics of each value of a label of which rows may have several."""


def slug(value: str) -> str:
    """Return the beginning of the names of a value's metrics: `pleural_effusion`."""
    return re.sub(r"\W+", "_", value.casefold()).strip("_")


BY_CHEXBERT = "_by_chexbert"
"""Ending of the same metrics as CheXbert reads the texts."""


def rates(values: Iterable[str], chexbert: bool = False) -> list[str]:
    readers = ("", BY_CHEXBERT) if chexbert else ("",)
    return [f"{slug(value)}_{rate}{reader}" for value in values for rate in RATES for reader in readers]


class RequirementSpec(Section):
    """Bounds for one metric, in its own unit: shares, ROUGE and F1 from 0 to 1, BLEU and chrF from 0 to 100."""

    min_change: float | None = None
    """Smallest change from before to after. 0 means no worse."""
    max_change: float | None = None
    """Largest change, for a metric where less is better (loss, empty, repeated)."""
    min_value: float | None = None
    """Smallest value after training."""
    max_value: float | None = None
    """Largest value after training."""
    judged_by: Literal["value", "interval"] = "value"
    """What must lie within the bounds: the measured value, or its whole confidence interval."""


ExtraMetric = Literal["bertscore", "radgraph", "chexbert", "ratescore", "radcliq", "srrbert", "green", "crimson"]
"""Metrics that need a model of their own."""
CHEXBERT = ("chexbert_14_micro_f1", "chexbert_14_macro_f1", "chexbert_5_micro_f1", "chexbert_5_macro_f1")
"""Further metrics of `chexbert`, over all its labels and over the five that are usually reported."""


class EvaluationSpec(Section):
    """The evaluation before and after training."""

    max_rows: Count = 200
    """Held-out rows to generate answers for, spread evenly over all of them."""
    max_new_tokens: Count = 128
    """Longest answer, in tokens."""
    batch_size: Count | Literal["auto"] = "auto"
    """Rows generated at once. `auto` takes as many as fit in GPU memory, up to 32; a batch takes hardly longer than one row."""
    labels: dict[str, LabelSpec] = Field(default_factory=dict)
    """Facts to score: `finding: {column: finding}` gives `finding_accuracy` and `finding_macro_f1`. Where rows have
    several values, there are also `finding_micro_f1` and, for each value, `pneumothorax_sensitivity`, `_specificity`, `_ppv` and
    `_npv`. Like all fields of this section that do not choose the step, it may change on a finished run: the job then evaluates
    again and does not train again."""
    groups: list[str] = Field(default_factory=list)
    """Columns to report on separately (modality, sex, site)."""
    extra_metrics: dict[ExtraMetric, str] = Field(default_factory=dict)
    """Metrics that need their own model, each with that model's folder or `s3://` prefix: an encoder for bertscore
    (`bertscore: /models/roberta-large`), RadEval's model cache for the others. docs/evaluation.md says how to fill it. With
    `chexbert`, values that are named as CheXbert's conditions also get `pneumothorax_sensitivity_by_chexbert` and so on."""
    bootstrap_samples: int = Field(1000, ge=100, le=100_000)
    """Bootstrap resamples for the confidence intervals."""
    confidence: float = Field(0.95, gt=0.5, lt=1)
    """Level of the confidence intervals."""
    explained_rows: CountOrZero = 3
    """Samples for which the report shows where the model looked. Each takes 37 forward passes; 0 makes no maps."""
    eval_steps: Count | None = None
    """Optimizer steps between measurements of loss on rows that are not trained on; the last step is also measured. Null measures
    none."""
    eval_loss_rows: Count = 64
    """Rows for that loss: held-out rows, spread evenly over the `max_rows`; or, if the loss chooses the step, the validation
    rows: at most a tenth of the training rows, set aside in whole groups, so that they may be a few more."""
    eval_samples: CountOrZero = 4
    """How many of those rows are also answered each time, always the same ones, for `evaluation/samples.jsonl` and the report."""
    take: Literal["last", "best"] = "last"
    """Which step becomes the tuned model: the last, or the one with the lowest loss on validation rows, which are then neither
    trained on nor part of the final measurement."""
    patience: Count | None = None
    """Stop training after this many consecutive measurements on validation rows that are no better than the best one."""
    primary_metric: str | None = None
    """The metric that the verdict is about. Default: whether the first of `labels` is right, else `rougeL`. All other metrics
    are for reading."""
    require: dict[str, RequirementSpec] = Field(default_factory=dict)
    """Bounds that the tuned model must meet, by metric: `finding_accuracy: {min_change: 0.0}`. If it does not, the job exits
    with 76 and publishes adapter and report, but no merged weights and no `RESULT.json`. May change on a finished run."""
    cache: str | None = None
    """`s3://` prefix or folder in which runs share the base model's answers, so that a sweep measures it once. It holds texts
    generated from your images. Jobs on one node always share these answers through scratch."""

    @property
    def batch(self) -> int:
        """Rows generated at once; 8 if nothing resolved `auto`."""
        return 8 if self.batch_size == "auto" else self.batch_size

    @property
    def chooses_step(self) -> bool:
        """Whether losses on validation rows choose the step."""
        return self.take == "best" or self.patience is not None


class GateSpec(Section):
    """How far merged weights may deviate from base + adapter."""

    rows: Count = 16
    """Held-out rows to compare on."""
    max_mean_logit_difference: float = Field(0.05, gt=0)
    """Mean absolute difference of logits over answer tokens, as a share of the logits' standard deviation."""
    min_token_agreement: float = Field(0.97, gt=0, le=1)
    """Share of answer tokens at which both rank the same token first. A token within the logit bound of the first counts too, and
    one token may always differ."""
    rounding_allowance: float = Field(2.0, ge=0)
    """If a model amplifies rounding, both bounds widen to this multiple of what rounding alone does to it."""
    min_gain_kept: float = Field(0.8, ge=0, le=1)
    """Share of the adapter's gain in loss, and in each label, that merged weights in fewer bits (`merged_4bit`, `merged_fp8`,
    `merged_int4`, `gguf`) must keep to be published. The other folders are published without them."""


class HubSpec(Section):
    """Repositories on a model hub to push to. Needs a token with write access in `HF_TOKEN`."""

    adapter_repo: str | None = Field(None, pattern=HUB_ID)
    """Hub id of the repository for the adapter."""
    merged_repo: str | None = Field(None, pattern=HUB_ID)
    """Hub id of the repository for merged weights. They are pushed once the gate has passed."""
    private: bool = True
    """Create private repositories, and refuse one that is already public."""


class ServeSpec(Section):
    """A server that must answer the gate's rows from the folders to publish as was measured."""

    engine: Literal["vllm"] | None = None
    """The server to start on `merged/`, and on `adapter/` where it can serve one. Null starts none."""
    python: str | None = None
    """The Python of an environment in which it is installed, apart from the job's own. Default: `JOB_SERVE_PYTHON`."""
    min_agreement: float = Field(0.98, gt=0, le=1)
    """Share of the tokens of the true answers at which the server must rank the token first that the job ranked first. One token
    may always differ."""
    seconds: float = Field(1800, gt=0)
    """Seconds in which each server must have started and answered."""


class ExportSpec(Section):
    """What is published besides the adapter, and where."""

    merged: bool = True
    """Also publish the base model's weights with the adapter merged, in the base model's precision, names and files."""
    scratch_copy: bool | Literal["auto"] = "auto"
    """Whether to keep merged weights on scratch until they are published. `false` streams them to the output as they are
    made; `auto` does so if scratch has no room for them."""
    merged_4bit: bool = False
    """Also publish merged weights in 4 bits (bitsandbytes nf4). Needs a GPU."""
    merged_fp8: bool = False
    """Also publish merged weights in FP8 for vLLM and SGLang. Needs the fp8 extra."""
    merged_int4: bool = False
    """Also publish merged weights in INT4 (W4A16, groups of 128) for vLLM and SGLang, rounded by auto-round on training rows.
    Needs the fp8 extra."""
    gguf: bool = False
    """Also publish GGUF files for llama.cpp, made by the converter in the folder that LLAMA_CPP names."""
    gate: GateSpec = GateSpec()
    """Bounds beyond which merged weights are refused."""
    serve: ServeSpec = ServeSpec()
    """A server that must answer from these folders as was measured."""
    hub: HubSpec = HubSpec()
    """Hub repositories to push to as well."""


class OutputSpec(Section):
    """Where the results are written."""

    url: str = Field(min_length=1)
    """`s3://bucket/prefix`, `file:///folder` or a folder. It must be empty at first and lie apart from everything that the job
    reads. It belongs to one run."""
    on_conflict: Literal["refuse", "restart"] = "refuse"
    """What to do if `url` holds a run with a different spec or other data: stop, or delete that run and start over."""
    sse: Literal["AES256", "aws:kms"] | None = None
    """Server-side encryption to request from an `s3://` store."""
    sse_kms_key_id: str | None = None
    """Id of the key for `aws:kms`."""


class PrivacySpec(Section):
    """How images and texts that may identify a patient are treated."""

    report_images: bool = True
    """Show held-out images and captions in the report, and one row in `data/example.txt`. `false` leaves images and texts out."""
    burned_in: Literal["quarantine", "refuse", "mask", "allow"] = "quarantine"
    """What to do with an image that has text, often a name, burned into its pixels: set its row aside, exit with 65, paint over
    the text, or use the image as it is."""
    look_for_text: bool | Literal["auto"] = "auto"
    """Whether to look for burned-in text by OCR, which takes about half a second per image and needs the burned-in extra.
    `true` reads all images; `auto` reads DICOM files that may have text but do not say so, if the extra is installed."""


class JobSpec(Section):
    """One fine-tuning job."""

    name: str = "vision-lora"
    """Name of the job in logs, model cards and reports."""
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
        """SHA-256 of the fields that decide the training. All others may change between attempts."""
        return _sha256(deciding(self))

    @property
    def result_digest(self) -> str:
        """SHA-256 of the fields that decide the result: training, evaluation and publishing."""
        leaves = flatten(self.model_dump(mode="json"))
        besides = {path: value for path, value in leaves.items() if path not in WHILE_TRAINING and not _neither(path)}
        return _sha256(deciding(self) | besides)


NEITHER = frozenset(
    {
        "name",
        "dataset.cache_gb",
        "dataset.image_hosts",
        "training.logging_steps",
        "training.report_to",
        "training.report_samples",
        "training.dataloader_num_workers",
        "training.shard",
        "training.vision_cache_gb",
        "export.scratch_copy",
        "export.serve.python",
        "export.serve.seconds",
        "evaluation.batch_size",
        "evaluation.cache",
        "evaluation.eval_samples",
    }
)
"""Fields that decide neither training nor what is published. The same holds for all fields of checkpoint, preemption and
output."""
PLACES = frozenset({"dataset.path", "dataset.eval_path"})
"""Where the rows are stored. `output.identity` records which rows they are, and other rows are refused."""
WHILE_TRAINING = frozenset({"evaluation.eval_steps", "evaluation.eval_loss_rows"})
"""Evaluation during training, which decides the training if its losses choose the step."""
ANSWERS = ("max_rows", "max_new_tokens")
"""Fields of evaluation that change the answers. The others only judge existing answers."""


def deciding(spec: JobSpec) -> dict[str, Any]:
    """Return the leaves that decide the training, by dotted path."""
    chosen = {"evaluation.take", "evaluation.patience"}
    chosen |= WHILE_TRAINING if spec.evaluation.chooses_step else set()
    after = ("evaluation.", "export.", "privacy.report_images")
    leaves = flatten(spec.model_dump(mode="json"))
    return {
        path: value
        for path, value in leaves.items()
        if path in chosen or not (_neither(path) or path in PLACES or path.startswith(after))
    }


def _neither(path: str) -> bool:
    return path in NEITHER or path.startswith(("checkpoint.", "preemption.", "output."))


def _sha256(tree: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves by dotted path; lists and empty dicts are leaves."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            leaves |= flatten(value, f"{path}.")
        else:
            leaves[path] = value
    return leaves
