"""Packages that come without bytecode are told: a start that compiles them takes about twice as long."""

from __future__ import annotations

import compileall
import sys
from pathlib import Path

import pytest

from job.planning.optional_packages import uncompiled


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "site" / "slowpackage"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("VALUE = 1\n")
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.setattr(sys, "pycache_prefix", None)
    return folder


def test_packages_that_each_start_compiles_again_are_told_with_the_cure(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    told = uncompiled(("slowpackage", "not_installed_here"))
    assert told.startswith("packages without bytecode, which cannot be written: slowpackage; ")
    assert f"'python -m compileall -q -j 0 {package.parent}'" in told
    compileall.compile_dir(package.parent, quiet=1)
    assert uncompiled(("slowpackage",)) == ""


def test_bytecode_that_the_first_start_will_write_is_nothing_to_tell(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    assert uncompiled(("slowpackage",)) == ""
    monkeypatch.setattr(sys, "pycache_prefix", str(tmp_path / "kept" / "elsewhere"))
    assert uncompiled(("slowpackage",)) == ""
