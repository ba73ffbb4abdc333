"""Writes GGUF for llama.cpp with llama.cpp's own converter, which is only in its sources, not in a package."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from job.errors import SpecError
from job.model.families import family_of

CONVERTER = "convert_hf_to_gguf.py"
PARTS = {"model.gguf": [], "mmproj.gguf": ["--mmproj"]}


def converter(model_type: str) -> Path:
    """Return the converter in the folder that `LLAMA_CPP` names. Raises SpecError if it is missing or cannot convert the
    family."""
    found = [server for server in family_of(model_type).servers if server.name == "llama.cpp"]
    if not found or not found[0].versions:
        reason = found[0].note if found else "it is not known to"
        raise SpecError(
            f"export.gguf: llama.cpp does not support {model_type} models ({reason}); set gguf to false, and serve merged "
            "weights with a server that the plan names"
        )
    folder = os.environ.get("LLAMA_CPP")
    if folder is None or not (Path(folder) / CONVERTER).is_file():
        raise SpecError(f"export.gguf: set LLAMA_CPP to a folder with llama.cpp's sources, which hold {CONVERTER}")
    if importlib.util.find_spec("sentencepiece") is None:  # the converter asks for it first, whatever the tokenizer
        raise SpecError("export.gguf: llama.cpp's converter needs sentencepiece; pip install sentencepiece")
    return Path(folder) / CONVERTER


def rehearse(program: Path, base: Path) -> None:
    """Check that the converter knows the base's tokenizer and tensor names, which the merged weights share. Raises SpecError."""
    for name in PARTS:
        _convert(program, base, Path(name), "--dry-run")


def write_gguf(program: Path, merged: Path, into: Path) -> None:
    """Write `model.gguf` and `mmproj.gguf` (the vision tower) in bfloat16. Raises SpecError with the converter's last line."""
    into.mkdir(parents=True, exist_ok=True)
    for name in PARTS:
        _convert(program, merged, into / name)


def _convert(program: Path, model: Path, file: Path, *options: str) -> None:
    command = [sys.executable, str(program), str(model), "--outfile", str(file), "--outtype", "bf16"]
    made = subprocess.run([*command, *PARTS[file.name], *options], capture_output=True, text=True, check=False)
    if made.returncode:
        said = (made.stderr.strip().splitlines() or ["nothing"])[-1]
        raise SpecError(
            f"export.gguf: {program} cannot make {file.name} of {model}; it said: {said[:300]}; use the base model's "
            "published files, or set gguf to false"
        )
