"""Caches shrunk images on scratch, so that a large file is decoded once and not every epoch. Lossless, up to a size limit."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

SOURCE = "source"
"""Key of the text in a cached image that records what it was made from."""
TOLD = "told"
"""Key of the text that holds what is known of the original: its size, and whether text is burned into it."""
KNOWN = ("whole", "burned_in")


@dataclass
class ImageCache:
    """Images stored as PNG below `folder`, up to about `room` bytes; once full, it accepts no more.

    Nothing is evicted: each epoch reads every image once, so any other choice would be as good. `folder` serves one way of making
    images; another way needs another folder.
    """

    folder: Path
    room: int
    _used: int | None = None

    def place(self, key: str) -> Path:
        name = hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
        return self.folder / name[:2] / f"{name[2:34]}.png"

    def take(self, key: str) -> Image.Image | None:
        try:
            with Image.open(self.place(key)) as image:
                picture = image.convert("RGB")
                picture.info = json.loads(image.info.get(TOLD, "{}"))
                return picture
        except OSError:
            return None

    def put(self, key: str, picture: Image.Image, source: str) -> None:
        """Stores the image if there is room, replacing one made from another `source` (a digest of its files). A grey image is
        stored as grey, in a third of the space."""
        place = self.place(key)
        if self._used is None:
            self._used = sum(file.stat().st_size for file in self.folder.rglob("*.png"))
        there = _source_of(place)
        if there is not None and there != source:  # in a store, or with its old time, a changed file keeps its key
            place.unlink(missing_ok=True)
        if self._used >= self.room or there == source:
            return
        said = PngInfo()
        said.add_text(SOURCE, source)
        said.add_text(TOLD, json.dumps({name: picture.info[name] for name in KNOWN if name in picture.info}))
        red, green, blue = picture.split()
        grey = red.tobytes() == green.tobytes() == blue.tobytes()
        partial = place.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            (red if grey else picture).save(partial, "PNG", compress_level=1, pnginfo=said)
            self._used += partial.stat().st_size
            partial.rename(place)
        except OSError:  # a full disk costs speed, not the job
            partial.unlink(missing_ok=True)
            self._used = self.room


def _source_of(place: Path) -> str | None:
    """Returns None if there is no image; an empty text if it does not say."""
    try:
        with Image.open(place) as image:
            return str(image.info.get(SOURCE, ""))
    except FileNotFoundError:
        return None
    except OSError:
        return ""
