"""Chooses held-out rows by a hash of their group, so that the choice is fixed by the seed and stable when rows are added."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence

POINT_ZERO = re.compile(r"\.0+$")
LEADING_ZEROS = re.compile(r"(?<![\d.])0+(?=\d)")


def same_name(name: str) -> str:
    """Returns the form in which names of groups are compared: NFKC, case folded, with single blanks, without characters that are
    not seen (category Cf, such as zero-width spaces)."""
    if name.isascii() and name.isalnum():
        return name.lower()
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
    return " ".join("".join(letter for letter in folded if unicodedata.category(letter) != "Cf").split())


def first_alike(names: Iterable[str]) -> tuple[int, tuple[int, int] | None]:
    """Counts the names (as `same_name` returns them) that equal an earlier one but for leading zeros or a `.0`: 7, 007 and 7.0.
    Returns also the first two places with such names, None if there are none."""
    seen: dict[str, dict[str, int]] = {}
    for place, name in enumerate(names):
        bare = LEADING_ZEROS.sub("", POINT_ZERO.sub("", name))
        seen.setdefault(bare, {}).setdefault(name, place)
    several = [list(places.values()) for places in seen.values() if len(places) > 1]
    return sum(len(places) - 1 for places in several), (several[0][0], several[0][1]) if several else None


def hold_out(
    groups: Sequence[str], fraction: float, seed: int, *, strata: Sequence[str] | None = None, rows: int | None = None
) -> list[bool]:
    """Returns for each row whether it is held out. All rows of a group are on one side.

    Groups are ordered by their hash, read as a number in [0, 1). Held out are

    - those below `fraction`;
    - with `rows`, the first that together have at least that many rows, as long as one group is left;
    - with `strata` (a value per row; a group takes that of its first row), the first of each stratum, so that its share is
      `fraction` (or that of `rows`) to within one group.

    With few groups, the nearest group is moved over so that neither side is empty. One group, or fraction 0, holds nothing out.
    """
    places = {group: _place(group, seed) for group in set(groups)}
    if (fraction <= 0 and rows is None) or len(places) < 2:
        return [False] * len(groups)
    ordered = sorted(places, key=lambda group: places[group])
    sizes = Counter(groups)
    if strata is not None:
        held = _of_each_stratum(ordered, groups, strata, rows / len(groups) if rows else fraction, seed)
    elif rows is not None:
        held, left = set[str](), rows
        for group in ordered:
            if left > 0:
                held.add(group)
                left -= sizes[group]
    else:
        held = {group for group in ordered if places[group] < fraction}
    held = held or {ordered[0]}
    if len(held) == len(ordered):
        held.discard(ordered[-1])
    return [group in held for group in groups]


def _of_each_stratum(
    ordered: Sequence[str], groups: Sequence[str], strata: Sequence[str], share: float, seed: int
) -> set[str]:
    stratum: dict[str, str] = {}
    for group, value in zip(groups, strata, strict=True):
        stratum.setdefault(group, value)
    members: dict[str, list[str]] = {}
    for group in ordered:
        members.setdefault(stratum[group], []).append(group)
    held = set[str]()
    for value, those in members.items():
        # Round up or down by the stratum's own hash, so that many small strata together get their share too.
        held |= set(those[: int(share * len(those) + _place(f"stratum {value}", seed))])
    return held


def units(keys: Sequence[Sequence[Hashable]]) -> list[int]:
    """Numbers each row by the first row that has a key in common with it, directly or through others."""
    parent = list(range(len(keys)))

    def root(place: int) -> int:
        while parent[place] != place:
            parent[place] = place = parent[parent[place]]
        return place

    seen: dict[Hashable, int] = {}
    for place, mine in enumerate(keys):
        for key in mine:
            other = root(seen.setdefault(key, place))
            here = root(place)
            parent[max(here, other)] = min(here, other)
    return [root(place) for place in range(len(keys))]


def _place(group: str, seed: int) -> float:
    digest = hashlib.sha256(f"{seed}:{group}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8]) / 2**64
