"""Converts one row of a table into a conversation and its images, or raises the reason why not.

Supported are columns with an instruction and an answer (or templates over columns); OpenAI's `messages`, whose content is text or
parts; and ShareGPT's and LLaVA's `conversations` with `from` and `value`. `<image>` in a user turn marks an image's place.
"""

from __future__ import annotations

import math
from numbers import Number
from typing import Any, NamedTuple

from job.config.schema import FIELD, DatasetSpec
from job.data.cells import HALF, as_text, fill, from_json, images_of
from job.data.pixels import BadRow
from job.data.reading import SYSTEM, Reading
from job.data.stacks import MEDGEMMA

MARK = "<image>"
MOST_CHARACTERS = 1_000_000
"""Limit for one text: more than any model reads, and seconds of work for some tokenizers."""
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "developer": "system"}
KINDS = {list: "a list", dict: "a mapping", bytes: "bytes"}
TEXTS = ("text", "input_text", "output_text")
PICTURES = ("image", "image_url", "input_image")
BEFORE, AFTER = "_before", "_after"
"""Keys of words beside the path of an image, which the model reads before and after the image."""
SLICE = "SLICE {}"
"""What MedGemma's notebook puts after each slice (see `windows.MEDGEMMA`)."""

Message = dict[str, Any]


class Sample(NamedTuple):
    """A conversation. `messages` has the form that every processor's chat template accepts; `images` holds values for
    `job.data.images`, one per image part, in order; `weight` multiplies the row's loss."""

    messages: list[Message]
    images: list[Any]
    weight: float


def read_sample(row: dict[str, Any], spec: DatasetSpec, reading: Reading) -> Sample:
    """Raises BadRow."""
    images = [image for name in reading.images for image in images_of(row, name)]
    if reading.messages is not None:
        own = row.get(SYSTEM)  # stored beside the conversation, as ShareGPT's tools do
        system = own if isinstance(own, str) and own.strip() else spec.system_prompt
        turns = _conversation(row.get(reading.messages), system)
    else:
        columns = [part for name in reading.images for part in FIELD.findall(name) or [name]]
        if columns and not images and not any(row.get(name) in ([], "[]") for name in columns):
            raise BadRow(str(row.get("_why") or "no image"))  # see `tables.WHY`
        turns = conversation(_instruction(row, spec), _answer(row, spec, reading.answer), spec.system_prompt, images=0)
    messages, placed = _place(turns, images)
    return Sample(_with_words(messages, placed), placed, _weight(row, spec.weight_column))


def conversation(instruction: str, answer: str, system_prompt: str | None, images: int = 1) -> list[Message]:
    """Builds one question and its answer, images first."""
    system = [{"role": "system", "content": [_text(system_prompt)]}] if system_prompt else []
    user = {"role": "user", "content": [*({"type": "image"} for _ in range(images)), _text(instruction)]}
    return [*system, user, {"role": "assistant", "content": [_text(answer)]}]


def last_answer(messages: list[Message]) -> str:
    return "".join(part["text"] for part in messages[-1]["content"])


def prompt_text(messages: list[Message]) -> str:
    """Returns the texts of user and system turns."""
    said = [message for message in messages if message["role"] != "assistant"]
    return "\n".join(part["text"] for message in said for part in message["content"] if not _is_image(part))


def repeat_images(messages: list[Message], counts: list[int], frames: Any = None) -> list[Message]:
    """Repeats image part number i `counts[i]` times, because a file of several frames may yield several images. They are numbered
    if `frames`, that of `dataset.dicom`, says so."""
    left = iter(counts)

    def repeated(part: Message) -> list[Message]:
        if not _is_image(part) or (count := next(left)) == 1:
            return [part]
        if frames != MEDGEMMA:
            return [part] * count
        return [each for n in range(count) for each in (part, _text(SLICE.format(n + 1)))]

    return [
        message | {"content": [each for part in message["content"] for each in repeated(part)]} for message in messages
    ]


def _with_words(messages: list[Message], images: list[Any]) -> list[Message]:
    """Puts the words that `dicom_studies` has for an image before and after it."""
    left = iter([value if isinstance(value, dict) else {} for value in images])

    def worded(part: Message) -> list[Message]:
        value = next(left) if _is_image(part) else {}
        before, after = ([_text(value[place])] if value.get(place) else [] for place in (BEFORE, AFTER))
        return [*before, part, *after]

    return [
        message | {"content": [each for part in message["content"] for each in worded(part)]} for message in messages
    ]


def fixed(spec: DatasetSpec) -> bool:
    """Whether every row has the same instruction."""
    return spec.instruction_column is None and not FIELD.search(spec.instruction)


def _instruction(row: dict[str, Any], spec: DatasetSpec) -> str:
    if spec.instruction_column is None:
        return fill(spec.instruction, row)
    return _said(row, spec.instruction_column)


