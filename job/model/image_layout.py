"""Cuts a batch by rows and extracts single images, by the layout in which the family stores images."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

from job.model.families import Layout

Batch = dict[str, torch.Tensor]
FEATURES = "vision_features"
"""Key of the vision tower's features in a batch: (rows, images, tiles, tokens, hidden) in the layout `rows`, else (tokens of
all images, levels, hidden). Level 0 is the image, the others are Qwen3-VL's deepstack."""
WEIGHTS = "row_weights"
"""Key of the row weights in a batch, shape (rows,); absent when the spec names no column for them."""
_ROWS_INPUTS = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")


class Uncuttable(Exception):
    """The first axis of a tensor does not tell which of its entries belong to which rows."""


def cut(
    batch: Batch, layout: Layout | None, counts: Sequence[int], rows: Sequence[int], image_token: int | None
) -> Batch:
    """Return `rows` of a batch whose rows have `counts` images. `image_token` is the ID of the token that stands for a part of an
    image in the text.

    The first axis of a tensor holds rows, images, the rows that have images, or parts of images (patches, tiles, features), which
    rows have in proportion to their image tokens. Raises Uncuttable if it fits none of these, or fits several that differ.
    """
    text = batch["input_ids"]
    exact = {"rows": [1] * len(counts), "images": counts, "rows with images": [min(count, 1) for count in counts]}
    part = {}
    for name, tensor in batch.items():
        if tensor.shape[:2] == text.shape or name == WEIGHTS:
            part[name] = _taken(tensor, exact["rows"], rows)
            continue
        if not any(counts[row] for row in rows):
            continue  # rows without images: the models accept no empty tensor for them
        found = {axis: tuple(of_rows) for axis, of_rows in exact.items() if sum(of_rows) == len(tensor)}
        if not found and image_token is not None:
            found = _parts((text == image_token).sum(dim=1).tolist(), len(tensor))
        if len({*found.values()}) > 1 and layout is not None:
            found = {axis: of_rows for axis, of_rows in found.items() if (axis == "rows") == (layout == "rows")}
        shares = {*found.values()}
        if len(shares) != 1:
            raise Uncuttable(name)
        part[name] = _taken(tensor, shares.pop(), rows)
    return part


def without_padding(batch: Batch) -> Batch:
    """Drop the columns that only pad, on the right of every row."""
    text, longest = batch["input_ids"].shape, int(batch["attention_mask"].sum(dim=1).max())
    return {name: each[:, :longest] if each.shape[:2] == text else each for name, each in batch.items()}


def _taken(tensor: torch.Tensor, of_rows: Sequence[int], rows: Sequence[int]) -> torch.Tensor:
    """Return the part of a tensor that belongs to `rows`, if row n owns `of_rows[n]` entries of its first axis."""
    ends = [0, *accumulate(of_rows)]
    if isinstance(rows, range):
        return tensor[ends[rows.start] : ends[rows.stop]]
    return torch.cat([tensor[ends[row] : ends[row + 1]] for row in rows])


def _parts(tokens: Sequence[int], parts: int) -> dict[str, tuple[int, ...]]:
    """Return how many of an axis of `parts` each row owns by its image tokens, if every share is whole; else nothing."""
    total = sum(tokens)
    if not total or any(parts * of_row % total for of_row in tokens):
        return {}
    return {"parts": tuple(parts * of_row // total for of_row in tokens)}


def number_of_pictures(batch: Batch, layout: Layout) -> int:
    """Count the images in a batch; in the layout `rows`, include the padding of shorter rows."""
    if layout == "rows":
        rows, pictures = batch["pixel_values"].shape[:2]
        return int(rows * pictures)
    return len(_units(batch, batch["pixel_values"]))


def picture(batch: Batch, layout: Layout, index: int) -> Batch:
    """Return the vision tower's inputs for a single image."""
    if layout == "rows":
        row, place = divmod(index, batch["pixel_values"].shape[1])
        return {name: batch[name][row : row + 1, place : place + 1] for name in _ROWS_INPUTS}
    pixels = batch["pixel_values"]
    inputs = {"pixel_values": pixels[_place(batch, pixels, index) : _place(batch, pixels, index + 1)]}
    if layout == "patches":
        inputs["image_grid_thw"] = batch["image_grid_thw"][index : index + 1]
    return inputs


def without_pixels(batch: Batch) -> Batch:
    """Drop the inputs that only the vision tower takes. Qwen's language model takes the grids too."""
    return {name: tensor for name, tensor in batch.items() if name not in _ROWS_INPUTS}


def with_features(batch: Batch, layout: Layout, rows: int, features: Sequence[torch.Tensor]) -> Batch:
    """Replace the pixels of a batch of `rows` rows with the features of their images, each shaped as in `FEATURES`."""
    together = torch.cat(list(features))
    if layout == "rows":
        together = together.reshape(rows, len(features) // rows, *together.shape[-3:])
    return without_pixels(batch) | {FEATURES: together}


def _units(batch: Batch, tensor: torch.Tensor) -> list[int]:
    """Return the images' relative sizes: each owns a proportional part of the first axis of `tensor`."""
    grid = batch.get("image_grid_thw")
    if grid is not None:
        sizes: list[int] = grid.prod(dim=1).tolist()
        return sizes
    return [1] * tensor.shape[0]


def _place(batch: Batch, tensor: torch.Tensor, index: int) -> int:
    """Return where image `index` begins on the first axis of `tensor`."""
    units = _units(batch, tensor)
    return sum(units[:index]) * tensor.shape[0] // sum(units)
