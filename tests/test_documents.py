"""What the documents promise is what the code does."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import get_args

import click
import yaml
from pydantic import BaseModel

from job.cli import main
from job.config.loader import validate
from job.config.parsing import parse
from job.config.schema import JobSpec, flatten
from job.errors import EXIT_CODES
from tests import metric_reference
from tests.cli_reference import PAGE, reference
from tests.conftest import ROOT

DOCS = ROOT / "docs"


def test_troubleshooting_has_each_exit_code():
    page = (DOCS / "troubleshooting.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (.+?) \| (\w+) \| (\w+) \|$", page, re.MULTILINE)
    assert rows == [(str(row.code), row.meaning, row.kubernetes, row.slurm) for row in EXIT_CODES]
    entries = {int(code) for code in re.findall(r"^### (\d+): ", page, re.MULTILINE)}
    assert entries == {row.code for row in EXIT_CODES if row.code}


def test_the_spec_by_example_is_valid_and_says_the_defaults():
    text = re.search(r"```yaml\n(.*?)```", (DOCS / "example-spec.md").read_text(), re.DOTALL)
    spec = validate(parse(text[1]))
    given = {"model.name_or_path", "dataset.path", "output.url", "name"}
    given |= {"dataset.group_column", "evaluation.labels", "evaluation.groups"}
    minimal = {"model": {"name_or_path": "m"}, "dataset": {"path": "d"}, "output": {"url": "o"}}
    defaults = flatten(JobSpec.model_validate(minimal).model_dump(mode="json"))
    shown = flatten(spec.model_dump(mode="json"))
    for path, value in defaults.items():
        if not any(path.startswith(name) for name in given):
            assert shown[path] == value, path


def test_the_page_of_the_command_line_is_what_its_help_prints():
    assert PAGE.read_text() == reference(), "docs/cli.md is stale; run python -m tests.cli_reference"


def test_the_page_of_metrics_is_what_the_code_says():
    assert metric_reference.PAGE.read_text() == metric_reference.reference(), (
        "stale; run python -m tests.metric_reference"
    )


def blocks(language: str) -> list[tuple[str, str]]:
    """The fenced blocks of README and pages in a language, each with the name of its page."""
    pages = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
    fenced = re.compile(rf"^ *```{language}\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
    return [(page.name, block) for page in pages for block in fenced.findall(page.read_text())]


def test_every_spec_and_part_of_a_spec_on_a_page_is_valid():
    needed = {"model": {"name_or_path": "m"}, "dataset": {"path": "d"}, "output": {"url": "o"}}
    read = []
    for name, block in blocks("yaml"):
        tree = next(iter(yaml.safe_load_all(block)))
        if isinstance(tree, dict) and tree.keys() <= JobSpec.model_fields.keys():
            read.append(name)
            validate(tree | {name: fields | (tree.get(name) or {}) for name, fields in needed.items()})
    assert {"vqa.md", "several-findings.md", "continue-from-an-adapter.md", "first-model.md", "evaluation.md"} <= {
        *read
    }


def test_every_command_on_a_page_is_one_that_job_knows():
    lines = [(name, line.strip()) for name, block in blocks("sh") for line in block.replace("\\\n", " ").splitlines()]
    said = [
        (name, shlex.split(line, comments=True)) for name, line in lines if re.match(r"(\w+=\S+ )*(\S*/)?job ", line)
    ]
    assert len(said) > 30
    for name, words in said:
        words = words[next(n for n, word in enumerate(words) if word.rpartition("/")[2] == "job") + 1 :]
        words = words[: next((n for n, word in enumerate(words) if word in "|>&"), len(words))]
        group: click.Command = main
        while isinstance(group, click.Group):
            found = group.get_command(click.Context(group), words[0])
            assert found is not None, f"{name}: job {' '.join(words)}"
            group, words = found, words[1:]
        group.make_context(name, words)


def test_times_of_real_models_are_those_that_were_measured():
    measured, page = (ROOT / "benchmarks" / "RESULTS.md").read_text(), (DOCS / "first-model.md").read_text()
    rows = re.findall(r"^\| `(.+? GB)` \| .+? \| ([\d.]+) s \| .+? \| ([\d.]+) min \|$", page, re.MULTILINE)
    assert len(rows) > 5
    for case, step, minutes in rows:
        (seconds,) = re.findall(rf"^\| {case}: a steady step \| ([\d.]+) s", measured, re.MULTILINE)
        assert (f"{float(seconds):.2f}", f"{float(seconds) * 375 / 60:.1f}") == (step, minutes), case


def test_the_site_is_built_without_a_warning_and_asks_no_other_host(tmp_path: Path):
    """A link without a target is a warning, and so is a page that the menu does not name."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    pages = [*tmp_path.rglob("*.html")]
    assert len(pages) > len([*DOCS.rglob("*.md")])
    asked = [re.findall(r'<(?:script|img|link)[^>]*(?:src|href)="(https?://[^"]+)', page.read_text()) for page in pages]
    assert not [*chain(*asked)]


