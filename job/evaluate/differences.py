"""Word-level differences between a reference text and a generated one."""

from __future__ import annotations

import re
from difflib import SequenceMatcher
from typing import Literal, NamedTuple

PIECE = re.compile(r"\s*\S+")
BARE = re.compile(r"^\W+|\W+$")


class Part(NamedTuple):
    """A run of text: in both, `missing` (only in the reference) or `added` (only in the generated text)."""

    kind: Literal["same", "missing", "added"]
    text: str


def difference(reference: str, generated: str) -> list[Part]:
    """`generated` as parts, with what the reference has besides; case and punctuation around a word do not count.

    The parts that are not `missing` give back `generated`, but for white space at its end.
    """
    ours, theirs = PIECE.findall(reference), PIECE.findall(generated)
    matcher = SequenceMatcher(None, [_bare(word) for word in ours], [_bare(word) for word in theirs], autojunk=False)
    parts: list[Part] = []
    for kind, i1, i2, j1, j2 in matcher.get_opcodes():
        if kind == "equal":
            parts.append(Part("same", "".join(theirs[j1:j2])))
            continue
        if i2 > i1:
            parts.append(Part("missing", "".join(ours[i1:i2])))
        if j2 > j1:
            parts.append(Part("added", "".join(theirs[j1:j2])))
    return parts


def _bare(word: str) -> str:
    return BARE.sub("", word.strip()).casefold() or word.strip()
