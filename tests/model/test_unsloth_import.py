"""A backend is imported without the work that the job has no use for, and is otherwise as it was."""

from __future__ import annotations

import gc
import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from job.model.patches.unsloth_import import changed, one_trainer, uncollected


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package whose `outer` uses a function of `inner` as it is imported."""
    (tmp_path / "toys").mkdir()
    (tmp_path / "toys" / "__init__.py").touch()
    (tmp_path / "toys" / "inner.py").write_text("def answer():\n    return 'theirs'\n")
    (tmp_path / "toys" / "outer.py").write_text("from toys import inner\nANSWER = inner.answer()\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "toys"
    for name in [name for name in sys.modules if name.partition(".")[0] == "toys"]:
        del sys.modules[name]


def test_a_module_is_changed_before_its_importer_goes_on(package: str) -> None:
    finders = list(sys.meta_path)
    with changed(f"{package}.inner", lambda module: setattr(module, "answer", lambda: "ours")):
        outer = importlib.import_module(f"{package}.outer")
    assert outer.ANSWER == "ours"
    assert sys.meta_path == finders
    assert "theirs" in inspect.getsource(sys.modules[f"{package}.inner"])


def test_a_module_that_is_imported_afterwards_is_as_it_was(package: str) -> None:
    with changed(f"{package}.inner", lambda module: setattr(module, "answer", lambda: "ours")):
        pass
    assert importlib.import_module(f"{package}.outer").ANSWER == "theirs"


def test_a_change_that_fails_is_told(package: str) -> None:
    finders = list(sys.meta_path)
    with pytest.raises(AttributeError, match="gone"), changed(f"{package}.inner", lambda module: module.gone()):
        importlib.import_module(f"{package}.outer")
    assert sys.meta_path == finders


def test_what_is_imported_is_not_collected_again() -> None:
    before = gc.get_freeze_count()
    with uncollected():
        assert not gc.isenabled()
        kept = [[] for _ in range(1000)]  # type: list[list[int]]
    assert gc.isenabled()
    assert gc.get_freeze_count() >= before + len(kept)
    gc.unfreeze()


def test_collection_goes_on_behind_an_import_that_fails() -> None:
    with pytest.raises(ImportError), uncollected():
        importlib.import_module("job.nothing")
    assert gc.isenabled()
    gc.unfreeze()


def test_unsloth_rewrites_the_trainer_that_is_used_alone() -> None:
    asked = list[str]()
    rl = ModuleType("unsloth.models.rl")
    rl._patch_trl_rl_trainers = asked.append  # type: ignore[attr-defined]
    rl.patch_trl_rl_trainers = lambda: asked.extend(["sft_trainer", "dpo_trainer", "grpo_trainer"])  # type: ignore[attr-defined]
    one_trainer(rl)
    rl.patch_trl_rl_trainers()
    assert asked == ["sft_trainer"]


def test_another_unsloth_is_left_as_it_is() -> None:
    rl = ModuleType("unsloth.models.rl")
    one_trainer(rl)
    assert not hasattr(rl, "patch_trl_rl_trainers")
