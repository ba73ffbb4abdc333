"""What a server is asked about the gate's rows, what it answers, and how the two compare."""

from __future__ import annotations

import base64
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from job.config.schema import JobSpec
from job.data import Data, Row
from job.data.originals import originals
from job.errors import GateRefused
from job.export.gate import VISIBLE, Reference, near
from job.export.logits import Answers
from job.model.collator import IGNORE, Collator, image_token
from job.model.loaded import Loaded

Ask = Callable[[dict[str, Any]], dict[str, Any]]
"""Posts a chat request, and returns the server's answer."""
FREELY = {"logprobs": True, "top_logprobs": 20, "return_tokens_as_token_ids": True}
"""Options of a request for a greedy answer."""
CUT = "\ufffd"
"""What a tokenizer writes for the first bytes of a character."""
CHOICES = 20
"""Tokens whose log-probabilities are kept at each place. One that is not among them is no tie."""


class Choice(NamedTuple):
    """What the job measured at one token of a true answer: its log-probability, that of the base model, and the log-probabilities
    of the most likely tokens by id, the first one first."""

    true: float
    base: float
    likely: dict[int, float]


class Asked(NamedTuple):
    """A row of the gate: its `request` without the answer, the `answer`, the tokens of the whole conversation with one for
    each run of image tokens, and what was measured at each place of the answer; the measured greedy text and whether it was
    `ended` by a token, None if the row was not evaluated."""

    request: list[dict[str, Any]]
    answer: dict[str, Any]
    tokens: list[int]
    choices: dict[int, Choice]
    greedy: str | None
    ended: bool


@dataclass(frozen=True)
class Agreement:
    """How a server's answers compare with what was measured, on `rows` rows and `tokens` tokens of their true answers.

    `token_agreement` is the share of tokens at which both rank the same token first, or the server's first is within
    `export.gate.max_mean_logit_difference` of ours; `logprob_difference` the mean of |a − b| of the true tokens'
    log-probabilities, in nats, and `loss` their negative mean as the server has it. `effect_kept` is Σ(s − b)(t − b) / Σ(t − b)²
    over the true tokens' log-probabilities of server, tuned model and base: 1 if the adapter acts in full, 0 for the base; None
    if it has no effect that can be told from rounding. `other_prompts` counts rows whose conversation the server writes in other
    tokens; `greedy` counts evaluated rows, `greedy_equal` those with the measured answer, and `greedy_departed` those with
    another answer or another end, near ties left out.
    """

    rows: int
    tokens: int
    token_agreement: float
    logprob_difference: float
    loss: float
    effect_kept: float | None
    other_prompts: int
    greedy: int
    greedy_equal: int
    greedy_departed: int
    server: str = ""


def rows_to_ask(
    reference: Reference, loaded: Loaded, spec: JobSpec, data: Data, measured: Mapping[str, tuple[str, int]]
) -> list[Asked]:
    """Return the rows of the gate as a server is asked about them. `measured` has the greedy answer and its tokens by row id."""
    collate = Collator(loaded.processor, spec.training.max_length, truncate=spec.dataset.over_length == "truncate")
    image = image_token(loaded.processor)
    found, answers = [], zip(reference.tuned, reference.untuned, strict=True)
    for row in itertools.chain.from_iterable(reference.batches):
        batch = collate([row])
        places = (batch["labels"][0] != IGNORE).nonzero()[:, 0].tolist()
        if not places:
            continue
        ids, kept = collapsed(batch["input_ids"][0].tolist(), image)
        choices = dict(zip([kept[place] for place in places], _choices(*next(answers)), strict=True))
        *asked, answer = _turns(row, originals(row, data, spec))
        text, count = measured.get(row["id"], (None, 0))
        found.append(Asked(asked, answer, ids, choices, text, count < spec.evaluation.max_new_tokens))
    return found


def collapsed(ids: Sequence[int], image: int) -> tuple[list[int], dict[int, int]]:
    """Return the tokens with one for each run of `image`, and where each token that was kept is among them."""
    kept = [place for place, token in enumerate(ids) if token != image or place == 0 or ids[place - 1] != image]
    return [ids[place] for place in kept], {place: number for number, place in enumerate(kept)}


def _choices(tuned: Answers, untuned: Answers) -> Iterator[Choice]:
    chances, base = (each.logits.float().log_softmax(-1) for each in (tuned, untuned))
    most = chances.topk(min(CHOICES, chances.shape[-1]))
    for row, target in enumerate(tuned.targets.tolist()):
        likely = dict(zip(most.indices[row].tolist(), most.values[row].tolist(), strict=True))
        yield Choice(float(chances[row, target]), float(base[row, target]), likely)


def _turns(row: Row, files: list[tuple[str, bytes]]) -> list[dict[str, Any]]:
    """Return a row's conversation in OpenAI's format, its images in place."""
    urls = (f"data:{kind};base64,{base64.b64encode(content).decode()}" for kind, content in files)
    return [
        {
            "role": turn["role"],
            "content": [
                {"type": "image_url", "image_url": {"url": next(urls)}} if part["type"] == "image" else part
                for part in turn["content"]
            ],
        }
        for turn in row["messages"]
    ]


class Heard(NamedTuple):
    """What a server said at the places of one answer: log-probabilities of the true tokens as `served`, as `tuned` and as `base`
    were measured, and how many of its first choices `agreed`."""

    served: list[float]
    tuned: list[float]
    base: list[float]
    agreed: int


