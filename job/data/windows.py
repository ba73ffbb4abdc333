"""Windows of grey levels: from values, such as Hounsfield units, to 8-bit shades."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

HOUNSFIELD = (40.0, 400.0)
"""Center and width of the window for a CT image that has none: soft tissue. Its whole range shows little but bone and air."""
MEDGEMMA = ((0.0, 2048.0), (40.0, 350.0), (40.0, 80.0))
"""Center and width of the windows that MedGemma 1.5 was shown CT in, as red, green and blue: wide (-1024 to 1024), soft tissue
(-135 to 215), brain (0 to 80). From notebooks/high_dimensional_ct_hugging_face.ipynb in github.com/Google-Health/medgemma."""

Numbers = NDArray[Any]


def windowed(values: Numbers, center: float, width: float, function: str = "LINEAR") -> NDArray[np.uint8]:
    """Returns shades of the same shape (PS3.3 C.11.2.1.2, C.11.2.1.3)."""
    if function == "SIGMOID":
        return eight_bits(1 / (1 + np.exp(np.clip(-4 * (values - center) / width, -60, 60))))
    if function == "LINEAR_EXACT":
        return eight_bits((values - center) / max(width, 1e-6) + 0.5)
    return eight_bits((values - (center - 0.5)) / max(width - 1, 1e-6) + 0.5)


def in_colours(values: Numbers) -> NDArray[np.uint8]:
    """Returns Hounsfield units of shape (height, width) as MedGemma's three windows, of shape (height, width, 3)."""
    return np.stack([windowed(values, center, width, "LINEAR_EXACT") for center, width in MEDGEMMA], axis=-1)


def eight_bits(shares: Numbers) -> NDArray[np.uint8]:
    """Converts fractions of full brightness."""
    return np.asarray(np.clip(shares, 0, 1) * 255 + 0.5).astype(np.uint8)
