"""Patches of third-party code, one per file; CONTRIBUTING.md lists them, tests/test_upstream.py checks what they rely on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def replaced(owner: Any, name: str, by: Any) -> Iterator[None]:
    """While the block runs, replace the method `name` of this one object with `by`, or, if that is None, with its class's."""
    own = vars(owner)
    before = {name: own.pop(name)} if name in own else {}
    own.update({name: by} if by else {})
    try:
        yield
    finally:
        own.pop(name, None)
        own.update(before)