def ask_all(
    ask: Ask,
    rows: Sequence[Asked],
    options: Mapping[str, Any],
    loaded: Loaded,
    spec: JobSpec,
    reference: Reference,
) -> Agreement:
    """Ask a server about every row, each request with `options`, and compare."""
    image, allowed = image_token(loaded.processor), near(spec, reference.scale)
    heard, others, greedy = list[Heard](), 0, list[tuple[bool, bool]]()
    for row in rows:
        known = {"messages": [*row.request, row.answer], "max_tokens": 1, "prompt_logprobs": 1}
        said = ask({**options, **known, "add_generation_prompt": False})
        if not (said.get("prompt_token_ids") and said.get("prompt_logprobs")):
            raise GateRefused("the server tells no tokens of a prompt; use vLLM 0.32 or newer")
        found = _at_places(row, said["prompt_token_ids"], said["prompt_logprobs"], image)
        others += found is None
        heard.append(_heard(row.choices, found, allowed))
        if row.greedy is not None:
            (free,) = ask({**options, **FREELY, "messages": row.request})["choices"]
            greedy.append((_is_measured(row, free, loaded), _departs(row, free, loaded, allowed)))
    served, tuned, base = (list(itertools.chain(*each)) for each in list(zip(*heard, strict=True))[:3])
    return Agreement(
        rows=len(rows),
        tokens=len(served),
        token_agreement=sum(each.agreed for each in heard) / len(served),
        logprob_difference=_mean([abs(a - b) for a, b in zip(served, tuned, strict=True)]),
        loss=-_mean(served),
        effect_kept=_kept(served, tuned, base, VISIBLE * reference.scale),
        other_prompts=others,
        greedy=len(greedy),
        greedy_equal=sum(equal for equal, _ in greedy),
        greedy_departed=sum(departs for _, departs in greedy),
    )


def _heard(choices: Mapping[int, Choice], found: Mapping[int, tuple[float, int]] | None, allowed: float) -> Heard:
    """Compare at each place that the server has. If it wrote other tokens, nothing of the adapter was served."""
    if found is None:
        base = [choice.base for choice in choices.values()]
        return Heard(base, [choice.true for choice in choices.values()], base, 0)
    ours = [choices[place] for place in found]
    firsts = zip(ours, found.values(), strict=True)
    agreed = sum(
        choice.likely.get(first, -torch.inf) >= max(choice.likely.values()) - allowed for choice, (_, first) in firsts
    )
    served = [chance for chance, _ in found.values()]
    return Heard(served, [choice.true for choice in ours], [choice.base for choice in ours], agreed)


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


def _kept(served: Sequence[float], tuned: Sequence[float], base: Sequence[float], visible: float) -> float | None:
    effect = [a - b for a, b in zip(tuned, base, strict=True)]
    if _mean([abs(each) for each in effect]) < visible:
        return None
    moved = [a - b for a, b in zip(served, base, strict=True)]
    return sum(a * b for a, b in zip(moved, effect, strict=True)) / sum(each * each for each in effect)


def _at_places(
    row: Asked, ids: list[int], chances: list[dict[str, dict[str, Any]] | None], image: int
) -> dict[int, tuple[float, int]] | None:
    """Return the log-probability of the true token and the first choice at each place of the answer; None if the server wrote
    the conversation in other tokens. A template that ends no turn leaves out the end that the job adds."""
    there, kept = collapsed(ids, image)
    at = {number: place for place, number in kept.items()}
    last = max(row.choices)
    same = [a == b for a, b in zip(row.tokens[: last + 1], there, strict=False)]
    if not all(same[:last]):
        return None
    found = {}
    for place in row.choices:
        if place < len(same) and same[place]:
            by_id = chances[at[place]] or {}
            first = next(token for token, each in by_id.items() if each["rank"] == 1)
            found[place] = (by_id[str(ids[at[place]])]["logprob"], int(first))
    return found


def _departs(row: Asked, said: Mapping[str, Any], loaded: Loaded, allowed: float) -> bool:
    """Tell whether a greedy answer is another one than was measured, or ends elsewhere, other than by a near tie: at the first
    token that differs, the server's log-probability of the measured one is within `allowed` of that of its own."""
    ends, right, ids = loaded.model.generation_config.eos_token_id, str(row.greedy), list[int]()
    if _is_measured(row, said, loaded):
        return bool((said["finish_reason"] == "stop") != row.ended)

    def text(*more: int) -> str:
        return _text(loaded, [*ids, *more]).rstrip(CUT)

    for token in said["logprobs"]["content"]:
        chosen, before = _id(token), text()
        if right.startswith(text(chosen)) and not (chosen in ends and before != right):
            ids.append(chosen)
            continue
        follow = [
            each["logprob"]
            for each in token["top_logprobs"]
            if (
                _id(each) in ends
                if before == right
                else right.startswith(text(_id(each))) and text(_id(each)) != before
            )
        ]
        return not any(abs(token["logprob"] - chance) <= allowed for chance in follow)
    return True


def _is_measured(row: Asked, said: Mapping[str, Any], loaded: Loaded) -> bool:
    """Tell whether a greedy answer is the measured one. Servers write broken characters in other ways, so those that have any
    are compared by tokens."""
    if CUT in str(row.greedy):
        return _text(loaded, said["token_ids"]) == row.greedy
    return bool((said["message"]["content"] or "").strip() == row.greedy)


def _text(loaded: Loaded, ids: Sequence[int]) -> str:
    """Decode as the measured answers were."""
    return str(loaded.processor.tokenizer.decode(ids, skip_special_tokens=True)).strip()


def _id(token: Mapping[str, Any]) -> int:
    return int(token["token"].removeprefix("token_id:"))
