"""Conversations become tensors whose labels are the answers, token for token."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from job.data.conversations import conversation
from job.data.images import Bounds
from job.data.prepare import prepare
from job.errors import DataError
from job.model.collator import (
    IGNORE,
    Collator,
    adds_bos,
    encode,
    finished,
    image_token,
    render,
    replacement,
    tokens,
    without_end,
)
from job.model.families import family_of
from job.model.image_layout import cut
from job.model.image_runs import takes_runs
from job.model.loaded import Loaded
from job.model.patches.image_processors import written_in_place
from job.model.token_length import TokenCounter
from tests.families import FAMILIES, LAID_OUT
from tests.tiny import QUESTION, batch, job_spec, load_tiny, picture, row

PLACEHOLDERS = ["<|image|>", "<|image_pad|>", "<image_soft_token>", "<start_of_image>", "<end_of_image>", "<image>"]
ANSWERS = {
    "plain": "The heart is of normal size.",
    "short": "No.",
    "unicode": "Größe 3 µm – 肺に結節 🫁.",
    "spaces": "  clear  lungs. ",
    "new lines": "\n\nFindings:\n\n- none\n",
    "also in the prompt": QUESTION,
    "says its role": "assistant\nmodel\nASSISTANT: user\nThe heart.",
}


def collate(loaded: Loaded, rows: list[dict[str, Any]], responses_only: bool = True) -> dict[str, torch.Tensor]:
    return Collator(loaded.processor, 2048, responses_only)(rows)


def learnt(loaded: Loaded, labels: torch.Tensor) -> list[str]:
    """What the labels of one row say, a text for each unbroken run of them."""
    runs: list[list[int]] = [[]]
    for label in labels.tolist():
        if label != IGNORE:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [loaded.processor.tokenizer.decode(run) for run in runs if run]


@pytest.mark.parametrize("kind", ANSWERS)
def test_labels_are_the_answer_and_the_end_of_its_turn(family: str, loaded: Loaded, kind: str) -> None:
    (text,) = learnt(loaded, collate(loaded, [row(1, ANSWERS[kind])])["labels"][0])
    answer = ANSWERS[kind]
    if family in (
        "gemma3",
        "llava",
    ):  # Gemma's template trims; LLaVA's puts a space before the answer and one behind it
        text, answer = text.strip(), answer.strip()
    if kind == "new lines":  # those of the header and the answer's first are one token
        text, answer = text.lstrip("\n"), answer.lstrip("\n")
    assert text == answer + FAMILIES[family].end


@pytest.mark.parametrize("kind", ["plain", "short", "unicode", "also in the prompt"])
def test_labels_are_what_stands_between_header_and_end(family: str, loaded: Loaded, kind: str) -> None:
    """A reference made otherwise: by looking for the ids of the answer's header, as Unsloth and TRL do."""
    tokenizer = loaded.processor.tokenizer
    header = tokenizer(FAMILIES[family].header, add_special_tokens=False)["input_ids"]
    if family == "llava":
        header = [tokenizer.convert_tokens_to_ids(FAMILIES[family].header)]
    inputs = collate(loaded, [row(1, ANSWERS[kind]), row(2, ANSWERS["plain"], "?")])
    for ids, labels in zip(inputs["input_ids"].tolist(), inputs["labels"].tolist(), strict=True):
        starts = [at + len(header) for at in range(len(ids)) if ids[at : at + len(header)] == header]
        end = ids.index(tokenizer.convert_tokens_to_ids(FAMILIES[family].end), starts[-1]) + 1
        assert labels == [IGNORE] * starts[-1] + ids[starts[-1] : end] + [IGNORE] * (len(ids) - end)


def test_rows_of_a_batch_have_the_labels_they_have_alone(loaded: Loaded) -> None:
    together = collate(loaded, batch())
    for index, each in enumerate(batch()):
        alone = collate(loaded, [each])
        length = alone["input_ids"].shape[1]
        assert torch.equal(together["input_ids"][index, :length], alone["input_ids"][0])
        assert torch.equal(together["labels"][index, :length], alone["labels"][0])
        assert not together["attention_mask"][index, length:].any()
        assert (together["labels"][index, length:] == IGNORE).all()


