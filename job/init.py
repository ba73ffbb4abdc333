"""Writes a spec with comments for rows that it has looked at, and asks whether its guesses are right if someone is there."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from job.config.environment import Environment
from job.config.loader import validate
from job.config.parsing import did_you_mean, parse
from job.config.schema import FIELD, RADIOGRAPHER, DatasetSpec
from job.data.guess import Guess, guess, held_out
from job.errors import DataError, SpecError
from job.output.overlap import refuse_overlap
from job.runtime.staging import exists

log = logging.getLogger("job")

DEFAULT_MODEL = "Qwen/Qwen3-VL-8B-Instruct"
"""What docs/choosing-a-model.md begins with."""
NONE = "none"
TOKENS_PER_WORD = 2
"""A generous bound for English and its medical terms."""
SHORT = 3
"""Words of the longest answers to questions up to which ROUGE says little."""
WIDEST = 110
"""Characters of a line, its comment included."""
Ask = Callable[[str, str, tuple[str, ...]], str]
"""Returns the answer to a question. Given are its default and, unless any answer will do, the answers that there are."""


def nobody(_question: str, default: str, _known: tuple[str, ...]) -> str:
    return default


def init(data: str, given: Mapping[str, str | None], ask: Ask, scratch: Path, environment: Environment) -> str:
    """Return the text of a spec for the rows at `data`, a folder or file on this machine. `given` holds `model`, `answer` and
    `output` if the caller names them.

    Raises SpecError if `data` is not here, and DataError if its columns cannot be made out.
    """
    if not exists(Path(data)):
        raise SpecError(
            f"DATA: {data} does not exist on this machine, and job init looks at rows here only; name a folder or a file, copy "
            "some rows here, or begin with docs/example-spec.md"
        )
    here = Path(data).resolve()
    found = guess(str(here), scratch, "DATA")
    log.info("%s; its columns: %s", found.why, ", ".join(found.columns))
    fields = _dataset(found, given["answer"], ask)
    split = held_out(DatasetSpec(**fields), scratch)
    fields |= {"eval_split": split} if split else {"eval_fraction": 0.1}
    name = re.sub(r"[^\w.-]+", "-", here.name.partition(".")[0]).strip("-.") or "job"
    model = given["model"] or ask("Base model: a hub id, a folder or an s3:// prefix", DEFAULT_MODEL, ())
    output = given["output"] or ask("Folder or s3:// prefix for the results", _output(here, name), ())
    text = _written(found, fields, model, output, name)
    refuse_overlap(validate(parse(text)), environment)
    return text


def _dataset(found: Guess, answer: str | None, ask: Ask) -> dict[str, Any]:
    """Return the fields of the section `dataset`, without what is held out."""
    fields: dict[str, Any] = {"path": found.path} | ({"join": found.join} if found.join else {})
    if found.images:
        asked = ask("Columns of images, with commas between them", ", ".join(found.images), found.columns)
        several = _parts(asked)
        fields["image_column"] = several[0] if len(several) == 1 else several
    if found.messages and not answer:
        fields["messages_column"] = found.messages[0]
    else:
        fields |= _question_and_answer(found, answer, ask)
    if not found.patients:
        group = ask("Column of patients, or none", next(iter(found.groups), NONE), (*found.columns, NONE))
        fields |= {"group_column": group} if group != NONE else {}
    return fields


def _question_and_answer(found: Guess, answer: str | None, ask: Ask) -> dict[str, Any]:
    asked = "Columns with the text to learn, with commas between them"
    answer = answer or ask(asked, _likeliest(found.answers), found.columns)
    several = _parts(answer)
    for name in several:
        if name not in found.columns:
            problem = f"no column {name}" if name else "no column looks like text to learn; name one with --answer"
            near = did_you_mean(name, found.columns) or f"; the columns are {', '.join(found.columns)}"
            raise DataError(f"DATA: {problem}{near}")
    learned = {"answer_column": answer}
    if len(several) > 1:
        learned = {"answer": "\n".join(f"{name[:1].upper()}{name[1:]}: {{{name}}}" for name in several)}
    question = ask("Column of questions, or none", next(iter(found.questions), NONE), (*found.columns, NONE))
    if question != NONE:
        return learned | {"instruction_column": question}
    return learned | {"instruction": ask("Question about each image", RADIOGRAPHER, ())}


def _parts(answer: str) -> list[str]:
    return [name.strip() for name in answer.split(",")]


def _likeliest(answers: tuple[str, ...]) -> str:
    """Return the first column of answers, or both parts of a report if it is one of them."""
    parts = tuple(name for name in answers if name.lower() in ("findings", "impression"))
    return ", ".join(parts if answers[:1] == parts[:1] else answers[:1])


def _output(data: Path, name: str) -> str:
    """Return a folder that does not exist yet: below the current folder, beside the data, or at home."""
    around = (folder for folder in (Path.cwd(), data.parent, Path.home()) if os.access(folder, os.W_OK))
    runs = next((folder for folder in around if not folder.is_relative_to(data)), Path.cwd()) / "runs"
    return str(next(folder for n in range(1, 10_000) if not (folder := runs / f"{name}-{n}").exists()))


def _written(found: Guess, fields: dict[str, Any], model: str, output: str, name: str) -> str:
    said = _comments(found, fields)
    learned = FIELD.findall(fields.get("answer", "")) or [fields.get("answer_column", "")]
    words = sum(found.words.get(column, 0) for column in learned)
    tokens = max(128, -(-words * TOKENS_PER_WORD // 64) * 64)
    long = f"{words} word{'s' * (words != 1)}" if words else "an unknown number of words"
    short = bool(fields.get("instruction_column")) and 0 < words <= SHORT
    labels = {re.sub(r"\W+", "_", label): {"column": label} for label in found.labels or ("finding",)}
    alone = not ({"group_column"} & fields.keys() or found.patients)
    lines = [
        "# Written by job init from a look at the data. docs/spec.md lists every field.",
        f"name: {_yaml(name)}",
        "model:",
        *_field("name_or_path", model, "a hub id, a folder or an s3:// prefix: docs/choosing-a-model.md"),
        "dataset:",
        *(line for field, value in fields.items() for line in _field(field, value, said[field])),
        *(["  # group_column: patient_id   # without it, both sides may have rows of one patient"] if alone else []),
        "training:",
        *_field("num_train_epochs", 3, "passes over the rows"),
        *_field("learning_rate", 2e-4, "its peak"),
        "evaluation:",
        *_field("max_new_tokens", tokens, f"longest answer; the long ones here have {long}"),
        *(_field("primary_metric", "exact_match", "short answers are right or wrong") if short else []),
        f"  # labels: {_yaml(labels)}   # columns with what an answer must state: docs/evaluation.md",
        "output:",
        *_field("url", output, "an empty place for all results"),
    ]
    return "\n".join(lines) + "\n"


def _comments(found: Guess, fields: dict[str, Any]) -> dict[str, str]:
    """Return what to say of each field."""
    others = [name for name in found.answers if name != fields.get("answer_column")]
    also = f"; it could also be {', '.join(others[:4])}" if others else ""
    return {
        "path": found.why,
        "join": "tables share this column; rows with an answer get the others' columns",
        "image_column": "several images a row"
        if isinstance(fields.get("image_column"), list)
        else "images, or their names",
        "answer_column": f"the text to learn{also}",
        "answer": "the text to learn; a line whose column is empty in a row is left out",
        "messages_column": "whole conversations",
        "instruction_column": "a question for each row",
        "instruction": "the same question for every image; {column} inserts a column",
        "group_column": "rows of one such value (a patient) stay on one side of the split",
        "eval_split": "rows that the data themselves hold out; they are answered, never trained on",
        "eval_fraction": "share of the rows to hold out; they are answered, never trained on",
    }


def _field(name: str, value: Any, comment: str) -> list[str]:
    """Return a field of a section with its comment: beside it, or above it if the line would be too long."""
    line = f"  {name}: {_yaml(value)}"
    return [f"{line}   # {comment}"] if len(line) + len(comment) < WIDEST else [f"  # {comment}", line]


def _yaml(value: Any) -> str:
    if isinstance(value, str) and "\n" in value:
        return json.dumps(value, ensure_ascii=False)
    written: str = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return written.removesuffix("...\n").strip()
