"""The house stands: imports point down, nothing goes in circles, and it does not grow unseen."""

from __future__ import annotations

import ast

from job.data.layouts import KINDS
from job.runtime.hub import TABLES
from tests import house

MOST_LINES = 22_146
"""Lines of code in job/. A commit that raises it names in CHANGELOG.md the feature that needed it, and what was deleted."""
MOST_OF_A_FUNCTION = 60


def test_every_import_points_down() -> None:
    assert house.upward() == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert house.circles() == []


def test_the_code_does_not_grow_unseen() -> None:
    assert sum(map(house.code_lines, house.modules().values())) <= MOST_LINES


def test_no_function_is_longer_than_a_screen() -> None:
    assert [name for length, name in house.functions() if length > MOST_OF_A_FUNCTION] == []


def test_endings_of_tables_are_known_where_names_of_the_hub_are_told_from_files() -> None:
    assert set(KINDS) == TABLES


def test_errors_of_the_hub_are_turned_into_ours_in_one_place() -> None:
    """Two others are not mapped: one is ignored, as the download after it gives the reason; one is about a file's content."""
    found = {
        (name, error)
        for name, file in house.modules().items()
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module == "huggingface_hub.errors" and name != "job.runtime.hub"
        for error in (alias.name for alias in node.names)
    }
    assert found == {
        ("job.model.base_model", "DryRunError"),
        ("job.planning.remote_headers", "SafetensorsParsingError"),
    }
