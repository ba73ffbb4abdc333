"""Whether a published output still holds, byte for byte, what `RESULT.json` names. Reads every file once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from job.errors import DataError
from job.layout import ADAPTER, MADE_OF_MERGED, RESULT_KEY
from job.output.stored import read_json
from job.store import Digest, Missing, Store
from job.store.folders import together

PIECE = 16 * 2**20


class Verified(NamedTuple):
    """What was read: files, their bytes, and the SHA-256 of `RESULT.json` itself, which names those of all others."""

    files: int
    size: int
    result: str


def verify(store: Store, told: Callable[[str], None] = lambda _key: None) -> Verified:
    """Compare every file of a result with `RESULT.json`; `told` hears of each file that is as it was published.

    Raises DataError naming each file that differs, is missing, or lies in a published folder without being named; and if there
    is no result.
    """
    result = read_json(store, RESULT_KEY) or {}
    try:
        files = {key: Digest(int(each["size"]), str(each["sha256"])) for key, each in result["files"].items()}
    except (LookupError, TypeError, ValueError, AttributeError):
        files = {}
    if not files:
        raise DataError(f"{store.url} holds no published result: {RESULT_KEY} is missing or names no files")

    def compare(key: str, published: Digest) -> str | None:
        problem = _difference(store, key, published)
        if problem is None:
            told(key)
        return problem and f"{key}: {problem}"

    found = together({key: partial(compare, key, digest) for key, digest in files.items()})
    folders = sorted({f"{key.partition('/')[0]}/" for key in files} | {f"{ADAPTER}/", *MADE_OF_MERGED})
    there = [entry.key for folder in folders for entry in store.list(folder)]
    problems = [each for each in found.values() if each] + [
        f"{key}: was not published" for key in there if key not in files
    ]
    if problems:
        lines = "\n".join(f"  - {problem}" for problem in problems)
        raise DataError(
            f"{store.url} is not what {RESULT_KEY} names:\n{lines}\nDo not use it; publish or copy it again"
        )
    return Verified(
        len(files), sum(digest.size for digest in files.values()), hashlib.sha256(store.read(RESULT_KEY)).hexdigest()
    )


def _difference(store: Store, key: str, published: Digest) -> str | None:
    """Say how a file differs from what was published; None if it does not."""
    sha256, size = hashlib.sha256(), 0
    try:
        found = store.entry(key).size
        if found != published.size:
            return f"has {found:,} bytes in place of {published.size:,}"
        while piece := store.read_piece(key, size, min(PIECE, found - size)) if size < found else b"":
            sha256.update(piece)
            size += len(piece)
    except Missing:
        return "is missing"
    return None if sha256.hexdigest() == published.sha256 else "its SHA-256 differs"
