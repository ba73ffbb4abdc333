"""Rows with several findings: what is counted, and what comes of it."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from job.config.loader import validate
from job.config.schema import LabelSpec, RequirementSpec
from job.data.prepare import prepare
from job.errors import DataError, SpecError
from job.evaluate import bootstrap
from job.evaluate.acceptance import judged
from job.evaluate.compare import compare
from job.evaluate.label_metrics import stated_and_right
from job.evaluate.radeval import CONDITIONS, LABELS
from job.evaluate.records import Answer, Comparison, Settings, from_json
from job.report.contents import Contents
from job.report.page import markdown, render
from tests.data.test_data import folder_of, rows_of

FINDINGS = ["edema", "pleural effusion", "pneumothorax"]
SPEC = {"findings": LabelSpec(column="findings", values=FINDINGS)}
SETTINGS = Settings(bootstrap_samples=200, confidence=0.95, seed=1)
SAY = {"present": "There is {}.", "absent": "No {}.", "uncertain": "Possible {}.", "": ""}


def unmet(required: dict[str, RequirementSpec], measured: Comparison) -> list[str]:
    return [each.said for each in judged(required, measured) if not each.met]


def row(place: int, truth: dict[str, str], said: dict[str, str], **more: Any) -> Answer:
    """A row whose text states each finding as in `said`; the reference states the truth."""
    lists = {kind: [finding for finding, each in truth.items() if each == kind] for kind in ("present", "uncertain")}
    labels = {"findings": lists["present"], "findings (uncertain)": lists["uncertain"]}
    texts = [" ".join(SAY[each].format(finding) for finding, each in states.items()) for states in (truth, said)]
    return Answer(f"row-{place}", texts[0], labels, unit=place // 2, generated=texts[1], **more)


def drawn(count: int, right: float, seed: int) -> tuple[list[Answer], list[tuple[dict[str, str], dict[str, str]]]]:
    chance, rows, pairs = random.Random(seed), [], []
    truths = random.Random(0)
    for place in range(count):
        truth = {finding: truths.choice(["present", "absent", "absent", "uncertain"]) for finding in FINDINGS}
        kinds = list(SAY)
        said = {one: state if chance.random() < right else chance.choice(kinds) for one, state in truth.items()}
        rows.append(row(place, truth, said))
        pairs.append((truth, {one: state or "absent" for one, state in said.items()}))
    return rows, pairs


@pytest.fixture(scope="module")
def measured() -> Comparison:
    return compare(drawn(120, 0.5, 1)[0], drawn(120, 0.8, 2)[0], SPEC, [], SETTINGS, metric="findings_micro_f1")


def test_rates_are_those_that_counting_gives(measured: Comparison):
    _, pairs = drawn(120, 0.8, 2)
    for finding in FINDINGS:
        both = [(truth[finding], said[finding]) for truth, said in pairs if truth[finding] != "uncertain"]
        there, gone = ([said for truth, said in both if truth == kind] for kind in ("present", "absent"))
        stated, denied = ([truth for truth, said in both if said == kind] for kind in ("present", "absent"))
        wanted = {
            "sensitivity": there.count("present") / len(there),
            "specificity": gone.count("absent") / len(gone),
            "ppv": stated.count("present") / len(stated),
            "npv": denied.count("absent") / len(denied),
        }
        name = finding.replace(" ", "_")
        assert {rate: measured.after[f"{name}_{rate}"].value for rate in wanted} == pytest.approx(wanted, abs=1e-6)
        assert measured.after[f"{name}_sensitivity"].n == len(there)
        assert measured.after[f"{name}_ppv"].n == len(stated)
        table = measured.labels["findings"].findings[finding]
        assert table.prevalence.value == pytest.approx(len(there) / len(both), abs=1e-6)
        assert table.confusion["after"]["present"]["present"] == there.count("present")
        assert sum(sum(each.values()) for each in table.confusion["before"].values()) == 120
        for metric in (f"{name}_{rate}" for rate in wanted):
            found = measured.after[metric]
            assert found.low < found.value < found.high
            assert measured.change[metric].low is not None


def test_f1_is_that_of_counting(measured: Comparison):
    _, pairs = drawn(120, 0.8, 2)

    def f1(findings: list[str], kind: str, left_out: str) -> float:
        both = [(truth[one], said[one]) for truth, said in pairs for one in findings if truth[one] != left_out]
        right = both.count((kind, kind))
        return 2 * right / (sum(truth == kind for truth, _ in both) + sum(said == kind for _, said in both))

    after = {name: each.value for name, each in measured.after.items()}
    single = [f1([finding], "present", "uncertain") for finding in FINDINGS]
    assert after["findings_macro_f1"] == pytest.approx(np.mean(single), abs=1e-6)
    assert after["findings_micro_f1"] == pytest.approx(f1(FINDINGS, "present", "uncertain"), abs=1e-6)
    assert after["findings_uncertain_f1"] == pytest.approx(f1(FINDINGS, "uncertain", ""), abs=1e-6)
    assert after["findings_accuracy"] == pytest.approx(np.mean([truth == said for truth, said in pairs]), abs=1e-6)


def test_the_ceiling_is_what_the_reference_texts_reach(measured: Comparison):
    assert measured.labels["findings"].ceiling == 1.0
    rows = [
        replace(each, reference="Normal.") if place < 30 else each for place, each in enumerate(drawn(120, 0.8, 2)[0])
    ]
    table = compare(rows, rows, SPEC, [], SETTINGS).labels["findings"]
    assert table.ceiling < 1
    right = sum("edema" not in str(each.labels) for each in rows[:30]) + 90
    assert table.findings["edema"].ceiling == pytest.approx(right / 120, abs=1e-6)


def test_chexbert_reads_beside_the_rules_and_its_own_ceiling_is_said():
    """It reads the references right but for every tenth row, and answers all as uncertain."""
    rows, _ = drawn(120, 0.8, 2)
    code, read = {"present": 1, "uncertain": -1, "absent": 0}, []
    for place, each in enumerate(rows):
        own = [0] * len(CONDITIONS)
        for finding in FINDINGS if place % 10 else []:
            there = finding in each.labels["findings"]
            state = "present" if there else "uncertain" if finding in each.labels["findings (uncertain)"] else "absent"
            own[CONDITIONS.index(finding)] = code[state]
        read.append([*own, *([-1] * len(CONDITIONS))])
    spec = {"findings": LabelSpec(column="findings", values=[*FINDINGS, "scoliosis"])}
    found = compare(rows, rows, spec, [], SETTINGS, ({LABELS: read}, {LABELS: read}))
    tables = found.labels["findings"].findings
    wrong = sum(finding == "edema" for each in rows[::10] for part in each.labels.values() for finding in part)
    assert tables["edema"].chexbert_ceiling == pytest.approx(1 - wrong / 120, abs=1e-6)
    assert tables["scoliosis"].chexbert_ceiling is None
    assert found.after["edema_sensitivity_by_chexbert"].value == 0
    assert found.after["edema_ppv_by_chexbert"].n == 0
    assert "scoliosis_sensitivity_by_chexbert" not in found.after
    page = render(Contents(metrics=found, before=rows, after=rows))
    assert page.count("<small>read by CheXbert</small>") == 4 * len(FINDINGS)
    assert "as CheXbert reads them" in page
    assert "by_chexbert" not in markdown(found)


def test_rows_of_a_patient_widen_the_intervals():
    """One patient with ten rows is not ten patients."""
    rows, alone = [], []
    for place in range(100):
        truth = {"edema": "present"}
        each = row(place, truth, truth if place // 10 % 2 else {"edema": "absent"})
        rows.append(replace(each, unit=place // 10))
        alone.append(replace(each, unit=place))
    spec = {"findings": LabelSpec(column="findings", values=["edema"])}
    wide, narrow = (compare(each, each, spec, [], SETTINGS).after["edema_sensitivity"] for each in (rows, alone))
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)


def test_intervals_hold_the_true_rate():
    """400 draws of 80 patients with one to four rows each, which are alike within a patient in truth and in answers."""
    draw = np.random.default_rng(0)

    def rows_of_patients(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        unit = np.repeat(np.arange(count), draw.integers(1, 5, count))
        true = draw.random(len(unit)) < draw.beta(1, 2, count)[unit]
        said = draw.random(len(unit)) < np.where(true, draw.beta(4, 1, count)[unit], draw.beta(1, 8, count)[unit])
        return unit, true, said

    _, true, said = rows_of_patients(200_000)
    for right, among in ((said & true).sum() / true.sum(), True), ((said & true).sum() / said.sum(), False):
        held = 0
        for _ in range(400):
            unit, there, stated = rows_of_patients(80)
            sums = np.stack([there & stated, there if among else stated], axis=-1).astype(float)
            low, high = bootstrap.share_span(sums, unit, 0.95)
            held += low <= right <= high
        assert 0.925 <= held / 400 <= 0.98


def test_values_restrict_what_counts():
    rows = [row(0, {"edema": "present", "mass": "present"}, {"edema": "present", "nodule": "present"})]
    classes, pairs = stated_and_right(rows, "findings", LabelSpec(column="f", values=["edema"]))
    assert (classes, pairs) == (("edema",), [("edema", "edema")])
    single = [
        Answer("row-0", "", {"f": "mass"}, generated="A mass."),
        Answer("row-1", "", {"f": "edema"}, generated="Edema"),
    ]
    restricted = stated_and_right(single, "f", LabelSpec(column="f", values=["edema", "nodule"]))
    assert restricted == (("edema", "nodule"), [None, ("edema", "edema")])


def test_a_row_without_findings_counts_and_one_without_a_label_does_not():
    rows = [Answer("a", "", {"f": []}, generated="Clear."), Answer("b", "", {"f": None}, generated="Edema.")]
    rows.append(Answer("c", "", {"f": ["edema"]}, generated="Clear."))
    found = compare(rows, rows, {"f": LabelSpec(column="f", values=["edema"])}, [], SETTINGS).after
    assert (found["edema_specificity"].value, found["edema_specificity"].n) == (1, 1)
    assert (found["edema_sensitivity"].value, found["edema_sensitivity"].n) == (0, 1)
    assert (found["edema_ppv"].value, found["edema_ppv"].n) == (None, 0)
    assert (found["edema_npv"].value, found["edema_npv"].n) == (0.5, 2)


def test_a_model_that_names_every_finding_is_not_better(measured: Comparison):
    before = drawn(120, 0.2, 1)[0]
    after = [replace(each, generated=" ".join(f"There is {one}." for one in FINDINGS)) for each in before]
    found = compare(before, after, SPEC, [], SETTINGS, metric="findings_micro_f1").verdict
    assert found.said != "better"
    assert found.constant >= compare(after, after, SPEC, [], SETTINGS).after["findings_micro_f1"].value - 1e-6
    assert measured.verdict.said == "better"


def test_a_bound_may_be_about_one_finding(measured: Comparison):
    value = measured.after["pneumothorax_sensitivity"].value
    assert unmet({"pneumothorax_sensitivity": RequirementSpec(min_value=value)}, measured) == []
    (said,) = unmet({"pneumothorax_sensitivity": RequirementSpec(min_value=0.999)}, measured)
    assert said.startswith(f"pneumothorax_sensitivity is {value:.4f} (95 % interval")
    (missing,) = unmet({"mass_sensitivity": RequirementSpec(min_value=0.9)}, measured)
    assert missing.startswith("mass_sensitivity was not measured")


def test_the_report_has_a_table_for_each_finding(measured: Comparison):
    rows = drawn(120, 0.8, 2)[0]
    page = render(Contents(metrics=measured, before=drawn(120, 0.5, 1)[0], after=rows))
    for text in (
        "<h4>Pleural effusion</h4>",
        "Sensitivity",
        "PPV",
        "Present in",
        "read in the same way, agree",
        "uncertain",
    ):
        assert text in page
    assert page.count("<caption>Rates</caption>") == 3
    assert "sensitivity" not in markdown(measured)
    again = from_json(Comparison, json.loads(json.dumps(measured, default=vars)))
    assert again.labels["findings"] == measured.labels["findings"]


@pytest.mark.parametrize(
    ("cells", "label", "wanted"),
    [
        ([["edema", " mass "], [], None], {}, [["edema", "mass"], [], ""]),
        (["edema; mass", "edema", ""], {"separator": ";"}, [["edema", "mass"], ["edema"], ""]),
        (["['edema', 'mass']", '["edema"]', "[]"], {}, [["edema", "mass"], ["edema"], []]),
        (["edema", "mass", ""], {}, ["edema", "mass", ""]),
    ],
)
def test_cells_with_several_values_are_read(tree: dict[str, Any], tmp_path: Path, cells, label, wanted):
    rows = [{**each, "found": cells[place % 3], "open": cells[0]} for place, each in enumerate(rows_of(6))]
    folder_of(rows, tmp_path / "data")
    tree["evaluation"] = {"labels": {"found": {"column": "found", **label}}}
    data = prepare(validate(tree), tmp_path / "scratch")
    read = sorted([*data.train, *data.evaluation], key=lambda each: each["id"])
    assert [each["labels"]["found"] for each in read[:3]] == wanted
    assert data.label_values == {"found": ["edema", "mass"]}


def test_what_the_truth_leaves_open_is_read(tree: dict[str, Any], tmp_path: Path):
    rows = [{**each, "found": "edema", "open": "mass|nodule"} for each in rows_of(4)]
    folder_of(rows, tmp_path / "data")
    tree["evaluation"] = {"labels": {"f": {"column": "found", "separator": "|", "uncertain_column": "open"}}}
    data = prepare(validate(tree), tmp_path / "scratch")
    assert data.train[0]["labels"] == {"f": ["edema"], "f (uncertain)": ["mass", "nodule"]}
    assert data.label_values == {"f": ["edema", "mass", "nodule"]}


def test_single_text_beside_an_uncertain_column_is_refused(tree: dict[str, Any], tmp_path: Path):
    folder_of([{**each, "found": "edema", "open": "mass"} for each in rows_of(4)], tmp_path / "data")
    tree["evaluation"] = {"labels": {"f": {"column": "found", "uncertain_column": "open"}}}
    with pytest.raises(DataError, match="column found holds text and no list; say in evaluation.labels.f.separator"):
        prepare(validate(tree), tmp_path / "scratch")


def test_bounds_on_findings_are_accepted_in_a_spec_and_others_are_not(tree: dict[str, Any]):
    labels = {"findings": {"column": "f", "separator": ";", "values": FINDINGS}}
    tree["evaluation"] = {"labels": labels, "require": {"pneumothorax_sensitivity": {"min_value": 0.9}}}
    validate(tree)
    tree["evaluation"]["require"] = {"mass_sensitivity": {"min_value": 0.9}}
    with pytest.raises(SpecError, match=r"require.mass_sensitivity: no such metric.*pneumothorax_sensitivity"):
        validate(tree)
    tree["evaluation"]["require"] = {"pneumotorax_sensitivity": {"min_value": 0.9}}
    with pytest.raises(
        SpecError, match=r"pneumotorax_sensitivity: no such metric; did you mean pneumothorax_sensitivity\?"
    ):
        validate(tree)
    tree["evaluation"]["require"] = {"pneumothorax_sensitivity_by_chexbert": {"min_value": 0.9}}
    with pytest.raises(SpecError, match="no such metric"):
        validate(tree)
    tree["evaluation"]["extra_metrics"] = {"chexbert": "/models/radeval"}
    validate(tree)
    tree["evaluation"] = {"require": {"pneumothorax_sensitivity": {"min_value": 0.9}}}
    with pytest.raises(SpecError, match="no such metric"):
        validate(tree)
    tree["evaluation"] = {"labels": labels, "primary_metric": "pneumothorax_sensitivity"}
    with pytest.raises(SpecError, match="primary_metric: no metric pneumothorax_sensitivity"):
        validate(tree)
    tree["evaluation"] = {"labels": {"f": {"column": "f", "pattern": "(x)", "separator": ";"}}}
    with pytest.raises(SpecError, match="a pattern finds one value"):
        validate(tree)
