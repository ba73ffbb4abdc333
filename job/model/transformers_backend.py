"""Loads models with plain transformers and PEFT: used on the CPU, and the reference that Unsloth is measured against."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from accelerate.utils import align_module_device

from job.config.schema import JobSpec, LoraSpec, ModelSpec
from job.errors import JobError, OutOfMemory, SpecError, is_host_memory
from job.model.base_model import module_name
from job.model.families import family_of
from job.model.generation import greedy, stop_tokens
from job.model.init_adapter import fitted, read_init_adapter
from job.model.loaded import Loaded
from job.model.lora_targets import Linear, census, is_fused, parameters, pattern, targets
from job.model.memory_model import last_cure
from job.model.patches import mllama_attention, mllama_intermediate
from job.model.patches.mllama_checkpointing import make_recomputable
from job.model.template import refuse_endless

DTYPES = {"16bit": torch.bfloat16, "32bit": torch.float32, "4bit": torch.bfloat16}


def load(
    spec: JobSpec,
    folder: Path,
    device: torch.device,
    start: Path | None = None,
    precision: str = "32bit",
    *,
    sharded: bool = False,
) -> Loaded:
    """Load the base model in `folder` to `device`, frozen, with adapters in exactly the requested groups: fresh ones, or those
    in the folder `start`. `sharded` loads this rank's share of it (`job.model.sharding`).

    Raises SpecError when `folder` is not a vision-language model or lacks a requested group.
    """
    model = (load_share if sharded else load_weights)(spec.model, folder, device, precision)
    make_recomputable(model)
    processor = load_processor(spec.model, folder)
    model.generation_config = greedy(processor, folder)
    layers = linears(model)
    model, groups = add_adapters(model, spec, targets(spec.lora, layers, tables(model)))
    if start is not None:
        begin_from(model, spec.lora, start, layers)
    return Loaded(model, processor, folder, "transformers", precision, device, groups)


@dataclass(frozen=True)
class Offload:
    """Keeps part of a model outside the GPU: at most `room` bytes of weights stay on it, the rest is loaded for each forward
    from the memory-mapped weight files; `folder` holds what cannot be taken from those as it is."""

    room: int
    folder: Path


def placement(device: torch.device, offload: Offload | None) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that place the weights."""
    if offload is None:
        return {"device_map": {"": device}}
    memory: dict[Any, int] = {device.index or 0: offload.room, "cpu": 2**60} if device.type == "cuda" else {}
    return {"device_map": "auto", "max_memory": memory or {"cpu": offload.room}, "offload_folder": str(offload.folder)}


def load_weights(
    spec: ModelSpec, folder: Path, device: torch.device, precision: str, offload: Offload | None = None
) -> Any:
    """Load an `AutoModelForImageTextToText` in eval mode, on `device` or, with `offload`, partly outside it."""
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    extra: dict[str, Any] = {}
    if precision == "4bit":
        if device.type != "cuda":
            raise SpecError("model.precision: 4bit needs an NVIDIA GPU; on a CPU choose 32bit")
        extra["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    try:
        with warnings.catch_warnings():  # LLaVA-NeXT places a parameter that is in no module of its own
            warnings.filterwarnings("ignore", "The following device_map keys do not match any submodules", UserWarning)
            model = AutoModelForImageTextToText.from_pretrained(
                folder,
                dtype=DTYPES[precision],
                attn_implementation=spec.attn_implementation,
                trust_remote_code=spec.trust_remote_code,
                use_safetensors=True,
                **placement(device, offload),
                **extra,
            )
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(f"the base model does not fit the GPU; {last_cure(precision)}") from error
    except (JobError, torch.AcceleratorError):
        raise
    except Exception as error:  # the libraries raise many types when these files make no model
        if is_host_memory(error):
            raise
        raise _unusable(folder, "is not a vision-language model", error) from error
    if offload is not None:
        _bring_vectors(model)
    return patched(spec, model).eval()


def load_share(spec: ModelSpec, folder: Path, device: torch.device, precision: str) -> Any:
    """Like `load_weights`, but only this rank's share of the language model's weights."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    from job.model.sharding import load_shards

    config = AutoConfig.from_pretrained(folder, trust_remote_code=spec.trust_remote_code)
    how = {"dtype": DTYPES[precision], "attn_implementation": spec.attn_implementation}

    def build() -> Any:
        return AutoModelForImageTextToText.from_config(config, trust_remote_code=spec.trust_remote_code, **how)

    try:
        return patched(spec, load_shards(folder, build, device)).eval()
    except torch.OutOfMemoryError as error:
        raise OutOfMemory("this rank's share of the base model does not fit the GPU; use more GPUs") from error


def patched(spec: ModelSpec, model: Any) -> Any:
    """Return a bare `model` with what its family needs of `job.model.patches` to compute rightly and, with sdpa, faster."""
    mllama_intermediate.install(model)
    if spec.attn_implementation == "sdpa":
        mllama_attention.install(model)
    return model


def _bring_vectors(model: Any) -> None:
    """Keep norms and other vectors on the compute device: they are small, and Unsloth's patches, which are present if it
    trained, read them without going through the modules that would load them."""
    for module in model.modules():
        if not waits(module) or any(weight.dim() > 1 for weight in module.parameters(recurse=False)):
            continue
        with align_module_device(module):
            held = {name: weight.detach().clone() for name, weight in module.named_parameters(recurse=False)}
        remove_hook_from_module(module)
        for name, weight in held.items():
            setattr(module, name, torch.nn.Parameter(weight, requires_grad=False))


def waits(module: Any) -> bool:
    """Whether accelerate loads the module's own weights for each forward and removes them afterwards."""
    return any(weight.is_meta for weight in module.parameters(recurse=False))


def load_processor(spec: ModelSpec, folder: Path) -> Any:
    """Load the model's processor and set a padding token. Raises SpecError when there is no processor or no chat template."""
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=spec.trust_remote_code)
    except MemoryError:
        raise
    except Exception as error:  # several libraries read tokenizer, image processor and template
        raise _unusable(folder, "has no usable processor", error) from error
    if not hasattr(processor, "image_processor"):
        raise SpecError(f"model.name_or_path: the processor of {folder} takes no images; name a vision-language model")
    if "labels" in processor.model_input_names:  # PaliGemma
        raise SpecError(
            f"model.name_or_path: {folder} reads a prompt in both directions, as its processor marks it, and such models cannot "
            "be trained on conversations; choose an instruction-tuned model"
        )
    if processor.chat_template is None:
        raise SpecError(f"model.name_or_path: {folder} has no chat template; choose an instruction-tuned model")
    refuse_endless(processor, folder)
    tokenizer = processor.tokenizer
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(stop_tokens(processor, folder)[0])
    return processor


