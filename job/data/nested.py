"""Reads JSON files that are one object with rows in it: `{"images": […]}`, a list for each split, COCO's annotations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from job.data.layouts import of_split, split_of
from job.data.reading import CONVERSATIONS

COCO = ("images", "annotations")
"""The lists of COCO's format: an annotation belongs to the image whose `id` is its `image_id` (cocodataset.org, data format)."""

Row = dict[str, Any]


class Selection(NamedTuple):
    """Which rows of an object are read: those of `split` (with `held_out`, see `layouts.of_split`). An object with one of the
    columns `own` is a row itself."""

    split: str = "train"
    held_out: bool = False
    own: frozenset[str] = frozenset()


class Inside(NamedTuple):
    """Rows of an object, which of its lists they are in words, and whether those are named after the split."""

    rows: list[Row]
    why: str
    of_split: bool = False


def rows_inside(whole: Mapping[str, Any], wanted: Selection) -> Inside | None:
    """Returns the rows in an object; None if it has none, and so is a row itself. Raises ValueError if several lists may be the
    rows, or annotations do not say of which image they are."""
    if wanted.own & whole.keys() or any(name in whole for name in CONVERSATIONS):
        return None
    lists = {name: value for name, value in whole.items() if isinstance(value, list) and _mappings(value)}
    if set(COCO) <= lists.keys():
        return Inside(_annotated(*(lists[name] for name in COCO)), "annotations, each with its image")
    if (chosen := lists_of_split([*lists], wanted)) is not None:
        rest = [name for name in lists if name not in chosen]
        left = f" (not read: {', '.join(rest)})" if rest else ""
        return Inside([row for name in chosen for row in lists[name]], f"{', '.join(chosen)}{left}", True)
    if len(lists) > 1:
        raise ValueError(
            f"it holds several lists, {', '.join(lists)}; write the rows among them as a file of their own"
        )
    return next((Inside(rows, name) for name, rows in lists.items()), None)


def lists_of_split(names: list[str], wanted: Selection) -> list[str] | None:
    """Returns the lists, or sheets, that hold the split; None if none is named after a split. Raises ValueError if only others
    are there."""
    splits = [name for name in names if split_of(f"{name}/")]
    if not splits:
        return None
    chosen = [name[:-1] for name in of_split([f"{name}/" for name in names], wanted.split, wanted.held_out)]
    if not chosen:
        raise ValueError(f"it holds the splits {', '.join(splits)}, and not {wanted.split}")
    return chosen


def flat(row: Row) -> Row:
    """Adds the values of nested objects by their paths: `{"Case": {"Title": "a"}}` has a column `Case.Title`."""
    found = dict(row)
    for name, value in row.items():
        if isinstance(value, dict) and not {"bytes", "path", "url"} & value.keys():
            found |= {f"{name}.{inner}": each for inner, each in flat(value).items() if f"{name}.{inner}" not in row}
    return found


def _mappings(value: list[Any]) -> bool:
    return bool(value) and all(isinstance(each, dict) for each in value)


def _annotated(images: list[Row], annotations: list[Row]) -> list[Row]:
    """Joins annotations with their images; without an id, with none. Raises ValueError if two images have one id, as in files
    that were merged."""
    by_id = {str(image["id"]): image for image in images if image.get("id") is not None}
    if len(by_id) < sum(image.get("id") is not None for image in images):
        raise ValueError("two of its images have the same id, and annotations name images by id; number them anew")
    return [{**by_id.get(str(each.get("image_id")), {}), **each} for each in annotations]
