"""Parses the text of a spec: YAML of plain values, within limits, and each refusal with its place."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable
from typing import Any, NoReturn

import yaml

from job.errors import SpecError

MOST_VALUES = 10_000
DEEPEST = 30
TOO_DEEP = f"values are nested deeper than {DEEPEST}"
MOST_DIGITS = 100


class Loader(yaml.SafeLoader):
    """Loads YAML of plain values: as in YAML 1.2, 1e-4 is a number; a date is text; each refusal names its place.

    Refuses duplicate keys, an alias inside its own anchor, more than `MOST_VALUES` values after expanding aliases, values nested
    deeper than `DEEPEST`, and every tag that a spec has no use for.
    """

    depth = nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        # Stop here: reading on takes seconds, growing with the square of the depth.
        if self.depth > DEEPEST or self.nodes > MOST_VALUES:
            problem = TOO_DEEP if self.depth > DEEPEST else f"it has more than {MOST_VALUES:,} values"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=self.get_mark())
        self.depth += 1
        self.nodes += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError):  # tagged as a number, or looks like one, but is not
            _refuse(node, f"{describe(node.value)} does not match its tag {node.tag}; put text in quotes")

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                _refuse(node.value[index][0], f"the key {key!r} is given twice")
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if len(node.value) > MOST_DIGITS:
            _refuse(node, f"a number of {len(node.value)} digits")
        return int(super().construct_yaml_int(node))


def _refuse(node: yaml.Node, problem: str) -> NoReturn:
    raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if not tag.endswith(":timestamp")]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)
Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_yaml_int)
TAGS: dict[str, type[yaml.Node]] = {
    **dict.fromkeys(("str", "int", "float", "bool", "null", "merge"), yaml.ScalarNode),
    "seq": yaml.SequenceNode,
    "map": yaml.MappingNode,
}
"""The kinds of values that a spec uses, and how each is written."""


def parse(text: str, name: str = "JOB_SPEC") -> dict[str, Any]:
    """Parse a YAML or JSON mapping that came from `name`. Raises SpecError with line and column."""
    try:
        tree = read_value(text)
    except yaml.YAMLError as error:
        raise SpecError(f"{name} is not YAML or JSON: {problem_of(error)}") from None
    if not isinstance(tree, dict):
        cure = ". If it is meant as a path, check the path" if name == "JOB_SPEC" else ""
        raise SpecError(
            f"{name} must be a mapping with the sections model, dataset and output; found {describe(tree)}{cure}"
        )
    return tree


def read_value(text: str) -> Any:
    """Return the value of a YAML or JSON text. Raises YAMLError."""
    loader = Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _measure(node, {}, 0)
        return loader.construct_document(node)
    except RecursionError:
        raise yaml.YAMLError(f"its values are nested deeper than {DEEPEST}") from None
    except ValueError as error:  # \U00110000 is not a character
        raise yaml.YAMLError(f"an escape in quotes stands for no character ({error})") from None
    finally:
        loader.dispose()


def _measure(node: yaml.Node, known: dict[int, int], depth: int) -> int:
    """Count a node's values, following aliases. `known` has the counts of nodes by id; 0 means being counted."""
    if known.get(id(node)) == 0:
        _refuse(node, "an alias points to a value that contains it")
    if depth > DEEPEST:
        _refuse(node, TOO_DEEP)
    if id(node) not in known:
        known[id(node)] = 0
        kind = TAGS.get(node.tag.removeprefix("tag:yaml.org,2002:"))
        if kind is None or not isinstance(node, kind):
            _refuse(node, f"the tag {node.tag} is not allowed in a spec; write the plain value, and put text in quotes")
        inner = [] if isinstance(node, yaml.ScalarNode) else node.value
        children = [each for pair in inner for each in pair] if isinstance(node, yaml.MappingNode) else inner
        known[id(node)] = 1 + sum(_measure(each, known, depth + 1) for each in children)
    if known[id(node)] > MOST_VALUES:
        _refuse(node, f"its aliases expand to more than {MOST_VALUES:,} values")
    return known[id(node)]


def problem_of(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark
        return f"{f'line {mark.line + 1}, column {mark.column + 1}: ' if mark else ''}{error.problem}"
    return str(error).splitlines()[0]


def describe(value: object) -> str:
    """Describe a value for people: its text, shortened, and its kind."""
    if value is None:
        return "nothing"
    kinds = {str: "text", bool: "true/false", int: "a number", float: "a number", list: "a list", dict: "a mapping"}
    kind = next((name for base, name in kinds.items() if type(value) is base), type(value).__name__)
    text = json.dumps(value, default=str)
    return f"{text if len(text) <= 60 else text[:57] + '…'} ({kind})"


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """Return the known names that begin with `name`, else the one most like it, whatever their case and punctuation."""
    plain = {re.sub(r"[\W_]", "", each).lower(): each for each in known}
    asked = re.sub(r"[\W_]", "", name).lower()
    near = [each for each in plain if len(asked) > 2 and each.startswith(asked)]
    return [plain[each] for each in near or difflib.get_close_matches(asked, plain, 1, 0.7)]


def did_you_mean(name: str, known: Iterable[str], before: str = "", after: str = "") -> str:
    """Return the end of a sentence that offers the nearest of the known names, each between `before` and `after`; empty if none
    is near."""
    near = [before + each + after for each in nearest(name, known)]
    return f"; did you mean {' or '.join(near)}?" if near else ""
