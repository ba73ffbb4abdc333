"""One row → one conversation: columns, templates, OpenAI's messages, ShareGPT's and LLaVA's conversations."""

from __future__ import annotations

from datetime import date
from typing import Any

import pytest

from job.config.schema import DatasetSpec
from job.data.cells import fill
from job.data.conversations import Sample, read_sample, repeat_images
from job.data.pixels import BadRow
from job.data.reading import choose_columns
from job.errors import DataError


def read(row: dict[str, Any], **fields: Any) -> Sample:
    spec = DatasetSpec.model_validate({"path": "d"} | fields)
    return read_sample(row, spec, choose_columns(row, spec))


def short(sample: Sample) -> list[tuple[str, list[str]]]:
    """Roles, and parts as text with ◻ for an image."""
    return [(m["role"], [part.get("text", "◻") for part in m["content"]]) for m in sample.messages]


LLAVA = [{"from": "human", "value": "<image>\nWhat is seen?"}, {"from": "gpt", "value": "A nodule."}]


def test_columns_become_a_question_and_its_answer():
    sample = read({"image": "a.png", "caption": " Clear. "}, instruction="Look.")
    assert short(sample) == [("user", ["◻", "Look."]), ("assistant", ["Clear."])]
    assert (sample.images, sample.weight) == (["a.png"], 1.0)


def test_other_columns_are_put_into_templates():
    row = {"image": "a", "findings": "Clear.", "impression": "Normal.", "history": "Cough", "age": 40}
    spec = {"instruction": "History: {history}, {age}\nDescribe.", "answer": "{findings}\nImpression: {impression}"}
    assert short(read(row, **spec)) == [
        ("user", ["◻", "History: Cough, 40\nDescribe."]),
        ("assistant", ["Clear.\nImpression: Normal."]),
    ]
    without = row | {"history": None, "age": "", "impression": ""}
    assert short(read(without, **spec)) == [("user", ["◻", "Describe."]), ("assistant", ["Clear."])]
    with pytest.raises(BadRow, match=r"every field of dataset\.answer is empty"):
        read(without | {"findings": None}, **spec)


@pytest.mark.parametrize(
    ("value", "kind"), [(["a", "b"], "a list"), ({"a": 1}, "a mapping"), (b"a", "bytes"), (date(2020, 2, 1), "a date")]
)
def test_an_answer_that_is_no_text_is_told_from_one_that_is_not_there(value: Any, kind: str):
    with pytest.raises(BadRow, match=f"^caption is not text but {kind}"):
        read({"image": "a", "caption": value})
    if kind in ("a list", "a date"):
        said = read({"image": "a", "caption": value}, answer="Is {caption}.").messages[-1]["content"]
        assert said[0]["text"] in ("Is a, b.", "Is 2020-02-01.")


def test_braces_that_name_no_column_stay():
    assert fill('Say {{x}} as {"finding": "…"}: {x}', {"x": 1}) == 'Say {x} as {"finding": "…"}: 1'


def test_a_template_with_an_unknown_column_is_refused_before_any_row_is_read():
    with pytest.raises(
        DataError, match=r"dataset\.instruction has \{histroy\}: no such column; dataset.path has caption"
    ):
        read({"image": "a", "caption": "b"}, instruction="{histroy}")


@pytest.mark.parametrize(
    ("named", "says"),
    [
        ({"answer_column": "Findings"}, r"answer_column is Findings \(did you mean findings\?\): no such column"),
        ({"image_column": "imagepath"}, r"image_column is imagepath \(did you mean Image Path\?\)"),
        ({"group_column": "patient_id"}, r"group_column is patient_id \(did you mean PatientID\?\)"),
        ({"answer": "{findigns}"}, r"answer has \{findigns\} \(did you mean findings\?\)"),
        (
            {"stratify_column": "hospital"},
            r"stratify_column is hospital: no such column; dataset\.path has Image Path, Pa",
        ),
    ],
)
def test_a_column_that_is_not_there_is_told_with_the_one_most_like_it(named: dict[str, Any], says: str):
    spec = DatasetSpec.model_validate({"path": "d", "image_column": "Image Path", "answer_column": "findings"} | named)
    with pytest.raises(DataError, match=says):
        choose_columns(["Image Path", "PatientID", "findings"], spec)


def test_several_images_come_from_a_list_or_from_several_columns():
    assert read({"image": ["a", None, "b"], "caption": "c"}).images == ["a", "b"]
    assert read({"image": '["a", "b"]', "caption": "c"}).images == ["a", "b"]
    sample = read({"pa": "a", "lateral": "b", "caption": "c"}, image_column=["pa", "lateral"], instruction="Q")
    assert (sample.images, short(sample)[0]) == (["a", "b"], ("user", ["◻", "◻", "Q"]))


