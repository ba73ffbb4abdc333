"""A model that misses the spec's requirements is not published, and the job says by how much it misses them."""

from __future__ import annotations

from typing import Any

import pytest

from job.config.rules import contradictions
from job.config.schema import METRICS, EvaluationSpec, RequirementSpec
from job.evaluate import metric_info
from job.evaluate.acceptance import judged
from job.evaluate.radeval import RADEVAL
from job.evaluate.records import Change, Comparison, Estimate
from tests.tiny import job_spec

MEASURED = Comparison(after={"rougeL": Estimate(0.5, 0.4, 0.6, 40)}, change={"rougeL": Change(0.03, -0.01, 0.07, 40)})


def unmet(required: dict[str, RequirementSpec], measured: Comparison) -> list[str]:
    return [each.said for each in judged(required, measured) if not each.met]


@pytest.mark.parametrize(
    ("demand", "met"),
    [
        ({"min_change": 0.0}, True),
        ({"min_change": 0.03}, True),
        ({"min_change": 0.031}, False),
        ({"min_change": 0.0, "judged_by": "interval"}, False),
        ({"min_change": -0.02, "judged_by": "interval"}, True),
        ({"max_change": 0.01}, False),
        ({"max_change": 0.08, "judged_by": "interval"}, True),
        ({"min_value": 0.45}, True),
        ({"min_value": 0.45, "judged_by": "interval"}, False),
        ({"max_value": 0.45}, False),
    ],
)
def test_bounds_are_held_against_the_value_or_the_whole_interval(demand: dict[str, Any], met: bool) -> None:
    assert (unmet({"rougeL": RequirementSpec(**demand)}, MEASURED) == []) is met


def test_the_sentence_names_metric_value_interval_and_bound() -> None:
    assert unmet({"rougeL": RequirementSpec(min_change=0.05)}, MEASURED) == [
        "rougeL changed by +0.0300 (95 % interval -0.0100 to 0.0700, n = 40), below "
        "evaluation.require.rougeL.min_change = 0.05"
    ]


def test_what_was_not_measured_meets_no_demand() -> None:
    assert "was not measured" in unmet({"loss": RequirementSpec(max_change=0.0)}, MEASURED)[0]
    assert "was not measured" in unmet({"loss": RequirementSpec(max_change=0.0)}, Comparison())[0]


def test_a_demand_that_can_never_be_judged_is_a_problem_of_the_spec() -> None:
    spec = job_spec(
        dataset={"path": "rows", "eval_fraction": 0},
        evaluation={"require": {"rougeL": {}, "finding_accuracy": {"min_change": 0}}},
    )
    said = "\n".join(contradictions(spec))
    assert "evaluation.require.rougeL: sets no bound" in said
    assert "evaluation.require.finding_accuracy: no such metric" in said
    assert "no rows are held out" in said


def test_a_demand_may_change_between_attempts() -> None:
    with_demand = job_spec(evaluation={"require": {"rougeL": {"min_change": 0.9}}})
    assert with_demand.digest == job_spec().digest


def test_the_spec_knows_the_metrics_that_are_measured() -> None:
    assert set(METRICS) == set(metric_info.ABOUT)
    extra = EvaluationSpec.model_json_schema()["properties"]["extra_metrics"]["propertyNames"]["enum"]
    assert set(extra) == set(metric_info.EXTRA) == {"bertscore", *RADEVAL}


def test_chexberts_f1_can_be_demanded_where_chexbert_is_asked_for() -> None:
    demand = {"chexbert_14_micro_f1": {"min_value": 0.3}}
    asked = job_spec(evaluation={"extra_metrics": {"chexbert": "/models"}, "require": demand})
    assert list(contradictions(asked)) == []
    assert len(list(contradictions(job_spec(evaluation={"require": demand})))) == 1
