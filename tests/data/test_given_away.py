"""Prompts that hold their answer are found, and honest questions are not taken for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from job.config.loader import validate
from job.data import BadRows
from job.data.conversations import conversation
from job.data.facts import QuarantinedRow
from job.data.given_away import given_away, is_short, stated_answer, words
from job.data.prepare import prepare
from job.errors import SpecError
from tests.data.test_data import folder_of, rows_of

CLOSED = (
    "Answer yes or no: is there {}?",
    "Is there {} in this image? Answer with yes or no.",
    "Does the picture contain {}? (yes/no)",
    "Answer the question with Yes or No. Is {} present?",
    "There is {}, yes or no?",
    "Is {} seen on this film?",
)
THINGS = [
    "a pneumothorax",
    "a small left pleural effusion",
    "evidence of an aortic aneurysm",
    "free air under the diaphragm",
]
OPEN = r"""
Is this a CT or an MRI?|CT
Is the mass on the left or right?|left
Is the image an axial or a coronal plane?|axial
What modality is shown: X-ray, CT, MRI or ultrasound?|ultrasound
Which side is the pleural effusion on, left or right?|Left.
Is the lesion in the left lower lobe or in the right upper lobe?|in the right upper lobe
Is the heart enlarged or normal in size?|normal in size
Is the cardiac silhouette larger than half of the chest or not?|not
Where is the mass in the right upper lobe located?|right upper lobe
What is the location of the mass?|In the right upper lobe
Which organ is abnormal, the liver, the spleen or the left kidney?|the left kidney
What is the largest organ in the picture?|lung
How many nodules are there?|2
How many ribs are fractured, two or three?|three
Is the trachea midline?|The trachea is midline
The lungs are normally inflated?|The lungs are normally inflated
The small bowel is dilated, correct?|The small bowel is dilated
There is free air under the right hemidiaphragm?|There is free air under the right hemidiaphragm.
Do you see a fracture of the distal radius?|Yes, there is a fracture of the distal radius.
What does the arrow point to?|the aorta
Which of these is the diagnosis? A. Lobar pneumonia of the left lung B. Heart failure|lobar pneumonia of the left lung
Pick the finding. (A) small left apical pneumothorax (B) large right pleural effusion|(A) small left apical pneumothorax
Which finding is shown? Options: large right effusion, small left apical pneumothorax.|small left apical pneumothorax
Choose one of the following: acute left middle cerebral artery infarct; chronic subdural hematoma.|Chronic subdural hematoma
A: the left main coronary artery\nB: the right main coronary artery\nWhich vessel is narrowed?|The right main coronary artery
Is it a T1 weighted or a T2 weighted image?|T2 weighted
Is this study normal/abnormal?|abnormal
Which finding: pneumonia/pneumothorax/effusion?|pneumothorax
Is contrast used?|No
Was the study done with IV contrast, with oral contrast, or with neither of the two?|with neither of the two
What can be seen beside the heart?|An opacity beside the heart
What kind of scan is this?|This is a CT scan
Is the left kidney in the picture healthy or abnormal?|healthy
Which part of the body is this?|Chest
Does this image look normal? If there is a finding, name it.|yes
Is there a finding? Say no finding, or name it.|no finding
Are there more than 12 ribs? Count them.|12
In one word: what is the abnormality in the left lower lobe?|Consolidation
Describe the findings of this chest radiograph.|The heart is enlarged. No effusion.
You are a radiologist. Write the impression.|No acute abnormality
What is wrong with the left lung? Be brief.|a left pneumothorax
Could this be a lung abscess?|lung abscess
Bilden beide Lungen normal oder auffällig ab?|normal
Liegt der Erguss rechts oder links?|rechts
¿Hay derrame pleural? Responda sí o no.|no
Y a-t-il un épanchement pleural? Répondez par oui ou non.|oui
这张图像中有气胸吗?请回答是或否。|是
病灶在左肺还是右肺?|左肺
図に胸水はありますか。はいかいいえで答えてください。|はい
"""
QUESTIONS = [(form.format(thing), answer) for form in CLOSED for thing in THINGS for answer in ("yes", "No.", "Yes")]
LINES = [line.replace("\\n", "\n").split("|") for line in OPEN.strip().split("\n")]
QUESTIONS += [(prompt, answer) for prompt, answer in LINES]
TELLING = (
    ("Describe the image. History: cough. Small left pleural effusion.", "Small left pleural effusion."),
    (
        "Findings: there is a SMALL left-pleural effusion\nWrite the findings.",
        "There is a small left pleural effusion.",
    ),
    ("Beschreibe das Bild. Vorbefund: Kleiner Pleuraerguss links basal.", "Kleiner Pleuraerguss links basal"),
    ("描述图像。病史:左侧少量胸腔积液伴肺不张。", "左侧少量胸腔积液伴肺不张"),
    ("1. Heart enlarged. 2. Edema of both lungs. Repeat the report.", "Heart enlarged. 2. Edema of both lungs"),
)


def stated(prompt: str, answer: str) -> str:
    return stated_answer(conversation(prompt, answer, None))


def test_honest_questions_do_not_state_their_answer():
    """All but short answers are judged by this alone."""
    assert len(QUESTIONS) > 100
    assert [
        (prompt, answer) for prompt, answer in QUESTIONS if (said := stated(prompt, answer)) and not is_short(said)
    ] == []


def test_a_mixed_set_of_questions_is_accepted_as_a_whole():
    found = {row: said for row, (prompt, answer) in enumerate(QUESTIONS) if (said := stated(prompt, answer))}
    told = [(words(prompt), words(answer)) for prompt, answer in QUESTIONS]
    assert given_away(found, len(QUESTIONS), lambda count: told[:: max(1, len(told) // count)]) == []


@pytest.mark.parametrize(("prompt", "answer"), TELLING)
def test_a_prompt_that_holds_its_answer_is_found(prompt: str, answer: str):
    assert (said := stated(prompt, answer)) == words(answer)
    assert given_away({0: said}, 10, lambda count: [(words(prompt), said), ("look", "a nodule")]) == [0]


def test_a_system_turn_and_an_earlier_question_count_and_an_earlier_answer_does_not():
    assert stated_answer(conversation("Look.", "Large right apical pneumothorax", "Large right apical pneumothorax."))
    first, again = (conversation(asked, "A large right pneumothorax.", None) for asked in ("Look.", "Are you sure?"))
    assert not stated_answer(first + again)
    assert stated_answer(conversation("A large right pneumothorax.", "Thank you", None) + again)


@pytest.fixture
def prepared(tree: dict[str, Any], tmp_path: Path):
    def prepare_it(rows: list[dict[str, Any]], **dataset: Any):
        folder_of([{**each, **row} for each, row in zip(rows_of(len(rows)), rows, strict=True)], tmp_path / "data")
        tree["dataset"] |= dataset
        return prepare(validate(tree), tmp_path / "scratch")

    return prepare_it


def test_a_row_whose_history_holds_its_answer_is_set_aside(prepared):
    rows = [{"caption": f"There is a nodule of {n} mm.", "history": f"Patient {n}."} for n in range(20)]
    rows[7]["history"] = "Cough. There is a nodule of 7 mm. Smoker."
    data = prepared(rows, instruction="Look.\nHistory: {history}", max_bad_fraction=0.1)
    assert data.quarantined == [QuarantinedRow(7, "the answer is already in the instruction or history")]
    assert data.facts.train + data.facts.evaluation == 19
    with pytest.raises(BadRows, match=r"1 × the answer is already in the instruction or history \(first: row 7\)"):
        prepared(rows, max_bad_fraction=0.01)


def test_short_answers_count_where_most_rows_hold_theirs(prepared):
    findings = ("nodule", "left effusion", "mass", "edema")
    rows = [{"caption": findings[n % 4], "history": f"Known {findings[n % 4]}."} for n in range(20)]
    with pytest.raises(BadRows, match=r"20 of 20 rows are bad.*the answer is already in the instruction"):
        prepared(rows, instruction="Look. {history}")
    assert prepared(rows, instruction="Look.").quarantined == []


def test_an_answer_that_the_task_names_is_not_given_away(prepared):
    task = "Describe the film. If nothing is wrong, write: No acute cardiopulmonary abnormality."
    rows = [
        {"caption": "No acute cardiopulmonary abnormality." if n % 3 else f"Nodule {n}.", "ask": task}
        for n in range(20)
    ]
    assert prepared(rows, instruction_column="ask").quarantined == []
    assert prepared(rows, instruction=task).quarantined == []


def test_a_list_of_classes_gives_no_answer_away(prepared):
    rows = [{"caption": ("normal", "pneumonia", "edema")[n % 3]} for n in range(12)]
    assert prepared(rows, instruction="Name the class: normal, pneumonia, edema.").quarantined == []


@pytest.mark.parametrize(
    "fields",
    [
        {"instruction": "Look. {caption}"},
        {"instruction": "{findings} {side}", "answer": "{side}: {findings}"},
        {"instruction_column": "caption"},
    ],
)
def test_a_spec_that_puts_the_answer_into_the_prompt_is_refused(tree: dict[str, Any], fields: dict[str, str]):
    tree["dataset"] |= fields
    with pytest.raises(SpecError, match=r"dataset: instruction(_column| has).*also the text to learn"):
        validate(tree)


def test_a_column_of_both_may_be_part_of_the_answer(tree: dict[str, Any]):
    tree["dataset"] |= {"instruction": "This is a {modality}.", "answer": "{modality}: {findings}"}
    validate(tree)
