"""Loads a spec: `JOB_SPEC` as text, path or URL, then `JOB__SECTION__FIELD` overrides, then all problems at once."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from job.config.environment import Environment
from job.config.parsing import describe, parse, problem_of, read_value
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
    tree = parse(read_source(source))
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
        return f"{path}: no such field{_nearest(path)}"
    if kind == "missing":
        return f"{path}: missing; {_meaning(path)}"
    found = "" if SECRET.search(path) else f"found {describe(detail['input'])}; "
    if kind == "model_type":
        return f"{path}: {found}must be a mapping of its fields"
    message = detail["msg"].replace("Input should be", "must be").removeprefix("Value error, ")
    return f"{path}: {found}{message}"


_BRANCHES = {"int", "str", "bool", "list[str]", "constrained-int", "literal['auto']"}


def _fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield every (dotted path, description) of the tree."""
    for name, field in model.model_fields.items():
        path = f"{prefix}{name}"
        yield path, field.description or ""
        kinds = [field.annotation, *get_args(field.annotation)]
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, BaseModel) and "labels" not in path:
                yield from _fields(kind, f"{path}.")


def _nearest(path: str) -> str:
    known = [name for name, _ in _fields(JobSpec)]
    section, _, leaf = path.rpartition(".")
    siblings = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == section}
    close = difflib.get_close_matches(leaf, siblings, n=1)
    if close:
        return f"; did you mean {siblings[close[0]]}?"
    elsewhere = [name for name in known if name.rpartition(".")[2] == leaf]
    return (
        f"; did you mean {elsewhere[0]}?"
        if elsewhere
        else f"; the fields here are {', '.join(sorted(siblings)) or 'none'}"
    )


def _meaning(path: str) -> str:
    text = dict(_fields(JobSpec)).get(path, "")
    return text or f"add the section {path}"
