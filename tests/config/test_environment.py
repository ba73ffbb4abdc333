"""The variables of the job: what they may hold, that they are read in one place, and that all else names them rightly."""

import ast
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from job.config import environment
from job.config.environment import Environment
from job.errors import SpecError
from tests.conftest import ROOT

NAME = re.compile(r"\bJOB_[A-Z]+(?:_[A-Z]+)*\b(?!_)")
"""Of a variable; not of an override (`JOB__LORA__R`), nor of a pattern (`JOB_*`)."""
OURS = {f"JOB_{field.name.upper()}" for field in fields(Environment)}
PAGE = (ROOT / "docs" / "environment.md").read_text()
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
NOT_OURS = {"JOB_COMPLETION_INDEX", "JOB_TEST_MODEL"}
"""Kubernetes' own, and one of our tests on GPUs."""


def rows(section: str) -> dict[str, list[str]]:
    """The table of a section of the page: by variable, the other cells."""
    lines = [line.strip("| ").split(" | ") for line in SECTIONS[section].splitlines() if line.startswith("| `JOB_")]
    return {name.strip("`"): [cell.strip() for cell in cells] for name, *cells in lines}


SCRIPTS = rows("The scripts' own")


def docstrings() -> Iterator[tuple[str, str]]:
    """Each field of the environment and the sentences below it, on one line."""
    (tree,) = [
        node for node in ast.parse(Path(environment.__file__).read_text()).body if isinstance(node, ast.ClassDef)
    ]
    for field, text in zip(tree.body[1:], tree.body[2:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            yield field.target.id, " ".join(ast.literal_eval(text.value).split())  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("JOB_GRACE_SECONDS", "seconds"),
        ("JOB_LEASE_SECONDS", "seconds"),
        ("JOB_SCRATCH_GB", "gigabytes"),
        ("JOB_GPU_MEMORY_GB", "gigabytes"),
    ],
)
def test_a_size_or_time_is_a_number_above_0(name: str, unit: str):
    field = name.removeprefix("JOB_").lower()
    assert getattr(Environment.read({name: " 1.5 "}), field) == 1.5
    for blank in ("", " "):
        assert Environment.read({name: blank}) == Environment()
    for text in ("soon", "-1", "0", "inf", "nan"):
        with pytest.raises(SpecError, match=f"^{name} is '{text}'; give a number of {unit} above 0$"):
            Environment.read({name: text})


def test_every_variable_sets_its_field():
    given: dict[str, Any] = {
        "spec": "a: 1\n",
        "bundle": "s3://bucket/b",
        "scratch": Path("/s"),
        "scratch_gb": 1.0,
        "grace_seconds": 2.0,
        "lease_seconds": 3.0,
        "gpu_memory_gb": 4.0,
        "price_per_hour": "5",
        "serve_python": "/vllm/bin/python",
        "radeval_python": "/radeval/bin/python",
        "image_digest": "sha256:6",
        "metrics_port": 7,
    }
    assert Environment.read({f"JOB_{name.upper()}": str(value) for name, value in given.items()}) == Environment(
        **given
    )
    assert given.keys() == {field.name for field in fields(Environment)}


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("JOB_METRICS_PORT", "http", "^JOB_METRICS_PORT is 'http'; give a free port$"),
        ("JOB_SCRATCH", "s3://bucket/s", "JOB_SCRATCH is s3://bucket/s; name a folder of this machine by its"),
        (
            "JOB_SCRATCH",
            "~no-such-user/s",
            "JOB_SCRATCH: ~no-such-user/s starts with the home of a user that this mach",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(name: str, text: str, said: str):
    with pytest.raises(SpecError, match=said):
        Environment.read({name: text})


READING = re.compile(r"environ|getenv|variables|settings|given")


def read_in(code: str) -> set[str]:
    """Variables that the code takes from a mapping of an environment, or gives a name for that.

    A message may name a variable, and so may what is written for others to read: whoever looks for a sentence finds it where
    it is said. Reading is a call, an index or a comparison with such a name beside a mapping.
    """
    found = set[str]()
    for node in ast.walk(ast.parse(code)):
        match node:
            case ast.Call(args=parts):
                where = ast.unparse(node.func) + " ".join(ast.unparse(part) for part in parts)
            case ast.Subscript(value=value, slice=part, ctx=ast.Load()):
                parts, where = [part], ast.unparse(value)
            case ast.Compare(left=left, comparators=[right]):
                parts, where = [left], ast.unparse(right)
            case ast.Assign(targets=[ast.Name()], value=value):
                parts, where = [value], "given a name"
            case _:
                continue
        names = {part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)}
        found |= {name for name in names if NAME.fullmatch(name) and READING.search(where)}
    return found


@pytest.mark.parametrize(
    "code",
    [
        'os.environ.get("JOB_X")',
        'os.getenv("JOB_X", "")',
        'environment["JOB_X"]',
        '"JOB_X" in os.environ',
        'positive(environment, "JOB_X", 1)',
        'VARIABLE = "JOB_X"',
    ],
)
def test_reading_is_seen(code: str):
    assert read_in(code) == {"JOB_X"}
    assert (
        read_in('raise SpecError(f"JOB_X is {environment}")\noutside("JOB_X", read)\nsaid["JOB_X"] = scratch') == set()
    )


def test_no_other_file_reads_a_variable_of_the_job():
    others = [file for file in (ROOT / "job").rglob("*.py") if file != Path(environment.__file__)]
    found = {str(file.relative_to(ROOT)): read for file in others if (read := read_in(file.read_text()))}
    assert found == {}
    assert len(others) > 100


def test_no_message_names_a_variable_that_is_not_there():
    known = OURS | set(SCRIPTS) | NOT_OURS
    files = [*(ROOT / "job").rglob("*.py")]
    assert any(NAME.search(file.read_text()) for file in files)
    for file in files:
        assert set(NAME.findall(file.read_text())) <= known, file


def test_the_page_says_of_each_variable_what_its_field_does():
    shown = {}
    for name, text in docstrings():
        text, _, default = text.partition(" Default: ")
        value = getattr(Environment, name)
        shown[f"JOB_{name.upper()}"] = [default.rstrip(".") or (f"{value:g}" if value else ""), text]
    assert rows("The job's") == shown


def files(*folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from (
            path for path in (ROOT / folder).rglob("*") if path.is_file() and path.suffix not in (".png", ".pyc")
        )


def test_scripts_manifests_image_and_documents_name_only_what_is_there():
    for file in (*files("slurm", "k8s", "docker", "docs", "examples"), ROOT / "README.md", ROOT / "Makefile"):
        assert set(NAME.findall(file.read_text())) <= OURS | set(SCRIPTS) | NOT_OURS, file
    used = {name for file in files("slurm", "docker") for name in NAME.findall(file.read_text())}
    assert set(SCRIPTS) == used - OURS


def test_a_container_is_handed_every_variable_of_the_job():
    """But scratch, which is a mount of its own there."""
    for script, line in (
        ("slurm/runtimes.sh", r"^known\+?='(.*)'$"),
        ("docker/rented-box.sh", r"^ +(JOB_SPEC \| .*)$"),
    ):
        lists = re.findall(line, (ROOT / script).read_text(), re.MULTILINE)
        handed = re.findall(r"JOB_[A-Z_]+\*?", " ".join(lists))
        patterns = tuple(name.removesuffix("*") for name in handed if name.endswith("_*"))
        missing = {name for name in OURS if name not in handed and not name.startswith(patterns)}
        assert missing <= {"JOB_SCRATCH"}, script