def refuse_unless_built(spec: ModelSpec, folder: Path) -> None:
    """Build the model without its weights, unless its family is known. Raises SpecError when transformers cannot, for example
    without an optional package."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=spec.trust_remote_code)
        if not family_of(config.model_type).whole:
            with torch.device("meta"):
                AutoModelForImageTextToText.from_config(config, trust_remote_code=spec.trust_remote_code)
    except MemoryError:
        raise
    except Exception as error:
        raise _unusable(folder, "is not a vision-language model", error) from error


def _unusable(folder: Path, what: str, error: Exception) -> SpecError:
    why = first_line(error)
    if isinstance(error, ImportError):
        what, why = "cannot be loaded here", f"{why.split('. ')[0]}; install it, or choose another model"
    return SpecError(f"model.name_or_path: {folder} {what}: {why}")


def linears(model: Any) -> dict[str, Linear]:
    """Return every linear layer but routers by name (4-bit layers report their unquantised shape)."""
    return {
        name: Linear(module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and not is_fused(name)
    }


def tables(model: Any) -> list[str]:
    """Return the names of embeddings and convolutions, and of a head that is tied to the embeddings."""
    kinds = (torch.nn.Embedding, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    tied = [name.removesuffix(".weight") for name in model.all_tied_weights_keys]
    return [*(name for name, module in model.named_modules() if isinstance(module, kinds)), *tied]


def add_adapters(model: Any, spec: JobSpec, chosen: list[str]) -> tuple[Any, dict[str, int]]:
    """Add PEFT adapters to exactly `chosen`, checked by the census. Returns the model and parameters by group."""
    from peft import LoraConfig, get_peft_model

    counts = parameters(spec.lora.r, linears(model), chosen)
    config = LoraConfig(**lora_settings(spec.lora, chosen), task_type="CAUSAL_LM")
    torch.manual_seed(spec.training.seed)
    model = get_peft_model(model, config).eval()  # the adapters' new dropout modules start in training mode
    census(chosen, adapted(model))
    return model, counts


def lora_settings(lora: LoraSpec, chosen: list[str]) -> dict[str, Any]:
    """Translate the spec's LoRA fields to PEFT's arguments, which are also Unsloth's."""
    return {
        "r": lora.r,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": lora.lora_dropout,
        "bias": lora.bias,
        "use_rslora": lora.use_rslora,
        "target_modules": pattern(chosen),
    }


def adapted(model: Any) -> list[str]:
    """Return the layers that hold an adapter with trainable parameters, by their names in the base model."""
    from peft.tuners.lora import LoraLayer

    return [
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and any(p.requires_grad for p in module.parameters())
    ]


@torch.no_grad()
def begin_from(model: Any, lora: LoraSpec, folder: Path, layers: Mapping[str, Linear]) -> None:
    """Make the fresh adapters of `model` the same function as the adapter in `folder`. `layers` are the base's linear layers.

    Raises SpecError when they cannot be: see `init_adapter`.
    """
    from safetensors import safe_open

    adapter = read_init_adapter(lora.init_adapter or str(folder), folder)
    factors = fitted(adapter, lora, layers)
    base = model.get_base_model()
    with safe_open(adapter.weights, "pt") as file:
        for name, each in factors.items():
            layer = base.get_submodule(name)
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            a[: each.rank] = file.get_tensor(each.a).to(a)
            b.zero_()
            ratio = each.scale / layer.scaling["default"]
            b[:, : each.rank] = (file.get_tensor(each.b).double() * ratio).to(b)
            if not (a.isfinite().all() and b.isfinite().all()):
                raise SpecError(
                    f"lora.init_adapter: {adapter.name} holds numbers that are not finite (nan or inf) at {name}; its training "
                    "diverged, so start from another"
                )
        for name, key in adapter.biases.items():
            bias_of(base, name).copy_(file.get_tensor(key))


def bias_of(base: Any, name: str) -> torch.Tensor:
    """Return the bias of a module by its current name or its name before transformers 4.52. Raises SpecError when there is
    none."""
    modules = dict(base.named_modules())
    module = modules.get(name, modules.get(module_name(name)))
    bias: torch.Tensor | None = getattr(getattr(module, "base_layer", module), "bias", None)
    if bias is None:
        raise SpecError(f"lora.init_adapter: it holds a bias for {name}, which this base model does not have")
    return bias


def load_adapter(model: Any, folder: Path) -> None:
    """Load weights that this same job saved into the adapters."""
    from peft import load_peft_weights, set_peft_model_state_dict

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        result = set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "lora_" in key]


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
