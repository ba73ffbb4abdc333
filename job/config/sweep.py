"""Reads the table of a sweep: each row changes fields of one spec, and is a run with a name and an output of its own."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import yaml

from job.config.loader import OVERRIDE, load_spec
from job.config.parsing import problem_of, read_value
from job.errors import SpecError

FIELD = re.compile(r"[a-z]\w*(\.[a-z]\w*)+")
NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,62}", re.ASCII)
EXAMPLE = "as in name,lora.r,training.learning_rate"


def read_sweep(file: Path, text: str, environment: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Read a table and validate each row as its job will, on the spec `text` with the overrides of this environment.

    CSV and TSV name fields in the first line; YAML and JSON are a list of mappings. An empty cell changes nothing. A row is
    called by its column `name`, or else by its number, from 1; its run is called `<name of the spec>-<row>`, and its output
    is `<output.url of the spec>/<row>`.

    Returns by row the variables `JOB__SECTION__FIELD` that make its run of the spec. Raises SpecError naming the row.
    """
    runs = dict[str, dict[str, str]]()
    number = 0
    try:
        for number, row in enumerate(_read_table(file), 1):
            name = row.pop("name", str(number))
            if not NAME.fullmatch(name) or name.lower() in map(str.lower, runs):
                raise SpecError(f"name: {name!r} must be letters, digits, dots and dashes, and differ from other rows")
            overrides = dict(_overrides(row))
            spec = load_spec({**environment, **overrides}, text)
            made = {"JOB__NAME": f"{spec.name}-{name}", "JOB__OUTPUT__URL": f"{spec.output.url.rstrip('/')}/{name}"}
            runs[name] = overrides | made
    except SpecError as error:
        place = f", row {number}" if number else ""
        raise SpecError(f"--sweep: {file}{place}: {error}") from None
    if not runs:
        raise SpecError(f"--sweep: {file} has no rows; its first line names fields, {EXAMPLE}, and others are runs")
    return runs


def _read_table(file: Path) -> list[dict[str, str]]:
    try:
        content = file.read_text(encoding="utf-8-sig")
        if file.suffix not in (".yaml", ".yml", ".json"):
            return list(_delimited(content))
        table = read_value(content)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SpecError(f"cannot be read: {error.strerror if isinstance(error, OSError) else error}") from None
    except yaml.YAMLError as error:
        raise SpecError(f"is not YAML: {problem_of(error)}") from None
    if not isinstance(table, list) or not all(isinstance(row, dict) for row in table):
        raise SpecError("must be a list of mappings, as in [{name: r8, lora.r: 8}, {name: r16, lora.r: 16}]")
    return [
        {str(field): str(value) if field == "name" else json.dumps(value) for field, value in row.items()}
        for row in table
    ]


def _delimited(content: str) -> Iterator[dict[str, str]]:
    delimiter = next((mark for mark in "\t;" if mark in content.partition("\n")[0]), ",")
    lines = csv.reader(io.StringIO(content, newline=""), delimiter=delimiter)
    fields = [field.strip() for field in next(lines, [])]
    for cells in lines:
        if any(cells):
            if len(cells) != len(fields):
                raise SpecError(
                    f"line {lines.line_num}: {len(cells)} values for {len(fields)} fields; quote text with {delimiter!r}"
                )
            yield {field: cell.strip() for field, cell in zip(fields, cells, strict=True) if cell.strip()}


def _overrides(row: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for field, value in row.items():
        if field == "output.url":
            raise SpecError("output.url: remove it; each run writes to a folder below that of the spec, or of --output")
        if not FIELD.fullmatch(field):
            raise SpecError(f"{field!r} names no field of a spec, {EXAMPLE}")
        yield OVERRIDE + field.upper().replace(".", "__"), value
