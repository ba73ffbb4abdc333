"""Loads one image value of a row as RGB images, or raises the reason why not."""

from __future__ import annotations

import hashlib
import io
import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, UnidentifiedImageError

from job.config.schema import DatasetSpec, PrivacySpec
from job.data.archives import IN_TAR, Member, read_member
from job.data.encoded import begins_as_picture, from_base64, from_data_url
from job.data.image_cache import ImageCache
from job.data.image_names import OUTSIDE, Lookup
from job.data.layouts import is_dicom
from job.data.nifti import frames as nifti_frames
from job.data.nifti import is_nifti
from job.data.pixels import MIN_SIDE, BadRow, Picture, as_rgb, check_bytes, check_size, shrink, upright
from job.data.remote import NO_HOST, Unfetchable, fetched, piece
from job.data.stacks import montage
from job.errors import DataError
from job.runtime.staging import BUNDLE
from job.store.disk import FAILING, disk_fault

WORTH_KEEPING = 2
"""Images that shrinking made this many times smaller are cached: decoding them again would be slower than reading the copy."""
Image.init()
FORMATS = sorted({"PNG", "JPEG", "TIFF", "JPEG2000", "WEBP", "GIF", "BMP", "PPM", "AVIF"} & Image.OPEN.keys())
"""Pillow would also pass PostScript to an interpreter, and read many formats that no user means."""
WHOLE = "whole"
"""Key of the size of an image before it was shrunk, in Pillow's `info`."""
UNKNOWN_HOST = f"image cannot be fetched: {NO_HOST}"
"""Why a row is bad, permanently or for as long as the name servers are unreachable."""
WEB = ("http://", "https://", "s3://")


class Bounds(NamedTuple):
    """Upper limits on image size in pixels: the longer side, the area, the shorter side, and the total area of a row's images.
    Larger images are shrunk with their aspect ratio kept or, with a `grid`, to multiples of it as Qwen's processor would
    (smart_resize), so that this processor gives an image that nobody shrank as many tokens. `resample` is the number of the
    filter in Pillow, that of the processor; None is Lanczos."""

    side: float | None = None
    area: float | None = None
    short: float | None = None
    row: float | None = None
    grid: int | None = None
    resample: int | None = None

    def most(self, pictures: int = 1) -> int | None:
        """Returns the largest area of one of a row's `pictures` images; None if areas have no limit."""
        limits = [limit for limit in (self.area, self.row and self.row / max(pictures, 1)) if limit]
        return int(min(limits)) if limits else None

    def size(self, width: int, height: int, pictures: int) -> tuple[int, int]:
        """Returns the size to shrink one of a row's `pictures` images to; unchanged if it is small enough."""
        most = self.most(pictures)
        if self.grid and most:
            grid, factor = self.grid, math.sqrt(width * height / most)
            if round(width / grid) * round(height / grid) * grid**2 <= most:
                return width, height
            high, wide = (max(math.floor(side / factor / grid), 1) * grid for side in (height, width))
            return wide, high
        scales = [1.0]
        scales += [self.side / max(width, height)] if self.side else []
        scales += [math.sqrt(self.area / (width * height))] if self.area else []
        scales += [self.short / min(width, height)] if self.short else []
        scales += [math.sqrt(self.row / max(pictures, 1) / (width * height))] if self.row else []
        scale, least = min(scales), min(MIN_SIDE, width, height)
        # As processors do, the longer side is cut off, not rounded.
        if self.short and scale == self.short / min(width, height) < 1:
            return int(self.short * width / min(width, height)), int(self.short * height / min(width, height))
        return (width, height) if scale >= 1 else (max(round(width * scale), least), max(round(height * scale), least))


AS_IT_IS = Bounds()


class Files(NamedTuple):
    """Where relative paths in rows start (a folder, or an `s3://` prefix), where images behind URLs are stored, the cache of
    shrunk images, the limits they are shrunk to, what to do about burned-in text, which hosts need not be public, and how to look
    up names that are no such paths."""

    base: Path | str | None = None
    fetched: Path | None = None
    cache: ImageCache | None = None
    bounds: Bounds = AS_IT_IS
    privacy: PrivacySpec = PrivacySpec()
    hosts: tuple[str, ...] = ()
    lookup: Lookup | None = None


class Place(NamedTuple):
    """Where an encoded file is: a path, or the URL of a shard; and the byte range in it or its place in a zip, else the whole."""

    name: str
    offset: int = 0
    size: int | None = None
    member: Member | None = None


