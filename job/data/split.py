"""Which rows are held out: by a hash of their group, so that the choice is fixed by the seed and stable when rows are added."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence


def hold_out(groups: Sequence[str], fraction: float, seed: int) -> list[bool]:
    """For each row, whether it is held out. All rows of a group are on one side.

    A group is held out when its hash, read as a number in [0, 1), is below `fraction`; with few groups the nearest
    one to each side is moved over, so that neither side is empty. One group alone, or fraction 0, holds nothing out.
    """
    places = {group: _place(group, seed) for group in set(groups)}
    if fraction <= 0 or len(places) < 2:
        return [False] * len(groups)
    ordered = sorted(places, key=lambda group: places[group])
    held = {group for group in ordered if places[group] < fraction} or {ordered[0]}
    if len(held) == len(ordered):
        held.discard(ordered[-1])
    return [group in held for group in groups]


def _place(group: str, seed: int) -> float:
    digest = hashlib.sha256(f"{seed}:{group}".encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64
