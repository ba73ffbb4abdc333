"""Where a spec comes from: `JOB_SPEC` as text, path or URL, then `JOB__SECTION__FIELD` overrides, then one verdict."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from job.errors import JobError, SpecError
from job.spec import JobSpec, contradictions
from job.store import open_store

OVERRIDE = "JOB__"
SECRET = re.compile(r"secret|token|password|credential|access_?key|api_?key", re.IGNORECASE)


def load_spec(environment: Mapping[str, str], source: str | None = None) -> JobSpec:
    """The spec named by `source` (default: the variable `JOB_SPEC`) with the environment's overrides.

    Raises SpecError listing every problem at once.
    """
    source = source if source is not None else environment.get("JOB_SPEC", "")
    if not source.strip():
        raise SpecError(
            "JOB_SPEC is empty: give the spec itself (YAML or JSON), a path to it, or its file:// or s3:// URL"
        )
    tree = parse(read_source(source))
    problems = list(apply_overrides(tree, environment))
    return validate(tree, problems)


def read_source(source: str) -> str:
    """The text of a spec given inline, as a path, or as a `file://` or `s3://` URL."""
    if re.fullmatch(r"(file|s3)://[^\n]+", source.strip()):
        folder, _, name = source.strip().rpartition("/")
        try:
            return open_store(folder).read(name).decode()
        except UnicodeDecodeError:
            raise SpecError(f"JOB_SPEC: {source.strip()} is not text in UTF-8") from None
        except JobError as error:
            raise type(error)(f"JOB_SPEC: cannot read {source.strip()}: {error}") from error
    if "\n" in source or ":" in source or source.lstrip().startswith("{"):
        return source
    try:
        return Path(source).read_text()
    except OSError as error:
        raise SpecError(f"JOB_SPEC: cannot read {source}: {error.strerror}") from error
    except UnicodeDecodeError:
        raise SpecError(f"JOB_SPEC: {source} is not text in UTF-8") from None


class _Loader(yaml.SafeLoader):
    """YAML that refuses a key given twice and reads 1e-4 as a number, as YAML 1.2 does."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                mark = node.value[index][0].start_mark
                raise yaml.MarkedYAMLError(problem=f"the key {key!r} is given twice", problem_mark=mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def parse(text: str) -> dict[str, Any]:
    """A YAML or JSON mapping. Raises SpecError with line and column."""
    try:
        tree = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise SpecError(f"JOB_SPEC is not YAML or JSON: {where}{error.problem}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise SpecError(f"JOB_SPEC is not YAML or JSON: {str(error).splitlines()[0]}") from None
    if not isinstance(tree, dict):
        raise SpecError(
            "JOB_SPEC must be a mapping with the sections model, dataset and output; "
            f"found {_describe(tree)}. If it is meant as a path, check the path"
        )
    return tree


def apply_overrides(tree: dict[str, Any], environment: Mapping[str, str]) -> Iterator[str]:
    """Puts `JOB__TRAINING__LEARNING_RATE=1e-4` into `tree`; values are YAML. Yields a sentence for each that cannot be."""
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
            node[field] = yaml.load(environment[variable], Loader=_Loader)
        except yaml.YAMLError:
            yield f"{variable}: its value is not YAML"


def validate(tree: dict[str, Any], problems: list[str] | None = None) -> JobSpec:
    """The spec, or SpecError with every problem: where, what was found, what would be right."""
    problems = list(problems or [])
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


def _without(tree: dict[str, Any], bad: list[tuple[int | str, ...]]) -> JobSpec | None:
    """The spec less its bad fields, so that contradictions among the good ones are reported in the same go."""
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
    """One problem of pydantic's in our words. The value of an unknown field is never shown: it may be a secret."""
    location = [str(part) for part in detail["loc"] if not (isinstance(part, str) and part in _BRANCHES)]
    path, kind = ".".join(location), detail["type"]
    if kind == "extra_forbidden":
        if SECRET.search(location[-1]):
            return f"{path}: credentials come from the platform's own variables or roles, never from the spec"
        return f"{path}: no such field{_nearest(path)}"
    if kind == "missing":
        return f"{path}: missing; {_meaning(path)}"
    found = "" if SECRET.search(path) else f"found {_describe(detail['input'])}; "
    if kind == "model_type":
        return f"{path}: {found}must be a mapping of its fields"
    message = detail["msg"].replace("Input should be", "must be").removeprefix("Value error, ")
    return f"{path}: {found}{message}"


_BRANCHES = {"int", "str", "bool", "list[str]", "constrained-int", "literal['auto']"}


def _fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every (dotted path, description) of the tree."""
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


def _describe(value: object) -> str:
    """A value for people: its text and its kind, cut short."""
    if value is None:
        return "nothing"
    kinds = {str: "text", bool: "true/false", int: "a number", float: "a number", list: "a list", dict: "a mapping"}
    kind = next((name for base, name in kinds.items() if type(value) is base), type(value).__name__)
    text = json.dumps(value, default=str)
    return f"{text if len(text) <= 60 else text[:57] + '…'} ({kind})"
