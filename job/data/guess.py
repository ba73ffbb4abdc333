"""Guesses what the columns of a source mean, by their names and by what a sample of the rows holds."""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from job.config.schema import DatasetSpec
from job.data.encoded import looks_like_picture
from job.data.images import WEB
from job.data.pixels import BadRow
from job.data.sources import Source, open_source, open_whole
from job.data.tables import PATIENT
from job.errors import DataError, JobError

SAMPLED = 200
"""Rows, evenly spread, that are looked at: each may hold its images."""
MOST_OF_A_NAME = 3
"""Words of the longest values above which a column holds texts, whatever it is called."""
MOST_LABELS = 20
IMAGES = ("image", "images", "filename", "filenames", "imagepath", "imagepaths", "path")
MESSAGES = ("messages", "conversations")
ANSWERS = ("answer", "caption", "report", "findings", "impression", "response", "description", "text", "txt", "labels")
QUESTIONS = ("question", "instruction", "prompt", "query")
PATIENTS = ("patientid", "patient", "subjectid", "subject", "participantid", "mrn")
STUDIES = ("studyinstanceuid", "studyuid", "studyid", "study", "accessionnumber", "accession", "uid", "caseid")
"""Usual names of columns, the likeliest first, without capitals, blanks and punctuation."""


@dataclass(frozen=True)
class Guess:
    """Columns by what they seem to mean, the likeliest first. Several `images` are those of one row."""

    path: str
    """The folder or file that holds the rows."""
    join: str | None
    images: tuple[str, ...]
    messages: tuple[str, ...]
    answers: tuple[str, ...]
    questions: tuple[str, ...]
    groups: tuple[str, ...]
    labels: tuple[str, ...]
    """Columns of a few values, which mostly stand in the answer beside them."""
    columns: tuple[str, ...]
    words: dict[str, int]
    """Words of a long text (95th percentile) of each column of texts."""
    why: str
    """How the rows were read."""
    patients: bool
    """Whether the format itself says which rows belong to one patient."""


def guess(path: str, scratch: Path, field: str) -> Guess:
    """Looks at the rows at `path`. Raises DataError naming `field` if there are none, or if no column holds images."""
    source, tables = open_whole(path, scratch, field)
    rows = _sample(source)
    columns = dict.fromkeys(name for row in ({**dict.fromkeys(source.table.found.columns)}, *rows) for name in row)
    values = {name: [row[name] for row in rows if row.get(name) not in (None, "", [])] for name in columns}
    values.pop(PATIENT, None)
    texts = {name: [str(value) for value in found] for name, found in values.items() if _is_text(found)}
    messages = [name for name in values if _plain(name) in MESSAGES and name not in texts]
    images = _images(source, values)
    if not images and not messages:
        raise DataError(f"{field}: no column of {path} holds images, or names of files below it: {', '.join(values)}")
    rest = {name: found for name, found in texts.items() if name not in images}
    questions = [name for name in _named(rest, QUESTIONS) if len(set(rest[name])) > 1]
    answers = _answers({name: found for name, found in rest.items() if name not in questions})
    where, join = _together(source, tables, {*images[:1], *(messages or answers)[:1]}, path)
    groups = [name for name in _named(values, (*PATIENTS, *STUDIES)) if len(set(map(str, values[name]))) > 1]
    return Guess(
        where,
        join,
        images,
        tuple(messages),
        answers,
        tuple(questions),
        tuple(groups),
        _labels(rows, rest, answers[0]) if answers else (),
        tuple(values),
        {name: _long(found) for name, found in rest.items()},
        source.table.why,
        source.table.patients,
    )


def held_out(dataset: DatasetSpec, scratch: Path) -> str | None:
    """Returns the split that the data themselves hold out, if any: `test`, else `validation`."""
    train = open_source(dataset, dataset.path, dataset.split, scratch)
    if not (train.table.left_out or train.reading.splits or "not read: " in train.table.why):
        return None
    for split in ("test", "validation"):
        with suppress(JobError):
            other = open_source(dataset, dataset.path, split, scratch, "dataset.eval_split")
            if other.table.why != train.table.why:
                return split
    return None


