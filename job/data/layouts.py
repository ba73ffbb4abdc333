"""Finds the files below a folder that hold the rows of a split, their format, and the files left out."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from job.config.schema import DatasetSpec
from job.data.cards import files_by_split
from job.data.split import same_name
from job.data.text import encoding_of, ending_of
from job.data.webdataset import without_texts
from job.errors import DataError

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
KINDS = {
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".tar": "webdataset",
    ".xlsx": "excel",
    ".xlsm": "excel",
}
SHARDS = {".mds": "MosaicML shards", ".lance": "a Lance table"}
"""Formats beside whose files lie JSON files that are no rows."""
ANEW = "write it as Parquet, or as WebDataset (.tar)"
PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".7z", ".rar")
"""Archives that cannot be read in place."""
UNREAD = {
    **dict.fromkeys((".xls", ".xlsb", ".ods"), "save it as .xlsx or CSV"),
    **dict.fromkeys((*SHARDS, ".h5", ".hdf5", ".tfrecord", ".npz", ".npy", ".pkl"), ANEW),
    **dict.fromkeys(PACKED, "unpack it"),
}
"""Formats that may hold rows and are not read, with what to do."""
NOT_ROWS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
"""Files that `datasets` writes beside rows."""
LARGEST_NOTE = 64_000_000
"""Largest .json file, in bytes, that is checked for being a single object, and so not rows."""
TRAIN = "train"
"""The split that takes all files if none is named after a split. For any other split that would be a leak."""
WORDS = {
    TRAIN: "train|training|trn|trainval",
    "validation": "(?:mini)?val|valid|validate|validation|dev|devel",
    "test": "test|testing|tst|eval|evaluation|held[_ -]?out|hold[_ -]?out",
}
SPLITS = {
    split: re.compile(rf"(?<![a-z])({words})(?:[_ -]?(?:set|data|dataset|split))?(?![a-z])")
    for split, words in WORDS.items()
}
"""Common names of splits: trainset.json, X_test.csv, val2017/, TestData.tsv."""
BARE = re.compile(
    rb"\x02\x00\x00\x00UL\x04\x00|\x08\x00[\x00\x01\x05\x08\x12-\x18]\x00(?:(?:CS|DA|TM|UI|UL)|[\x00-\x80]\x00\x00\x00)"
)
"""The first element of a DICOM file without preamble: in group 2, or in group 8 with an explicit VR or a length (PS3.5 7.1)."""
LISTED = 4
"""File names that are written out; of more, only the first and the last are."""


@dataclass(frozen=True)
class Found:
    """The files that make up the rows, their format, and the reason in words. `left_out` are tables named after other splits.
    `unless` says what is wrong unless these files themselves say which rows are of the split."""

    kind: str
    files: list[Path]
    why: str
    left_out: tuple[str, ...] = ()
    unless: str = ""


def find_rows(spec: DatasetSpec, here: Path, split: str, field: str, held_out: bool = False) -> Found:
    """Finds the rows of `split` in a file or below a folder. `held_out` prefers tables named as held out.

    Raises DataError if there are none, or only those of other splits.
    """
    files = [here] if here.is_file() else files_below(here)
    root = here if here.is_dir() else here.parent
    asked = spec.format
    if here.is_dir() and asked not in ("dicom", "imagefolder"):
        by_card = files_by_split(here, spec.name)
        if found := _carded(by_card, files, here, split, field, held_out):
            return found
    if asked in ("auto", "imagefolder") and here.is_dir() and not spec.join:
        named_so = [file for file in files if file.name in METADATA and file.parent.parent in (here, here.parent)]
        beside = sorted(_files_of_split(named_so, here, split, held_out), key=lambda file: METADATA.index(file.name))
        beside = [file for file in beside if file.parent == here] or beside
        if len({file.parent for file in beside}) == 1:
            return _found("", beside[:1], files, here, split)
    tables = rows_among(files if asked == "webdataset" else _without_images(files))
    if spec.join or asked == "excel":
        tables += [file for file in files if KINDS.get(ending_of(file)) == "excel" and file not in tables]
    if {KINDS[ending_of(file)] for file in tables} <= {"json"}:
        _refuse_shards(files, here, field)
    rest = [file for file in files if ending_of(file) not in KINDS]
    kinds = Counter(KINDS[ending_of(file)] for file in tables)
    if asked == "dicom" or (asked == "auto" and not kinds["webdataset"] and any(map(_is_dicom, rest[:200]))):
        return Found("dicom", rest, "")
    if asked not in ("auto", "hub"):
        tables = [file for file in tables if KINDS[ending_of(file)] == asked]
    elif kinds["webdataset"]:
        tables = [file for file in tables if KINDS[ending_of(file)] == "webdataset"]
    chosen = tables if here.is_file() and split == TRAIN else _files_of_split(tables, root, split, held_out)
    unnamed = [file for file in tables if split_of(_relative(file, root)) is None or here.is_file()]
    unless = "" if chosen else f"{here} holds {_nothing_for(spec, split, tables, files, root)}"
    if not (chosen := chosen or unnamed):
        raise DataError(f"{field}: {unless}")
    kind = KINDS[ending_of(chosen[0])]
    if spec.join:
        chosen = [
            file
            for file in tables
            if file in {*chosen, *unnamed} and KINDS[ending_of(file)] in ("json", "csv", "excel")
        ]
    else:
        chosen = [file for file in chosen if KINDS[ending_of(file)] == kind]
    return replace(_found(kind, chosen, files, root, split), unless=unless)


def _carded(
    named: dict[str, list[Path]], files: list[Path], here: Path, split: str, field: str, held_out: bool
) -> Found | None:
    """Returns the rows that README.md names; None if it names images and no tables."""
    by_split = {name: tables for name, those in named.items() if (tables := rows_among(_without_images(those)))}
    if not by_split:
        return None
    chosen = of_split([f"{name}/" for name in by_split], split, held_out)
    if len(chosen) != 1:
        raise DataError(
            f"{field}: README.md of {here} names the splits {', '.join(by_split)}, not {split}; name one in dataset.split"
        )
    those = by_split[chosen[0][:-1]]
    kind = KINDS[ending_of(those[0])]
    found = _found(kind, [file for file in those if KINDS[ending_of(file)] == kind], files, here, split)
    return replace(found, why=f"{found.why} as listed in README.md")


def _found(kind: str, chosen: list[Path], files: list[Path], root: Path, split: str) -> Found:
    kind = "imagefolder" if len(chosen) == 1 and chosen[0].name in METADATA else kind
    others = [file for file in _tables_among(files) if file not in set(chosen)]
    others = others if kind == "webdataset" else _without_images([*chosen, *others])[len(chosen) :]
    read, left = ([_relative(file, root) for file in those] for those in (chosen, others))
    why = f"{'image folder: it holds' if kind == 'imagefolder' else f'{kind}:'} {listed(read)}"
    left_out = tuple(name for name in left if split_of(name) not in (None, split_of(split)))
    return Found(kind, chosen, why + (f" (not read: {listed(left)})" if left else ""), left_out)


def _without_images(files: list[Path]) -> list[Path]:
    """Returns the files without tar archives that hold no texts, whose rows are in a table beside them. Beside shards with texts,
    or without a table, they are shards too."""
    tables = _tables_among(files)
    shards = {file for file in tables if KINDS[ending_of(file)] == "webdataset"}
    if len(shards) in (0, len(tables)) or not all(map(without_texts, sorted(shards))):
        return files
    return [file for file in files if file not in shards]


def files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith((".", "~$")))


def tables_below(folder: Path) -> list[Path]:
    return rows_among(files_below(folder))


def rows_among(files: list[Path]) -> list[Path]:
    """Returns the tables among files, without JSON files that are a single object, which describe other files. If all tables are
    JSON, an object on one line may be a row. A workbook beside other tables describes them."""
    every = _tables_among(files)
    tables = [file for file in every if KINDS[ending_of(file)] != "excel"] or every
    alike = {ending_of(file) for file in tables} == {".json"}
    rows = [file for file in tables if not _is_object(file, over_lines=alike)] if len(tables) > 1 else tables
    return rows or tables


def _tables_among(files: list[Path]) -> list[Path]:
    """Excludes what `datasets` writes beside rows and keeps in its caches."""
    tables = [file for file in files if ending_of(file) in KINDS and file.name not in NOT_ROWS]
    tables = [file for file in tables if file.suffix.lower() != ".gz" or KINDS[ending_of(file)] in ("json", "csv")]
    return [file for file in tables if file.suffix.lower() != ".arrow" or _is_saved(file)]


def _is_saved(file: Path) -> bool:
    """Whether an Arrow file holds rows: the state of a saved data set names it or, without a state, it is not a cache file."""
    try:
        state = json.loads((file.parent / "state.json").read_text())
        return file.name in {each["filename"] for each in state["_data_files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return not file.name.startswith(("cache-", "tmp"))


def _is_object(file: Path, over_lines: bool) -> bool:
    if file.suffix.lower() != ".json" or file.stat().st_size > LARGEST_NOTE:
        return False
    text = file.read_text(encoding_of(file), errors="replace").strip()
    try:
        whole = text.startswith("{") and json.JSONDecoder().raw_decode(text)[1] == len(text)
    except (ValueError, RecursionError):
        return False
    return whole and ("\n" in text or not over_lines)


def split_of(name: str) -> str | None:
    """Returns the split that a file (by its path from the data root) is named after: by its own name, else by its folders', the
    nearest first. A file that names several is a training file if `train` is among them."""
    for part in reversed(name.split("/")):
        words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", part).lower()
        if found := [split for split, pattern in SPLITS.items() if pattern.search(words)]:
            return found[0]
    return None


def of_split(names: Iterable[str], split: str, held_out: bool = False) -> list[str]:
    """Returns the files, by path from the data root, that are named after `split` or a synonym. For `train`, falls back to those
    named after no split; for held-out rows, takes the first of test, validation, none and train that exists."""
    names, kind = list(names), split_of(split)
    exact = [name for name in names if re.search(rf"(^|[/_.-]){re.escape(split)}[/_.-]", name)]
    if kind is None:
        return exact
    kinds: list[str | None] = ["test", "validation", None, TRAIN] if held_out else [TRAIN, None]
    for wanted in kinds if kind == TRAIN else [kind]:
        if those := [name for name in names if split_of(name) == wanted]:
            return [name for name in those if name in exact] or those
    return []


def values_of_split(values: Iterable[str], split: str, own: str | None, held_out: bool) -> set[str]:
    """Returns the values of a column of splits that mean `split`: `val` for validation, `4` for 4; none if none does. For
    `train`, all but those of other splits and `own`, the name of held-out rows; for held-out rows see `of_split`."""
    known = set(values)
    if split_of(split) != TRAIN:
        return {value for value in known if _same(value, split)} or {
            value for value in known if split_of(split) and split_of(value) == split_of(split)
        }
    if held_out:
        return {name[:-1] for name in of_split([f"{value}/" for value in known], split, held_out)}
    return {value for value in known if split_of(value) in (None, TRAIN) and not (own and _same(value, own))}


def _same(one: str, other: str) -> bool:
    """Whether two names of a split or fold are one: `External` and `external `, 2 and 2.0."""
    one, other = (re.sub(r"^(\d+)\.0+$", r"\1", same_name(each)) for each in (one, other))
    return one == other


def _files_of_split(files: list[Path], root: Path, split: str, held_out: bool) -> list[Path]:
    names = {_relative(file, root): file for file in files}
    return [names[name] for name in of_split(names, split, held_out)]


def listed(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= LISTED else f"{names[0]} … {names[-1]} ({len(names)} files)"


def _nothing_for(spec: DatasetSpec, split: str, tables: list[Path], files: list[Path], root: Path) -> str:
    if tables and split == TRAIN:
        names = listed([_relative(file, root) for file in tables])
        return (
            f"only tables named after other splits than {split}: {names}; name the split to train on in "
            "dataset.split, or the file itself in dataset.path"
        )
    there = Counter(packed_as(file.name) or file.suffix.lower() or "no ending" for file in files).most_common(5)
    unread = "".join(f"; {ending} is not read: {UNREAD[ending]}" for ending, _ in there if ending in UNREAD)
    found = ", ".join(f"{count} × {suffix}" for suffix, count in there) or "nothing"
    wanted = (
        "metadata.jsonl or .csv, .jsonl, .json, .csv, .xlsx, .parquet, .arrow, .tar, DICOM, or a .zip by its own name"
    )
    wanted = {"auto": wanted, "imagefolder": ", ".join(METADATA)}.get(spec.format, spec.format)
    return f"{found}; expected {wanted}" + ("" if split == TRAIN else f", named after the split {split}") + unread


def packed_as(name: str) -> str:
    """Returns the ending of an archive that cannot be read in place; empty for other files."""
    return next((ending for ending in PACKED if name.lower().endswith(ending)), "")


def _refuse_shards(files: list[Path], here: Path, field: str) -> None:
    for file in files:
        for ending, what in SHARDS.items():
            if ending in file.suffixes:
                raise DataError(f"{field}: {here} holds {what} ({file.name}), which is not read; {ANEW}")


def _relative(file: Path, root: Path) -> str:
    return file.relative_to(root).as_posix()


def is_dicom(start: bytes) -> bool:
    """Whether a file that starts so is DICOM, with the preamble of PS3.10 or, as old archives have it, without."""
    return start[128:132] == b"DICM" or BARE.match(start) is not None


def _is_dicom(file: Path) -> bool:
    try:
        with file.open("rb") as stream:
            return is_dicom(stream.read(132))
    except OSError:
        return False
