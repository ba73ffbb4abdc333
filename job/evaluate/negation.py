"""Reads from an English text which of the words found in it are stated as present, absent or uncertain.

A set of rules after NegEx (Chapman et al. 2001, J Biomed Inform 34:301) and ConText (Harkema et al. 2009, same journal 42:839). A
cue ("no", "possible") holds for what follows it in the sentence, lists included, up to a word that turns the sentence; some cues
follow what they are about ("is not seen", "cannot be excluded"). Apparent cues ("no change in the effusion") mean nothing, and
history, indication, technique and comparison are not read. The rules are made for findings in radiology texts: `make reader-test`
measures them on sentences that they were not tuned to.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Literal

Stated = Literal["present", "uncertain", "absent"]
STRENGTH = {"absent": 0, "uncertain": 1, "present": 2}


def _words(*alternatives: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![\w-])(?:{'|'.join(alternatives)})(?![\w-])", re.IGNORECASE)


SENTENCE_END = re.compile(
    r"(?<!\bno)(?<!\bvs)[.;!?](?=\s|$)|\n\s*\n|(?<![,:])(?<!\bor)(?<!\band)(?<!\bof)\n\s*(?=[-*•\d(A-Z])", re.IGNORECASE
)
NEXT_LINE = re.compile(r"(?<![.;:!?\n])\n(?=[ \t]*[a-z])")
"""A line break within a sentence."""
OTHER_SECTION = re.compile(
    r"(?:^|(?<=\n)|(?<=[.;] ))[ \t]*(?:clinical (?:history|information|indication|details|question)|history|indications?"
    r"|reason for (?:exam(?:ination)?|study)|techniques?|comparisons?|procedure|protocol)\s*:"
    r"(?:(?:(?!\n\s*\n).)*?(?=(?:\n|[.;] |\A)[ \t]*(?:findings?|impression|report|conclusion|result)s?\s*:)|[^.;\n]*)",
    re.IGNORECASE | re.DOTALL,
)
ANSWERED = re.compile(r"\?\s+(no|none|yes|negative|absent|present)\b", re.IGNORECASE)
ABBREVIATED = ((re.compile(r"\bneg\.", re.I), "negative"), (re.compile(r"\be/o\b|\bevid\.", re.I), "evidence of"))

CHANGE = (
    r"(?:change|increase|decrease|difference|progression|improvement|growth|worsening|enlargement|alteration|progress)"
)
NOTHING = _words(
    rf"(?:no|without|nor)\s+(?:(?:any|\w+al|\w+ant|\w+ble|\w+ite|other|new|further|large|major)\s+){{0,3}}?{CHANGE}",
    r"not\s+(?:\w+ly\s+)?(?:changed|increased|decreased|enlarged|progressed|improved|resolved|grown|worsened)",
    r"no longer (?:clear|normal|requir\w+|need\w*)",
    r"not (?:only|just|necessarily|merely|certain (?:if|whether)|absent)",
    r"no doubt",
    r"(?:near(?:ly)?|almost|partial(?:ly)?|incomplete(?:ly)?|some)[\s-]+(?:complete(?:ly)?\s+)?"
    r"(?:resolution|clearing|clearance)(?: of)?",
)
"""What looks like a cue and is none."""
OPEN = _words(
    r"(?:cannot|can ?not|can't|could not|not|unable to|difficult to|hard to|impossible to|does not) (?:\w+ly )?(?:be )?"
    r"(?:exclude|rule out|excluded|ruled out)",
    r"(?:to )?(?:exclude|rule out)|r/o",
    r"possib(?:le|ly)|probab(?:le|ly)|likely|presum(?:ed|ably)|question(?:able|ed)|equivocal|doubtful|suspected|suspects?"
    r"|perhaps|potential(?:ly)?|conceivabl[ey]",
    r"suspicious (?:for|of)|suspicion (?:for|of)|concern(?:ing|ed)?(?: \w+)? (?:for|of|about)|worrisome for|question of",
    r"may|might|could|would be",
    r"suggest(?:s|ed|ive|ing)?(?: of)?|versus|vs\.?|differential(?: diagnos[ie]s)?|consider(?:ation)?",
    r"possibility of|if there is|raises?",
)
FAVOURED = _words(r"favou?rs?|favou?red")
CUE = _words(
    r"no|not|nor|neither|never|without|w/o|den(?:ies|ied|ying)|none",
    r"(?:absence|lack|free|clear|cleared|devoid|resolution|clearance|clearing|disappearance) (?:of|from)",
    r"(?:negative|-ve) for|rather than|instead of|lacks?|lacking",
    r"(?:rules|ruled|ruling) out(?: for)?|exclud(?:es|ing)|excluded",
    r"cannot (?:see|identify|find)|fails? to (?:show|reveal|demonstrate|identify)|nothing to \w+",
    r"favou?rs?(?: [\w-]+){1,4}? over|absent(?: are| is)?|non-?visuali[sz](?:ed|ation)(?: of)?|unlikely",
    r"(?<!has )(?<!have )(?<!is )(?<!are )(?<!been )(?<!fully )resolved",
)
QUALITY = (
    r"(?:(?:new|old|stable|unchanged|persist(?:ent|ing)|residual|chronic|known|mild|minimal|small|tiny|trace|moderate|large|severe"
    r"|marked|extensive|definite|multiple|several|few|bilateral|bibasilar|again|prominent|healed|subtle|interval|also)\b)"
)
TURN = _words(
    r"but|however|nevertheless|yet|although|though|still|except(?: for)?|apart from|aside from|other than|besides"
    r"|with the exception of|whereas|while|despite|only|because of|leaving",
    r"there (?:is|are|was|were|remains?)|shows?|demonstrates|reveals|makes?|renders?|explains?|with(?!in)|that",
    r"is|are|was|were|(?<!not )(?:has|have|had)|persists?|remains?|lies|(?<!previously )(?:seen|noted)",
)
AGAIN = re.compile(rf",\s*(?:and\s+)?(?:an?|there|the)\b|\band\s+(?:an?|there|the|{QUALITY})\b", re.IGNORECASE)
NEXT_ITEM = re.compile(rf",\s*(?={QUALITY})", re.IGNORECASE)
EITHER = re.compile(r"\s+or\s+(?:[\w-]+\s+){0,2}", re.IGNORECASE)
JOINED = re.compile(r"\b(?:or|nor)\b", re.IGNORECASE)
APART = re.compile(r",|\band\b", re.IGNORECASE)

GAP = r"(?:[^\S\n]*[,/]?[^\S\n]+(?!which|that|but|with|no\b|is\b|are\b|was\b|were\b|has\b|have\b)[\w-]+){0,7}?[^\S\n]*,?[^\S\n]*"
VERB = r"\b(?:is|are|was|were|has|have|had|can|could|may|might|must|should|would|appears?|seems?|remains?)\b"
SEEN = (
    r"(?:seen|present|identified|visible|visuali[sz]ed|detected|found|evident|demonstrated|appreciated|shown|noted|observed"
    r"|apparent|discerned|recogni[sz]ed|suggested|suspected)"
)
BEHIND_OPEN = re.compile(
    rf"{GAP}(?:(?:{VERB}\s+)(?:\w+ly\s+|also\s+)?(?:not\s+(?:be\s+)?(?:\w+ly\s+)?(?:excluded|ruled out)"
    rf"|(?:be\s+)?(?:difficult|hard)"
    rf" to (?:exclude|rule out)|(?:be\s+)?(?:considered|suspected|assumed|possible|probable|likely|less likely"
    rf"|questionable|questioned"
    rf"|equivocal|doubtful|raised)(?!\s+(?:un|absent))"
    rf"|a\s+(?:\w+\s+)?(?:consideration|possibility|concern)|in the differential|favou?red)"
    rf"|can(?:not|\s?not|'t) be (?:\w+ly )?(?:excluded|ruled out)|not (?:excluded|ruled out)|(?:versus|vs\.?)\b"
    rf"|be (?:\w+ )?(?:difficult|hard) to exclude|to be excluded)",
    re.IGNORECASE,
)
BEHIND_ABSENT = re.compile(
    rf"(?:,\s*(?:which|previously|formerly)[^,.]*,)?{GAP}(?:{VERB}(?:\s+(?:been|be|both|all|now|also|since|\w+ly))*\s+(?:(?:not|never)\s+"
    rf"(?:been\s+|be\s+)?(?:\w+ly\s+)?{SEEN}"
    rf"|absent|excluded|ruled out|negative|resolved|cleared|gone|disappeared"
    rf"|(?:considered|felt|thought|deemed)?(?:\s+to be)?\s*(?:\w+ly\s+)?"
    rf"unlikely|no longer\s+{SEEN}|none)|cannot (?:be )?(?:seen|identified)|do(?:es)? not (?:appear|exist)"
    rf"|\bresolved\b|\bunlikely\b|\babsent\b(?!\s+\w))"
    rf"(?!\s+(?:on|in|at) (?:the )?(?:prior|previous|earlier|last)| previously| before)",
    re.IGNORECASE,
)
TABLED = re.compile(r"\s*(?:\((?:-|\+)\)|[:=]\s*|\s-\s*|\u2013\s*)(?P<said>[\w+-]+)?", re.IGNORECASE)
NO, YES = {"none", "no", "not", "absent", "negative", "nil", "0", "unremarkable"}, {"yes", "present", "positive", "1"}
HERE = re.compile(
    rf"{GAP}(?:{VERB}\s+)?(?:again\s+|now\s+|\w+ly\s+)?"
    rf"(?:persists?|remains?|present|unchanged|stable|larger|smaller|(?:again )?noted)\b",
    re.I,
)


def assertions(expression: re.Pattern[str], text: str) -> dict[str, Stated]:
    """Return how each match of the first group of `expression` is stated: by its strongest mention, of which present is the
    strongest and absent the weakest."""
    found: dict[str, Stated] = {}
    for sentence in _sentences(text):
        matches = list(expression.finditer(sentence))
        either = {
            place
            for place, (one, other) in enumerate(pairwise(matches))
            if EITHER.fullmatch(sentence, one.end(), other.start())
        }
        for place, match in enumerate(matches):
            said = _stated(sentence, match.start(), match.end())
            if said == "present" and {place, place - 1} & either:
                said = "uncertain"
            earlier = found.get(match[1])
            if earlier is None or STRENGTH[said] > STRENGTH[earlier]:
                found[match[1]] = said
    return found


def _sentences(text: str) -> list[str]:
    text = NEXT_LINE.sub(" ", OTHER_SECTION.sub("\n\n", text))
    text = ANSWERED.sub(r": \1", text)
    for short, long in ABBREVIATED:
        text = short.sub(long, text)
    ends = [0, *(end.end() for end in SENTENCE_END.finditer(text)), len(text)]
    return [text[start:end] for start, end in pairwise(ends)]


def _stated(sentence: str, start: int, end: int) -> Stated:
    ahead, behind = sentence[:start], sentence[end:]
    tabled = TABLED.match(behind)
    word = ((tabled and tabled["said"]) or "").lower()
    if word in NO or word in YES:
        return "absent" if word in NO else "present"
    if BEHIND_OPEN.match(behind) or sentence.rstrip().endswith("?") or re.search(r"\?\s*$", ahead):
        return "uncertain"
    if BEHIND_ABSENT.match(behind):
        return "absent"
    return _ahead(ahead, behind)


def _ahead(ahead: str, behind: str) -> Stated:
    """Return what the last cue before a mention makes of it."""

    def blank(found: re.Match[str]) -> str:
        return " " * len(found[0])

    ahead = NOTHING.sub(blank, ahead)
    opened = sorted(cue.span() for cues in (OPEN, FAVOURED) for cue in cues.finditer(ahead))
    denied = [cue.span() for cue in CUE.finditer(OPEN.sub(blank, ahead))]
    no = next((span for span in reversed(denied) if _reaches(ahead[span[1] :], behind)), None)
    maybe = next((span for span in reversed(opened) if _reaches(ahead[span[1] :], behind)), None)
    if no and not (maybe and maybe[0] > no[1] and APART.search(ahead, no[1], maybe[0])):
        return "absent" if not maybe or maybe[0] >= no[0] or APART.search(ahead, maybe[1], no[0]) else "uncertain"
    return "uncertain" if maybe else "present"


def _reaches(between: str, behind: str) -> bool:
    """Whether a cue holds for a mention, given the words between them and those after it."""
    if TURN.search(between) or AGAIN.search(between):
        return False
    joined = JOINED.search(between) or JOINED.match(behind.lstrip(" ,")) or JOINED.search(behind.split(".")[0])
    if NEXT_ITEM.search(between) and not joined:
        return False
    return not ("," in between and not joined and HERE.match(behind))
