"""Rows that choose the step: set aside from training rows by patient, and apart from what is measured in the end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from job.config.loader import validate
from job.data import Data
from job.data.prepare import prepare
from job.errors import DataError
from job.evaluate.answer_cache import held
from job.planning.facts import Facts
from job.planning.warnings import warnings
from job.train.eval_callback import lowest
from tests.data.test_data import folder_of, png, rows_of

PATIENTS = 60
EACH = 4
CHOOSING = {"eval_steps": 1, "take": "best"}
Prepared = Callable[..., Data]


@pytest.fixture
def prepared(tree: dict[str, Any], tmp_path: Path) -> Prepared:
    """Prepares `PATIENTS` patients of `EACH` rows; `prepared(evaluation, **dataset)`."""
    rows = [{**row, "patient": f"p{n // EACH}"} for n, row in enumerate(rows_of(PATIENTS * EACH))]
    folder_of(rows, tmp_path / "data")

    def prepare_it(evaluation: dict[str, Any] | None = None, most: int | None = None, **dataset: Any) -> Data:
        given = tree | {
            "dataset": tree["dataset"] | {"group_column": "patient"} | dataset,
            "evaluation": CHOOSING if evaluation is None else evaluation,
        }
        return prepare(validate(given), tmp_path / "scratch", most=most)

    return prepare_it


def patients(rows: Any) -> set[str]:
    return {f"p{int(row['id'].removeprefix('row-')) // EACH}" for row in rows}


def ids(rows: Any) -> list[str]:
    return [row["id"] for row in rows]


@pytest.mark.parametrize("evaluation", [CHOOSING, {"eval_steps": 1, "patience": 2}])
def test_no_patient_chooses_the_step_and_is_trained_on_or_measured(
    prepared: Prepared, evaluation: dict[str, Any]
) -> None:
    data, plain = prepared(evaluation), prepared({"eval_steps": 1})
    sides = [patients(rows) for rows in (data.train, data.validation, data.evaluation)]
    assert all(sides)
    assert sum(map(len, sides)) == len(set().union(*sides)) == PATIENTS
    assert ids(data.evaluation) == ids(plain.evaluation), "runs with and without it could not be compared"
    assert (len(plain.validation), plain.facts.validation) == (0, None)
    facts = data.facts
    assert (facts.train, facts.evaluation, facts.validation) == tuple(
        map(len, (data.train, data.evaluation, data.validation))
    )
    assert facts.validation_groups == len(sides[1])
    assert facts.train + (facts.validation or 0) == plain.facts.train
    assert len(data.validation) == pytest.approx(plain.facts.train / 10, abs=EACH)


def test_the_same_rows_choose_at_each_attempt_and_others_with_another_seed(
    prepared: Prepared, tree: dict[str, Any]
) -> None:
    first, second = prepared(), prepared()
    assert ids(first.validation) == ids(second.validation)
    assert first.identity is not None
    assert first.identity == second.identity
    assert len(first.identity.validation) == 16 * len(first.validation)
    tree["training"] = {"seed": 1}
    assert ids(prepared().validation) != ids(first.validation)


def test_no_more_rows_choose_than_are_measured(prepared: Prepared) -> None:
    few = prepared(CHOOSING | {"eval_loss_rows": 9})
    assert 9 <= len(few.validation) < 9 + EACH


def test_a_quick_look_foresees_the_same_share(prepared: Prepared) -> None:
    whole, look = prepared().facts, prepared(most=PATIENTS * EACH // 2).facts
    assert (look.looked_at, look.train + look.evaluation + (look.validation or 0)) == (120, 240)
    assert look.validation == pytest.approx(whole.validation, abs=2 * EACH)


def test_rows_of_the_users_own_patients_and_their_near_duplicates_choose_nothing(
    prepared: Prepared, tmp_path: Path
) -> None:
    """Half of the patients are in the user's held-out rows too, so that their training rows would choose what they measure."""
    shared = PATIENTS // 2
    held = [{**row, "patient": f"P{n}"} for n, row in enumerate(rows_of(shared))]
    folder_of(held, tmp_path / "held", {f"{n}.png": png(n, (16, 16)) for n in range(shared)})
    data = prepared(CHOOSING | {"eval_loss_rows": 24}, eval_path=str(tmp_path / "held"))
    assert data.facts.same_in_both == shared
    chosen = patients(data.validation)
    assert len(chosen) == 24 // EACH
    assert not chosen & {f"p{n}" for n in range(shared)}
    assert not chosen & patients(data.train)


def test_one_patient_cannot_choose_and_the_cure_is_said(
    tree: dict[str, Any], tmp_path: Path, prepared: Prepared
) -> None:
    folder_of(rows_of(8, patient="a"), tmp_path / "one")
    with pytest.raises(DataError, match=r"1 are in the training rows.*set take to last and remove patience") as raised:
        prepared(path=str(tmp_path / "one"), eval_fraction=0)
    assert raised.value.exit_code == 65
    rows = rows_of(40)
    for number, row in enumerate(rows):
        row["patient"] = f"q{number // 10}"
    folder_of(rows, tmp_path / "few")
    few = prepared(path=str(tmp_path / "few"), eval_fraction=0)
    spec = validate(tree | {"evaluation": CHOOSING})
    told = warnings(spec, Facts(data=few.facts), [], None, None, "", "16bit")
    assert any(text.startswith("only 10 rows of 1 groups (patients) choose the step") for text in told)


def test_choosing_does_not_flatter_the_final_measurement(prepared: Prepared) -> None:
    """All steps are equally good, and patients differ by chance. The chosen step then measures as good as any other, while it
    looks better than it is on the rows that chose it."""
    data, random, steps, draws = prepared(eval_rows=60), np.random.default_rng(0), 12, 4000
    chose, measured = (np.array([int(row["unit"]) for row in rows]) for rows in (data.validation, data.evaluation))
    luck = np.empty((draws, 2, 2))
    for draw in luck:
        of_patients = random.normal(size=(PATIENTS * EACH, steps))
        losses = [
            (of_patients[units] + random.normal(size=(len(units), steps))).mean(axis=0) for units in (chose, measured)
        ]
        for choice, by in zip(draw, losses, strict=True):
            step = lowest(dict(enumerate(by.tolist())))
            choice[:] = [side[step] for side in losses]
    by_validation, by_final = luck.mean(axis=0)
    error = luck.std(axis=0) / draws**0.5
    assert abs(by_validation[1]) < 4 * error[0, 1]
    assert by_validation[0] < -50 * error[0, 0], "nothing was chosen by chance, so this shows nothing"
    assert by_final[1] < -50 * error[1, 1], "choosing on the final rows would have flattered them"


def test_held_out_rows_keep_their_file_and_their_question_if_it_is_not_the_same_for_all(
    prepared: Prepared, tmp_path: Path
) -> None:
    rows = [{**row, "ask": f"What of {n}?"} for n, row in enumerate(rows_of(8))]
    folder_of(rows, tmp_path / "asked")
    given = {"path": str(tmp_path / "asked"), "group_column": None, "eval_rows": 3}
    asked = [each.own for each in held(prepared({}, instruction_column="ask", **given).evaluation)]
    numbers = [int(own.id.removeprefix("row-")) for own in asked]
    assert [(own.question, own.source) for own in asked] == [(f"What of {n}?", f"{n}.png") for n in numbers]
    assert {each.own.question for each in held(prepared({}, **given).evaluation)} == {None}