def file_name(value: Any) -> str | None:
    """Returns the name by which a row's image value names its file, without a URL's query; None if it names none."""
    name = value.get("path") if isinstance(value, dict) else value
    if not isinstance(name, str) or name.startswith("data:") or begins_as_picture(name):
        return None
    return name.partition("?")[0]


def locate(value: Any, files: Files) -> bytes | Place:
    """Returns the encoded file of a row's image value, or its place: embedded bytes, base64, `{"bytes", "path"}`, a `data:`, http
    or s3 URL, a path relative to `files.base`, or a piece `{"path", "offset", "size"}` of an archive. Raises BadRow if none."""
    given = value if isinstance(value, dict) else {"path": value}
    name = given.get("path") if given.get("bytes") is None else given["bytes"]
    name = str(name) if type(name) is int and files.base is not None else name
    if isinstance(name, bytes):
        check_bytes(len(name))
        return name
    extent = [given["offset"], given.get("size")] if "offset" in given else []
    if not (isinstance(name, str) and name and all(isinstance(number, int) and number >= 0 for number in extent)):
        raise BadRow("no image")
    if name.startswith("data:"):
        return from_data_url(name)
    if begins_as_picture(name):
        return from_base64(name, "image is broken base64")
    name = name.removeprefix("file://")
    if not name.startswith(WEB):
        if files.base is not None:
            if files.lookup is not None:
                return _found(files.lookup, name)
            name = _below(str(files.base), name)
        elif value is not given:  # the Hub's own files come as {"path"}; text in a stranger's row names no file here
            raise BadRow("image is a path, and there is no folder to resolve it in")
    if extent or not name.startswith(WEB):
        return Place(name, *extent)
    if files.fetched is None:
        raise BadRow("image is a URL, and there is no folder to fetch it to")
    try:
        return Place(str(fetched(name, files.fetched, files.hosts)))
    except Unfetchable as error:
        raise BadRow(f"image cannot be fetched: {error}") from None


def _found(lookup: Lookup, name: str) -> Place:
    with suppress(BadRow, OSError, ValueError):
        if (place := Path(_below(str(lookup.tree.base), name))).is_file():
            return Place(str(place))
    found = lookup.find(name)
    archive, member = lookup.tree.archived.get(found, (found, None))
    if member is not None and member.method == IN_TAR:
        return Place(archive, member.offset, member.size)
    return Place(archive, member=member)


def _below(base: str, name: str) -> str:
    """Resolves a name against `base` to a path or URL. Follows the owner's links, but refuses names that lead out of it."""
    scheme, folder = ("s3:/", base.removeprefix("s3:/")) if base.startswith(WEB) else ("", str(Path(base).absolute()))
    whole = os.path.normpath(f"{folder}/{name}") if name[:1] != "/" else os.path.normpath(name)
    if not whole.startswith(f"{os.path.normpath(folder)}/"):
        raise BadRow(OUTSIDE)
    return scheme + whole


def read(place: Place) -> bytes:
    """Raises BadRow if it cannot be read."""
    size = place.size
    try:
        if place.name.startswith("s3://"):
            check_bytes(size or 0)
            return piece(place.name, place.offset, size) if size else b""
        file = os.open(place.name, os.O_RDONLY | os.O_NONBLOCK)  # does not wait for a pipe
        try:
            if place.member is not None:
                return read_member(file, place.member)
            there = os.fstat(file).st_size - place.offset
            size = there if size is None else size
            if not 0 <= size <= there:
                raise BadRow("image file is truncated")
            check_bytes(size)
            data = os.pread(file, size, place.offset)
        finally:
            os.close(file)
    except DataError as error:
        raise BadRow("archive is gone from its store") from error
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in FAILING:  # not the row's fault
            raise disk_fault(error, Path(place.name)) from error
        raise BadRow(f"image cannot be read: {getattr(error, 'strerror', None) or 'not a path'}") from error
    if len(data) < size:
        raise BadRow("image file is truncated")
    return data


def is_absolute(value: Any, files: Files) -> bool:
    """Whether a row's image value is an absolute path on this machine."""
    name = path_of(value)
    return name is not None and name[:1] == "/" and (files.lookup is None or Path(name).is_file())


def path_of(value: Any) -> str | None:
    """Returns the path in a row's image value as it is written; None if it is something else, such as a URL."""
    name = value.get("path") if isinstance(value, dict) and value.get("bytes") is None else value
    if isinstance(value, dict) and "offset" in value:
        return None
    name = str(name) if type(name) is int else name
    if not isinstance(name, str) or not name or name.startswith((*WEB, "data:")) or begins_as_picture(name):
        return None
    return name.removeprefix("file://")


