"""Shrunk pictures, kept on scratch so that a large file is decoded once and not once an epoch. Without loss, up to a size."""

from __future__ import annotations

import hashlib
import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError


@dataclass
class Shelf:
    """Pictures as PNG below `folder`, `room` bytes of them at most; when it is full, no more are put there.

    Nothing is ever taken off: each epoch wants every picture once, so that any other would be as good. `folder` is for one
    way of making pictures: whoever makes them in another way takes another folder.
    """

    folder: Path
    room: int
    _lock: Any = field(default_factory=threading.Lock, repr=False)
    _used: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "room": 0, "_used": 0}  # worker processes take and do not put

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def place(self, value: Any, base: Any, pictures: int) -> Path | None:
        """Where the picture of an image value belongs; None for one that is in the row itself."""
        if isinstance(value, dict) and "montage" in value:
            parts = [str(self.place(part, base, pictures)) for part in value["montage"]]
            return self._named(*parts)
        if isinstance(value, dict) and "offset" in value:
            return self._named(value["file"], value["offset"], value["size"], pictures)
        path = (
            value.get("path") or value.get("file") if isinstance(value, dict) and value.get("bytes") is None else value
        )
        if isinstance(path, str) and not path.startswith("data:"):
            frame = value.get("frame") if isinstance(value, dict) else None
            try:
                facts = (Path(base or "") / path).stat()
            except (OSError, ValueError):
                return self._named(base, path, frame, pictures) if "://" in f"{base}{path}" else None
            return self._named(base, path, frame, facts.st_size, facts.st_mtime_ns, pictures)
        data = path.get("bytes") if isinstance(path, dict) else path
        return self._named(hashlib.sha256(data).hexdigest(), pictures) if isinstance(data, bytes) else None

    def take(self, place: Path) -> Image.Image | None:
        try:
            with Image.open(place) as image:
                return image.convert("RGB")
        except (FileNotFoundError, UnidentifiedImageError, OSError):
            return None

    def put(self, place: Path, picture: Image.Image) -> None:
        """Keep it if there is room. A grey one is kept as such, in a third of the space."""
        with self._lock:
            if self._used is None:
                self._used = sum(file.stat().st_size for file in self.folder.rglob("*.png"))
            if self._used >= self.room or place.exists():
                return
        red, green, blue = picture.split()
        grey = red.tobytes() == green.tobytes() == blue.tobytes()
        place.parent.mkdir(parents=True, exist_ok=True)
        partial = place.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
        try:
            (red if grey else picture).save(partial, "PNG", compress_level=1)
            size = partial.stat().st_size
            partial.rename(place)
        except OSError:  # a full disk costs speed, not the job
            partial.unlink(missing_ok=True)
            size = self.room
        with self._lock:
            self._used += size

    def _named(self, *facts: Any) -> Path:
        name = hashlib.sha256("\0".join(map(str, facts)).encode("utf-8", "surrogatepass")).hexdigest()
        return self.folder / name[:2] / f"{name[2:34]}.png"
