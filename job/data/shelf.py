"""Shrunk pictures, kept on scratch so that a large file is decoded once and not once an epoch. Without loss, up to a size."""

from __future__ import annotations

import hashlib
import os
import threading
from dataclasses import dataclass
from pathlib import Path

from PIL import Image


@dataclass
class Shelf:
    """Pictures as PNG below `folder`, about `room` bytes of them at most; when it is full, no more are put there.

    Nothing is ever taken off: each epoch wants every picture once, so that any other would be as good. `folder` is for one
    way of making pictures: whoever makes them in another way takes another folder.
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
                return image.convert("RGB")
        except OSError:
            return None

    def put(self, key: str, picture: Image.Image) -> None:
        """Keep it if there is room. A grey one is kept as such, in a third of the space."""
        place = self.place(key)
        if self._used is None:
            self._used = sum(file.stat().st_size for file in self.folder.rglob("*.png"))
        if self._used >= self.room or place.exists():
            return
        red, green, blue = picture.split()
        grey = red.tobytes() == green.tobytes() == blue.tobytes()
        partial = place.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            (red if grey else picture).save(partial, "PNG", compress_level=1)
            self._used += partial.stat().st_size
            partial.rename(place)
        except OSError:  # a full disk costs speed, not the job
            partial.unlink(missing_ok=True)
            self._used = self.room
