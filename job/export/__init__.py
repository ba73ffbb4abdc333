"""Adapter, merged weights and the gate between them."""

from __future__ import annotations

import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job.attempt import Attempt
from job.data import Data
from job.model import Loaded
from job.record import bytes_text


@dataclass(frozen=True)
class Exported:
    """Folders ready to publish; `merged` is None when the spec does not ask for it. `gate` holds what was measured."""

    adapter: Path
    merged: Path | None
    gate: dict[str, Any]


def export(attempt: Attempt, loaded: Loaded, data: Data, *, merged: bool) -> Exported:
    """Write the adapter to scratch and, where `merged` weights are wanted, those too, measured against the adapter. What is
    refused is decided by the caller."""
    from job.export.gate import compare
    from job.export.merge import merge

    spec, record = attempt.spec, attempt.record
    folder = attempt.scratch / "export"
    shutil.rmtree(folder, ignore_errors=True)
    adapter, folded = folder / "adapter", folder / "merged"
    with record.stage("export") as facts, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded.model.save_pretrained(adapter)
        loaded.processor.save_pretrained(adapter)
        if not merged:
            return Exported(adapter, None, {})
        size = merge(spec, loaded.folder, adapter, folded)
        facts.append(f"merged {bytes_text(size)}")
        rows = data.evaluation if len(data.evaluation) else data.train
        verdict = compare(spec, loaded, adapter, folded, rows)
        facts.append(f"token agreement {verdict.token_agreement:.4f}")
    return Exported(adapter, folded, verdict.facts())
