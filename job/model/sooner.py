"""A backend's import, without the work that this job has no use for: of a restart's seconds to the first step, imports and
what Unsloth does to the model as it loads take more than half."""

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
    """What is made in here is looked at by Python's collector of cycles neither now nor ever: modules, classes and functions
    stay anyway. A collection otherwise goes through some millions of them, and Unsloth asks for several as it loads."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def changed(name: str, change: Change) -> Iterator[None]:
    """`change` is made to the module `name` once its code has run, if it is imported in here, before its importer goes on."""
    finder = _Finder(name, change)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        with suppress(ValueError):
            sys.meta_path.remove(finder)


class _Finder(MetaPathFinder):
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
        """The source, which Unsloth's compiler asks for, and all else."""
        if name == "loader":  # not there yet, in a copy
            raise AttributeError(name)
        return getattr(self.loader, name)


def one_trainer(rl: ModuleType) -> None:
    """Unsloth writes, compiles and imports a version of its own of each of TRL's trainers: 7 seconds for a dozen, of which
    the job uses one."""
    rewrite = getattr(rl, "_patch_trl_rl_trainers", None)
    if rewrite is not None and hasattr(rl, "patch_trl_rl_trainers"):
        rl.patch_trl_rl_trainers = lambda: rewrite("sft_trainer")  # type: ignore[attr-defined]
