"""The keys of an output are spelled in one place."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from job import layout
from tests import house
from tests.conftest import ROOT

FOLDERS = (*layout.WORK, "logs/", "data/")


def keys() -> set[str]:
    """Every whole key of the layout."""
    found = [value for name, value in vars(layout).items() if name.isupper() and isinstance(value, str)]
    return {key for key in found if "." in Path(key).name}


def literals(file: Path) -> Iterator[str]:
    """The strings of a file, and the first parts of those with braces, without docstrings."""
    tree = ast.parse(file.read_text())
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield node.value


def test_no_other_file_spells_a_key() -> None:
    known = keys()
    spelled = {
        (name, text)
        for name, file in house.modules().items()
        if name != "job.layout"
        for text in literals(file)
        if text in known or (text.startswith(FOLDERS) and " " not in text)
    }
    assert spelled == set()


def test_the_page_of_the_output_names_every_key() -> None:
    page = (ROOT / "docs" / "output.md").read_text()
    wanted = {Path(key).name for key in keys()} | {
        f"{folder}/" for folder in (layout.ADAPTER, layout.MERGED, *layout.SMALLER)
    }
    assert {name for name in wanted if name not in page} == set()
