"""Sets how a model generates while it is measured, and which tokens end its answers.

These settings are the same before and after training, in a resumed attempt and in the published folders, whatever the base's
files and the training libraries put into the model's generation config.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.errors import DataError, SpecError
from job.model.base_model import json_object
from job.model.collator import Messages, finished

if TYPE_CHECKING:
    from transformers import GenerationConfig

FILE = "generation_config.json"
WORD = "radiograph"
"""A sample answer, used to see what the template appends to it."""
BENDS: dict[str, Any] = {
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "constraints": None,
    "dola_layers": None,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1,
    "exponential_decay_length_penalty": None,
    "force_words_ids": None,
    "forced_bos_token_id": None,
    "forced_decoder_ids": None,
    "forced_eos_token_id": None,
    "guidance_scale": 1,
    "max_time": None,
    "min_length": 0,
    "min_new_tokens": 0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "penalty_alpha": 0,
    "repetition_penalty": 1,
    "sequence_bias": None,
    "stop_strings": None,
    "suppress_tokens": None,
    "token_healing": False,
    "watermarking_config": None,
}
"""Settings that change a greedy answer or where it ends, each with its neutral value (null is neutral too)."""


def greedy(processor: Any, base: Path) -> GenerationConfig:
    """Return the generation config of every measurement: greedy decoding until one of the `stop_tokens`. No other setting of
    the folder `base` is used."""
    from transformers import GenerationConfig

    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        use_cache=True,  # trainers disable it in the model's config
        eos_token_id=stop_tokens(processor, base),
        pad_token_id=processor.tokenizer.pad_token_id,
        bos_token_id=processor.tokenizer.bos_token_id,
    )


def stop_tokens(processor: Any, base: Path) -> list[int]:
    """Return the ids of the tokens that end an answer: the template's end of turn, which training teaches, the tokenizer's end
    of text, and those in the base's own files. The template's comes first. Raises SpecError when there is none."""
    found = [_turn_end(processor), processor.tokenizer.eos_token_id, *_named(base)]
    tokens = list(dict.fromkeys(token for token in found if token is not None))
    if not tokens:
        raise SpecError(
            f"model.name_or_path: {base} has no token that ends an answer: its chat template, its tokenizer and its {FILE} name "
            "none; set eos_token in tokenizer_config.json"
        )
    return tokens


def _turn_end(processor: Any) -> int | None:
    """Return the first of the tokenizer's added tokens that the template puts after an answer, else its end of text."""
    known = processor.tokenizer.added_tokens_decoder
    asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}
    said = {"role": "assistant", "content": [{"type": "text", "text": WORD}]}
    system: Messages = [{"role": "system", "content": [{"type": "text", "text": "."}]}]
    for messages in ([asked, said], [*system, asked, said]):  # some templates require a system turn
        with suppress(DataError):
            _, answer, behind = finished(processor, messages).rpartition(WORD)
            behind = behind if answer else ""  # the template rewrote the answer
            ids: list[int] = processor.tokenizer(behind, add_special_tokens=False)["input_ids"]
            return next((token for token in ids if token in known), processor.tokenizer.eos_token_id)
    return None


def _named(base: Path) -> list[int]:
    tokens = _settings(base).get("eos_token_id")
    if tokens is None:
        config = json_object(base / "config.json")
        tokens = config.get("eos_token_id", (config.get("text_config") or {}).get("eos_token_id"))
    tokens = tokens if isinstance(tokens, list) else [tokens]
    return [token for token in tokens if isinstance(token, int) and token >= 0]


def _settings(base: Path) -> dict[str, Any]:
    """Return the generation settings in the base's files; from config.json if there is no separate file, as transformers does."""
    if (base / FILE).is_file():
        return json_object(base / FILE)
    config = json_object(base / "config.json")
    return (config.get("text_config") or {}) | config


def left_out(base: Path) -> dict[str, Any]:
    """Return the base's settings that would change answers and that `greedy` disables."""
    found = _settings(base)
    return {name: found[name] for name, off in BENDS.items() if found.get(name) not in (None, off, [], {})}


def remarks(processor: Any, base: Path) -> list[str]:
    """Return remarks where the base's own files would make it answer or stop differently than when measured."""
    said, names = list[str](), ", ".join(left_out(base))
    if names:
        said.append(
            f"model.name_or_path: the base model's {FILE} sets {names}, but the job, merged/ and adapter/ generate greedily"
        )
    if (first := stop_tokens(processor, base)[0]) not in _named(base):
        token = processor.tokenizer.convert_ids_to_tokens(first)
        said.append(
            f"model.name_or_path: the chat template ends a turn with {token}, at which the base model's {FILE} does not stop, "
            "but the job does, as do merged/ and adapter/"
        )
    return said
