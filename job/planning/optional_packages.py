"""Checks for packages that only some specs need; a missing one is reported before training, not after."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from importlib.util import cache_from_source, find_spec
from pathlib import Path

from job.config.schema import JobSpec
from job.errors import SpecError

OCR = ("rapidocr", "install the burned-in extra")
BITSANDBYTES = ("bitsandbytes", "install the gpu extra")
LLMCOMPRESSOR = ("llmcompressor", "install the fp8 extra")
LARGE = ("torch", "transformers", "unsloth")
TRACKERS = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}


def check_packages(spec: JobSpec, cuda: bool) -> None:
    """Raises SpecError naming the field, the package and how to install it. Does nothing if torch is not installed: the plan is
    then for another machine."""
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
        "privacy.look_for_text: true": (spec.privacy.look_for_text is True, *OCR),
        "privacy.burned_in: mask": (spec.privacy.burned_in == "mask", *OCR),
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


def uncompiled(names: Iterable[str] = LARGE) -> str:
    """Returns a note if packages come without Python's bytecode and none can be written: each start, and each process in which
    Inductor compiles kernels, then compiles thousands of sources again. Empty if all is well."""
    folders = {}
    for name in names:
        spec = find_spec(name)
        if spec is None or spec.origin is None:
            continue
        kept = Path(cache_from_source(spec.origin))
        if not kept.exists() and (sys.dont_write_bytecode or not _writable(kept.parent)):
            folders[name] = str(Path(spec.origin).parents[1])
    if not folders:
        return ""
    where = " ".join(sorted(set(folders.values())))
    return (
        f"packages without bytecode, which cannot be written: {', '.join(folders)}; every start compiles them again: run "
        f"'python -m compileall -q -j 0 {where}' once, or, if that is read-only, set PYTHONPYCACHEPREFIX to a persistent "
        "folder and unset PYTHONDONTWRITEBYTECODE"
    )


def _writable(folder: Path) -> bool:
    return os.access(next(path for path in (folder, *folder.parents) if path.exists()), os.W_OK)
