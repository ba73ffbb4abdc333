"""A base is asked in one way, and stops at one set of tokens, whatever its files say of generation."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import AutoProcessor, GenerationConfig
from transformers.trainer_utils import align_special_tokens

from job.errors import SpecError
from job.evaluate.generate import answer
from job.model.generation import BENDS, greedy, left_out, remarks, stop_tokens
from tests.families import FAMILIES
from tests.tiny import job_spec, load_tiny, row

TOKENS = 48
END_OF_TURN, END_OF_TEXT = 493, 494  # of the demo's tokenizer


@pytest.fixture(scope="module")
def rows(demo: Path) -> list[dict[str, Any]]:
    """Two radiographs, with the question that the demo's base was trained on."""
    names = [json.loads(line)["file_name"] for line in (demo / "data" / "metadata.jsonl").read_text().splitlines()[:2]]
    asked = [row(number, question=job_spec().dataset.instruction) for number in range(2)]
    return [
        each | {"images": [Image.open(demo / "data" / name).convert("RGB")]}
        for each, name in zip(asked, names, strict=True)
    ]


@pytest.fixture(scope="module")
def said(demo: Path, rows: list[dict[str, Any]]) -> list[tuple[str, int]]:
    """What the untouched base says: it stops by itself, at the end of its turn."""
    answers = answer(load_tiny(demo / "base"), rows, TOKENS)
    assert all(3 < length < TOKENS for _, length in answers)
    return answers


@pytest.fixture
def base(demo: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo / "base", tmp_path / "base"))


def rewrite(folder: Path, name: str, **settings: Any) -> None:
    """Set what is given in a JSON file; remove what is None."""
    there = json.loads((folder / name).read_text()) | settings
    (folder / name).write_text(json.dumps({key: value for key, value in there.items() if value is not None}))


def unmark(folder: Path) -> None:
    """The end of a turn becomes an added token that is not special, as many fine-tuned tokenizers have it."""
    rewrite(folder, "tokenizer_config.json", eos_token="<|endoftext|>", extra_special_tokens=["<|endoftext|>"])
    tree = json.loads((folder / "tokenizer.json").read_text())
    for token in tree["added_tokens"]:
        token["special"] = token["special"] and token["content"] != "<|im_end|>"
    (folder / "tokenizer.json").write_text(json.dumps(tree))


def nameless(folder: Path) -> None:
    tree = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(tree | {"eos_token": None, "pad_token": None}))


GENERATION, TOKENIZER = "generation_config.json", "tokenizer_config.json"
DISAGREE: dict[str, Callable[[Path], Any]] = {
    "generation config stops at the end of text": lambda base: rewrite(base, GENERATION, eos_token_id=[END_OF_TEXT]),
    "generation config names one token": lambda base: rewrite(base, GENERATION, eos_token_id=END_OF_TEXT),
    "generation config names none": lambda base: rewrite(base, GENERATION, eos_token_id=None),
    "generation config names what is no token": lambda base: rewrite(base, GENERATION, eos_token_id=[-1]),
    "no generation config, another end in config": lambda base: (
        (base / GENERATION).unlink(),
        rewrite(base, "config.json", eos_token_id=END_OF_TEXT),
    ),
    "tokenizer and generation config say the end of text": lambda base: (
        rewrite(base, TOKENIZER, eos_token="<|endoftext|>"),
        rewrite(base, GENERATION, eos_token_id=END_OF_TEXT),
    ),
    "tokenizer has neither an end nor padding": lambda base: (
        nameless(base),
        rewrite(base, GENERATION, eos_token_id=END_OF_TEXT),
    ),
    "no special token, and all say the end of text": lambda base: (
        unmark(base),
        rewrite(base, GENERATION, eos_token_id=END_OF_TEXT),
    ),
}


@pytest.mark.parametrize("what", DISAGREE)
def test_the_end_of_the_templates_turn_ends_an_answer(
    base: Path, rows: list[dict[str, Any]], said: list[tuple[str, int]], what: str
) -> None:
    DISAGREE[what](base)
    loaded = load_tiny(base)
    assert answer(loaded, rows, TOKENS) == said
    stops = stop_tokens(loaded.processor, base)
    assert stops[0] == END_OF_TURN
    align_special_tokens(loaded.model, loaded.processor)  # what every trainer does to a model
    assert set(loaded.model.generation_config.eos_token_id) == set(stops)
    assert answer(loaded, rows, TOKENS) == said


def test_what_the_base_stops_at_besides_is_kept(
    base: Path, rows: list[dict[str, Any]], said: list[tuple[str, int]]
) -> None:
    """The second token of an answer, here: its publisher knows why."""
    tokenizer = AutoProcessor.from_pretrained(base).tokenizer
    _, second, *_ = tokenizer(said[0][0])["input_ids"]
    rewrite(base, GENERATION, eos_token_id=[END_OF_TURN, second])
    loaded = load_tiny(base)
    assert stop_tokens(loaded.processor, base) == [END_OF_TURN, second]
    assert [length for _, length in answer(loaded, rows[:1], TOKENS)] == [2]


