"""What a model says in a batch is what it says alone, and what its logits say."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForImageTextToText

from job.data import Data
from job.data.prepare import prepare
from job.evaluate.generate import _generate, _with_other_images, answer, answer_losses, generations
from job.evaluate.records import Answer
from job.model.collator import IGNORE, Collator, encode, render
from job.model.loaded import Loaded
from tests.tiny import batch, job_spec, load_tiny, perturb, picture

TOKENS = 12


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.inference_mode():
        yield


def test_answers_of_a_batch_are_those_given_one_by_one(loaded: Loaded) -> None:
    """Left padding must reach positions, token types and cross attention."""
    together = answer(loaded, batch(), TOKENS)
    assert together == [answer(loaded, [each], TOKENS)[0] for each in batch()]
    assert len({text for text, _ in together}) == 3


def test_answers_follow_the_largest_logit_without_a_cache(loaded: Loaded) -> None:
    """The config of most families samples or punishes repeats; the measurement does not."""
    processor = loaded.processor
    prompts = [render(processor, each["messages"][:-1], prompt=True) for each in batch()]
    inputs = encode(processor, prompts, [each["images"] for each in batch()], side="left")
    start = inputs["input_ids"].shape[1]
    ends = torch.tensor(loaded.model.generation_config.eos_token_id)
    done = torch.zeros(len(prompts), dtype=torch.bool)
    for _ in range(TOKENS):
        token = loaded.model(**inputs).logits[:, -1].argmax(-1)
        token[done] = processor.tokenizer.pad_token_id
        done |= torch.isin(token, ends)
        inputs = longer(inputs, token)
    texts = processor.tokenizer.batch_decode(inputs["input_ids"][:, start:], skip_special_tokens=True)
    assert [text for text, _ in answer(loaded, batch(), TOKENS)] == [text.strip() for text in texts]


def test_the_loss_with_other_images_is_that_of_the_row_with_the_next_ones(loaded: Loaded) -> None:
    """Of another unit, and of as many images; a row alone has none to take."""
    rows = [row | {"unit": unit, "reference": "No."} for row, unit in zip(batch(), (0, 0, 1), strict=True)]
    spec = job_spec(evaluation={"max_new_tokens": 2})
    made = _generate(loaded, _with_other_images(rows), spec)
    own = [loss for loss, _ in answer_losses(loaded, rows, spec.training.max_length)]
    assert [each.loss for each in made] == own
    places = (2, 2, 0)
    swapped = [row | {"images": rows[place]["images"]} for row, place in zip(rows, places, strict=True)]
    assert [len(row["images"]) for row in rows] == [1, 1, 1]
    expected = [loss for loss, _ in answer_losses(loaded, swapped, 1 << 20)]
    assert [each.swapped_loss for each in made] == expected
    assert all(abs(other - mine) > 1e-4 for other, mine in zip(expected, own, strict=True))
    assert [other for _, other in _with_other_images(rows[:2])] == [None, None]
    (alone,) = _generate(loaded, _with_other_images(rows[:1]), spec)
    assert alone.swapped_loss is None


def longer(inputs: dict[str, torch.Tensor], token: torch.Tensor) -> dict[str, torch.Tensor]:
    """Inputs with one text token more."""
    more = dict(inputs)
    for name, last in (("input_ids", token[:, None]), ("attention_mask", torch.ones_like(token)[:, None])):
        more[name] = torch.cat([inputs[name], last], dim=1)
    for name in {"token_type_ids", "mm_token_type_ids"} & inputs.keys():
        more[name] = torch.cat([inputs[name], torch.zeros_like(token)[:, None]], dim=1)
    if "cross_attention_mask" in inputs:
        mask = inputs["cross_attention_mask"]
        more["cross_attention_mask"] = torch.cat([mask, mask[:, -1:]], dim=1)
    return more


def test_the_picture_decides_what_is_said(loaded: Loaded) -> None:
    other = [each | {"images": [picture(number + 10, 80, 60)]} for number, each in enumerate(batch())]
    assert answer(loaded, other, TOKENS) != answer(loaded, batch(), TOKENS)


def test_losses_of_a_batch_are_those_of_each_row(loaded: Loaded) -> None:
    together = answer_losses(loaded, batch(), 2048)
    for each, (loss, count) in zip(batch(), together, strict=True):
        inputs = Collator(loaded.processor, 2048)([each])
        wanted = inputs["labels"][:, 1:]
        logits = loaded.model(**inputs).logits[:, :-1]
        by_hand = cross_entropy(logits[wanted != IGNORE], wanted[wanted != IGNORE])
        assert loss == pytest.approx(float(by_hand), rel=1e-4)
        assert count == int((wanted != IGNORE).sum())


SPEC = {"evaluation": {"batch_size": 2, "max_new_tokens": 6}}


@pytest.fixture
def data(tmp_path: Path) -> Data:
    rows = [{"file_name": f"{number}.png", "caption": f"Finding {number}."} for number in range(10)]
    (tmp_path / "rows").mkdir()
    for number, each in enumerate(rows):
        picture(number).save(tmp_path / "rows" / each["file_name"])
    (tmp_path / "rows" / "metadata.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    spec = job_spec(dataset={"path": str(tmp_path / "rows"), "eval_fraction": 0.5}, **SPEC)
    return prepare(spec, tmp_path / "scratch")


@pytest.fixture(scope="module")
def small(tiny: Callable[..., Path]) -> Loaded:
    return perturb(load_tiny(tiny("llava")))


def test_the_base_speaks_when_adapters_are_silenced(small: Loaded, data: Data) -> None:
    plain = AutoModelForImageTextToText.from_pretrained(small.folder).eval()
    alone = Loaded(plain, small.processor, small.folder, "transformers", "32bit", small.device, {})
    spec = job_spec(**SPEC)
    order = range(len(data.evaluation))
    base = generations(alone, data.evaluation, spec, tuned=True, order=order)
    assert generations(small, data.evaluation, spec, tuned=False, order=order) == base
    assert generations(small, data.evaluation, spec, tuned=True, order=order) != base


def test_what_an_earlier_attempt_finished_is_not_made_again_and_changes_no_batch(small: Loaded, data: Data) -> None:
    made: list[list[str]] = []
    spec, order = job_spec(**SPEC), [3, 0, 1, 2]
    whole = generations(small, data.evaluation, spec, tuned=True, order=order)
    ids = [record.id for record in whole]
    known = [replace(whole[place], generated="kept") for place in order[:2]]

    def each(records: list[Answer]) -> None:
        made.append([record.id for record in records])

    again = generations(small, data.evaluation, spec, tuned=True, order=order, known=known, each=each)
    assert made == [[ids[1], ids[2]]]
    assert [record.id for record in again] == ids
    assert again[1:3] == whole[1:3]
    assert [again[place].generated for place in (3, 0)] == ["kept", "kept"]
