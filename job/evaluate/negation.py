"""Detects which words found in an English text are negated, after NegEx (Chapman et al. 2001, J Biomed Inform 34:301).

A cue negates what follows it in the sentence, lists included, up to a word that reverses the meaning; some cues follow what
they negate. Apparent negations ("no change in the effusion") negate nothing. The rules are made for findings in radiology
texts; they fail on sentences that negate and affirm without such a word in between.
"""

from __future__ import annotations

import re

SENTENCE_END = re.compile(r"[.;!?](?=\s|$)|\n\s*\n")
CUE = re.compile(
    r"\b(?:no|not|nor|neither|never|without|denies|(?:absence|lack|free|clear) of|negative for|rather than"
    r"|(?:rules?|ruled|ruling) out|excludes?|cannot see|fails? to (?:show|reveal))\b",
    re.IGNORECASE,
)
NO_CUE = re.compile(
    r"\b(?:no|without)\s+(?:\w+\s+){0,2}?(?:change|increase|decrease|difference|progression|improvement|growth)\b"
    r"|\bno longer (?:clear|normal)\b|\bnot (?:only|just|necessarily|certain (?:if|whether))\b|\bno doubt\b",
    re.IGNORECASE,
)
TURN = re.compile(
    r"\b(?:but|however|nevertheless|yet|although|though|still|except|apart from|aside from|other than|besides|instead"
    r"|there (?:is|are)|shows?|demonstrates?|reveals?)\b|,\s*(?:and\s+)?(?:an?|there|the)\b",
    re.IGNORECASE,
)
BEHIND = re.compile(
    r"(?:[^\S\n]+[\w-]+){0,4}?\s*(?:\b(?:is|are|was|were|has|have|can|could)(?:\s+(?:been|be))?\s+(?:\w+ly\s+)?"
    r"(?:not\s+(?:seen|present|identified|visible|visuali[sz]ed|detected|found|evident|demonstrated|appreciated|shown"
    r"|noted|observed)|absent|excluded|ruled out|negative|resolved|unlikely|no longer\s+(?:seen|present|visible))"
    r"|[:=]\s*(?:none|no|not seen|absent|negative))\b",
    re.IGNORECASE,
)


def affirmed(expression: re.Pattern[str], text: str) -> set[str]:
    """Return the matches of the first group of `expression` in `text`, except those negated wherever they occur."""
    found = set[str]()
    for sentence in SENTENCE_END.split(text):
        matches = list(expression.finditer(sentence))
        found |= {match[1] for match in matches if not _denied(sentence, match.start(), match.end())}
    return found


def _denied(sentence: str, start: int, end: int) -> bool:
    ahead = NO_CUE.sub(lambda cue: " " * len(cue[0]), sentence[:start])
    cues = [cue.end() for cue in CUE.finditer(ahead)]
    return bool(cues and not TURN.search(ahead, cues[-1])) or BEHIND.match(sentence, end) is not None
