"""The table of a sweep: what each row becomes, and what is said of a wrong one."""

from __future__ import annotations

from pathlib import Path

import pytest

from job.config.loader import load_spec
from job.config.sweep import read_sweep
from job.errors import SpecError

TEXT = "name: chest\nmodel: {name_or_path: m}\ndataset: {path: d}\noutput: {url: s3://b/sweep/}\n"
FORMS = {
    "runs.csv": "\ufeffname,lora.r,training.learning_rate\r\nsmall, 8,1e-4\r\n\r\n,16,\r\n",
    "runs.tsv": "name\tlora.r\ttraining.learning_rate\nsmall\t8\t1e-4\n\t16\t\n",
    "excel.csv": "name;lora.r;training.learning_rate\nsmall;8;1e-4\n;16;\n",
    "runs.yaml": "- {name: small, lora.r: 8, training.learning_rate: 1e-4}\n- {lora.r: 16}\n",
}


def swept(folder: Path, table: str, name: str = "runs.csv", **environment: str) -> dict[str, dict[str, str]]:
    (folder / name).write_text(table, encoding="utf-8")
    return read_sweep(folder / name, TEXT, environment)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_table_makes_the_same_runs(form: str, tmp_path: Path):
    runs = swept(tmp_path, FORMS[form], form, JOB__LORA__R="4", JOB__TRAINING__LEARNING_RATE="3e-4")
    specs = {row: load_spec({"JOB__TRAINING__LEARNING_RATE": "3e-4"} | runs[row], TEXT) for row in runs}
    assert [(row, spec.name, spec.output.url) for row, spec in specs.items()] == [
        ("small", "chest-small", "s3://b/sweep/small"),
        ("2", "chest-2", "s3://b/sweep/2"),
    ]
    assert [(spec.lora.r, spec.training.learning_rate) for spec in specs.values()] == [(8, 1e-4), (16, 3e-4)]


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        ("lora.r\n8\n16\nmany\n", r"runs.csv, row 3: the spec has 1 problem:\n  - lora.r: found \"many\""),
        ("lora.rank\n8\n", "row 1: the spec has 1 problem:\n  - lora.rank: no such field; the fields here are"),
        ("lora_r\n8\n", "row 1: 'lora_r' names no field of a spec, as in name,lora.r"),
        ("name,lora.r\na,8\nA,16\n", "row 2: name: 'A' must be letters, .* and differ from other rows"),
        ("name,lora.r\n../a,8\n", r"row 1: name: '\.\./a' must be letters"),
        ("output.url\ns3://b/1\n", "row 1: output.url: remove it"),
        ("lora.r,dataset.instruction\n8,Say, what you see\n", "line 2: 3 values for 2 fields; quote text"),
        ("lora.r\n", "has no rows"),
        ("", "has no rows"),
    ],
)
def test_a_wrong_table_is_told_with_its_row(tmp_path: Path, table: str, sentence: str):
    with pytest.raises(SpecError, match=sentence):
        swept(tmp_path, table)


@pytest.mark.parametrize(
    ("table", "sentence"), [("a: 1", "must be a list of mappings"), ("- [", "is not YAML: line 1, column 4")]
)
def test_a_wrong_list_is_told_with_its_place(tmp_path: Path, table: str, sentence: str):
    with pytest.raises(SpecError, match=sentence):
        swept(tmp_path, table, "runs.yaml")


def test_a_table_that_is_not_there_is_told(tmp_path: Path):
    with pytest.raises(SpecError, match=r"--sweep: .*none.csv: cannot be read: No such file"):
        read_sweep(tmp_path / "none.csv", TEXT, {})
