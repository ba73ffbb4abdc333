"""Keeps Unsloth from adding a padding token, and a row for it, to the model's vocabulary.

Why: Unsloth does so where a tokenizer has no padding token apart from its end of text and no other token to take. The vocabulary
then no longer is the base's, to which the adapters belong. The job pads with the processor's own token.
Upstream: Unsloth Zoo 2026.10.9, `fix_pad_token`, which `patch_tokenizer` of unsloth_zoo/tokenizer_utils.py calls.
May go: when Unsloth leaves the vocabulary alone.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from job.model.patches import replaced


def vocabulary_kept() -> AbstractContextManager[None]:
    """While the block runs, models that Unsloth loads keep their vocabulary."""
    from unsloth_zoo import tokenizer_utils

    return replaced(tokenizer_utils, "fix_pad_token", _unchanged)


def _unchanged(*_: Any, **__: Any) -> dict[str, Any]:
    """In the shape of its result."""
    return {"changed": False, "reason": None, "old_pad": None, "new_pad": None, "added": False}
