"""Converts one row of a table into a conversation and its images, or raises the reason why not.

Supported are columns with an instruction and an answer (or templates over columns); OpenAI's `messages`, whose content is text or
parts; and ShareGPT's and LLaVA's `conversations` with `from` and `value`. `<image>` in a user turn marks an image's place.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Number
from types import MappingProxyType
from typing import Any, NamedTuple

from job.config.schema import FIELD, DatasetSpec, LabelSpec, uncertain_key
from job.data.pixels import BadRow
from job.data.stacks import MEDGEMMA
from job.errors import DataError

MARK = "<image>"
SPLIT = ("split", "data_split", "dataset_split", "partition", "subset", "fold")
"""Names, in any case, of columns that say which split a row belongs to."""
SYSTEM = "system"
"""The column beside a conversation that holds its system turn."""
HALF = re.compile("[\\ud800-\\udfff]")
"""Half a character, such as an emoji cut in two: JSON can hold it, but no tokenizer accepts it."""
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


@dataclass(frozen=True)
class Reading:
    """Which columns mean what: either `messages`, or instruction and answer as in the spec. `used` holds all columns that make up
    a row; `split` is a column that names a row's split."""

    images: tuple[str, ...]
    answer: str
    messages: str | None = None
    used: frozenset[str] = frozenset()
    split: str | None = None


def choose_columns(
    columns: Iterable[str],
    spec: DatasetSpec,
    field: str = "dataset.path",
    also: Mapping[str, str] = MappingProxyType({}),
) -> Reading:
    """Decides what the columns of the source named by `field` mean. Columns named in the spec must exist, and so must those in
    `also` (keyed by the field that needs them); a missing default falls back to other common names. Raises DataError with all
    that is missing."""
    present, given = set(columns), spec.model_fields_set
    messages = spec.messages_column
    if messages is None and not {"answer", "answer_column"} & given:
        messages = next((name for name in ("messages", "conversations") if name in present), None)
    names = [spec.image_column] if isinstance(spec.image_column, str) else list(spec.image_column or [])
    if "image_column" not in given:
        usual = [*names, "file_name", "file_names", "images", "jpg", "png", "jpeg", "webp"]
        names = [next((name for name in usual if name in present), "" if messages else names[0])]
    answer = spec.answer_column
    if "answer_column" not in given and answer not in present:
        answer = next((name for name in ("text", "txt") if name in present), answer)
    fields = ("group_column", "stratify_column", "weight_column", "messages_column")
    wanted: dict[str, str | None] = {f"dataset.{name} is {getattr(spec, name)}": getattr(spec, name) for name in fields}
    for name in filter(None, names):
        wanted |= {f"dataset.image_column is {name}": name for _ in range(not FIELD.search(name))}
        wanted |= {f"dataset.image_column has {{{part}}}": part for part in FIELD.findall(name)}
    if messages is None:
        wanted |= {f"dataset.instruction_column is {spec.instruction_column}": spec.instruction_column}
        wanted |= {f"dataset.instruction has {{{name}}}": name for name in FIELD.findall(spec.instruction)}
        wanted |= {f"dataset.answer has {{{name}}}": name for name in FIELD.findall(spec.answer or "")}
        wanted |= {} if spec.answer else {f"dataset.answer_column is {answer}": answer}
    wanted |= also
    missing = [where for where, column in wanted.items() if column is not None and column not in present]
    if missing:
        raise DataError(f"{'; '.join(missing)}: no such column; {field} has {', '.join(sorted(present))}")
    used = {column for column in wanted.values() if column} | {
        messages or answer if spec.answer is None or messages else ""
    }
    used |= {SYSTEM} & present if messages else set()
    split = next((name for name in sorted(present) if name.lower() in SPLIT), None)
    return Reading(tuple(name for name in names if name), answer, messages, frozenset(used - {""}), split)


def answer_columns(spec: DatasetSpec) -> list[str]:
    """Returns the columns that may hold what is learned, in the order in which they are tried."""
    if spec.messages_column:
        return [spec.messages_column]
    given = {"answer", "answer_column"} & spec.model_fields_set
    own = FIELD.findall(spec.answer) if spec.answer else [spec.answer_column]
    return own if given else ["messages", "conversations", *own, "text", "txt"]


