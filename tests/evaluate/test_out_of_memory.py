"""Out of memory while a model is asked: the same rows in halves, and the same answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from job.errors import OutOfMemory
from job.evaluate.generate import generations
from job.evaluate.occlusion import explain
from job.export.gate import micro_batches
from job.export.logits import answers, spread_rows
from job.model.loaded import Loaded
from tests.tiny import batch, job_spec, load_tiny, perturb

SPEC = job_spec(evaluation={"batch_size": 3, "max_new_tokens": 6})


@pytest.fixture(scope="module")
def asked(tiny: Callable[..., Path]) -> Loaded:
    return perturb(load_tiny(tiny("qwen2_5_vl")))


class Rows(list[dict[str, Any]]):
    """Rows of a data set that are in memory."""

    def with_format(self, _: None) -> dict[str, list[int]]:
        return {"_row": [int(row["id"].removeprefix("row-")) for row in self]}


def rows() -> Rows:
    return Rows(row | {"reference": "", "labels": {}, "groups": {}, "unit": row["id"]} for row in batch())


@contextmanager
def card(loaded: Loaded, fits: int) -> Iterator[list[int]]:
    """A card on which `fits` rows fit at once, and that more are tried on; yields how many went through, call by call."""
    through, refused = list[int](), list[int]()

    def pre_forward(_: Any, _arguments: Any, named: dict[str, Any]) -> None:
        if (count := named["attention_mask"].shape[0]) > fits:
            refused.append(count)
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB")
        through.append(count)

    hook = loaded.model.get_base_model().register_forward_pre_hook(pre_forward, with_kwargs=True)
    try:
        yield through
    finally:
        hook.remove()
    assert refused


def test_answers_come_in_halves_and_are_the_same(asked: Loaded) -> None:
    right = generations(asked, rows(), SPEC, tuned=True, order=range(3))
    with card(asked, 1) as through:
        found = generations(asked, rows(), SPEC, tuned=True, order=range(3))
    assert set(through) == {1}
    assert [row.generated for row in found] == [row.generated for row in right]
    assert [row.loss for row in found] == pytest.approx([row.loss for row in right], rel=1e-4)


def test_a_map_of_where_the_model_looks_comes_in_halves(asked: Loaded) -> None:
    wanted = {"row-1": "There is a nodule."}
    right = explain(asked, batch(), wanted, SPEC, lambda: None)
    with card(asked, 2):
        found = explain(asked, batch(), wanted, SPEC, lambda: None)
    for one, other in zip(right["row-1"], found["row-1"], strict=True):
        assert one == pytest.approx(other, abs=1e-4)


def test_the_gate_asks_in_halves(asked: Loaded) -> None:
    batches = spread_rows(batch(), 3, 3)
    right = answers(asked, batches, SPEC, micro_batches(SPEC, asked))
    with card(asked, 2):
        found = answers(asked, batches, SPEC, micro_batches(SPEC, asked))
    for one, other in zip(right, found, strict=True):
        assert torch.allclose(one.logits, other.logits, atol=1e-4)


@pytest.mark.parametrize(("precision", "cure"), [("16bit", "set model.precision to 4bit"), ("4bit", "use a GPU with")])
def test_one_row_that_does_not_fit_ends_with_71_and_a_cure_that_is_not_on_already(
    asked: Loaded, precision: str, cure: str
) -> None:
    held = replace(asked, precision=precision)
    with (
        card(asked, 0),
        pytest.raises(OutOfMemory, match=f"evaluation does not fit the GPU; shrink .*, {cure}") as caught,
    ):
        generations(held, rows(), SPEC, tuned=True, order=range(3))
    assert caught.value.exit_code == 71