@pytest.mark.parametrize("responses_only", [True, False])
def test_no_placeholder_of_an_image_is_learnt(loaded: Loaded, responses_only: bool) -> None:
    labels = collate(loaded, batch(), responses_only)["labels"]
    known = loaded.processor.tokenizer.get_vocab()
    assert not torch.isin(labels, torch.tensor([known[token] for token in PLACEHOLDERS if token in known])).any()
    assert int(labels.max()) < loaded.model.get_output_embeddings().out_features


def test_all_else_is_learnt_when_asked(loaded: Loaded) -> None:
    inputs = collate(loaded, batch(), responses_only=False)
    text = "".join(learnt(loaded, inputs["labels"][0]))
    assert QUESTION in text
    assert "The heart is of normal size." in text
    assert (inputs["labels"][inputs["attention_mask"] == 0] == IGNORE).all()


def test_a_system_prompt_is_read_as_words_and_not_learnt(loaded: Loaded) -> None:
    inputs = collate(loaded, [row(1, system="Be brief.")])
    text = loaded.processor.tokenizer.decode(inputs["input_ids"][0])
    assert "Be brief." in text
    assert "'type'" not in text
    plain = collate(loaded, [row(1)])
    assert learnt(loaded, inputs["labels"][0]) == learnt(loaded, plain["labels"][0])


def test_a_system_prompt_is_not_dated(loaded: Loaded) -> None:
    """Llama 3.2's template would write the date, and a run resumed tomorrow would see other samples."""
    text = render(loaded.processor, row(1, system="Be brief.")["messages"])
    assert "Today Date" not in text or "Today Date: 26 Jul 2024" in text


@pytest.mark.parametrize("family", [name for name in FAMILIES if FAMILIES[name].rewrites], scope="session")
def test_several_answers_are_refused_where_the_template_rewrites_earlier_ones(family: str, tiny: Any) -> None:
    loaded = load_tiny(tiny(family))
    with pytest.raises(DataError, match="rewrites earlier turns, so the answer cannot be told.*its own row"):
        collate(loaded, [dialogue()])


def test_every_answer_of_a_conversation_is_learnt(family: str, loaded: Loaded) -> None:
    one_answer_at_most(family)
    each = row(1, "There is a nodule.")
    each["messages"] += copy.deepcopy(row(1, "There is a nodule.", "Where is it?")["messages"])
    each["messages"][2]["content"].pop(0)
    first, last = (text.strip() for text in learnt(loaded, collate(loaded, [each])["labels"][0]))
    assert first == "There is a nodule." + ("" if family == "llava" else FAMILIES[family].end)
    assert last == "There is a nodule." + FAMILIES[family].end


def test_tokens_are_those_of_the_processors_own_template(family: str, loaded: Loaded) -> None:
    """No second begin-of-text, no other spacing: as served with the model's own template. Pixels are the same bit for bit."""
    each = row(1)
    made = collate(loaded, [each])
    ids = made["input_ids"][0].tolist()
    spoken = copy.deepcopy(each["messages"])
    spoken[0]["content"][0]["image"] = each["images"][0]
    given = loaded.processor.apply_chat_template(spoken, tokenize=True, return_dict=True, return_tensors="pt")
    assert torch.equal(made["pixel_values"], given["pixel_values"])
    reference = given["input_ids"][0].tolist()
    if family == "llava":  # the space that its template leaves becomes the end of text
        assert ids[:-1] == reference[: len(ids) - 1]
    else:
        assert ids == reference
    bos = loaded.processor.tokenizer.bos_token_id
    assert bos is None or ids.count(bos) == 1


def test_a_batch_is_the_processors_own_bit_for_bit(loaded: Loaded) -> None:
    """Also where it is made in another way (image_runs.py, patches/image_processors.py): images of all shapes, one or several of
    them in a row."""
    pair = row(2, "Both are clear.", shape=(300, 40))
    pair["messages"][0]["content"].insert(1, {"type": "image"})
    pair["images"].append(picture(5, 56, 56))
    rows = [row(1, shape=(90, 350)), pair, row(3, "No.", shape=(560, 420))]
    texts, images = [finished(loaded.processor, each["messages"]) for each in rows], [each["images"] for each in rows]
    given = {"padding": True, "add_special_tokens": adds_bos(loaded.processor, texts[0]), "return_tensors": "pt"}
    for side in ("left", "right"):
        own = dict(loaded.processor(text=list(texts), images=images, padding_side=side, **given))
        made = encode(loaded.processor, texts, images, side=side)
        assert made.keys() == own.keys()
        for name, tensor in made.items():
            assert tensor.dtype == own[name].dtype
            assert torch.equal(tensor, own[name]), name