BENT: dict[str, Any] = {
    "repetition_penalty": 3.0,
    "encoder_repetition_penalty": 0.1,
    "no_repeat_ngram_size": 1,
    "suppress_tokens": [END_OF_TURN],
    "begin_suppress_tokens": list(range(480)),
    "bad_words_ids": [[number] for number in range(200, 480)],
    "exponential_decay_length_penalty": [2, 9.0],
    "sequence_bias": [[[100], 90.0]],
    "min_length": 1000,
    "min_new_tokens": 40,
    "penalty_alpha": 0.6,
    "num_beams": 3,
    "guidance_scale": 4.0,
    "stop_strings": ["e"],
    "token_healing": True,
    "watermarking_config": {"greenlist_ratio": 0.1, "bias": 90.0},
    "dola_layers": "high",
}


@pytest.mark.parametrize("setting", BENT)
def test_no_setting_of_a_base_bends_an_answer(
    base: Path, rows: list[dict[str, Any]], said: list[tuple[str, int]], setting: str
) -> None:
    rewrite(base, GENERATION, **{setting: BENT[setting]})
    assert answer(load_tiny(base), rows, TOKENS) == said
    assert left_out(base) == {setting: BENT[setting]}


def test_settings_that_stand_in_config_bend_no_answer(
    base: Path, rows: list[dict[str, Any]], said: list[tuple[str, int]]
) -> None:
    (base / GENERATION).unlink()
    rewrite(base, "config.json", no_repeat_ngram_size=1, repetition_penalty=3.0)
    assert answer(load_tiny(base), rows, TOKENS) == said
    assert left_out(base) == {"no_repeat_ngram_size": 1, "repetition_penalty": 3.0}


def test_the_base_is_told_by_name_what_is_left_out(base: Path) -> None:
    processor = AutoProcessor.from_pretrained(base)
    assert remarks(processor, base) == []
    rewrite(base, GENERATION, repetition_penalty=1.05, min_length=0, num_beams=1, eos_token_id=END_OF_TEXT)
    first, second = remarks(processor, base)
    assert "sets repetition_penalty, but the job, merged/ and adapter/ generate greedily" in first
    assert "ends a turn with <|im_end|>, at which the base model's generation_config.json does not stop" in second


def test_what_is_published_says_the_same(base: Path, tmp_path: Path) -> None:
    rewrite(base, GENERATION, repetition_penalty=1.05, eos_token_id=END_OF_TEXT, temperature=0.6, do_sample=True)
    processor = AutoProcessor.from_pretrained(base)
    greedy(processor, base).save_pretrained(tmp_path)
    read = GenerationConfig.from_pretrained(tmp_path)
    assert read.eos_token_id == [END_OF_TURN, END_OF_TEXT]
    assert (read.do_sample, read.pad_token_id, read.repetition_penalty, read.temperature) == (False, 494, None, None)


def test_every_setting_that_makes_a_logits_processor_is_known() -> None:
    """A newer transformers may bring another: it is to be switched off here, or shown to leave greedy answers alone."""
    harmless = {
        *(
            "max_length",
            "max_new_tokens",
            "early_stopping",
            "do_sample",
            "use_cache",
            "use_mtp",
            "cache_implementation",
        ),
        *("cache_config", "max_cache_len", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p"),
        *("epsilon_cutoff", "eta_cutoff", "length_penalty", "renormalize_logits", "remove_invalid_values"),
        *("num_return_sequences", "output_attentions", "output_hidden_states", "output_scores", "output_logits"),
        *("return_dict_in_generate", "pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"),
        *("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
        *("prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind"),
        *("target_lookbehind", "assistant_ensemble_weight", "speculation_type", "compile_config", "disable_compile"),
        *("continuous_batching_config", "low_memory", "diversity_penalty", "num_beam_groups", "prefill_chunk_size"),
        "transformers_version",
    }
    assert {name for name in vars(GenerationConfig()) if name[0] != "_"} <= harmless | BENDS.keys()


def test_every_family_stops_where_its_template_ends_a_turn(family: str, folder: Path) -> None:
    processor = AutoProcessor.from_pretrained(folder)
    assert stop_tokens(processor, folder)[0] == processor.tokenizer.convert_tokens_to_ids(FAMILIES[family].end)


def test_a_template_that_writes_answers_in_its_own_way_does_not_stop_them_at_their_beginning(base: Path) -> None:
    template = base / "chat_template.jinja"
    template.write_text(template.read_text().replace("part.text", "part.text | upper"))
    assert stop_tokens(AutoProcessor.from_pretrained(base), base)[0] == END_OF_TURN


def test_a_base_without_any_end_is_refused(base: Path) -> None:
    rewrite(base, GENERATION, eos_token_id=[])
    (base / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content[-1].text }}\n{% endfor %}"
    )
    processor = AutoProcessor.from_pretrained(base)
    assert stop_tokens(processor, base) == [END_OF_TURN]
    processor.tokenizer.eos_token = None
    with pytest.raises(SpecError, match="has no token that ends an answer"):
        stop_tokens(processor, base)