def _answer(row: dict[str, Any], spec: DatasetSpec, column: str) -> str:
    if spec.answer is None:
        return _said(row, column)
    if not any(as_text(row.get(name)) for name in FIELD.findall(spec.answer)):
        raise BadRow("every field of dataset.answer is empty")
    return fill(spec.answer, row)


def _said(row: dict[str, Any], column: str) -> str:
    value = row.get(column)
    if not (value if isinstance(value, list | dict | bytes) else as_text(value)):
        raise BadRow(f"no {column}")
    if not isinstance(value, str | Number):
        kind = next((name for one, name in KINDS.items() if isinstance(value, one)), "a date or time")
        cure = "; a template (dataset.answer) would write it as text" if kind not in ("a mapping", "bytes") else ""
        raise BadRow(f"{column} is not text but {kind}{cure}")
    return str(value).strip()


def _weight(row: dict[str, Any], column: str | None) -> float:
    if column is None:
        return 1.0
    try:
        weight = float(row[column])
    except (KeyError, TypeError, ValueError):
        weight = math.nan
    if not (math.isfinite(weight) and weight >= 0):
        raise BadRow(f"{column} is not a number of at least 0")
    return weight


def _conversation(value: Any, system_prompt: str | None) -> list[Message]:
    """Converts the turns of a row to our format; image parts keep their value under `image`. Raises BadRow."""
    turns = from_json(value) if isinstance(value, str) else value
    if not isinstance(turns, list) or not turns:
        raise BadRow("no conversation")
    messages = [_turn(turn) for turn in turns]
    if messages[0]["role"] != "system" and system_prompt:
        messages.insert(0, {"role": "system", "content": [_text(system_prompt)]})
    spoken = [message["role"] for message in messages if message is not messages[0] or message["role"] != "system"]
    if not spoken or spoken != ["user", "assistant"] * (len(spoken) // 2):
        raise BadRow("turns do not alternate between user and assistant")
    for message in messages:
        if not any(_is_image(part) or part["text"].strip() for part in message["content"]):
            raise BadRow(f"an empty turn of the {message['role']}")
    return messages


def _turn(turn: Any) -> Message:
    if not isinstance(turn, dict):
        raise BadRow("a turn that is not a mapping")
    said = turn.get("role") or turn.get("from")
    role = ROLES.get(str(said), said)
    if role not in ("system", "user", "assistant"):
        raise BadRow("a turn with an unknown role")
    content = turn.get("content") if turn.get("content") is not None else turn.get("value")
    content = as_text(content) if isinstance(content, Number) else content
    if not isinstance(content, str | list):
        raise BadRow("a turn without content")
    parts = [_text(content)] if isinstance(content, str) else [_part(part) for part in content]
    if role != "user":  # no blanks around learned text
        parts = [part if _is_image(part) else _text(part["text"].strip()) for part in parts]
    return {"role": role, "content": parts}


def _part(part: Any) -> Message:
    kind = part.get("type") if isinstance(part, dict) else "text"
    if kind in TEXTS:
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str):
            raise BadRow("a part without text")
        return _text(text)
    if kind in PICTURES:
        value = next((part[name] for name in (str(kind), "image_url", "url", "path") if part.get(name)), None)
        value = value["url"] if isinstance(value, dict) and "url" in value else value
        return {"type": "image"} if value is None else {"type": "image", "image": value}
    raise BadRow("a part with an unknown type")


def _place(messages: list[Message], images: list[Any]) -> tuple[list[Message], list[Any]]:
    """Places every image and returns the values in that order. Images that no turn asks for go before the first user text."""
    cut = [message | {"content": _cut(message)} for message in messages]
    if images and all("image" in part for message in cut for part in message["content"] if _is_image(part)):
        first = next(message for message in cut if message["role"] == "user")
        first["content"][:0] = [{"type": "image"} for _ in images]
    parts = [part for message in cut for part in message["content"] if _is_image(part)]
    asked = sum("image" not in part for part in parts)
    if asked != len(images):
        raise BadRow(f"{asked} image places for {len(images)} images")
    left = iter(images)
    ordered = [part.pop("image") if "image" in part else next(left) for part in parts]
    return cut, ordered


def _cut(message: Message) -> list[Message]:
    """Returns the parts of a turn, with user text split at each `<image>`."""
    pieces = list[Message]()
    for part in message["content"]:
        if message["role"] != "user" and (_is_image(part) or MARK in part["text"]):
            raise BadRow("an image in a turn that is not the user's")
        if _is_image(part) or MARK not in part["text"]:
            pieces.append(dict(part))
            continue
        for number, text in enumerate(part["text"].split(MARK)):
            pieces += [{"type": "image"}] if number else []
            pieces += [_text(text.strip("\n"))] if text.strip() else []
    return pieces


def _is_image(part: Message) -> bool:
    return bool(part["type"] == "image")


def _text(text: str) -> Message:
    if len(text) > MOST_CHARACTERS:
        raise BadRow(f"a text of more than {MOST_CHARACTERS:,} characters")
    if HALF.search(text):
        raise BadRow("a text with half a character (a lone surrogate)")
    return {"type": "text", "text": text}
