"""States what a base model's licence asks of those who use or distribute weights tuned from it. Not legal advice."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from job.model.families import FAMILIES, family_of


class Licence(NamedTuple):
    """`name` is a key of `LICENCES`; `text` is Markdown for a model card."""

    name: str
    text: str


def licence_of(base: str, model_type: str = "") -> Licence:
    """Returns the licence of a base model by its name, such as `meta-llama/Llama-3.2-11B-Vision-Instruct`.

    If the name says nothing (a folder), the `model_type` of its configuration gives the architecture, but not whose weights they
    are, so the text says "if". Otherwise returns UNKNOWN.
    """
    folded = base.lower()
    for family in FAMILIES.values():
        for pattern, licence in family.named:
            if re.search(pattern, folded):
                return Licence(licence, LICENCES[licence])
    if whose := family_of(model_type).maker:
        maker, licence = whose
        condition = f"The base is of the type `{model_type}`. If its weights come from {maker}, this holds:"
        return Licence(UNKNOWN, f"{LICENCES[UNKNOWN]}\n{condition}\n\n{LICENCES[licence]}")
    return Licence(UNKNOWN, LICENCES[UNKNOWN])


UNKNOWN = "see-base-model"
ON_HUB = frozenset({"apache-2.0", "gemma", "llama3.2"})
"""Licences that the Hub has a tag for; it calls the others `other`, and asks for their name."""
TEXTS = Path(__file__).with_suffix(".md").read_text("utf-8")
LICENCES: dict[str, str] = dict(re.findall(r"^# (\S+)\n\n(.*?\n)(?=\n# |\Z)", TEXTS, re.DOTALL | re.MULTILINE))
