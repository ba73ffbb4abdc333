"""Packages that only some specs want. One that is missing is told before training, not behind it."""

from __future__ import annotations

from importlib.util import find_spec

from job.errors import SpecError
from job.spec import JobSpec

BITSANDBYTES = ("bitsandbytes", "install the gpu extra")
LLMCOMPRESSOR = ("llmcompressor", "install the fp8 extra")
TRACKERS = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}


def check_packages(spec: JobSpec, cuda: bool) -> None:
    """Raises SpecError naming the field, the package and what brings it. Where torch is not installed, plans are made for
    elsewhere, and nothing is asked for."""
    if find_spec("torch") is None:
        return
    model, export, report_to = spec.model, spec.export, spec.training.report_to
    wanted = {
        "model.precision: 4bit": (cuda and model.precision == "4bit", *BITSANDBYTES),
        "model.attn_implementation: flash_attention_2": (
            model.attn_implementation == "flash_attention_2",
            "flash_attn",
            "install flash-attn, or choose sdpa",
        ),
        "training.optim: adamw_8bit": (spec.training.optim == "adamw_8bit", *BITSANDBYTES),
        "export.merged_4bit": (export.merged_4bit, *BITSANDBYTES),
        "export.merged_fp8": (export.merged_fp8, *LLMCOMPRESSOR),
        "export.merged_int4": (export.merged_int4, *LLMCOMPRESSOR),
    } | {
        f"training.report_to: {name}": (name in report_to, package, "install the trackers extra")
        for name, package in TRACKERS.items()
    }
    for field, (asked, package, cure) in wanted.items():
        if asked and find_spec(package) is None:
            raise SpecError(f"{field} needs the package {package}, which is not installed; {cure}")
