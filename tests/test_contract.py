"""Families beside those that all tests take: whole from spec to RESULT.json, or refused in one sentence by `check` and `run`."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from job.data.images import Bounds
from job.model.base_model import base_facts
from job.model.collator import IGNORE, Collator, replacement
from job.model.families import family_of
from job.model.image_layout import Uncuttable, cut
from job.model.lora_targets import CONNECTOR, GROUPS, left_alone, parameters, targets
from job.model.token_length import TokenCounter
from job.model.transformers_backend import load_processor
from job.train.loss import token_loss
from tests.conftest import ROOT, Job
from tests.families import FAMILIES as KNOWN
from tests.family_proof import adapted, logits_agree, make_base, make_rows, spec_of
from tests.other_families import OTHERS
from tests.tiny import job_spec, load_tiny, picture, row

# InternVL's and GLM's processors hand tensors to NumPy 2, which torch serves by its older protocol.
pytestmark = pytest.mark.filterwarnings("ignore:.*__array:DeprecationWarning")
WHOLE = [family for family, other in OTHERS.items() if not other.refused]
REFUSED = [family for family, other in OTHERS.items() if other.refused]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_rows(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("base", WHOLE, indirect=True)
def test_a_family_goes_whole_from_spec_to_result(base: Path, rows: Path, job: Job, tmp_path: Path) -> None:
    goes_whole(job, base, tmp_path / "output", spec_of(base, rows, tmp_path / "output"))


@pytest.mark.parametrize("base", ["qwen3_vl", "internvl", "gemma4", "llama4"], indirect=True)
def test_a_connector_goes_whole_from_spec_to_result(base: Path, rows: Path, job: Job, tmp_path: Path) -> None:
    spec = spec_of(base, rows, tmp_path / "output", finetune_connector=True, finetune_vision_layers=False)
    assert "connector" in goes_whole(job, base, tmp_path / "output", spec)


def goes_whole(job: Job, base: Path, output: Path, tree: dict[str, Any]) -> set[str]:
    """Returns the groups that the adapter holds."""
    spec = yaml.safe_dump(tree)
    checked, ran = job("check", JOB_SPEC=spec), job("run", JOB_SPEC=spec)
    assert (checked.returncode, ran.returncode) == (0, 0), checked.stderr + ran.stderr
    assert (output / "RESULT.json").exists()
    lines = re.findall(r"^  ((?:vision|language)/\w+|connector) +([\d,]+)$", checked.stdout, re.MULTILINE)
    assert {group: int(count.replace(",", "")) for group, count in lines} == adapted(output / "adapter")
    logits_agree(base, output)
    return {group for group, _ in lines}


@pytest.mark.parametrize("base", WHOLE, indirect=True)
def test_the_loss_is_taken_over_the_answer_alone_and_images_keep_their_detail(base: Path) -> None:
    processor = load_processor(job_spec().model, base)
    batch = Collator(processor, 2048)([row(1, "No."), row(2, "The lungs are clear.", shape=(150, 70))])
    for labels, answer in zip(batch["labels"], ("No.", "The lungs are clear."), strict=True):
        said = processor.tokenizer.decode(labels[labels != IGNORE], skip_special_tokens=True)
        assert said.strip() == answer
    learned = Collator(processor, 2048, responses_only=False)([row(1)])["labels"]
    ids = processor.tokenizer(replacement(processor, row(1)["images"][0]), add_special_tokens=False)["input_ids"]
    of_image = {token for token in ids if token in processor.tokenizer.added_tokens_decoder}
    assert not of_image & {*learned.flatten().tolist()}
    bounds = Bounds(**TokenCounter(processor).room(10**6))
    for size in ((900, 900), (300, 1200), (2500, 1100)):
        image = Image.new("RGB", size)
        small = image.resize(bounds.size(*size, 1))
        assert replacement(processor, small) == replacement(processor, image), (size, small.size)


@torch.no_grad()
@pytest.mark.parametrize("base", WHOLE, indirect=True)
def test_rows_of_any_number_of_images_learn_together_as_they_do_alone(base: Path) -> None:
    loaded = load_tiny(base)
    collator, counter = Collator(loaded.processor, 4096), TokenCounter(loaded.processor)
    rows = [with_images(row(1), 0), with_images(row(2, "No.", "What is it?"), 2), row(3, shape=(150, 70))]
    together = collator(rows)
    counted = [counter(each["messages"], [image.size for image in each["images"]]).whole for each in rows]
    assert counted == together["attention_mask"].sum(dim=1).tolist()
    alone = sum(float(token_loss(loaded.model, collator([each]), 1.0)) for each in rows)
    assert float(token_loss(loaded.model, together, 1.0)) == pytest.approx(alone, rel=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("counts", [[1, 1, 1, 1], [0, 2, 1, 3]], ids=["one image each", "any number of images"])
@pytest.mark.parametrize("base", WHOLE, indirect=True)
def test_a_micro_batch_of_any_family_is_cut_into_its_rows(base: Path, counts: list[int]) -> None:
    """As a step that ran out of memory does. The parts have the loss of the whole."""
    loaded = load_tiny(base)
    config = loaded.model.config
    batch = Collator(loaded.processor, 4096)(
        [with_images(row(n, "No. " * n), each) for n, each in enumerate(counts, 1)]
    )
    layout = family_of(config.model_type).layout
    parts = [cut(batch, layout, counts, rows, config.image_token_id) for rows in (range(1), [1], [3, 2])]
    assert [len(part["input_ids"]) for part in parts] == [1, 1, 2]
    parted = sum(float(token_loss(loaded.model, part, 1.0)) for part in parts)
    assert parted == pytest.approx(float(token_loss(loaded.model, batch, 1.0)), rel=1e-5)


def test_what_may_be_cut_in_two_ways_is_not_cut() -> None:
    """Four rows with four images, but not one each: the axis may be that of the rows or that of the images."""
    batch = {"input_ids": torch.zeros(4, 9, dtype=torch.int64), "pixel_values": torch.zeros(4, 3, 8, 8)}
    with pytest.raises(Uncuttable, match="pixel_values"):
        cut(batch, None, [0, 2, 1, 1], [1], 7)
    assert len(cut(batch, "list", [0, 2, 1, 1], [1], 7)["pixel_values"]) == 2


def with_images(row: dict[str, Any], images: int) -> dict[str, Any]:
    question, answer = row["messages"]
    text = [part for part in question["content"] if part["type"] == "text"]
    asked = question | {"content": [{"type": "image"}] * images + text}
    return row | {"messages": [asked, answer], "images": [picture(number, 80, 60) for number in range(images)]}


@pytest.mark.parametrize("base", REFUSED, indirect=True)
def test_a_family_that_cannot_work_is_refused_in_one_sentence(
    base: Path, rows: Path, job: Job, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    spec = yaml.safe_dump(spec_of(base, rows, tmp_path / "output"))
    family = request.node.callspec.params["base"]
    for ended in (job("check", JOB_SPEC=spec), job("run", JOB_SPEC=spec)):
        assert ended.returncode == 78, ended.stderr
        last = ended.stderr.strip().splitlines()[-1]
        assert last == f"exit 78: model.name_or_path: {base} {OTHERS[family].refused}"


@pytest.mark.parametrize(
    ("lora", "sentence"),
    [
        ({"finetune_connector": True}, "nothing between vision tower and language model is a linear layer"),
        ({"finetune_expert_modules": True}, "routed experts are fused tensors"),
        ({"target_modules": ["q_proj", "patch_embedding"]}, "names model.vision_tower.embeddings.patch_embedding"),
        ({"target_modules": ["lm_head"]}, "names lm_head, an"),
    ],
    ids=["bare connector", "experts", "convolution", "tied head"],
)
def test_what_lora_does_not_reach_is_refused_in_one_sentence(
    lora: dict[str, Any], sentence: str, tiny: Callable[..., Path], rows: Path, job: Job, tmp_path: Path
) -> None:
    spec = yaml.safe_dump(spec_of(tiny("gemma3"), rows, tmp_path / "output", **lora))
    last = [job(command, JOB_SPEC=spec) for command in ("check", "run")]
    said = {each.stderr.strip().splitlines()[-1] for each in last}
    assert [each.returncode for each in last] == [78, 78]
    assert len(said) == 1
    assert sentence in said.pop()


def table() -> dict[str, list[str]]:
    """Cells of docs/families.md by model_type: state, what LoRA reaches, what it leaves alone, the sentence of a refusal."""
    lines = (ROOT / "docs" / "families.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    return {first.strip("`"): rest for first, *rest in cells}


def test_the_document_names_each_family_and_its_sentence() -> None:
    assert list(table()) == [*KNOWN, *OTHERS]
    for family, (state, _, _, sentence) in table().items():
        refused = OTHERS[family].refused if family in OTHERS else ""
        wanted = "refused" if refused else "contract" if family in OTHERS else "all tests"
        assert (state, sentence) == (wanted, refused), family


@pytest.mark.parametrize("base", WHOLE, indirect=True)
def test_the_document_says_what_lora_reaches(base: Path, request: pytest.FixtureRequest) -> None:
    assert table()[request.node.callspec.params["base"]][1:3] == reached(base)


@pytest.mark.parametrize("known", KNOWN)
def test_the_document_says_what_lora_reaches_of_a_known_family(known: str, tiny: Callable[..., Path]) -> None:
    assert table()[known][1:3] == reached(tiny(known))


def reached(base: Path) -> list[str]:
    facts = base_facts(base)
    chosen = targets(job_spec().lora, facts.linears)
    groups = parameters(1, facts.linears, chosen)
    reached = "all groups" if {*groups} == {*GROUPS} - {CONNECTOR} else ", ".join(sorted(groups))
    return [reached, ", ".join(sorted(left_alone(facts.matrices, chosen)))]
