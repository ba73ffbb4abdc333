"""Maps where the model looks: how much less likely its own answer becomes when a part of the image is covered.

This is the simplest method that works for every family and claims no more than it shows (Zeiler & Fergus 2014, occlusion):
each cell of a grid is painted in the image's mean colour, and the increase of the answer's loss is the cell's value. A finding
visible in two places is missed, since covering one leaves the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageStat

from job.config.schema import JobSpec
from job.data import Row
from job.evaluate.generate import answer_losses, micro_batches
from job.evaluate.records import Maps
from job.model.load import to_generation
from job.model.loaded import Loaded, without_gradients
from job.model.memory_model import gate_batch

LossesOf = Callable[[list[Row]], list[float]]
CELLS = 6
"""Cells per side."""


def occlusion(row: Row, answer: str, losses_of: LossesOf) -> list[list[float]]:
    """Return `CELLS` rows of `CELLS` values, in nats per answer token; above 0 where covering makes `answer` less likely.

    `losses_of` returns the loss of each row's answer. In a row with several images, the first is covered.
    """
    image, rest = row["images"][0].convert("RGB"), row["images"][1:]
    said = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    asked = row["messages"][:-1] if row["messages"][-1]["role"] == "assistant" else row["messages"]
    shown = [image, *(covered(image, down, across) for down in range(CELLS) for across in range(CELLS))]
    losses = losses_of([row | {"messages": [*asked, said], "images": [each, *rest]} for each in shown])
    values = np.array(losses[1:]).reshape(CELLS, CELLS) - losses[0]
    return [[round(float(value), 5) for value in line] for line in values]


def covered(image: Image.Image, down: int, across: int) -> Image.Image:
    """Copy the image with one cell painted in its mean colour."""
    copy = image.copy()
    left, right = (image.width * place // CELLS for place in (across, across + 1))
    top, bottom = (image.height * place // CELLS for place in (down, down + 1))
    mean = tuple(round(channel) for channel in ImageStat.Stat(image).mean)
    ImageDraw.Draw(copy).rectangle((left, top, max(right - 1, left), max(bottom - 1, top)), fill=mean)
    return copy


def explain(loaded: Loaded, rows: Any, wanted: dict[str, str], spec: JobSpec, each: Callable[[], None]) -> Maps:
    """Return maps of the answers `wanted` by row id; `each` is called before every row. Rows without image or answer have
    none."""
    truncate = spec.dataset.over_length == "truncate"
    micro = micro_batches(loaded, gate_batch(spec), "a map of where the model looks")

    def losses_of(batch: list[Row]) -> list[float]:
        said = micro.map(batch, lambda part: answer_losses(loaded, list(part), spec.training.max_length, truncate))
        return [loss for loss, _ in said]

    found = {}
    to_generation(loaded)
    with without_gradients(loaded.model):
        for row in (row for row in rows if row["id"] in wanted):
            each()
            if row["images"] and wanted[row["id"]].strip():
                found[row["id"]] = occlusion(row, wanted[row["id"]], losses_of)
    return found
