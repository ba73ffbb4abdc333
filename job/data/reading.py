"""Decides what the columns of a table mean: which hold images, the answer, a conversation or a split."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from job.config.parsing import nearest
from job.config.schema import FIELD, DatasetSpec
from job.errors import DataError

SPLIT = ("split", "data_split", "dataset_split", "partition", "subset", "fold")
"""Names, in any case, of columns that say which split a row belongs to."""
SYSTEM = "system"
"""The column beside a conversation that holds its system turn."""
CONVERSATIONS = ("messages", "conversations")
"""Usual names of columns with whole conversations."""


@dataclass(frozen=True)
class Reading:
    """Which columns mean what: either `messages`, or instruction and answer as in the spec. `used` holds all columns that make up
    a row; `splits` are columns that name a row's split."""

    images: tuple[str, ...]
    answer: str
    messages: str | None = None
    used: frozenset[str] = frozenset()
    splits: tuple[str, ...] = ()


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
        messages = next((name for name in CONVERSATIONS if name in present), None)
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
    wanted |= {f"dataset.filter has {name}": name for name in spec.filter}
    wanted |= {f"dataset.dropna has {name}": name for name in spec.dropna}
    wanted |= also
    missing = [where for where, column in wanted.items() if column is not None and column not in present]
    if missing:
        said = "; ".join(f"{where}{perhaps(str(wanted[where]), present)}" for where in missing)
        raise DataError(f"{said}: no such column; {field} has {', '.join(sorted(present))}")
    used = {column for column in wanted.values() if column} | {
        messages or answer if spec.answer is None or messages else ""
    }
    used |= {SYSTEM} & present if messages else set()
    splits = sorted(
        (name for name in present if name.lower() in SPLIT), key=lambda name: (SPLIT.index(name.lower()), name)
    )
    return Reading(tuple(name for name in names if name), answer, messages, frozenset(used - {""}), tuple(splits))


def perhaps(name: str, present: Iterable[str]) -> str:
    near = nearest(name, present)
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def answer_columns(spec: DatasetSpec) -> list[str]:
    """Returns the columns that may hold what is learned, in the order in which they are tried."""
    if spec.messages_column:
        return [spec.messages_column]
    given = {"answer", "answer_column"} & spec.model_fields_set
    own = FIELD.findall(spec.answer) if spec.answer else [spec.answer_column]
    return own if given else [*CONVERSATIONS, *own, "text", "txt"]


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