def test_links_in_the_readme_have_targets():
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / "README.md").read_text())
    assert len(links) > 10
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_example_is_valid():
    examples = [*(ROOT / "examples").glob("*.yaml")]
    assert examples
    for file in examples:
        assert validate(yaml.safe_load(file.read_text())).name


def fields(section: type[BaseModel]) -> set[str]:
    """Names of all settings below a section."""
    found = set[str]()
    for name, field in section.model_fields.items():
        inner = [each for each in (field.annotation, *get_args(field.annotation)) if isinstance(each, type)]
        below = [fields(each) for each in inner if issubclass(each, BaseModel)]
        found |= set().union(*below) if below else {name}
    return found


def test_every_field_of_the_spec_is_read():
    """One that nothing reads would be accepted and do nothing."""
    code = "".join(file.read_text() for file in (ROOT / "job").rglob("*.py"))
    read = Counter(re.findall(r"\w+", code))
    read.subtract(re.findall(r"^    (\w+): ", (ROOT / "job" / "config" / "schema.py").read_text(), re.MULTILINE))
    assert {name for name in fields(JobSpec) if not read[name]} == set()


def test_the_changelog_begins_with_the_version_of_the_package():
    text = (ROOT / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## \[(.+?)\] - (?:\d{4}-\d\d-\d\d|unreleased)$", text, re.MULTILINE)
    assert versions[0] == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert len(versions) == len(re.findall(r"^## ", text, re.MULTILINE))
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.+)$", text, re.MULTILINE)) <= kinds


def test_the_page_of_versions_says_what_is_pinned():
    names = "transformers|trl|peft|accelerate|unsloth|bitsandbytes|wandb|mlflow-skinny"
    pins = re.findall(rf'"({names})==([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    page = (DOCS / "versions.md").read_text()
    assert len(pins) == 8
    assert [pin for pin in pins if pin[1] not in page] == []


def test_the_form_for_bugs_knows_every_exit_code():
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text())
    (options,) = [part["attributes"]["options"] for part in form["body"] if part.get("id") == "code"]
    assert [option for option in options if option[0].isdigit()] == [f"{row.code} {row.name}" for row in EXIT_CODES]


def test_a_commit_is_held_to_what_make_check_runs():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook["entry"].replace(" --force-exclude", "") for hook in config["repos"][0]["hooks"]]
    recipe = (ROOT / "Makefile").read_text().partition("\ncheck:\n")[2].partition("\n\n")[0]
    run = [line.replace("\t@$(PYTHON_VENV)", ".venv/bin/python") for line in recipe.splitlines()[1:]]
    assert [line.removesuffix(" .").removesuffix(" --check") for line in run] == hooks
    assert "ruff format --check ." in recipe
    assert "--fix" not in recipe
