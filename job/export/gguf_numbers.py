"""Compares the numbers of GGUF files with those of the merged weights that they were made of."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open

from job.export.gguf import PARTS
from job.model.base_model import weight_files

NUMBERS = 2**16
"""Different numbers in bfloat16."""
AT_ONCE = 2**22
EXACT = 2.0**-17
"""Smallest number whose 8 bits of precision in bfloat16 float16 keeps: it counts in steps of 2⁻²⁴ there."""


def strange_numbers(program: Path, merged: Path, written: Path) -> int:
    """Count the numbers of `written` that the merged weights do not have.

    Matrices are compared as a histogram of their bfloat16 numbers, since the converter renames, splits and permutes them. It
    leaves out rows of an embedding that have no token, and writes a few tensors in float16, whose smallest numbers may differ.
    Vectors are not compared: it adds 1 to the norms of Gemma.
    """
    sys.path.append(str(program.parent / "gguf-py"))
    try:
        from gguf import GGUFReader
    finally:
        sys.path.pop()
    there, halves = np.zeros(NUMBERS, np.int64), 0
    for name in PARTS:
        for tensor in GGUFReader(written / name).tensors:
            if len(tensor.shape) > 1 and tensor.tensor_type.name == "BF16":
                there += _histogram(tensor.data.reshape(-1).view(np.uint16))
            elif len(tensor.shape) > 1:
                numbers = np.array(tensor.data, np.float32)
                there += _histogram(_bits(torch.from_numpy(numbers)))
                halves += int((np.abs(numbers) < EXACT).sum()) * (tensor.tensor_type.name == "F16")
    for file in weight_files(merged):
        with safe_open(file, "pt") as stream:
            for key in stream.keys():  # noqa: SIM118 - it is no mapping
                if len(stream.get_slice(key).get_shape()) > 1:
                    there -= _histogram(_bits(stream.get_tensor(key)))
    return max(0, int(np.maximum(there, 0).sum()) - halves)


def _bits(tensor: torch.Tensor) -> NDArray[np.uint16]:
    return tensor.bfloat16().reshape(-1).view(torch.int16).numpy().view(np.uint16)


def _histogram(numbers: NDArray[np.uint16]) -> NDArray[np.int64]:
    found = np.zeros(NUMBERS, np.int64)
    for start in range(0, len(numbers), AT_ONCE):
        found += np.bincount(numbers[start : start + AT_ONCE], minlength=NUMBERS)
    return found
