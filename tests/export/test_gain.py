"""A format in fewer bits is published if it keeps the adapter's gain, and only then."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from job.config.schema import GateSpec
from job.export.gain import Smaller, judge, label_shares
from job.export.gate import Verdict, compare
from job.export.merge import copy_rest, merge_to_folder, recipe
from job.export.read_back import read_folder
from job.export.tensor_map import changes, read_adapter
from job.model.transformers_backend import load_weights
from job.model.weight_map import read_base
from job.report import conclusion
from tests.export.trained import Trained, make_trained
from tests.tiny import CPU


@dataclass(frozen=True)
class Judged:
    trained: Trained
    verdict: Verdict
    merged: Path


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Judged:
    folder = tmp_path_factory.mktemp("trained")
    trained = make_trained(folder)
    trained.loaded.model.save_pretrained(folder / "adapter")
    base = read_base(trained.loaded.folder)
    merge_to_folder(
        recipe(base, folder / "adapter", changes(base, *read_adapter(folder / "adapter")), CPU), folder / "merged"
    )
    copy_rest(trained.loaded.folder, folder / "merged")
    read = partial(read_folder, trained.spec.model, folder / "merged", base, CPU)
    return Judged(
        trained, compare(trained.spec, trained.loaded, base, read, trained.data.evaluation), folder / "merged"
    )


def kept_labels(judged: Judged, folder: Path) -> dict[str, float]:
    trained = judged.trained
    model = load_weights(trained.spec.model, folder, CPU, "16bit")
    small = replace(trained.loaded, model=model, precision="16bit", backend="transformers")
    small.model.generation_config = trained.loaded.model.generation_config
    return label_shares(small, trained.data, trained.spec, trained.results)


def test_weights_that_are_the_tuned_model_keep_all_of_its_gain(judged: Judged) -> None:
    labels = kept_labels(judged, judged.merged)
    found = judge("merged_fp8", judged.verdict.loss_merged, labels, judged.verdict, GateSpec())
    assert found.gain_kept == {"loss": pytest.approx(1, abs=0.02), "finding_accuracy": 1}
    assert (found.refused, found.note) == (None, None)


def test_weights_that_lost_the_adapter_are_refused_by_loss_and_label(judged: Judged) -> None:
    labels = kept_labels(judged, judged.trained.loaded.folder)
    found = judge("merged_int4", judged.verdict.loss_base, labels, judged.verdict, GateSpec())
    assert found.gain_kept == {"loss": 0, "finding_accuracy": 0}
    assert found.refused == (
        "merged_int4/ is not published: of the adapter's gain it keeps 0.0% in loss, 0.0% in finding_accuracy, and "
        "export.gate.min_gain_kept is 0.8; serve merged/ or a format with more bits, or lower the bound"
    )


@pytest.mark.parametrize(("share", "least", "refused"), [(0.79, 0.8, True), (0.81, 0.8, False), (0.79, 0.7, False)])
def test_the_bound_is_the_specs(judged: Judged, share: float, least: float, refused: bool) -> None:
    verdict = judged.verdict
    loss = verdict.loss_base - share * (verdict.loss_base - verdict.loss_adapter)
    found = judge("merged_int4", loss, {}, verdict, GateSpec(min_gain_kept=least))
    assert found.gain_kept == {"loss": pytest.approx(share)}
    assert bool(found.refused) == refused


def test_a_label_is_enough_to_refuse(judged: Judged) -> None:
    found = judge("merged_int4", judged.verdict.loss_merged, {"side_accuracy": 0.5}, judged.verdict, GateSpec())
    assert "it keeps 50.0% in side_accuracy, and" in str(found.refused)


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"loss_adapter": 7.0}, "fell by -0."),
        ({"gain_error": 5.0}, "(standard error 5.000)"),
        ({"gain_error": None}, "(standard error unknown)"),
    ],
)
def test_where_no_gain_is_clear_no_share_is_formed_and_that_is_said(
    judged: Judged, facts: dict[str, Any], said: str
) -> None:
    found = judge("merged_fp8", 6.0, {}, replace(judged.verdict, **facts), GateSpec())
    assert (found.gain_kept, found.refused) == ({}, None)
    assert said in str(found.note)
    assert "which is published as it is" in str(found.note)


def test_a_loss_that_is_no_number_is_refused(judged: Judged) -> None:
    assert "its loss on the gate's rows is nan" in str(
        judge("merged_4bit", float("nan"), {}, judged.verdict, GateSpec())
    )


def test_report_and_card_say_what_is_kept() -> None:
    kept = Smaller(1.0, {"loss": 0.934, "finding_accuracy": 1.0})
    gate = {"smaller": {"merged_fp8": vars(kept), "merged_int4": vars(replace(kept, refused="merged_int4/ is not"))}}
    assert conclusion.smaller(gate) == [
        "merged_fp8/ keeps 93% (Loss) and 100% (Finding correct) of the adapter's gain.",
        "merged_int4/ is not.",
    ]
    assert conclusion.smaller(gate, "merged_fp8") == conclusion.smaller(gate)[:1]
    assert conclusion.smaller(gate, "merged") == conclusion.smaller({}) == []