def test_no_images_are_taken_only_where_that_is_said():
    with pytest.raises(BadRow, match="no image"):
        read({"image": None, "caption": "c"})
    assert read({"image": [], "caption": "c"}).images == read({"image": "[]", "caption": "c"}).images == []
    assert short(read({"caption": "c"}, image_column=None, instruction="Q"))[0] == ("user", ["Q"])


def test_llava_conversations_put_images_where_they_are_named():
    sample = read({"image": "a.jpg", "conversations": LLAVA})
    assert short(sample) == [("user", ["◻", "What is seen?"]), ("assistant", ["A nodule."])]
    more = [{"from": "human", "value": "Compare <image> with\n<image>"}, {"from": "gpt", "value": "Grown."}]
    sample = read({"image": ["a", "b", "c"], "conversations": LLAVA + more}, system_prompt="Be brief.")
    assert short(sample)[0] == ("system", ["Be brief."])
    own = read({"image": "a", "conversations": LLAVA, "system": "Be long."}, system_prompt="Be brief.")
    assert short(own)[0] == ("system", ["Be long."])
    assert short(sample)[3] == ("user", ["Compare ", "◻", " with", "◻"])
    assert sample.images == ["a", "b", "c"]


def test_openai_messages_carry_their_own_images():
    parts = [
        {"type": "text", "text": "Compare."},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
        {"type": "image", "image": "b.png", "text": None},
    ]
    row = {"messages": [{"role": "developer", "content": "S"}, {"role": "user", "content": parts}]}
    row["messages"].append({"role": "assistant", "content": [{"type": "text", "text": "Same."}]})
    sample = read(row, system_prompt="not used: the row has its own")
    assert short(sample) == [("system", ["S"]), ("user", ["Compare.", "◻", "◻"]), ("assistant", ["Same."])]
    assert sample.images == ["data:image/png;base64,AAAA", "b.png"]


def test_placeholders_take_images_from_the_images_column():
    turns = [{"role": "user", "content": [{"type": "text", "text": "Q"}, {"type": "image"}]}]
    turns.append({"role": "assistant", "content": "A"})
    sample = read({"messages": turns, "images": ["a"]})
    assert (short(sample)[0], sample.images) == (("user", ["Q", "◻"]), ["a"])
    unnamed = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    assert short(read({"messages": unnamed, "images": ["a"]}))[0] == ("user", ["◻", "Q"])


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([], "no conversation"),
        ("not JSON", "no conversation"),
        ([LLAVA[1]], "turns do not alternate"),
        (LLAVA + LLAVA[:1], "turns do not alternate"),
        ([LLAVA[0], {"from": "tool", "value": "x"}], "unknown role"),
        ([LLAVA[0], {"from": "gpt", "value": "  "}], "an empty turn of the assistant"),
        ([LLAVA[0], {"from": "gpt", "value": "see <image>"}], "not the user's"),
        ([{"from": "human", "value": "<image><image>"}, LLAVA[1]], "2 image places for 1 images"),
        ([{"role": "user", "content": [{"type": "video"}]}, LLAVA[1]], "unknown type"),
        (["a"], "not a mapping"),
    ],
)
def test_a_conversation_that_cannot_be_learned_is_a_bad_row(turns: Any, reason: str):
    with pytest.raises(BadRow, match=reason):
        read({"image": "a", "conversations": turns})


def test_an_answer_column_that_is_named_goes_before_a_conversation():
    row = {"image": "a", "conversations": LLAVA, "caption": "c"}
    assert short(read(row))[-1] == ("assistant", ["A nodule."])
    assert short(read(row, answer_column="caption"))[-1] == ("assistant", ["c"])


@pytest.mark.parametrize("value", [None, "much", -1, float("nan")])
def test_a_weight_that_is_none_is_a_bad_row(value: Any):
    row = {"image": "a", "caption": "c", "w": 2}
    assert read(row, weight_column="w").weight == 2.0
    with pytest.raises(BadRow, match="w is not a number of at least 0"):
        read(row | {"w": value}, weight_column="w")


def test_a_file_of_many_pictures_repeats_its_place():
    sample = read({"image": ["a", "b"], "caption": "c"}, instruction="<image> before <image>")
    messages = repeat_images(sample.messages, [1, 3])
    assert short(sample._replace(messages=messages))[0] == ("user", ["◻", " before ", "◻", "◻", "◻"])
