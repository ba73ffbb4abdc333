"""Where each family keeps a batch's pictures: a batch is cut by rows here, and one picture taken out of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

Batch = dict[str, torch.Tensor]
Layout = Literal["rows", "patches", "pictures", "list"]

LAYOUTS: dict[str, Layout] = {
    "mllama": "rows",  # (rows, pictures of a row, tiles, …)
    "qwen2_vl": "patches",  # (patches of all pictures, …), with image_grid_thw (pictures, 3)
    "qwen2_5_vl": "patches",
    "qwen3_vl": "patches",
    "gemma3": "pictures",  # (pictures, channels, height, width)
    "llava": "list",  # as "pictures", but its forward takes a list of features
}
FEATURES = "vision_features"
"""Key under which a batch carries what the vision tower said: (rows, pictures, tiles, tokens, hidden) in the layout
`rows`, else (tokens of all pictures, levels, hidden); level 0 is the picture, the others are Qwen3-VL's deepstack."""
_ROWS_INPUTS = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")


def cut(batch: Batch, layout: Layout, counts: Sequence[int], start: int, stop: int) -> Batch:
    """Rows `start` to `stop` of a batch whose rows have `counts` pictures."""
    first, last = sum(counts[:start]), sum(counts[:stop])
    part = {}
    for name, tensor in batch.items():
        if layout == "rows" or name not in ("pixel_values", "image_grid_thw", FEATURES):
            part[name] = tensor[start:stop]
        elif first == last:
            continue  # rows without pictures: the model takes no empty tensor for them
        elif name == "image_grid_thw":
            part[name] = tensor[first:last]
        else:
            part[name] = tensor[_place(batch, tensor, first) : _place(batch, tensor, last)]
    return part


def number_of_pictures(batch: Batch, layout: Layout) -> int:
    """Pictures in a batch; in the layout `rows` with those that only fill up shorter rows."""
    if layout == "rows":
        rows, pictures = batch["pixel_values"].shape[:2]
        return int(rows * pictures)
    return len(_units(batch, batch["pixel_values"]))


def picture(batch: Batch, layout: Layout, index: int) -> Batch:
    """What the vision tower takes for one picture alone."""
    if layout == "rows":
        row, place = divmod(index, batch["pixel_values"].shape[1])
        return {name: batch[name][row : row + 1, place : place + 1] for name in _ROWS_INPUTS}
    pixels = batch["pixel_values"]
    inputs = {"pixel_values": pixels[_place(batch, pixels, index) : _place(batch, pixels, index + 1)]}
    if layout == "patches":
        inputs["image_grid_thw"] = batch["image_grid_thw"][index : index + 1]
    return inputs


def without_pixels(batch: Batch) -> Batch:
    """The batch less what only the vision tower takes. Qwen's language model too takes the grids."""
    return {name: tensor for name, tensor in batch.items() if name not in _ROWS_INPUTS}


def with_features(batch: Batch, layout: Layout, rows: int, features: Sequence[torch.Tensor]) -> Batch:
    """The batch with the features of the pictures of its `rows`, each as `FEATURES` has one, instead of pixels."""
    together = torch.cat(list(features))
    if layout == "rows":
        together = together.reshape(rows, len(features) // rows, *together.shape[-3:])
    return without_pixels(batch) | {FEATURES: together}


def _units(batch: Batch, tensor: torch.Tensor) -> list[int]:
    """Sizes of the pictures, in proportion to which the first axis of `tensor` is theirs."""
    grid = batch.get("image_grid_thw")
    if grid is not None:
        sizes: list[int] = grid.prod(dim=1).tolist()
        return sizes
    return [1] * tensor.shape[0]


def _place(batch: Batch, tensor: torch.Tensor, index: int) -> int:
    """Where picture `index` begins on the first axis of `tensor`."""
    units = _units(batch, tensor)
    return sum(units[:index]) * tensor.shape[0] // sum(units)
