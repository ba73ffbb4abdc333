"""Identifies the rows that a run began with. If data changed between two attempts, the run would train on an unknown mixture."""

from __future__ import annotations

import base64
import hashlib
import json
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import pairwise

from job.errors import SpecError
from job.layout import IDENTITY_KEY

FORMAT = 2
"""Format 1 also held labels and groups, which only evaluation reads."""
SIDES = {"train": "training rows", "held_out": "held-out rows", "validation": "validation rows"}
HALF = 8
"""Bytes of each of a row's two digests: enough to distinguish a hundred million rows."""


def row_identity(pictures: list[str], decides: object) -> bytes:
    """Return 16 bytes: a digest of everything in a row that decides a result (JSON), including its image files (SHA-256 each);
    then a digest of only these files."""
    both = (json.dumps([pictures, decides]), json.dumps(pictures))
    return b"".join(hashlib.sha256(text.encode()).digest()[:HALF] for text in both)


@dataclass(frozen=True)
class Identity:
    """The training, held-out and validation rows, in their order: `row_identity` of each, joined."""

    train: bytes
    held_out: bytes
    validation: bytes = b""

    @property
    def rows(self) -> int:
        return sum(map(len, vars(self).values())) // (2 * HALF)

    @property
    def digest(self) -> str:
        """One SHA-256 of all sides."""
        sides = (hashlib.sha256(side).digest() for side in vars(self).values())
        return hashlib.sha256(b"".join(sides)).hexdigest()

    def to_json(self) -> bytes:
        return json.dumps({"format": FORMAT} | {name: _described(rows) for name, rows in vars(self).items()}).encode()


def from_json(data: bytes) -> Identity | None:
    """Parse what `to_json` wrote; None for anything else. Raises SpecError for the format of an earlier version."""
    try:
        sides = json.loads(data)
        if sides.get("format", FORMAT) != FORMAT:
            raise SpecError(
                f"output.url: it holds a run of another version of this program ({IDENTITY_KEY} has format {sides['format']}, "
                f"and {FORMAT} is known here); choose another output, or run that version"
            )
        return Identity(**{name: base64.b64decode(sides[name]["digests"]) for name in SIDES if name in sides})
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _described(rows: bytes) -> dict[str, object]:
    digests = base64.b64encode(rows).decode()
    return {"rows": len(rows) // (2 * HALF), "sha256": hashlib.sha256(rows).hexdigest(), "digests": digests}


def changes(before: Identity, after: Identity) -> list[str]:
    """Describe how the rows differ, one phrase for each side of the split that does; empty if they are the same."""
    found = []
    for side, name in SIDES.items():
        old, new = getattr(before, side), getattr(after, side)
        if old != new:
            rows = [[side[n : n + 2 * HALF] for n in range(0, len(side), 2 * HALF)] for side in (old, new)]
            found.append(f"{name} ({len(rows[0])} then, {len(rows[1])} now): {', '.join(_side(*rows))}")
    return found


def _side(old: list[bytes], new: list[bytes]) -> list[str]:
    """Describe how one side differs. A row in only one of the lists is a changed row of the other if the two have the same
    images, or the same place."""
    gone, come = _only_in(old, new), _only_in(new, old)
    kept = [[row for n, row in enumerate(rows) if n not in only] for rows, only in ((old, gone), (new, come))]
    texts = pictures = 0
    for place in [place for place in come if place in gone and gone[place][HALF:] == come[place][HALF:]]:
        del gone[place], come[place]
        texts += 1
    by_pictures = defaultdict[bytes, list[int]](list)
    for place in reversed(gone):
        by_pictures[gone[place][HALF:]].append(place)
    for place, row in list(come.items()):
        if row[HALF:] != NO_PICTURES and by_pictures[row[HALF:]]:
            del gone[by_pictures[row[HALF:]].pop()], come[place]
            texts += 1
    for place in [place for place in come if place in gone]:
        del gone[place], come[place]
        pictures += 1
    counts = {
        "with different texts or values": texts,
        "with different images": pictures,
        "removed": len(gone),
        "added": len(come),
    }
    said = [f"{count} {what}" for what, count in counts.items() if count]
    moved = _out_of_order(*kept)
    return said + ([f"{moved} in a different order"] if moved else [])


def _only_in(rows: list[bytes], others: list[bytes]) -> dict[int, bytes]:
    """Find, by place, the rows that the others lack or have fewer times."""
    left = Counter(others)
    found = {}
    for place, row in enumerate(rows):
        if left[row]:
            left[row] -= 1
        else:
            found[place] = row
    return found


def _out_of_order(old: list[bytes], new: list[bytes]) -> int:
    """Count the shared rows that do not follow the row that they followed before."""
    followed = Counter(pairwise([b"", *old]))
    return sum((Counter(pairwise([b"", *new])) - followed).values())


NO_PICTURES = row_identity([], None)[HALF:]