def _places(source: Source) -> list[int]:
    return sorted({place * len(source.table.rows) // SAMPLED for place in range(SAMPLED)})


def _sample(source: Source) -> list[dict[str, Any]]:
    rows = list[dict[str, Any]]()
    for row in source.rows_at(_places(source)):
        with suppress(BadRow):
            rows.append(source.read(row))
    return rows


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _named(columns: Iterable[str], known: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the columns with known names, also as their last part (`Description.Caption`), in the order of these."""
    parts = {name: {_plain(name), _plain(name.rpartition(".")[2])} for name in columns}
    return tuple(dict.fromkeys(name for each in known for name in parts if each in parts[name]))


def _is_text(values: list[Any]) -> bool:
    plain = [value for value in values if isinstance(value, str | int | float) and not looks_like_picture(value)]
    return bool(values) and len(plain) == len(values)


def _images(source: Source, values: dict[str, list[Any]]) -> tuple[str, ...]:
    """Returns the columns that look like images and are there or, if none does, one that names files without their ending. One
    with a usual name is returned alone."""
    if source.table.patients or source.table.why.startswith("webdataset"):
        return ("image",)
    found = [name for name, seen in values.items() if 2 * sum(map(looks_like_picture, seen)) > len(seen)]
    found = [name for name in found if _is_there(source, name)]
    others = (name for name in (*_named(values, IMAGES), *values) if _is_text(values[name]) and _is_there(source, name))
    found = found or list(islice(others, 1))
    return _named(found, IMAGES)[:1] or tuple(found)


def _is_there(source: Source, column: str) -> bool:
    """Whether the rows hold the images of this column themselves, or it names files that exist, or URLs."""
    source = replace(source, reading=replace(source.reading, images=(column,)))
    names, base = source.paths(_places(source)), source.files.base
    local = [name for name in names if not name.startswith(WEB)]
    if not local or not isinstance(base, Path):
        return True
    try:
        return source.with_lookup("train").files.lookup is not None or any((base / name).is_file() for name in local)
    except (OSError, ValueError):  # no name of a file
        return False


def _answers(texts: dict[str, list[str]]) -> tuple[str, ...]:
    """Returns columns with usual names, then those whose names contain one, then long texts."""
    exact = _named(texts, ANSWERS)
    part = [name for known in ANSWERS for name in texts if known in _plain(name)]
    long = sorted((name for name in texts if _long(texts[name]) > MOST_OF_A_NAME), key=lambda name: -_long(texts[name]))
    return tuple(dict.fromkeys(chain(exact, part, long)))


def _labels(rows: list[dict[str, Any]], texts: dict[str, list[str]], answer: str) -> tuple[str, ...]:
    few = [name for name in texts if name != answer and 1 < len(set(texts[name])) <= MOST_LABELS]
    stated = {name: sum(_stands_in(row.get(name), row.get(answer)) for row in rows) for name in few}
    return tuple(name for name in few if 2 * stated[name] > len(rows))


def _stands_in(value: Any, text: Any) -> bool:
    return re.search(rf"\b{re.escape(str(value))}\b", str(text), re.IGNORECASE) is not None


def _long(texts: list[str]) -> int:
    lengths = sorted(len(text.split()) for text in texts)
    return lengths[(len(lengths) - 1) * 95 // 100]


def _together(source: Source, tables: dict[str, tuple[str, ...]], used: set[str], path: str) -> tuple[str, str | None]:
    """Returns what to name in `dataset.path`, and the column to join tables by. If only some tables have all columns in use, the
    first of these is read alone; if none has, all are joined."""
    whole = [
        name for name, columns in tables.items() if {each.partition(".")[0] for each in used - {*columns}} <= {*columns}
    ]
    if len(whole) == len(tables):
        return path, None
    if whole:
        files = {str(file): file for file in source.table.files} | {file.name: file for file in source.table.files}
        return str(files[whole[0]]), None
    shared = sorted(set.intersection(*(set(columns) for columns in tables.values())))
    return path, next(iter((*_named(shared, (*STUDIES, *PATIENTS)), *shared)), None)
