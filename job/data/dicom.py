"""DICOM files → pictures as a reader sees them. Only pixels leave the file, and the few tags of `TECHNICAL`."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from job.data.images import BadRow, Picture, check_size, stretch
from job.errors import DataError
from job.spec import DatasetSpec

try:
    import pydicom
    from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi, pixel_array
except ImportError as missing:
    raise DataError("dataset: DICOM files need the dicom extra (pip install 'vision-lora-job[dicom]')") from missing

TECHNICAL = {
    "modality": "Modality",
    "body_part": "BodyPartExamined",
    "view": "ViewPosition",
    "laterality": "Laterality",
    "manufacturer": "Manufacturer",
}
"""Column → tag: what may be reported on. No tag of a person, a place or a time is among them."""
OFTEN_BURNED_IN = ("US", "XC", "ES", "SC", "OT")
"""Modalities whose makers write names into the pixels, and often do not say so."""
MOST_TILES = 16
TILE = 512

Numbers = NDArray[Any]


def frames(data: bytes, spec: DatasetSpec) -> list[Picture]:
    """The frames of a DICOM file that `spec.dicom.frames` chooses, windowed to 8 bits. Raises BadRow.

    The value of a pixel goes through the modality LUT or rescale slope, then the VOI LUT or window (PS3.3 C.11.1, C.11.2), then
    the inversion of MONOCHROME1. Without a window, from the darkest to the brightest that is no padding.
    """
    try:
        header = pydicom.dcmread(io.BytesIO(data))
        if "Rows" not in header or "Columns" not in header:
            raise BadRow("DICOM: no image in it")
        check_size(int(header.Columns), int(header.Rows), spec)
        count = int(header.get("NumberOfFrames") or 1)
        shown = [_frame(header, n, spec) for n in choose(count, spec.dicom.frames)]
        burned_in = _burned_in(header)
    except BadRow:
        raise
    except Exception as error:  # what a decoder raises for a broken file is its own affair
        raise BadRow(f"DICOM: {_cannot(header) if 'header' in locals() else 'header is broken'}") from error
    for picture in shown:
        picture.info["burned_in"] = burned_in
    return [montage(shown)] if spec.dicom.frames == "montage" and len(shown) > 1 else shown


def choose(count: int, frames: str | list[int]) -> list[int]:
    """Places in a stack of `count`: the middle one, evenly spread ones for a montage, or those named (from 0; -1 is the last).
    Of one frame there is no choice. Raises BadRow for a place that is not there."""
    if count == 1:
        return [0]
    if frames == "middle":
        return [count // 2]
    if frames == "montage":
        tiles = min(count, MOST_TILES)
        return [(2 * tile + 1) * count // (2 * tiles) for tile in range(tiles)]
    if not all(-count <= int(place) < count for place in frames):
        raise BadRow("DICOM: dataset.dicom.frames names a frame that is not there")
    return [int(place) % count for place in frames]


def montage(shown: list[Picture]) -> Picture:
    """Pictures row by row in a square grid, each at most `TILE` pixels a side."""
    side = int(np.ceil(np.sqrt(len(shown))))
    for picture in shown:
        picture.thumbnail((TILE, TILE), Image.Resampling.LANCZOS)
    width, height = (max(picture.size[axis] for picture in shown) for axis in (0, 1))
    grid = Image.new("RGB", (side * width, -(-len(shown) // side) * height))
    for place, picture in enumerate(shown):
        grid.paste(picture, (place % side * width, place // side * height))
    grid.info = dict(shown[0].info)
    return grid


def _frame(header: Any, number: int, spec: DatasetSpec) -> Picture:
    values = pixel_array(header, index=number)
    if header.PhotometricInterpretation == "PALETTE COLOR":
        values = apply_color_lut(values, header)
        return Image.fromarray((values >> 8 if values.dtype == np.uint16 else values).astype(np.uint8))
    if values.ndim == 3:
        return Image.fromarray((values >> max(int(header.BitsStored) - 8, 0)).astype(np.uint8))
    padding = _padding(values, header)
    shades = _grey(values, ~padding, _own(header, number), header, spec)
    if header.PhotometricInterpretation == "MONOCHROME1" or header.get("PresentationLUTShape") == "INVERSE":
        shades = 255 - shades
    shades[padding] = 0
    return Image.fromarray(shades).convert("RGB")


def _grey(values: Numbers, shown: Numbers, own: dict[str, Any], header: Any, spec: DatasetSpec) -> NDArray[np.uint8]:
    """8-bit shades; `shown` is where pixels are no padding."""
    if header.get("ModalityLUTSequence"):
        scaled = apply_modality_lut(values, header).astype(np.float32)
    else:
        scaled = values * np.float32(own["RescaleSlope"] or 1) + np.float32(own["RescaleIntercept"] or 0)
    if spec.dicom.window is not None:
        return _shades(_windowed(scaled, *spec.dicom.window, "LINEAR"))
    if header.get("VOILUTSequence"):
        bits = int(header.VOILUTSequence[0].LUTDescriptor[2])
        return _shades(apply_voi(scaled.astype(np.int32), header).astype(np.float32) / (2**bits - 1))
    center, width = _first(own["WindowCenter"]), _first(own["WindowWidth"])
    if center is not None and width is not None and width > 0:  # some writers say 0 for none
        return _shades(_windowed(scaled, center, width, str(own["VOILUTFunction"] or "LINEAR")))
    return stretch(np.clip(scaled, scaled[shown].min(), scaled[shown].max()) if shown.any() else scaled)


def _windowed(values: Numbers, center: float, width: float, function: str) -> Numbers:
    """Values as shares of full brightness (PS3.3 C.11.2.1.2, C.11.2.1.3)."""
    if function == "SIGMOID":
        return np.asarray(1 / (1 + np.exp(np.clip(-4 * (values - center) / width, -60, 60))))
    if function == "LINEAR_EXACT":
        return (values - center) / max(width, 1e-6) + 0.5
    return (values - (center - 0.5)) / max(width - 1, 1e-6) + 0.5


def _shades(shares: Numbers) -> NDArray[np.uint8]:
    return np.asarray(np.clip(shares, 0, 1) * 255 + 0.5).astype(np.uint8)


def _own(header: Any, number: int) -> dict[str, Any]:
    """Rescale and window: the file's, or in an enhanced file those of this frame, or those that its frames share."""
    wanted = ("RescaleSlope", "RescaleIntercept", "WindowCenter", "WindowWidth", "VOILUTFunction")
    places = [header]
    for groups, place in (("PerFrameFunctionalGroupsSequence", number), ("SharedFunctionalGroupsSequence", 0)):
        if header.get(groups) and place < len(header[groups].value):
            group = header[groups].value[place]
            for name in ("PixelValueTransformationSequence", "FrameVOILUTSequence"):
                places += list(group.get(name) or [])[:1]
    return {name: next((place[name].value for place in places if place.get(name) is not None), None) for name in wanted}


