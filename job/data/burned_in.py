"""Finds and masks text burned into pixels, often a patient's name, using DICOM tags and OCR."""

from __future__ import annotations

import os
import re
import threading
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from job.config.schema import PrivacySpec
from job.data.pixels import BadRow, Picture

SIDE = 1280
"""Longest side in pixels that is passed to the OCR; at this size it reads what a person can read."""
SURE, LIKELY = 0.8, 0.5
"""Minimum scores for a text to count as read, and to be painted over."""
TELLING = 3
"""Letters and digits a text needs to be more than a mark."""
MARKS = frozenset(
    [
        *("L", "R", "LT", "RT", "LEFT", "RIGHT", "AP", "PA", "LAT", "LATERAL", "OBL", "OBLIQUE", "LPO", "RPO", "LAO"),
        *("RAO", "CC", "MLO", "ML", "LM", "LCC", "RCC", "LMLO", "RMLO", "AXIAL", "PORTABLE", "PORT", "MOBILE", "BED"),
        *("SUPINE", "PRONE", "ERECT", "UPRIGHT", "SEMI", "SEMIERECT", "STANDING", "SITTING", "DECUB", "DECUBITUS"),
        *("LLD", "RLD", "INSP", "EXP", "INSPIRATION", "EXPIRATION", "WEIGHT", "BEARING", "CHEST", "ABDOMEN"),
    ]
)
"""Markers that technologists place beside the patient: sides, views and positions. They name nobody."""


class BurnedIn(BadRow):
    """Raised when text is burned into an image and `privacy.burned_in` does not allow it."""


class Words(NamedTuple):
    """A text that was read: its box (left, top, right, bottom) in pixels of the image, and its confidence score."""

    text: str
    box: tuple[int, int, int, int]
    score: float


def can_read() -> bool:
    """Whether the burned-in extra is installed."""
    return find_spec("rapidocr") is not None and find_spec("onnxruntime") is not None


def cleared(picture: Picture, privacy: PrivacySpec) -> Picture:
    """Returns the image as `privacy` allows it, with text painted over if required. `picture.info["burned_in"]` holds what the
    file says (`yes`, `maybe` or nothing) and is updated to what is then known, including `masked`. Raises BurnedIn."""
    said = picture.info.get("burned_in", "")
    mask = privacy.burned_in == "mask"
    unsure = said == "maybe" or (mask and said == "yes")
    if privacy.burned_in == "allow" or not (said or privacy.look_for_text is True):
        return picture
    if not (privacy.look_for_text is True or (privacy.look_for_text == "auto" and unsure and can_read())):
        if said == "yes":
            raise BurnedIn("text is burned into the image, as its file says (privacy.burned_in)")
        return picture
    found = read(picture)
    telling = any(is_telling(words) for words in found)
    if not telling and said != "yes":
        picture.info["burned_in"] = ""
        return picture
    if not mask:
        raise BurnedIn("text is burned into the image (privacy.burned_in)")
    painted = paint(picture, [words for words in found if left_of(words.text)])
    if not telling or any(map(is_telling, read(painted))):
        raise BurnedIn("text is burned into the image, and could not be masked (privacy.burned_in)")
    painted.info = picture.info | {"burned_in": "masked"}
    return painted


def left_of(text: str) -> str:
    """Returns the letters and digits of a text, without its marks."""
    words = re.findall(r"[^\W_]+", text.upper())
    return "".join(word for word in words if word not in MARKS)


def is_telling(words: Words) -> bool:
    return words.score >= SURE and len(left_of(words.text)) >= TELLING


def paint(picture: Picture, found: list[Words]) -> Picture:
    """Returns a copy with black boxes, slightly larger than the texts, since letters have edges."""
    copy = picture.copy()
    draw = ImageDraw.Draw(copy)
    for words in found:
        left, top, right, bottom = words.box
        edge = max(2, (bottom - top) // 5)
        draw.rectangle((left - edge, top - edge, right + edge, bottom + edge), fill=0)
    return copy


def read(picture: Picture) -> list[Words]:
    """Returns every text in the image that scores at least `LIKELY`."""
    scale = min(1.0, SIDE / max(picture.size))
    small = picture.convert("RGB")
    if scale < 1:
        small = small.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.LANCZOS)
    reader, lock = _reader(os.getpid())
    with lock:  # the OCR keeps state between its steps
        said = reader(np.asarray(small), use_cls=False)
    if said.boxes is None:
        return []
    found = []
    for corners, text, score in zip(said.boxes, said.txts, said.scores, strict=True):
        (left, top), (right, bottom) = np.min(corners, axis=0) / scale, np.max(corners, axis=0) / scale
        found.append(Words(str(text), (int(left), int(top), int(right) + 1, int(bottom) + 1), float(score)))
    return [words for words in found if words.score >= LIKELY]


@lru_cache(1)
def _reader(_process: int) -> tuple[Any, threading.Lock]:
    """One reader per process: its threads do not survive a fork."""
    from rapidocr import RapidOCR

    threads = {
        f"EngineConfig.onnxruntime.{kind}_op_num_threads": len(os.sched_getaffinity(0)) for kind in ("intra", "inter")
    }
    return RapidOCR(params=threads | {"Global.log_level": "error"}), threading.Lock()