def test_batches_of_these_families_are_made_the_faster_way(family: str, loaded: Loaded) -> None:
    assert takes_runs(loaded.processor) == (family not in ("mllama", "gemma3"))
    own, fast = (type(each.image_processor) for each in (loaded.processor, written_in_place(loaded.processor)))
    assert (fast is not own) == (own.__name__ in ("Qwen2VLImageProcessor", "MllamaImageProcessor"))


def test_a_row_over_max_length_is_named(loaded: Loaded) -> None:
    with pytest.raises(
        DataError, match=r"^row-7: \d+ tokens, over training\.max_length 20; raise it, or shrink images"
    ):
        Collator(loaded.processor, 20)([row(7)])


def dialogue() -> dict[str, Any]:
    """Two images in the first question, an answer, a third image in the second."""
    each = row(1, "There is a nodule.")
    each["messages"][0]["content"].insert(1, {"type": "image"})
    each["messages"] += [*row(2, "It is on the left.", "And here?")["messages"], *row(3, "No.", "Sure?")["messages"]]
    each["messages"][4]["content"].pop(0)
    each["images"] = [picture(1, 60, 90), picture(2, 56, 112), picture(3, 150, 70)]
    return each


def test_answers_are_found_between_images(family: str, loaded: Loaded) -> None:
    one_answer_at_most(family)
    batch = collate(loaded, [row(4), dialogue()])
    said = [text.strip().removesuffix(FAMILIES[family].end).strip() for text in learnt(loaded, batch["labels"][1])]
    assert said == ["There is a nodule.", "It is on the left.", "No."]


def one_answer_at_most(family: str) -> None:
    if FAMILIES[family].rewrites:
        pytest.skip("its template rewrites earlier answers")


def spoken_only(number: int) -> dict[str, Any]:
    each = row(number, "It is a bone of the shoulder.", "What is a clavicle?")
    each["messages"][0]["content"].pop(0)
    return each | {"images": []}


def test_a_row_without_images_learns_its_answer(family: str, loaded: Loaded) -> None:
    (text,) = learnt(loaded, collate(loaded, [spoken_only(1)])["labels"][0])
    assert text.strip() == "It is a bone of the shoulder." + FAMILIES[family].end


def test_rows_without_images_share_a_batch_where_the_family_can(family: str, loaded: Loaded) -> None:
    rows = [row(1), spoken_only(2), *(() if FAMILIES[family].rewrites else [dialogue()])]
    if family == "mllama":
        with pytest.raises(
            DataError, match=r"set training\.per_device_train_batch_size and evaluation\.batch_size to 1"
        ):
            collate(loaded, rows)
        return
    together, alone = collate(loaded, rows), collate(loaded, [spoken_only(2)])
    length = alone["input_ids"].shape[1]
    assert torch.equal(together["labels"][1, :length], alone["labels"][0])
    with torch.inference_mode():
        logits = [loaded.model(**{k: v for k, v in b.items() if k != "labels"}).logits for b in (together, alone)]
    torch.testing.assert_close(logits[0][1, :length], logits[1][0], rtol=1e-3, atol=1e-4)


def test_only_the_last_answer_is_cut_at_max_length(loaded: Loaded) -> None:
    whole = collate(loaded, [row(1)])
    length, (start, *_) = whole["input_ids"].shape[1], (whole["labels"][0] != IGNORE).nonzero()[0].tolist()
    batch = Collator(loaded.processor, length - 3, truncate=True)([row(1), row(2, "No.")])
    assert torch.equal(batch["labels"][0, : length - 3], whole["labels"][0, : length - 3])
    assert {each.shape[1] for name, each in batch.items() if "mask" in name and name != "aspect_ratio_mask"} == {
        length - 3
    }
    with torch.inference_mode():
        assert torch.isfinite(loaded.model(**batch).loss)
    with pytest.raises(DataError, match=r"over training\.max_length"):
        Collator(loaded.processor, start, truncate=True)([row(1)])


