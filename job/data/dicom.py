"""Decodes DICOM files into images as a reader sees them. Only pixels and the tags in `TECHNICAL` leave the file."""

from __future__ import annotations

import io
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from job.config.schema import DatasetSpec
from job.data.layouts import is_dicom
from job.data.pixels import LARGEST, BadRow, Picture, check_size, stretch
from job.data.stacks import MEDGEMMA, choose, square
from job.data.windows import HOUNSFIELD, Numbers, eight_bits, in_colours, windowed
from job.errors import DataError

try:
    import pydicom
    from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi, pixel_array
    from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
except ImportError as missing:
    raise DataError("dataset: DICOM files need the dicom extra (pip install 'vision-lora-job[dicom]')") from missing

TECHNICAL = {
    "modality": "Modality",
    "body_part": "BodyPartExamined",
    "view": "ViewPosition",
    "laterality": "Laterality",
    "manufacturer": "Manufacturer",
}
"""Column → tag of what may be reported. None of the tags identifies a person, a place or a time."""
OFTEN_BURNED_IN = ("US", "XC", "ES", "SC", "OT")
"""Modalities whose makers often write names into the pixels without saying so."""
SECONDARY = "1.2.840.10008.5.1.4.1.1.7"
"""Secondary capture (PS3.4 B.5); the UIDs of its multi-frame classes start with it too."""
SCREENS = ("SCREEN SAVE", "SCREEN SNAPSHOT", "DOSE_INFO", "PROTOCOL")
"""Values of ImageType with which scanners mark pages of text."""
NO_IMAGES = {"SEG": "1.2.840.10008.5.1.4.1.1.66.4", "RTDOSE": "1.2.840.10008.5.1.4.1.1.481.2"}
"""Modalities and classes (PS3.4 B.5) of objects whose pixels are no image: segmentations, doses."""
USUAL_BITS = 12
"""Bits of most detectors."""
DEFLATED, EXPLICIT = b"1.2.840.10008.1.2.1.99", b"1.2.840.10008.1.2.1\0\0\0"
"""The transfer syntaxes that differ only in deflation (PS3.5 A.5), padded to the same number of bytes."""
LONG = (b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV")
"""VRs whose length field has four bytes (PS3.5 7.1.2)."""
META, HEADER = 2**16, 2**24
"""Bytes of a file that hold its meta group, and inflated bytes that hold everything before the pixels."""


def opened(data: bytes, spec: DatasetSpec) -> tuple[Any, list[int], int]:
    """Opens a DICOM file without decoding it. Returns the pydicom dataset, the frames selected by `spec.dicom.frames`, and the
    bytes of its pixels. Raises BadRow if it is not an image or exceeds the limits of `spec`."""
    try:
        if DEFLATED in data:
            header = pydicom.dcmread(io.BytesIO(inflated(data, HEADER)), stop_before_pixels=True)
            data = inflated(data, HEADER + _check_pixels(header, spec))
        header = pydicom.dcmread(io.BytesIO(data), force=True)  # it may have no preamble
        _check_pixels(header, spec)
        if "TransferSyntaxUID" not in header.file_meta:
            implicit = header.original_encoding[0]
            header.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
        return header, choose(_count(header), spec.dicom.frames), len(header.get("PixelData") or b"")
    except BadRow:
        raise
    except Exception as error:  # pydicom may raise anything on a broken file
        raise BadRow("DICOM: header is broken") from error


def frames(header: Any, chosen: list[int], spec: DatasetSpec) -> list[Picture]:
    """Decodes frames of an opened file, windowed to 8 bits, grey or RGB. Raises BadRow.

    Pixel values pass through the modality LUT or rescale slope, then the VOI LUT or window (PS3.3 C.11.1, C.11.2), then the
    inversion of MONOCHROME1. Without a window, they span the darkest to the brightest value that is not padding.
    """
    try:
        shown = [_frame(header, n, spec) for n in chosen]
        burned_in = _burned_in(header)
    except BadRow:
        raise
    except Exception as error:  # decoders may raise anything on a broken file
        raise BadRow(f"DICOM: {_cannot(header)}") from error
    for picture in shown:
        picture.info |= {"burned_in": burned_in, "default_window": _by_default(header, spec)}
    return shown


def _check_pixels(header: Any, spec: DatasetSpec) -> int:
    """Returns the bytes of all pixels if uncompressed. Raises BadRow."""
    kind = next(
        (name for name, uid in NO_IMAGES.items() if name == header.get("Modality") or uid == header.get("SOPClassUID")),
        "",
    )
    if kind and not spec.dicom.series.every_kind:
        raise BadRow(f"DICOM: a {kind} object, and no image (dataset.dicom.series.every_kind would take it)")
    if "Rows" not in header or "Columns" not in header:
        raise BadRow("DICOM: no image in it")
    width, height, samples = int(header.Columns), int(header.Rows), int(header.get("SamplesPerPixel") or 1)
    check_size(width, height, spec)
    if not (1 <= samples <= 4 and _count(header) >= 1):
        raise BadRow(f"DICOM: {_count(header)} frames of {samples} values per pixel")
    return width * height * samples * _count(header) * (int(header.get("BitsAllocated") or 8) + 7) // 8


def _count(header: Any) -> int:
    return int(header.get("NumberOfFrames") or 1)


def read_header(file: Path, tags: list[str]) -> Any:
    """Reads `tags` of a file with pydicom."""
    with file.open("rb") as stream:
        start = stream.read(META)
        source = io.BytesIO(inflated(start + stream.read(LARGEST), HEADER)) if DEFLATED in start else file
    return pydicom.dcmread(source, stop_before_pixels=True, specific_tags=tags, force=is_dicom(start[:132]))


def inflated(data: bytes, most: int) -> bytes:
    """Rewrites a deflated file in the plain syntax, inflating only its first `most` bytes: pydicom inflates all, however large.
    The result no longer names the deflated syntax. Raises BadRow."""
    place = 132
    while data[place : place + 2] == b"\x02\0":  # elements of the meta group, in explicit VR little endian (PS3.10 7.1)
        head, size = (12, 4) if data[place + 4 : place + 6] in LONG else (8, 2)
        place += head + int.from_bytes(data[place + head - size : place + head], "little")
    meta, rest = data[:place], data[place:]
    if DEFLATED in meta:
        try:
            rest = zlib.decompressobj(-zlib.MAX_WBITS).decompress(rest, min(most, LARGEST))
        except zlib.error as error:
            raise BadRow("DICOM: its deflated part is broken") from error
    return b"".join(part.replace(DEFLATED, EXPLICIT) for part in (meta, rest))


def _frame(header: Any, number: int, spec: DatasetSpec) -> Picture:
    values, own = pixel_array(header, index=number), _own(header, number)
    if header.PhotometricInterpretation == "PALETTE COLOR":
        deep = _bits([header[f"{colour}PaletteColorLookupTableData"].value for colour in ("Red", "Green", "Blue")], 16)
        values = apply_color_lut(values, header)
        shades = values >> (deep - 8) if values.dtype == np.uint16 else values
    elif values.ndim == 3:
        shades = values >> max(int(header.BitsStored) - 8, 0)
    else:
        padding = _padding(values, header)
        shades = _shades(values, ~padding, own, header, spec)
        if header.PhotometricInterpretation == "MONOCHROME1" or header.get("PresentationLUTShape") == "INVERSE":
            shades = 255 - shades
        shades[padding] = 0
    return square(Image.fromarray(shades.astype(np.uint8)), own["PixelSpacing"] or header.get("PixelAspectRatio"))


def _bits(tables: list[Any], declared: int) -> int:
    """Returns the bits that the entries of lookup tables use. Some writers declare 16 and fill 8, 10 or 12."""
    entries = (np.frombuffer(each, "<u2") if isinstance(each, bytes) else np.atleast_1d(each) for each in tables)
    used = max(int(each.max(initial=0)) for each in entries).bit_length()
    return max(used, 8) if used <= USUAL_BITS < declared else declared


def _shades(values: Numbers, shown: Numbers, own: dict[str, Any], header: Any, spec: DatasetSpec) -> NDArray[np.uint8]:
    """Returns 8-bit shades, grey or of three windows; `shown` marks the pixels that are not padding."""
    if header.get("ModalityLUTSequence"):
        scaled = apply_modality_lut(values, header).astype(np.float32)
    else:
        scaled = values * np.float32(own["RescaleSlope"] or 1) + np.float32(own["RescaleIntercept"] or 0)
    if spec.dicom.window is not None:
        return windowed(scaled, *spec.dicom.window)
    if spec.dicom.frames == MEDGEMMA and _in_hounsfield(header):
        return in_colours(scaled)
    if header.get("VOILUTSequence"):
        table = header.VOILUTSequence[0]
        bits = _bits([table.LUTData], int(table.LUTDescriptor[2]))
        return eight_bits(apply_voi(scaled.astype(np.int32), header).astype(np.float32) / (2**bits - 1))
    center, width = _first(own["WindowCenter"]), _first(own["WindowWidth"])
    if center is not None and width is not None and width > 0:  # some writers put 0 for no window
        return windowed(scaled, center, width, str(own["VOILUTFunction"] or "LINEAR"))
    if _by_default(header, spec):
        return windowed(scaled, *HOUNSFIELD)
    return stretch(np.clip(scaled, scaled[shown].min(), scaled[shown].max()) if shown.any() else scaled)


def _by_default(header: Any, spec: DatasetSpec) -> bool:
    """Whether this is an image in Hounsfield units that nothing gives a window."""
    coloured = spec.dicom.frames == MEDGEMMA
    given = spec.dicom.window is not None or header.get("VOILUTSequence") or _first(_own(header, 0)["WindowWidth"])
    return _in_hounsfield(header) and not (given or coloured)


def _in_hounsfield(header: Any) -> bool:
    return header.get("Modality") == "CT" and _own(header, 0)["RescaleIntercept"] is not None


def _own(header: Any, number: int) -> dict[str, Any]:
    """Returns rescale and window values, and the spacing: the file's or, in an enhanced file, those of this frame or shared by
    all frames."""
    wanted = ("RescaleSlope", "RescaleIntercept", "WindowCenter", "WindowWidth", "VOILUTFunction", "PixelSpacing")
    places = [header]
    for groups, place in (("PerFrameFunctionalGroupsSequence", number), ("SharedFunctionalGroupsSequence", 0)):
        if header.get(groups) and place < len(header[groups].value):
            group = header[groups].value[place]
            for name in ("PixelValueTransformationSequence", "FrameVOILUTSequence", "PixelMeasuresSequence"):
                places += list(group.get(name) or [])[:1]
    return {name: next((place[name].value for place in places if place.get(name) is not None), None) for name in wanted}


def _padding(values: Numbers, header: Any) -> Numbers:
    """Marks pixels where the scanner put nothing (PixelPaddingValue, up to PixelPaddingRangeLimit)."""
    low = header.get("PixelPaddingValue")
    both = [] if low is None else [int(low), int(header.get("PixelPaddingRangeLimit", low))]
    info = np.iinfo(values.dtype)  # some writers give the bits of the value the other sign
    ends = sorted((end - info.min) % (info.max - info.min + 1) + info.min for end in both)
    return np.asarray((values >= ends[0]) & (values <= ends[1])) if ends else np.zeros(values.shape, bool)


def _first(value: Any) -> float | None:
    """Returns the first of several windows, which is the one that viewers show; None if there is none."""
    first = next(iter(value), None) if hasattr(value, "__len__") and not isinstance(value, str) else value
    return None if first is None or first == "" else float(first)


def _burned_in(header: Any) -> str:
    """Returns `yes` if the file says so; `maybe` if it does not say and its modality, class or type often has burned-in text;
    else nothing."""
    said = str(header.get("BurnedInAnnotation") or "").strip().upper()
    if said == "YES":
        return "yes"
    captured = f"{header.get('SOPClassUID')}.".startswith(f"{SECONDARY}.")
    screen = any(value in SCREENS for value in header.get("ImageType") or [])
    often = header.get("Modality") in OFTEN_BURNED_IN or captured or screen
    return "maybe" if said != "NO" and often else ""


def _cannot(header: Any) -> str:
    syntax = header.file_meta.get("TransferSyntaxUID") if hasattr(header, "file_meta") else None
    name = getattr(syntax, "name", "no transfer syntax")  # a damaged file may have a list
    cure = "; install pylibjpeg-libjpeg, whose licence is the GPL" if "Extended" in name else ""
    return f"pixels cannot be decoded ({name}{cure})"