def load(value: Any, files: Files, spec: DatasetSpec, pictures: int = 1) -> list[Picture]:
    """Loads the RGB images of an image value, upright by EXIF, shrunk to `files.bounds` as one of the row's `pictures`.

    Returns one image, or several if several frames of a DICOM file are selected. `{"montage": [values]}` is one image made of
    several. Raises BadRow.
    """
    kept = files.cache.take(_key(_parts(value, files), pictures)) if files.cache else None
    return [kept] if kept is not None else load_anew(value, files, spec, pictures)[1]


def load_anew(value: Any, files: Files, spec: DatasetSpec, pictures: int = 1) -> tuple[list[bytes], list[Picture]]:
    """Returns the encoded files behind an image value, and its images. Caches an image that took long to make."""
    parts = _parts(value, files)
    try:
        return _decoded(parts, files, spec, pictures)
    except BadRow:
        for path in [Path(part.name) for part in parts if isinstance(part, Place)]:
            # Keep fetched files only if they decode; a bundle is not ours to change.
            if path.parent == files.fetched and BUNDLE not in path.parts:
                path.unlink(missing_ok=True)
        raise


def _decoded(
    parts: list[bytes | Place], files: Files, spec: DatasetSpec, pictures: int
) -> tuple[list[bytes], list[Picture]]:
    data = [part if isinstance(part, bytes) else read(part) for part in parts]
    made = [_frames(each, spec, files, pictures) for each in data]
    costly = is_dicom(data[0][:132]) or is_nifti(data[0][:352])
    found = [picture for each in made for picture in each]
    if costly and len(parts) > 1:
        found = [montage(found)]
    before = found[0].width * found[0].height
    bounds = files.bounds
    for picture in found:
        picture.info.setdefault(WHOLE, picture.size)
    found = [shrink(picture, bounds.size(*picture.size, pictures), bounds.resample) for picture in found]
    if files.cache and len(found) == 1 and (costly or before >= WORTH_KEEPING * found[0].width * found[0].height):
        files.cache.put(_key(parts, pictures), found[0], hashlib.sha256(b"".join(data)).hexdigest())
    return data, found


def _frames(data: bytes, spec: DatasetSpec, files: Files, pictures: int) -> list[Picture]:
    """Decodes the image of a file, or the selected frames of DICOM, and handles burned-in text."""
    dicom, volume = is_dicom(data[:132]), is_nifti(data[:352])
    if dicom:
        from job.data.decoder import decoded_apart

        found = decoded_apart(data, spec)
    else:
        found = nifti_frames(data, spec) if volume else [decode(data, spec, files.bounds, pictures)]
    if dicom or files.privacy.look_for_text is True:
        from job.data.burned_in import cleared

        found = [cleared(picture, files.privacy) for picture in found]
    return [montage(found)] if (dicom or volume) and spec.dicom.frames == "montage" and len(found) > 1 else found


def _parts(value: Any, files: Files) -> list[bytes | Place]:
    several = value.get("montage") if isinstance(value, dict) else None
    return [locate(part, files) for part in (several if isinstance(several, list) and several else [value])]


def _key(parts: list[bytes | Place], pictures: int) -> str:
    """Identifies what an image is made from: a rewritten file gets another key."""
    facts = [str(pictures)]
    for part in parts:
        facts.append(hashlib.sha256(part).hexdigest() if isinstance(part, bytes) else str(part))
        if isinstance(part, Place):
            with suppress(OSError, ValueError):  # in a store, or missing
                stat = Path(part.name).stat()
                facts.append(f"{stat.st_size} {stat.st_mtime_ns}")
    return "\0".join(facts)


def decode(data: bytes, spec: DatasetSpec, bounds: Bounds = AS_IT_IS, pictures: int = 1) -> Picture:
    """Decodes an RGB image of shape (height, width), upright. Checks its size before decoding any pixel. Raises BadRow."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            check_size(*image.size, spec)
            whole = image.size
            if bounds.resample is None:  # a JPEG decodes at a half, a quarter or an eighth, but with other pixels
                image.draft(None, bounds.size(*image.size, pictures))
            image.load()
            picture = as_rgb(upright(image))
            picture.info[WHOLE] = whole if picture.size == image.size else whole[::-1]
            return picture
    except BadRow:
        raise
    except UnidentifiedImageError as error:
        if data.startswith(b"version https://git-lfs"):
            raise BadRow("image is a Git LFS pointer: fetch it with git lfs pull") from error
        raise BadRow("image of an unknown format") from error
    except Exception as error:  # decoders may raise anything on a broken file
        raise BadRow(f"image is broken: {type(error).__name__}") from error
