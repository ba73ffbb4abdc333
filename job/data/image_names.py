"""Finds the files that a table means by names that are no paths from its folder: bare names, names without an ending, paths of
another machine. How to read them is learned from many rows at once, so that no other image takes the place of a missing one."""

from __future__ import annotations

import difflib
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

from job.data.archives import ARCHIVES, Member, images_in
from job.data.layouts import packed_as, split_of
from job.data.pixels import BadRow
from job.data.webdataset import HIDDEN, IMAGES

MISSING = "image cannot be read: No such file or directory"
OUTSIDE = "image path leaves the dataset's folder"
SAMPLED = 64
"""Rows, evenly spread, whose names decide how all names are read."""
MOST = 5_000_000
"""Files above which a folder is not searched: it holds more than one data set."""
COMPARED = 5000
"""Files that a misspelled name is compared with."""

Parts = tuple[str, ...]


class Tree:
    """The files below a folder, listed when first asked; an archive counts as a folder of its images. Links to folders are
    followed, each folder once."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.archived: dict[str, tuple[str, Member]] = {}
        """Images in archives by path: the archive, and where it has them."""
        self.unopened: list[Path] = []
        """Archives that cannot be opened."""

    def __reduce__(self) -> tuple[type[Tree], tuple[Path]]:
        return Tree, (self.base,)  # each process lists the files itself, if it has to

    @cached_property
    def files(self) -> dict[str, list[str]]:
        """Paths relative to the folder, by the stem of their names."""
        found: dict[str, list[str]] = {}
        entered, count = set[tuple[int, int]](), 0
        for folder, inner, names in os.walk(self.base, followlinks=True):
            if count > MOST:
                return {}
            inner[:] = sorted(name for name in inner if name[0] != "." and name != "__MACOSX")
            try:
                status = Path(folder).stat()
            except FileNotFoundError:  # another program has removed it meanwhile
                continue
            if (status.st_dev, status.st_ino) in entered:
                inner.clear()
                continue
            entered.add((status.st_dev, status.st_ino))
            start = os.path.relpath(folder, self.base)
            for name in names:
                if name[0] != ".":
                    path = name if start == "." else f"{start}/{name}"
                    inside = self._inside(path) if name.lower().endswith(ARCHIVES) else []
                    count += 1 + len(inside)
                    for each in (path, *inside):
                        found.setdefault(_stem(each.rpartition("/")[2]), []).append(each)
        return found

    def _inside(self, archive: str) -> list[str]:
        whole = self.base / archive
        there = images_in(whole)
        if there is None:
            self.unopened.append(whole)
            return []
        names = [name for name in there if not HIDDEN.search(name)]
        self.archived |= {str(whole / name): (str(whole), there[name]) for name in names}
        return [f"{archive}/{name}" for name in names]

    def ending(self, parts: Parts) -> list[str]:
        """Returns the files whose path ends with `parts`. A name without the ending of an image matches any ending, and case
        matters only between files that differ by nothing else."""
        if not parts:
            return []
        plain = tuple(map(_plain, parts))
        found = [path for path in self.files.get(_stem(parts[-1]), ()) if _ends_with(path, plain)]
        exact = [path for path in found if f"/{path}".endswith(f"/{'/'.join(parts)}")]
        return exact or found


class Lookup(NamedTuple):
    """Looks names up in a tree, without their first `dropped` parts; None drops all but the last. Of several files of a name,
    that in a folder named after `split` is meant."""

    tree: Tree
    split: str | None = None
    dropped: int | None = 0
    shared: frozenset[Parts] = frozenset()
    """Names, without these parts, that different names of the table have in common."""

    def without_shared(self, names: Iterable[str]) -> Lookup:
        """Returns a lookup that refuses names of which these tell only after the dropped parts that they differ: the only file of
        that name is the image of one, and nobody knows of which."""
        first, shared = dict[Parts, Parts](), set[Parts]()
        for parts in map(_parts, names):
            rest = self._rest(parts)
            if first.setdefault(rest, parts) != parts:
                shared.add(rest)
        return self._replace(shared=frozenset(shared))

    def find(self, name: str) -> str:
        """Returns the path of the only file that a name may mean. Raises BadRow if there is none, or several."""
        found = self._meant(name)
        if self._rest(_parts(name)) in self.shared:
            raise BadRow("image paths of different folders end with this name; lay the images out in these folders")
        if len(found) > 1:
            several = "several folders" if len({Path(each).parent for each in found}) > 1 else "several formats"
            raise BadRow(
                f"image name is there in {several}; write which in dataset.image_column, as in images/{{name}}.png"
            )
        if not found:
            raise BadRow(MISSING)
        return str(self.tree.base / found[0])

    def folder(self, names: Iterable[str]) -> str:
        """Returns the folder, relative to the tree's, that holds all files found, as `images/` or nothing."""
        found = [self._meant(name) for name in names]
        folders = [each[0].rpartition("/")[0] for each in found if len(each) == 1]
        shared = os.path.commonpath(folders) if folders else ""
        return f"{shared}/" if shared else ""

    def known(self, names: Iterable[str]) -> float:
        """Counts the names that mean a file; one that means several counts half."""
        return sum(1 / min(len(found), 2) for name in names if (found := self._meant(name)))

    def _meant(self, name: str) -> list[str]:
        found = self.tree.ending(self._rest(_parts(name)))
        own = [path for path in found if split_of(path.rpartition("/")[0]) == self.split] if len(found) > 1 else []
        return own if len(own) == 1 else found

    def _rest(self, parts: Parts) -> Parts:
        return parts[-1:] if self.dropped is None else parts[self.dropped :]


