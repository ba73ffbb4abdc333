"""Cuts a batch by rows and extracts single images, by the layout in which the family stores images."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from job.model.families import Layout

Batch = dict[str, torch.Tensor]
FEATURES = "vision_features"
"""Key of the vision tower's features in a batch: (rows, images, tiles, tokens, hidden) in the layout `rows`, else (tokens of
all images, levels, hidden). Level 0 is the image, the others are Qwen3-VL's deepstack."""
_ROWS_INPUTS = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")


def cut(batch: Batch, layout: Layout, counts: Sequence[int], start: int, stop: int) -> Batch:
    """Return rows `start` to `stop` of a batch whose rows have `counts` images."""
    first, last = sum(counts[:start]), sum(counts[:stop])
    part = {}
    for name, tensor in batch.items():
        if layout == "rows" or name not in ("pixel_values", "image_grid_thw", FEATURES):
            part[name] = tensor[start:stop]
        elif first == last:
            continue  # rows without images: the model accepts no empty tensor for them
        elif name == "image_grid_thw":
            part[name] = tensor[first:last]
        else:
            part[name] = tensor[_place(batch, tensor, first) : _place(batch, tensor, last)]
    return part


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
