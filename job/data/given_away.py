"""Finds rows whose prompt holds their answer: a model learns to copy it, and every metric praises that.

An answer of four words or more counts wherever a row's instruction, history or system turn states it. Shorter ones occur in
honest prompts too ("Answer yes or no"), and count only if most rows of the data are like that. What the prompt asks or offers
("Is the mass in the left upper lobe or in the right?") it does not state. Nor does text that rows with other answers have as
well: it is part of the task ("If nothing is wrong, write: No acute cardiopulmonary abnormality").
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence

from job.data.conversations import Message, last_answer, prompt_text

LEAST_WORDS = 4
"""Of 121 questions as in VQA data sets, none states an answer of so many words (tests/data/test_given_away.py)."""
MOST_ROWS, LEAST_ROWS = 0.5, 10
"""Share and number of the rows from which on short answers count."""
SHARED = 0.05
"""Share of rows with other answers whose prompts also hold an answer, from which on it is part of the task."""
COMPARED = 200
UNSPACED = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
WORD = re.compile(rf"[{UNSPACED}]|[^\W_{UNSPACED}]+")
SENTENCE_END = re.compile(r"[.!?;](?=\s|$)|\n|[\u3002\uff1f\uff01]")
ALTERNATIVE = re.compile(r"\b(?:or|vs|versus|oder|ou)\b|/", re.IGNORECASE)
OFFER = re.compile(
    r"\b(?:options?|choices?|choose|select|pick|one of|candidates?)\b|(?:^|\s)\(?[A-H][).:]\s*$", re.IGNORECASE
)


def stated_answer(messages: list[Message]) -> str:
    """Returns the first answer that an earlier user or system turn states, as words; empty if there is none."""
    for place, message in enumerate(messages):
        if message["role"] == "assistant":
            said = words(last_answer(messages[: place + 1]))
            if said and _states(_folded(prompt_text(messages[:place])), said):
                return said
    return ""


def words(text: str) -> str:
    return " ".join(WORD.findall(_folded(text)))


def is_short(answer: str) -> bool:
    """Whether an answer, as `words` returns it, may occur in a prompt by chance. In scripts without blanks, two signs count as a
    word."""
    found = answer.split()
    return sum(0.5 if re.match(rf"[{UNSPACED}]", word) else 1 for word in found) < LEAST_WORDS


def given_away(
    stated: Mapping[int, str], total: int, compared: Callable[[int], Sequence[tuple[str, str]]]
) -> list[int]:
    """Returns the rows whose prompt gives the answer away, of those that state it (`stated_answer`) among `total`.

    `compared(n)` returns prompt and answer, as `words`, of about n rows.
    """
    if not stated:
        return []
    others = [(f" {prompt} ", answer) for prompt, answer in compared(COMPARED)]
    part_of_task = dict[str, bool]()
    for said in set(stated.values()):
        prompts = [prompt for prompt, answer in others if answer != said]
        part_of_task[said] = sum(f" {said} " in prompt for prompt in prompts) >= SHARED * max(len(prompts), 1)
    left = {row: said for row, said in stated.items() if not part_of_task[said]}
    short = {row for row, said in left.items() if is_short(said)}
    return sorted(left if len(short) >= max(MOST_ROWS * total, LEAST_ROWS) else left.keys() - short)


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()


def _states(prompt: str, answer: str) -> bool:
    """Whether a sentence of the prompt holds the words of the answer, and neither asks nor offers them."""
    if f" {answer} " not in f" {words(prompt)} ":
        return False
    found = re.compile(r"(?<!\w)" + r"[\W_]*".join(map(re.escape, answer.split())) + r"(?!\w)")
    for match in found.finditer(prompt):
        starts = [end.end() for end in SENTENCE_END.finditer(prompt, 0, match.start())]
        before = prompt[starts[-1] if starts else 0 : match.start()]
        end = SENTENCE_END.search(prompt, max(match.end() - 1, 0))
        after = prompt[match.end() : end.start() if end else len(prompt)]
        asked = end is not None and end[0] in "?\uff1f"
        if not (asked or ALTERNATIVE.search(f"{before} {after}") or OFFER.search(prompt[: match.start()])):
            return True
    return False
