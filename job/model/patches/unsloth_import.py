"""Changes how Unsloth is imported: without cycle collection, without rewriting all of TRL's trainers, and without its processor
for Gemma 3.

Why: imports and Unsloth's changes to the model at load take more than half of a restart's time to the first step. Its processor
does not report how many tokens an image takes (`return_text_replacement_offsets`), by which rows are counted and answers found.
Upstream: Unsloth 2026.10.9, `patch_trl_rl_trainers` of unsloth/models/rl.py, called when that module's importer continues, and
`patch_Gemma3Processor` of unsloth_zoo/temporary_patches/gemma.py, which strips a second first token; the job adds none.
May go: when Unsloth rewrites a trainer on first use, and leaves the processor alone.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

Change = Callable[[ModuleType], None]


@contextmanager
def uncollected() -> Iterator[None]:
    """Exempt objects made in the block from Python's cycle collector, now and later: modules, classes and functions stay
    anyway. Otherwise a collection visits millions of them, and Unsloth requests several as it loads."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def changed(name: str, change: Change) -> Iterator[None]:
    """If the module `name` is imported in the block, apply `change` after its code has run and before its importer continues."""
    finder = Finder(name, change)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        with suppress(ValueError):
            sys.meta_path.remove(finder)


class Finder(MetaPathFinder):
    def __init__(self, name: str, change: Change) -> None:
        self.name, self.change = name, change

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        found = PathFinder.find_spec(fullname, path, target)
        if found is not None and found.loader is not None:
            found.loader = _Loader(found.loader, self.change)
        return found


class _Loader(Loader):
    def __init__(self, loader: Loader, change: Change) -> None:
        self.loader, self.change = loader, change

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        self.change(module)

    def __getattr__(self, name: str) -> object:
        """Delegate everything else, such as the source that Unsloth's compiler reads."""
        if name == "loader":  # not set yet, in a copy
            raise AttributeError(name)
        return getattr(self.loader, name)


def upstreams_processor(gemma: ModuleType) -> None:
    """Keep transformers' processor for Gemma 3."""
    patches, processor = getattr(gemma, "TEMPORARY_PATCHES", []), getattr(gemma, "patch_Gemma3Processor", None)
    if processor in patches:
        patches.remove(processor)


def one_trainer(rl: ModuleType) -> None:
    """Rewrite only the trainer that the job uses. Unsloth writes, compiles and imports its own version of each of TRL's
    trainers: 7 seconds for a dozen."""
    rewrite = getattr(rl, "_patch_trl_rl_trainers", None)
    if rewrite is not None and hasattr(rl, "patch_trl_rl_trainers"):
        rl.patch_trl_rl_trainers = lambda: rewrite("sft_trainer")  # type: ignore[attr-defined]
