"""Public sets are read as their authors publish them: a spec names the folder and the columns, and no file is moved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from job.config.loader import validate
from job.config.schema import RADIOGRAPHER
from job.data import Row
from job.data.prepare import prepare
from tests.data.public_sets import SETS, Published


def spec_of(tree: dict[str, Any], folder: Path, published: Published) -> dict[str, Any]:
    """Writes the set into `folder`, and returns the spec of a job on it."""
    published.make(folder)
    paths = {"path": published.path, "eval_path": published.dataset.get("eval_path")}
    named = {field: str(folder / path) for field, path in paths.items() if path}
    return tree | {"dataset": published.dataset | named}


def asked(row: Row) -> str:
    return "".join(part.get("text", "") for part in row["messages"][0]["content"])


@pytest.mark.parametrize("name", SETS)
def test_a_public_set_is_read_without_moving_a_file(tree: dict[str, Any], tmp_path: Path, name: str):
    published = SETS[name]
    data = prepare(validate(spec_of(tree, tmp_path / "set", published)), tmp_path / "scratch")
    assert data.quarantined == []
    assert published.read in data.facts.source
    sides = ([*data.train], [*data.evaluation])
    rows = [row for side in sides for row in side]
    assert tuple(map(len, sides)) == published.rows
    assert sorted({len(row["images"]) for row in rows}) == list(published.images)
    question, answer = published.first
    first = next(row for row in rows if row["id"] == "row-0")
    assert (asked(first), first["reference"]) == (question or RADIOGRAPHER, answer)
