"""The rows and the browser of the tests of evaluation, and the contents of a good run and of a deliberately bad one."""

from __future__ import annotations

import io
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from job.config.schema import LabelSpec, RequirementSpec
from job.evaluate.acceptance import judged
from job.evaluate.compare import compare
from job.evaluate.records import Answer, Settings
from job.report import page
from job.report.contents import BaseModel, Contents, Lineage
from tests.evaluate.conftest import browser, facts, make_rows  # noqa: F401

FINDINGS = ["no acute finding", "pneumothorax", "pleural effusion", "nodule"]
LABELS = {"finding": LabelSpec(column="finding", values=FINDINGS)}
LIMITS = {"mean_logit_difference": 0.05, "token_agreement": 0.97, "gain_kept": 0.8, "served_agreement": 0.98}
LONG = "chest/2026/PA_and_lateral_views_of_the_second_visit_after_drainage_0123456789abcdef.png"


def answers(right: float, text: str | None = None, rows: int = 120) -> list[Answer]:
    """Rows of which the finding, side and degree are right in the share `right`, or which all get `text`."""
    made = []
    for place in range(rows):
        truth, chance = random.Random(place), random.Random(f"{place} {right}")
        said = [
            (true, true if chance.random() < right else chance.choice(values))
            for values in (FINDINGS, ["left", "right"], ["mild", "severe"])
            for true in [truth.choice(values)]
        ]
        reference, generated = (
            f"There is a {degree} {finding} on the {side}." if finding != FINDINGS[0] else "No acute finding."
            for finding, side, degree in zip(*said, strict=True)
        )
        loss = 2.2 - 1.5 * right + chance.random() / 5
        made.append(
            Answer(
                f"row-{place}",
                reference,
                {"finding": said[0][0]},
                {"sex": "FM"[place % 2]},
                place // 2,
                question=f"What is seen in film {place}?",
                source=LONG.replace("0123", f"{place:04}"),
                generated=generated if text is None else text,
                tokens=12,
                loss=loss,
                answer_tokens=12,
                swapped_loss=loss + (0.6 * right if text is None else 0.0),
            )
        )
    return made


def contents(before: list[Answer], after: list[Answer], leaked: set[str], gate: dict[str, Any]) -> Contents:
    measured = compare(before, after, LABELS, ["sex"], Settings(300, 0.95, 1), leaked=leaked)
    required = {"finding_accuracy": RequirementSpec(min_value=0.7), "loss": RequirementSpec(max_change=0.0)}
    flat, spot = np.random.default_rng(0).normal(0, 0.002, (6, 6)), np.zeros((6, 6))
    spot[2, 3] = 0.8
    shown = page.gallery_ids(Contents(before=before, after=after, metrics=measured))
    return Contents(
        name="chest-captions",
        requirements=judged(required, measured),
        plan={"steps": 200, "learning_rate": 2e-4},
        lineage=Lineage(
            written="2026-11-30T22:00:00Z", spec_digest="ab" * 32, taken_step=150, trained_steps=200, taken="best"
        ),
        gate={"limits": LIMITS} | gate,
        occlusion={shown[0]: spot.tolist(), shown[1]: flat.tolist(), shown[2]: (-np.abs(flat)).tolist()},
        data={"rows": 1400, "train": 1152, "evaluation": 120, "validation": 64, "validation_groups": 31},
        base=BaseModel("meta-llama/Llama-3.2-11B-Vision-Instruct", "mllama"),
        metrics=measured,
        before=before,
        after=after,
        log=[{"step": step, "loss": 2 / step + 0.2, "eval_loss": 2 / step + 0.3} for step in range(1, 201)],
    )


@pytest.fixture(scope="session")
def good_run() -> Contents:
    merged = {"mean_logit_difference": 0.0012, "token_agreement": 1.0, "wrong": [], "compared": 224}
    smaller = {"merged_fp8": {"gain_kept": {"loss": 0.95}, "refused": None, "note": None}}
    served = {"served_merged": {"token_agreement": 0.995, "server": "vLLM 0.32.0"}}
    return contents(answers(0.3), answers(0.9), set(), merged | {"smaller": smaller} | served)


@pytest.fixture(scope="session")
def bad_run() -> Contents:
    """Half of the held-out rows are in training too, every answer is the same, and other images give the same loss."""
    before, after = answers(0.2), answers(0.9, "No acute finding.")
    wrong = {"mean_logit_difference": 0.31, "token_agreement": 0.62, "wrong": ["lm_head.weight"], "compared": 224}
    refused = "merged weights differ from base + adapter: 1 of 224 weights are not base + adapter, first lm_head.weight"
    before = [replace(row, generated="It is a cat.") for row in before]
    return contents(before, after, {f"row-{place}" for place in range(60)}, wrong | {"refused": refused})


@pytest.fixture(scope="session")
def images(good_run: Contents, bad_run: Contents) -> dict[str, bytes]:
    found = {}
    for number, identity in enumerate({*page.gallery_ids(good_run), *page.gallery_ids(bad_run)}):
        stream = io.BytesIO()
        noise = np.random.default_rng(number).integers(0, 256, (96, 128), np.uint8)
        Image.fromarray(noise).save(stream, "JPEG")
        found[identity] = stream.getvalue()
    return found