def learned(base: Path, names: list[str], split: str | None = None) -> Lookup | None:
    """Returns how to look up names of a table, learned from some of them; None if that finds no more of them than are there as
    written.

    Names are tried whole. If none of them is a path from `base`, they are also tried without the folders that all begin with, one
    by one, and by their last part alone, if no two have the same. The first way that finds the most is taken.
    """
    there = 0
    for name in names:
        with suppress(OSError, ValueError):  # too long, or with a null character
            there += (base / name).is_file()
    if there == len(names):
        return None
    tree, parts = Tree(base), [_parts(name) for name in names]
    ways: list[int | None] = [0]
    if not there:
        shared = takewhile(lambda each: len(set(each)) == 1, zip(*(each[:-1] for each in parts), strict=False))
        ways += [
            *range(1, len(list(shared)) + 1),
            *([None] if len({each[-1:] for each in parts}) == len(parts) else []),
        ]
    best = max((Lookup(tree, split, way) for way in ways), key=lambda each: each.known(names))
    return best if best.known(names) > there else None


def beside(folder: Path, names: list[str], split: str | None = None) -> Lookup | None:
    """Returns how to look up names below the folder that holds a table's own: `annotations/rows.json` lies beside `images/`."""
    whole = Lookup(Tree(folder.parent), split)
    there = any((folder.parent / name).is_file() for name in names)
    return learned(folder.parent, names, split) or (whole if there else None)


def nearest(base: Path, name: str) -> str:
    """Returns a file below `base` with a similar name, if any, else the deepest folder on the way to `name` that exists; and
    names archives that cannot be opened."""
    tree = Tree(base)
    similar = difflib.get_close_matches(
        _stem(_parts(name)[-1] if _parts(name) else ""), list(tree.files)[:COMPARED], 1, 0.8
    )
    near = base / tree.files[similar[0]][0] if similar else None
    found = str(near or next((folder for folder in (base / name).parents if folder.is_dir()), base))
    return "; ".join([found, *(f"{archive} cannot be opened: copy it again" for archive in tree.unopened)])


def packed(base: Path) -> str:
    """Returns a hint about archives below `base` that may hold the images and are not read; empty if there are none."""
    names = [name for paths in Tree(base).files.values() for name in paths]
    endings = Counter(filter(None, map(packed_as, names)))
    there = ", ".join(f"{count} × {ending}" for ending, count in endings.most_common())
    return f"Not read beside the table: {there}; unpack archives of images" if there else ""


def _parts(name: str) -> Parts:
    """Splits a path of any machine: `C:\\data\\a.png`, `/mnt/a.png`, `./a.png`."""
    every = name.removeprefix("file://").replace("\\", "/").split("/")
    return tuple(part for part in every if part not in ("", ".", "..") and not re.fullmatch("[A-Za-z]:", part))


def _plain(name: str) -> str:
    return name.lower() if name.isascii() else unicodedata.normalize("NFC", name).lower()


def _stem(name: str) -> str:
    """Returns the name in lower case without the ending of an image."""
    plain = _plain(name).removesuffix(".nii.gz")
    rest, _, ending = plain.rpartition(".")
    return rest if ending in IMAGES else plain


def _ends_with(path: str, wanted: Parts) -> bool:
    parts = tuple(map(_plain, path.split("/")))[-len(wanted) :]
    last = parts[-1] if _stem(wanted[-1]) != wanted[-1] else _stem(parts[-1])
    return (*parts[:-1], last) == wanted