def test_a_ruler_counts_what_the_collator_makes(family: str, loaded: Loaded) -> None:
    ruler = TokenCounter(loaded.processor)
    for each in [*batch(), *(() if FAMILIES[family].rewrites else [dialogue()]), spoken_only(1)]:
        made = collate(loaded, [each])
        length = ruler(each["messages"], [image.size for image in each["images"]])
        assert length.whole == made["input_ids"].shape[1]
        last = (made["labels"][0] == IGNORE).nonzero().flatten()
        last = last[last < length.whole - 1]
        assert length.prompt in (int(last[-1]) + 1, int(last[-1]) + 2)


def test_tokens_that_are_known_are_those_that_would_be_made(family: str, loaded: Loaded) -> None:
    """The end of a text is parted from what is stripped of it without making its tokens again."""
    for each in [*batch(), spoken_only(1)]:
        text = finished(loaded.processor, each["messages"])
        whole, stripped = tokens(loaded.processor, text), tokens(loaded.processor, text.rstrip())
        known = without_end(loaded.processor, text, whole)
        assert known == stripped or (known is None and family in ("gemma3", "llava"))


def test_a_ruler_refuses_text_with_a_special_token(loaded: Loaded) -> None:
    with pytest.raises(DataError, match="special token of the model"):
        TokenCounter(loaded.processor)(row(1, f"The {loaded.processor.image_token} is clear.")["messages"], [(80, 60)])


