"""DICOM files → pictures as a reader sees them. Only pixels leave the file, and the few tags of `TECHNICAL`."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from job.data.images import BadRow, Picture, check_size, stretch
from job.spec import DatasetSpec

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
        import pydicom
    except ImportError as error:
        raise BadRow("DICOM: install the dicom extra to read it") from error
    try:
        header = pydicom.dcmread(io.BytesIO(data))
        if "Rows" not in header or "Columns" not in header:
            raise BadRow("DICOM: no image in it")
        check_size(int(header.Columns), int(header.Rows), spec)
        count = int(header.get("NumberOfFrames") or 1)
        shown = [_frame(header, n, spec) for n in choose(count, spec.dicom.frames)]
    except BadRow:
        raise
    except Exception as error:  # what a decoder raises for a broken file is its own affair
        raise BadRow(f"DICOM: {_cannot(header) if 'header' in locals() else 'header is broken'}") from error
    for picture in shown:
        picture.info["burned_in"] = _burned_in(header)
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
    from pydicom.pixels import apply_color_lut, pixel_array

    values = pixel_array(header, index=number)
    if header.PhotometricInterpretation == "PALETTE COLOR":
        values = apply_color_lut(values, header)
        return Image.fromarray((values >> 8 if values.dtype == np.uint16 else values).astype(np.uint8))
    if values.ndim == 3:
        return Image.fromarray((values >> max(int(header.BitsStored) - 8, 0)).astype(np.uint8))
    shades, padding = _grey(values, _own(header, number), header, spec)
    if header.PhotometricInterpretation == "MONOCHROME1" or header.get("PresentationLUTShape") == "INVERSE":
        shades = 255 - shades
    if padding is not None:
        shades[padding] = 0
    return Image.fromarray(shades).convert("RGB")


def _grey(
    values: Numbers, own: dict[str, Any], header: Any, spec: DatasetSpec
) -> tuple[NDArray[np.uint8], Numbers | None]:
    """8-bit shades, and where the pixels are padding."""
    from pydicom.pixels import apply_modality_lut, apply_voi

    padding = _padding(values, header)
    if header.get("ModalityLUTSequence"):
        scaled = apply_modality_lut(values, header).astype(np.float32)
    else:
        scaled = values * np.float32(own["RescaleSlope"] or 1) + np.float32(own["RescaleIntercept"] or 0)
    if spec.dicom.window is not None:
        return _shades(_windowed(scaled, *spec.dicom.window, "LINEAR")), padding
    if header.get("VOILUTSequence"):
        table = header.VOILUTSequence[0]
        looked_up = apply_voi(scaled.astype(np.int32), header).astype(np.float32)
        return _shades(looked_up / (2 ** int(table.LUTDescriptor[2]) - 1)), padding
    if own["WindowCenter"] is not None and own["WindowWidth"] is not None:
        center, width = _first(own["WindowCenter"]), _first(own["WindowWidth"])
        return _shades(_windowed(scaled, center, width, str(own["VOILUTFunction"] or "LINEAR"))), padding
    if padding is not None and not padding.all():
        scaled = np.clip(scaled, scaled[~padding].min(), scaled[~padding].max())
    return stretch(scaled), padding


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


def _padding(values: Numbers, header: Any) -> Numbers | None:
    """Where the scanner put nothing (PixelPaddingValue, up to PixelPaddingRangeLimit)."""
    low = header.get("PixelPaddingValue")
    if low is None:
        return None
    high = header.get("PixelPaddingRangeLimit")
    ends = sorted((int(low), int(low if high is None else high)))
    return np.asarray((values >= ends[0]) & (values <= ends[1]))


def _first(value: Any) -> float:
    """Of several windows the first, which is the one that viewers show."""
    return float(value[0]) if hasattr(value, "__len__") and not isinstance(value, str) else float(value)


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