def _padding(values: Numbers, header: Any) -> Numbers:
    """Where the scanner put nothing (PixelPaddingValue, up to PixelPaddingRangeLimit)."""
    low = header.get("PixelPaddingValue")
    ends = [] if low is None else sorted((int(low), int(header.get("PixelPaddingRangeLimit", low))))
    return np.asarray((values >= ends[0]) & (values <= ends[1])) if ends else np.zeros(values.shape, bool)


def _first(value: Any) -> float | None:
    """Of several windows the first, which is the one that viewers show; None where there is none."""
    first = next(iter(value), None) if hasattr(value, "__len__") and not isinstance(value, str) else value
    return None if first is None or first == "" else float(first)


def _burned_in(header: Any) -> str:
    """`yes` when the file says so; `maybe` when it does not say and its modality often has it; else nothing."""
    said = str(header.get("BurnedInAnnotation") or "").upper()
    if said == "YES":
        return "yes"
    return "maybe" if not said and header.get("Modality") in OFTEN_BURNED_IN else ""


def _cannot(header: Any) -> str:
    syntax = header.file_meta.get("TransferSyntaxUID") if hasattr(header, "file_meta") else None
    name = syntax.name if syntax is not None else "no transfer syntax"
    cure = "; install pylibjpeg-libjpeg, whose licence is the GPL" if "Extended" in name else ""
    return f"pixels cannot be decoded ({name}{cure})"
