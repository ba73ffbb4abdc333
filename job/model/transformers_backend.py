"""The boundary on plain transformers + PEFT: the CPU's way, and the peer that Unsloth is measured against."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from job.errors import OutOfMemory, SpecError
from job.model import Loaded, tiles
from job.model.lora import Linear, census, parameters, pattern, targets
from job.model.memory import last_cure
from job.spec import JobSpec, LoraSpec, ModelSpec

DTYPES = {"16bit": torch.bfloat16, "32bit": torch.float32, "4bit": torch.bfloat16}


def load(
    spec: JobSpec, folder: Path, device: torch.device, start: Path | None = None, precision: str = "32bit"
) -> Loaded:
    """Base model from `folder` on `device`, frozen, with adapters in exactly the groups asked for: fresh ones, or
    those of the folder `start`.

    Raises SpecError when `folder` is no vision-language model, or when a group does not exist in it.
    """
    model = load_weights(spec.model, folder, device, precision)
    make_recomputable(model)
    processor = load_processor(spec.model, folder)
    chosen = targets(spec.lora, linears(model))
    model, groups = add_adapters(model, spec, chosen)
    if start is not None:
        load_adapter(model, start)
    return Loaded(model, processor, folder, "transformers", precision, device, groups)


def make_recomputable(model: Any) -> None:
    """Gradient checkpointing for Llama 3.2's vision layers, the only ones of all families that upstream leaves out: eleven
    gigabytes a picture in the 11B shape."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    tower, made = tiles.llamas(model), dict[type, type]()
    for layer in [*tower.transformer.layers, *tower.global_transformer.layers] if tower is not None else []:
        kind = type(layer)
        if not issubclass(kind, GradientCheckpointingLayer):
            bases = (GradientCheckpointingLayer, kind)
            layer.__class__ = made.setdefault(kind, type(kind.__name__, bases, {"__module__": kind.__module__}))


@dataclass(frozen=True)
class Offload:
    """A model of which a part stays outside the GPU: at most `room` bytes of its weights are on it, the others come for each
    forward out of the weight files, which the host maps; `folder` is for what cannot be taken from there as it is."""

    room: int
    folder: Path


def placement(device: torch.device, offload: Offload | None) -> dict[str, Any]:
    """Where `from_pretrained` puts the weights."""
    if offload is None:
        return {"device_map": {"": device}}
    memory: dict[Any, int] = {device.index or 0: offload.room, "cpu": 2**60} if device.type == "cuda" else {}
    return {
        "device_map": "auto",
        "max_memory": memory or {"cpu": offload.room},
        "offload_folder": str(offload.folder),
    }


def load_weights(
    spec: ModelSpec, folder: Path, device: torch.device, precision: str, offload: Offload | None = None
) -> Any:
    """An `AutoModelForImageTextToText` in eval mode, on `device` or, with `offload`, partly outside it."""
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    extra: dict[str, Any] = {}
    if precision == "4bit":
        if device.type != "cuda":
            raise SpecError("model.precision: 4bit needs an NVIDIA GPU; on a CPU choose 32bit")
        extra["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    try:
        model = AutoModelForImageTextToText.from_pretrained(
            folder,
            dtype=DTYPES[precision],
            attn_implementation=spec.attn_implementation,
            trust_remote_code=spec.trust_remote_code,
            use_safetensors=True,
            **placement(device, offload),
            **extra,
        )
    except (OSError, ValueError, KeyError) as error:
        raise SpecError(f"model.name_or_path: {folder} is not a vision-language model: {first_line(error)}") from error
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(f"the base model does not fit the GPU; {last_cure(precision)}") from error
    if spec.attn_implementation == "sdpa":
        tiles.install(model)
    return model.eval()


def load_processor(spec: ModelSpec, folder: Path) -> Any:
    """The model's processor, with a padding token. Raises SpecError when there is none, or no chat template."""
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=spec.trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        raise SpecError(f"model.name_or_path: {folder} has no usable processor: {first_line(error)}") from error
    if not hasattr(processor, "image_processor"):
        raise SpecError(f"model.name_or_path: {folder} has a processor without images; choose a vision-language model")
    if processor.chat_template is None:
        raise SpecError(f"model.name_or_path: {folder} has no chat template; choose an instruction-tuned model")
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    return processor


def linears(model: Any) -> dict[str, Linear]:
    """Every linear layer by name (4-bit layers report the shape they stand for)."""
    return {
        name: Linear(module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }


def add_adapters(model: Any, spec: JobSpec, chosen: list[str]) -> tuple[Any, dict[str, int]]:
    """PEFT adapters on `chosen` and nothing else, checked by the census. Returns the model and parameters by group."""
    from peft import LoraConfig, get_peft_model

    counts = parameters(spec.lora.r, linears(model), chosen)
    config = LoraConfig(**lora_settings(spec.lora, chosen), task_type="CAUSAL_LM")
    torch.manual_seed(spec.training.seed)
    model = get_peft_model(model, config).eval()  # the adapters' new dropout begins in training mode
    census(chosen, adapted(model))
    return model, counts


def lora_settings(lora: LoraSpec, chosen: list[str]) -> dict[str, Any]:
    """The spec's adapters in PEFT's words, which are Unsloth's too."""
    return {
        "r": lora.r,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": lora.lora_dropout,
        "bias": lora.bias,
        "use_rslora": lora.use_rslora,
        "target_modules": pattern(chosen),
    }


def adapted(model: Any) -> list[str]:
    """Names, as in the base model, of the layers that hold an adapter with trainable parameters."""
    from peft.tuners.lora import LoraLayer

    return [
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and any(p.requires_grad for p in module.parameters())
    ]


def load_adapter(model: Any, folder: Path) -> None:
    """Put the weights of an earlier adapter into this one. Raises SpecError when they do not fit."""
    from peft import load_peft_weights, set_peft_model_state_dict

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            result = set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))
    except (OSError, ValueError, RuntimeError) as error:
        raise SpecError(
            f"lora.init_adapter: {folder} does not fit this model and these ranks: {first_line(error)}"
        ) from error
    missing = [key for key in result.missing_keys if "lora_" in key]
    if result.unexpected_keys or missing:
        raise SpecError(
            f"lora.init_adapter: {folder} was made for other layers ({len(missing)} missing, "
            f"{len(result.unexpected_keys)} unknown); use the same finetune_ choices"
        )


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
