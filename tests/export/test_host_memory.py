"""The export holds one model at a time in host memory."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import cycle
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from tests.export.host_memory import limited_export
from tests.families import FAMILIES

pytestmark = pytest.mark.timeout(900)
WAYS = {"by way of scratch": True, "straight to the output": False}
BOTH = pytest.mark.parametrize("scratch_copy", WAYS.values(), ids=WAYS)


@pytest.fixture(scope="module")
def process() -> Iterator[ProcessPoolExecutor]:
    """Runs each task in a new process, forked from one that has imported the libraries.

    malloc returns freed memory at once there, so the limit counts what the export holds and not what malloc keeps.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(["tests.export.host_memory", "datasets", "job.export.gain"])
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("MALLOC_MMAP_THRESHOLD_", str(128 * 1024))
        with ProcessPoolExecutor(1, context, initializer=gc.freeze, max_tasks_per_child=1) as executor:
            executor.submit(os.getpid).result()  # starts the process that is forked
            yield executor


@pytest.mark.parametrize(("family", "way"), [*zip(FAMILIES, cycle(WAYS), strict=False)])
def test_export_passes_the_gate_with_room_for_one_model(
    family: str, way: str, process: ProcessPoolExecutor, tmp_path: Path
) -> None:
    scratch_copy = WAYS[way]
    exported = process.submit(limited_export, family, tmp_path, scratch_copy=scratch_copy).result()
    assert exported.refused is None
    assert exported.gate is not None
    assert exported.gate.wrong == []
    assert exported.gate.compared > 100
    assert bool(exported.sent) is not scratch_copy


def test_files_in_16_bits_are_read_back_into_one_model_in_32(process: ProcessPoolExecutor, tmp_path: Path) -> None:
    task = process.submit(limited_export, "llava", tmp_path, scratch_copy=False, dtype=torch.bfloat16)
    assert task.result().refused is None


@BOTH
def test_two_models_do_not_fit_that_room(scratch_copy: bool, process: ProcessPoolExecutor, tmp_path: Path) -> None:
    task = process.submit(limited_export, "llava", tmp_path, scratch_copy=scratch_copy, keep=True)
    with pytest.raises(RuntimeError, match="Cannot allocate memory"):
        task.result()
