"""What a server answers is compared with what was measured, place by place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import log
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from job.errors import GateRefused
from job.export.gate import Reference
from job.export.logits import Answers
from job.export.questions import Agreement, Asked, Choice, ask_all, collapsed
from job.export.served import refuse_served
from job.model.transformers_backend import load_processor
from tests.tiny import job_spec

IMAGE, RIGHT = "<|image_pad|>", "The heart is of normal size."


def reference(scale: float = 1.0) -> Reference:
    nothing: list[Answers] = []
    return Reference([], nothing, nothing, scale, 0.0, 1.0, None, {}, {})


@pytest.fixture
def loaded(tiny: Callable[..., Path]) -> Any:
    processor = load_processor(job_spec().model, tiny("qwen2_5_vl"))
    ends = [processor.tokenizer.convert_tokens_to_ids("<|im_end|>")]
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=ends))
    return SimpleNamespace(processor=processor, model=model)


class Server:
    """One that answers as was measured, but for what is changed."""

    def __init__(self, loaded: Any, text: str = RIGHT, finish: str = "stop", runs: int = 3) -> None:
        self.tokenizer = loaded.processor.tokenizer
        self.image = self.tokenizer.convert_tokens_to_ids(IMAGE)
        self.end = loaded.model.generation_config.eos_token_id[0]
        self.text, self.finish, self.runs = text, finish, runs
        self.prompt, self.answer = self.tokenizer.encode("What is it?"), [*self.tokenizer.encode(RIGHT), self.end]
        self.chance, self.first, self.near = log(0.5), dict[int, int](), 0.0

    def asked(self) -> Asked:
        ids = [self.image, *self.prompt, *self.answer]
        places = range(len(ids) - len(self.answer), len(ids))
        choices = {
            place: Choice(log(0.5), log(0.1), {ids[place]: log(0.5), 0: log(0.49), 1: log(0.2)}) for place in places
        }
        return Asked([], {}, ids, choices, RIGHT, True)

    def __call__(self, request: dict[str, Any]) -> dict[str, Any]:
        if "prompt_logprobs" in request:
            ids = [self.image] * self.runs + self.prompt + self.answer
            chances = []
            for place, token in enumerate(ids):
                first = self.first.get(place - self.runs - len(self.prompt), token)
                one = {str(token): {"logprob": self.chance, "rank": 1 if first == token else 2}}
                chances.append(one | ({} if first == token else {str(first): {"logprob": -0.1, "rank": 1}}))
            return {"prompt_token_ids": ids, "prompt_logprobs": [None, *chances[1:]]}
        ids = [*self.tokenizer.encode(self.text), *([self.end] if self.finish == "stop" else [])]
        right = [*self.answer, self.end]
        content = [
            {
                "token": f"token_id:{token}",
                "logprob": -0.5,
                "top_logprobs": [
                    {"token": f"token_id:{token}", "logprob": -0.5},
                    {"token": f"token_id:{right[min(place, len(right) - 1)]}", "logprob": -0.5 - self.near},
                ],
            }
            for place, token in enumerate(ids)
        ]
        choice = {
            "message": {"content": self.text},
            "token_ids": ids,
            "finish_reason": self.finish,
            "logprobs": {"content": content},
        }
        return {"choices": [choice]}


def compared(server: Server, loaded: Any) -> Agreement:
    return ask_all(server, [server.asked()], {}, loaded, job_spec(), reference())


def test_runs_of_image_tokens_count_as_one() -> None:
    assert collapsed([7, 7, 1, 7, 7, 7, 2], 7) == ([7, 1, 7, 2], {0: 0, 2: 1, 3: 2, 6: 3})


def test_a_server_that_says_the_same_agrees_whatever_its_image_takes(loaded: Any) -> None:
    found = compared(Server(loaded, runs=5), loaded)
    assert (found.token_agreement, found.logprob_difference, found.effect_kept) == (1.0, 0.0, pytest.approx(1.0))
    assert (found.other_prompts, found.greedy, found.greedy_equal, found.greedy_departed) == (0, 1, 1, 0)
    refuse_served(found, "merged", job_spec(), reference())


def test_another_first_token_counts_unless_it_is_a_near_tie(loaded: Any) -> None:
    server = Server(loaded)
    server.first = {0: 0, 1: 1, 2: 2}  # log 0.49 is near log 0.5; log 0.2 is not; the last is not among the likely
    assert compared(server, loaded).token_agreement == pytest.approx(1 - 2 / len(server.answer))


def test_less_of_the_adapter_and_other_prompts_are_seen(loaded: Any) -> None:
    server = Server(loaded)
    server.chance = log(0.3)
    found = compared(server, loaded)
    assert found.effect_kept == pytest.approx(log(3) / log(5))
    assert found.logprob_difference == pytest.approx(log(5 / 3))
    server.prompt = server.tokenizer.encode("What was it?")
    row = Server(loaded).asked()
    found = ask_all(server, [row], {}, loaded, job_spec(), reference())
    assert (found.other_prompts, found.token_agreement, found.effect_kept) == (1, 0.0, 0.0)


@pytest.mark.parametrize(
    ("text", "finish", "near", "departed"),
    [
        (RIGHT, "length", 9.0, 1),
        (f"{RIGHT} There", "length", 9.0, 1),
        ("The heart is", "stop", 9.0, 1),
        ("The heart is", "length", 9.0, 1),
        ("The lungs are clear.", "stop", 9.0, 1),
        ("The lungs are clear.", "stop", 0.01, 0),
        (f"{RIGHT} There", "length", 0.01, 0),
        ("The heart is", "stop", 0.01, 0),
    ],
)
def test_an_answer_departs_where_it_is_another_or_ends_elsewhere(
    text: str, finish: str, near: float, departed: int, loaded: Any
) -> None:
    server = Server(loaded, text, finish)
    server.near = near
    assert compared(server, loaded).greedy_departed == departed


def test_every_bound_is_named(loaded: Any) -> None:
    right = compared(Server(loaded), loaded)
    for wrong, said in (
        (
            {"token_agreement": 0.97, "tokens": 1000},
            "token agreement 0.9700 is under 0.9800, the least that is allowed",
        ),
        ({"token_agreement": 1 - 2 / right.tokens}, f"is under {1 - 1 / right.tokens:.4f}, the least that is allowed"),
        ({"logprob_difference": 0.06}, "log-probabilities differ by 0.060 nats on average, where 0.050 are allowed"),
        ({"effect_kept": 0.5}, "50% of the adapter's effect is served"),
        ({"effect_kept": 1.5}, "150% of the adapter's effect is served"),
        ({"other_prompts": 1}, "1 of 1 conversations are written in other tokens"),
        ({"greedy_departed": 1}, "1 of 1 greedy answers are others, or end elsewhere"),
        ({"logprob_difference": float("nan")}, "differ by nan"),
    ):
        with pytest.raises(GateRefused, match=said.replace("(", r"\(")):
            refuse_served(replace(right, **wrong), "merged", job_spec(), reference())
    assert torch.isfinite(torch.tensor(right.loss))
    refuse_served(replace(right, token_agreement=(right.tokens - 1) / right.tokens), "merged", job_spec(), reference())
