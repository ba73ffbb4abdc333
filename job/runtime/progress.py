"""Progress bars on a terminal. A log has lines instead."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.runtime.peaks import used_bytes
from job.runtime.periodic import repeating
from job.runtime.status import on_terminal

if TYPE_CHECKING:
    from tqdm import tqdm

EVERY_SECONDS = 1.0


def progress_bar(title: str, total: int, unit: str = "row", done: int = 0) -> tqdm[Any]:
    """Return a bar that shows nothing unless stderr is a terminal. Bytes (`B`) are shown in their multiples."""
    from tqdm import tqdm

    return tqdm(total=total, initial=done, desc=title, unit=unit, unit_scale=unit == "B", disable=not on_terminal())


@contextmanager
def growing(title: str, folder: Path, total: int) -> Iterator[None]:
    """Show on a terminal how many of `total` bytes are in `folder` while the block runs."""
    if not on_terminal() or importlib.util.find_spec("tqdm") is None:  # the light half has no tqdm
        yield
        return
    with progress_bar(title, total, "B") as bar:

        def advance() -> None:
            bar.update(min(used_bytes(folder), total) - bar.n)

        with repeating(advance, EVERY_SECONDS, "progress bar"):
            yield
        advance()
