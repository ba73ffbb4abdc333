"""Loads a spec: `JOB_SPEC` as text, path or URL, then `JOB__SECTION__FIELD` overrides, then all problems at once."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from job.config.environment import Environment
from job.config.parsing import describe, did_you_mean, parse, problem_of, read_value
from job.config.rules import contradictions
from job.config.schema import JobSpec
from job.errors import JobError, SpecError
from job.store import Missing, open_store

OVERRIDE = "JOB__"
UNWRITABLE = re.compile("[\\0\\ud800-\\udfff]")
"""NUL and lone surrogates (halves of characters)."""
MOST_BYTES = 2**20
"""Largest size of a spec's text."""
SECRET = re.compile(r"secret|token|password|credential|access_?key|api_?key", re.IGNORECASE)


def load_spec(environment: Mapping[str, str], source: str | None = None) -> JobSpec:
    """Load the spec named by `source` (default: the variable `JOB_SPEC`) with the environment's overrides.

    Raises SpecError listing every problem at once.
    """
    source = source if source is not None else Environment.read(environment).spec
    if not source.strip():
        raise SpecError(
            "JOB_SPEC is empty: give the spec itself (YAML or JSON), a path to it, or its file:// or s3:// URL"
        )
    text = read_source(source)
    tree = parse(text, "JOB_SPEC" if text is source else source.strip())
    problems = list(apply_overrides(tree, environment))
    return validate(tree, problems)


def read_source(source: str) -> str:
    """Return the text of a spec given inline, as a path, or as a `file://` or `s3://` URL."""
    if re.fullmatch(r"(file|s3)://[^\n]+", source.strip()):
        folder, _, name = source.strip().rpartition("/")
        try:
            data = open_store(folder).read_piece(name, 0, MOST_BYTES + 1)
        except JobError as error:
            kind = SpecError if isinstance(error, Missing) else type(error)
            raise kind(f"spec: cannot read {source.strip()}: {error}") from error
        return _decoded(data, source.strip())
    if "\n" in source or ":" in source or source.lstrip().startswith("{"):
        return source
    try:
        with Path(source).open("rb") as stream:
            return _decoded(stream.read(MOST_BYTES + 1), source)
    except (OSError, ValueError) as error:  # ValueError: a character that no name may hold
        reason = (error.strerror if isinstance(error, OSError) else "") or str(error)
        raise SpecError(f"spec: cannot read {source[:300]}: {reason}") from error


def _decoded(data: bytes, source: str) -> str:
    if len(data) > MOST_BYTES:
        raise SpecError(f"spec: {source} is larger than {MOST_BYTES // 2**20} MB, so it is not a spec; check the path")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise SpecError(f"spec: {source} is not text in UTF-8") from None


def apply_overrides(tree: dict[str, Any], environment: Mapping[str, str]) -> Iterator[str]:
    """Apply `JOB__TRAINING__LEARNING_RATE=1e-4` to `tree`; values are YAML. Yields a sentence for each invalid override."""
    for variable in sorted(name for name in environment if name.startswith(OVERRIDE)):
        *sections, field = (part.lower() for part in variable.removeprefix(OVERRIDE).split("__"))
        node: Any = tree
        for section in sections:
            if node.get(section) is None:
                node[section] = {}
            node = node[section]
            if not isinstance(node, dict):
                break
        if not isinstance(node, dict) or not field or not all(sections):
            yield f"{variable}: does not name a field; write JOB__SECTION__FIELD, as in JOB__TRAINING__LEARNING_RATE"
            continue
        try:
            node[field] = read_value(environment[variable])
        except yaml.YAMLError as error:
            yield f"{variable}: its value is not YAML: {problem_of(error)}"


def validate(tree: dict[str, Any], problems: list[str] | None = None) -> JobSpec:
    """Return the spec, or raise SpecError with every problem: where it is, what was found, what would be right."""
    problems = [*(problems or []), *_unwritable(tree)]
    spec: JobSpec | None = None
    try:
        spec = JobSpec.model_validate(tree)
    except ValidationError as error:
        problems += [_sentence(dict(detail)) for detail in error.errors()]
        spec = _without(tree, [detail["loc"] for detail in error.errors()])
    if spec is not None:
        problems += contradictions(spec)
    if problems or spec is None:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise SpecError(f"the spec has {count}:\n" + "\n".join(f"  - {problem}" for problem in problems))
    return spec


