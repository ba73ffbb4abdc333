"""Every field of the spec is documented, in the schema and on the page that is written from it."""

from typing import Any

from job.config.schema import JobSpec
from tests.spec_reference import PAGE, reference


def test_the_page_of_the_spec_is_what_the_schema_says():
    assert PAGE.read_text() == reference(), "docs/spec.md is stale; run python -m tests.spec_reference"


def undocumented(schema: dict[str, Any]) -> list[str]:
    """Fields without a docstring. One that holds a section has the docstring of its class."""
    known = schema["$defs"]
    sections = {"JobSpec": schema, **known}
    return [
        f"{title}.{name}"
        for title, section in sections.items()
        for name, field in section["properties"].items()
        if not (field.get("description") or known.get(field.get("$ref", "").rpartition("/")[2], {}).get("description"))
    ]


def test_every_field_has_a_docstring():
    schema = JobSpec.model_json_schema()
    assert undocumented(schema) == []
    assert [title for title, section in schema["$defs"].items() if not section.get("description")] == []


def test_a_field_without_a_docstring_is_named():
    schema = JobSpec.model_json_schema()
    del schema["$defs"]["LoraSpec"]["properties"]["r"]["description"]
    assert undocumented(schema) == ["LoraSpec.r"]
