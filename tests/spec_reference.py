"""Writes docs/spec.md from the schema: `python -m tests.spec_reference`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from job.config.schema import JobSpec

PAGE = Path(__file__).parents[1] / "docs" / "spec.md"
HEAD = """# The job spec

Every field of the spec, as `job/config/schema.py` documents it. To change this page, change the docstrings there and run
`python -m tests.spec_reference`. `job schema` prints the same as a JSON schema, with which an editor completes and checks a spec.

Only fields marked *required* must be given. Integers may be as large as 2,147,483,647 where the type names no other limit.
The variable `JOB__SECTION__FIELD` overrides a field: `JOB__TRAINING__LEARNING_RATE=1e-4`.
[Evaluation](evaluation.md#measured-again) lists the fields that may change after training.
"""
MOST = 2**31 - 1


def reference() -> str:
    """Return the whole page."""
    schema = JobSpec.model_json_schema()
    return HEAD + "".join(_section("", schema, schema["$defs"]))


def _section(path: str, section: dict[str, Any], known: dict[str, Any]) -> Iterator[str]:
    """The table of a section, and then those of the sections in it."""
    if path:
        yield f"\n## `{path}`\n\n{_words(section['description'])}\n"
    yield "\n| field | type | default | what it does |\n|---|---|---|---|\n"
    inner = {}
    for name, field in section["properties"].items():
        below = f"{path}.{name}".lstrip(".")
        if reference := field.get("$ref"):
            inner[below] = reference
        elif reference := _values(field).get("$ref"):
            below += ".NAME"
            inner[below] = reference
        kind = f"section [`{below}`](#{below.replace('.', '').lower()})" if reference else _type(field)
        if below.endswith(".NAME"):
            kind = f"mapping from names to {kind.replace('section', 'sections')}"
        text = field.get("description") or _target(reference, known)["description"]  # of the section's class
        default = "" if "$ref" in field else _default(name, field, section)
        yield f"| `{name}` | {kind} | {default} | {_words(text)} |\n".replace("|  |", "| |")
    for below, reference in inner.items():
        yield from _section(below, _target(reference, known), known)


def _values(field: dict[str, Any]) -> dict[str, Any]:
    """What a mapping maps to."""
    values = field.get("additionalProperties")
    return values if isinstance(values, dict) else {}


def _target(reference: str | None, known: dict[str, Any]) -> dict[str, Any]:
    return known[str(reference).rpartition("/")[2]]


def _default(name: str, field: dict[str, Any], section: dict[str, Any]) -> str:
    if name in section.get("required", []):
        return "*required*"
    value = field.get("default", {} if field.get("type") == "object" else [])
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def _type(field: dict[str, Any]) -> str:
    """A field's type and the values that it allows, in words."""
    options = list(_alternatives(field))
    return " or ".join([", ".join(options[:-1]), options[-1]] if options[:-1] else options)


def _alternatives(field: dict[str, Any]) -> Iterator[str]:
    if "anyOf" in field:
        for option in field["anyOf"]:
            yield from _alternatives(option)
    elif "enum" in field or "const" in field:
        yield from (f"`{value}`" for value in field.get("enum", [field.get("const")]))
    elif field["type"] == "boolean":
        yield from ("`true`", "`false`")
    else:
        yield _one_type(field)


def _one_type(field: dict[str, Any]) -> str:
    match field["type"]:
        case "null":
            return "`null`"
        case "array" if "prefixItems" in field:
            return " and ".join(["pair of " + _type(field["prefixItems"][0]), *map(_type, field["prefixItems"][1:])])
        case "array":
            items = _type(field["items"])
            return f"{'non-empty ' * ('minItems' in field)}list of {items}{'s' * items.isalpha()}"
        case "object":
            keys = _type(field["propertyNames"]) if "propertyNames" in field else "string"
            return f"mapping from {keys} to {_type(_values(field))}"
        case "string" if "pattern" in field:
            return f"string that matches `{field['pattern']}`"
        case "string":
            return f"{'non-empty ' * ('minLength' in field)}string"
    return str(field["type"]) + _bounds(field)


def _bounds(field: dict[str, Any]) -> str:
    words = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {field[key]:,}" for key, sign in words.items() if key in field and field[key] != MOST]
    return f" {', '.join(bounds)}" if bounds else ""


def _words(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(reference())