def _unwritable(node: Any, path: str = "") -> Iterator[str]:
    """Yield a sentence for each text that no file, log or name can hold."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _unwritable(key, f"{path}: a key") if isinstance(key, str) else ()
            yield from _unwritable(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list):
        for value in node:
            yield from _unwritable(value, path)
    elif isinstance(node, str) and (found := UNWRITABLE.search(node)):
        place = path.encode(errors="backslashreplace").decode()
        yield f"{place}: contains the character U+{ord(found[0]):04X}, which files and names cannot contain; remove it"


def _without(tree: dict[str, Any], bad: list[tuple[int | str, ...]]) -> JobSpec | None:
    """The spec without its bad fields, so that contradictions among the good ones are reported at the same time."""
    copy = json.loads(json.dumps(tree, default=str))
    for location in bad:
        node = copy
        for part in location[:-1]:
            node = node.get(part) if isinstance(node, dict) else None
        if isinstance(node, dict):
            node.pop(location[-1], None)
    required = {("model", "name_or_path"): "?", ("dataset", "path"): "?", ("output", "url"): "?"}
    for (section, field), value in required.items():
        if not isinstance(copy.get(section), dict):
            copy[section] = {}
        copy[section].setdefault(field, value)
    try:
        return JobSpec.model_validate(copy)
    except ValidationError:
        return None


def _sentence(detail: dict[str, Any]) -> str:
    """Rephrase a pydantic error. Never shows the value of an unknown field, which may be a secret."""
    location = [str(part) for part in detail["loc"] if not (isinstance(part, str) and part in _BRANCHES)]
    path, kind = ".".join(location), detail["type"]
    if kind == "extra_forbidden":
        if SECRET.search(location[-1]):
            return f"{path}: credentials come from the platform's own variables or roles, never from the spec"
        return f"{path}: no such field{_nearest(location)}"
    if kind == "missing":
        return f"{path}: missing; {_meaning(location)}"
    found = "" if SECRET.search(path) else f"found {describe(detail['input'])}; "
    if kind == "model_type":
        return f"{path}: {found}must be a mapping of its fields"
    message = detail["msg"].replace("Input should be", "must be").removeprefix("Value error, ")
    return f"{path}: {found}{message}"


_BRANCHES = {"int", "str", "bool", "list[str]", "constrained-int", "literal['auto']"}


def _section(path: list[str]) -> type[BaseModel] | None:
    """Return the section at `path`, which may pass through a mapping, such as `evaluation.require.rougeL`."""
    kind: Any = JobSpec
    for part in path:
        field = kind.model_fields.get(part) if _is_section(kind) else None
        kind = field.annotation if field else (get_args(kind) or [None])[-1]
    return kind if _is_section(kind) else None


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _places(section: type[BaseModel], path: str = "") -> Iterator[tuple[str, str]]:
    """Yield the path and the name of every field below a section."""
    for name, field in section.model_fields.items():
        yield f"{path}{name}", name
        if _is_section(field.annotation):
            yield from _places(field.annotation, f"{path}{name}.")  # type: ignore[arg-type]


def _nearest(location: list[str]) -> str:
    *path, leaf = location
    section = _section(path)
    known = sorted(section.model_fields) if section else []
    if said := did_you_mean(leaf, known, ".".join([*path, ""])):
        return said
    elsewhere = next((place for place, name in _places(JobSpec) if name == leaf), None)
    return f"; did you mean {elsewhere}?" if elsewhere else f"; the fields here are {', '.join(known) or 'none'}"


def _meaning(location: list[str]) -> str:
    section = _section(location[:-1])
    field = section.model_fields.get(location[-1]) if section else None
    said = " ".join((field.description or "").split()) if field else ""
    return said.rstrip(".") or f"add the section {'.'.join(location)}"