def choose_alike(
    tables: Mapping[str, Iterable[str]], spec: DatasetSpec, field: str, also: Mapping[str, str] = MappingProxyType({})
) -> Reading:
    """Decides what the columns of tables to be concatenated mean. Raises DataError if the tables differ in a column in use."""
    reading = choose_columns((name for columns in tables.values() for name in columns), spec, field, also)
    without = {table: sorted(reading.used - set(columns)) for table, columns in tables.items()}
    for table, missing in without.items():
        if missing:
            other = next(each for each, lacks in without.items() if missing[0] not in lacks)
            shared = [name for name in tables[table] if name in tables[other]]
            cure = (
                f"join them by a column that both have ({', '.join(shared)}): dataset.join" if shared else "merge them"
            )
            raise DataError(
                f"{field}: {table} ({', '.join(tables[table])}) and {other} ({', '.join(tables[other])}) have different columns, "
                f"and {table} has no {', '.join(missing)}; name one table in {field}, or {cure}"
            )
    return reading


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


def as_text(value: Any) -> str:
    """Returns a column's value as text without surrounding blanks: patient "7 " is "7". List items are joined by commas. NaN,
    which pandas writes for a missing value, becomes empty."""
    if isinstance(value, list):
        return ", ".join(filter(None, map(as_text, value)))
    if value is None or value != value or (isinstance(value, float) and math.isinf(value)):
        return ""
    return HALF.sub("?", str(value).strip())


def several(value: Any, separator: str | None) -> list[str] | None:
    """Returns the values of a cell that may hold several: a list (some tables write it as JSON or as Python does), or text with a
    separator. None if it is neither, or empty text."""
    if isinstance(value, str) and value[:1] == "[":
        read = _from_json(value) or _from_python(value)
        value = read if isinstance(read, list) else value
    if isinstance(value, list):
        return [text for each in value if (text := as_text(each))]
    text = as_text(value)
    return [part for each in text.split(separator) if (part := each.strip())] if separator and text else None


def labels_of(values: Mapping[str, Any], labels: Mapping[str, LabelSpec]) -> dict[str, str | list[str]]:
    """Returns the true labels of a row, by name. Those of which it may have several are lists. Raises BadRow for single text
    beside an `uncertain_column`."""
    found: dict[str, str | list[str]] = {}
    for name, label in labels.items():
        value = values.get(label.column)
        parts = None if label.pattern else several(value, label.separator)
        found[name] = as_text(value) if parts is None else parts
        if parts is None and label.uncertain_column and found[name]:
            raise BadRow(
                f"column {label.column} holds text and no list; say in evaluation.labels.{name}.separator what separates its "
                "values, or remove uncertain_column"
            )
        if parts is not None and label.uncertain_column:
            found[uncertain_key(name)] = several(values.get(label.uncertain_column), label.separator) or []
    return found


def fill(template: str, row: dict[str, Any]) -> str:
    """Fills columns into the template. Omits a line whose fields are all empty in this row: not every patient has a history."""
    lines = []
    for line in template.split("\n"):
        names = FIELD.findall(line)
        values = {name: as_text(row.get(name)) for name in names}
        if not names or any(values.values()):
            filled = FIELD.sub(lambda found, values=values: values[found[1]], line)  # type: ignore[misc]
            lines.append(filled.replace("{{", "{").replace("}}", "}"))
    return "\n".join(lines).strip()


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


def images_of(row: dict[str, Any], column: str) -> list[Any]:
    """Returns the images of a column or, for a template, one for each value of its columns: none if one is empty."""
    names = FIELD.findall(column)
    if not names:
        return _values(row.get(column))
    values = {name: _values(row.get(name)) for name in names}
    count = max(map(len, values.values())) if all(values.values()) else 0
    if count and any(len(each) not in (1, count) for each in values.values()):
        raise BadRow(f"{', '.join(names)} have different numbers of values")
    each = ({name: several[n % len(several)] for name, several in values.items()} for n in range(count))
    return [fill(column, one) for one in each]


def _values(value: Any) -> list[Any]:
    """Returns the images of one column: one, a list (some tables write it as JSON or as Python does), or none."""
    if (
        isinstance(value, str)
        and value[:1] == "["
        and isinstance(several := _from_json(value) or _from_python(value), list)
    ):
        value = several
    if isinstance(value, dict) and value.get("bytes") is None and not value.get("path") and "montage" not in value:
        return []
    if isinstance(value, list):
        return [image for image in value if image is not None]
    return [] if value is None or value == "" else [value]


def _conversation(value: Any, system_prompt: str | None) -> list[Message]:
    """Converts the turns of a row to our format; image parts keep their value under `image`. Raises BadRow."""
    turns = _from_json(value) if isinstance(value, str) else value
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


def _from_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _from_python(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