def test_a_template_that_refuses_is_told_in_its_words(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    refusing = "{{ raise_exception('Prompting with images is incompatible with system messages.') }}"
    monkeypatch.setattr(loaded.processor, "chat_template", refusing)
    with pytest.raises(DataError, match="refuses the conversation: Prompting with images is incompatible"):
        collate(loaded, [row(1)])


def test_a_template_that_rewrites_earlier_turns_is_refused(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    counting = "{{ messages | length }}" + loaded.processor.chat_template
    monkeypatch.setattr(loaded.processor, "chat_template", counting)
    with pytest.raises(DataError, match="row-1: the model's chat template rewrites earlier turns"):
        collate(loaded, [row(1)])


THINKING = """
{%- for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == "assistant" and loop.last %}<think>

</think>

{% endif %}
{%- for p in m.content %}{{ p.text if p.type == "text" else "<|vision_start|><|image_pad|><|vision_end|>" }}{% endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
<think>
{% endif %}"""
"""Only the last answer has a place for thoughts, as in the templates of models that think."""


@pytest.mark.parametrize("family", ["qwen2_5_vl"], indirect=True)
def test_rows_whose_answers_the_template_rewrites_are_found_at_the_look(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Before anything is trained, by their row; a row of one turn is good, and so are all where everything is learned."""
    turn = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A lung."}]
    more = [{"from": "human", "value": "Which side?"}, {"from": "gpt", "value": "Left."}]
    picture(1).save(tmp_path / "0.png")
    rows = [{"image": "0.png", "conversations": turn + more * (number in (2, 5))} for number in range(8)]
    (tmp_path / "r.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in rows))
    spec = job_spec(dataset={"path": str(tmp_path / "r.jsonl"), "max_bad_fraction": 0.1})
    assert prepare(spec, tmp_path, TokenCounter(loaded.processor)).quarantined == []
    monkeypatch.setattr(loaded.processor, "chat_template", THINKING)
    with pytest.raises(DataError, match=r"2 of 8 rows are bad.*rewrites earlier turns.*its own.*\(first: row 2\)"):
        prepare(spec, tmp_path, TokenCounter(loaded.processor))
    assert prepare(spec, tmp_path, TokenCounter(loaded.processor, responses_only=False)).quarantined == []


@pytest.mark.parametrize("family", ["qwen2_5_vl"], indirect=True)
def test_an_answer_that_the_template_shortens_later_is_not_half_learned(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    cutting = """{% for m in messages %}<|im_start|>{{ m.role }}
{% set text = m.content | selectattr("type", "eq", "text") | map(attribute="text") | join %}
{{- text if loop.last or m.role != "assistant" else text[:9] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
    monkeypatch.setattr(loaded.processor, "chat_template", cutting)
    said = conversation("What?", "A nodule in the left upper zone.", None, images=0)
    assert TokenCounter(loaded.processor)(said, []).prompt > 0
    with pytest.raises(DataError, match="rewrites earlier turns"):
        TokenCounter(loaded.processor)(said + said, [])


TURN = "{%% for m in messages %%}<|im_start|>{{ m.role }}\n%s<|im_end|>\n{%% endfor %%}"
BLIND = {
    "takes only text, no images": TURN % "{{ m.content }}",
    "has 0 places for 1 images": TURN % '{{ m.content | selectattr("text") | map(attribute="text") | join }}',
    "has 2 places for 1 images": "<|image_pad|>"
    + TURN % '{% for p in m.content %}{{ p.text if "text" in p else "<|image_pad|>" }}{% endfor %}',
}


@pytest.mark.parametrize("family", ["qwen2_5_vl"], indirect=True)
@pytest.mark.parametrize("reason", BLIND)
def test_a_template_that_shows_no_images_is_found_at_the_look(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    prompt = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    monkeypatch.setattr(loaded.processor, "chat_template", BLIND[reason] + prompt)
    with pytest.raises(DataError, match=f"chat template {reason}; name a base"):
        TokenCounter(loaded.processor)(row(1)["messages"], [(80, 60)])


def test_the_loss_is_the_cross_entropy_of_the_labels(loaded: Loaded) -> None:
    inputs = collate(loaded, batch())
    with torch.inference_mode():
        output = loaded.model(**inputs)
    wanted = inputs["labels"][:, 1:]
    by_hand = cross_entropy(output.logits[:, :-1][wanted != IGNORE], wanted[wanted != IGNORE])
    assert torch.isfinite(output.loss)
    torch.testing.assert_close(output.loss, by_hand)


def test_a_ruler_knows_what_a_processor_keeps(family: str, loaded: Loaded) -> None:
    """Shrunk to `row`, a picture takes no more than the tokens that it is for, and not much less."""
    ruler = TokenCounter(loaded.processor)
    room = ruler.room(12)
    assert bool(room["area"]) != bool(room["short"])
    assert bool(room["row"]) == family.startswith("qwen")
    if family == "llava_next":  # its largest grid, and not the one tile that `size` names
        assert room["area"] == 112 * 112
    if room["row"]:
        side = int(room["row"] ** 0.5)
        assert 8 <= ruler(row(1)["messages"], [(side, side)]).images <= 13


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"], indirect=True)
def test_a_processor_with_the_limit_shrinks_to_the_tokens_of_training(loaded: Loaded, monkeypatch: Any) -> None:
    processor = loaded.processor
    monkeypatch.setitem(processor.image_processor.size, "longest_edge", 1 << 20)
    bounds, sizes = Bounds(**TokenCounter(processor).room(60)), random.Random(0)
    shapes = [(sizes.randint(40, 900), sizes.randint(40, 900)) for _ in range(80)]
    seen = [replacement(processor, Image.new("RGB", bounds.size(*shape, 1))) for shape in shapes]
    monkeypatch.setitem(processor.image_processor.size, "longest_edge", bounds.most())
    assert [replacement(processor, Image.new("RGB", shape)) for shape in shapes] == seen
    assert [replacement(processor, Image.new("RGB", bounds.size(*shape, 1))) for shape in shapes] == seen


def test_a_loaders_process_makes_the_same_batches(loaded: Loaded) -> None:
    rows = [*batch(), *batch()]
    loader = DataLoader(rows, batch_size=3, num_workers=1, collate_fn=Collator(loaded.processor, 2048))  # type: ignore[arg-type]
    wanted = collate(loaded, batch())
    made = list(loader)
    assert len(made) == 2
    for each in made:
        assert each.keys() == wanted.keys()
        assert all(torch.equal(each[name], value) for name, value in wanted.items())


# In Llama 3.2, rows with and without pictures do not share a batch.
@pytest.mark.parametrize("family", [family for family in LAID_OUT if family != "mllama"], indirect=True)
def test_a_part_of_a_batch_without_pictures_has_no_empty_tensors(family: str, loaded: Loaded) -> None:
    part = cut(
        collate(loaded, [spoken_only(1), row(2)]), family_of(family).layout, [0, 1], [0], image_token(loaded.processor)
    )
    assert not {"pixel_values", "image_grid_thw"} & part.keys()
    with torch.inference_mode():
        assert torch.isfinite(loaded.model(**part).loss)
