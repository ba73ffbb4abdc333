"""Reads slices of NIfTI volumes as a reader sees them: the patient's right on the left, the front or the head above."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from job.config.schema import DatasetSpec
from job.data.pixels import LARGEST, BadRow, Picture, check_size
from job.data.stacks import MEDGEMMA, choose, square
from job.data.windows import HOUNSFIELD, eight_bits, in_colours, windowed
from job.errors import DataError

GZIP = b"\x1f\x8b"
MAGIC = {344: (b"n+1\0",), 4: (b"n+2\0",)}
"""Place and text of the magic number of both versions (nifti.nimh.nih.gov)."""
SHARES = (0.5, 99.5)
"""Percentiles of the values that become black and white without `dataset.dicom.window`: a few voxels of an MR image are far
brighter than all others."""
AIR = (-3100, -900)
"""Bounds of the lowest value of a volume in Hounsfield units: air, or what scanners put outside their circle. NIfTI names no
modality, and no other has such values."""
NO_VALUE = -(2**15)
THICK = 1.5
"""How much thicker than wide a voxel is along the axis in which a volume was acquired slice by slice."""
AXIAL = 2


def is_nifti(start: bytes) -> bool:
    """Whether a file of which this is the first KB is NIfTI, or packed, as nothing else is that may hold an image."""
    return start.startswith(GZIP) or any(start[place : place + 4] in magic for place, magic in MAGIC.items())


def frames(data: bytes, spec: DatasetSpec) -> list[Picture]:
    """Returns the slices that `spec.dicom.frames` selects, of the first volume if there are several. Slices are those of the
    acquisition: along the axis of the thickest voxels, or axial. They are counted from the feet, the back or the left. Raises
    BadRow."""
    try:
        from nibabel import Nifti1Image, Nifti2Image, as_closest_canonical
    except ImportError as missing:
        raise DataError("dataset: NIfTI needs the nifti extra (pip install 'vision-lora-job[nifti]')") from missing
    whole = _inflated(data) if data.startswith(GZIP) else data
    if not is_nifti(whole[:352]) or whole.startswith(GZIP):
        raise BadRow("image of an unknown format")
    try:
        image: Any = (Nifti1Image if whole[344:348] in MAGIC[344] else Nifti2Image).from_bytes(whole)
        volume = as_closest_canonical(image)
        shape, zooms = [*volume.shape[:3], 1, 1][:3], [*volume.header.get_zooms()[:3], 1.0, 1.0][:3]
        axis = int(np.argmax(zooms)) if max(zooms) > THICK * min(zooms) else AXIAL
        across, down = (each for each in range(3) if each != axis)
        check_size(shape[across], shape[down], spec)
        values = np.asarray(volume.dataobj[(..., *[0] * (len(volume.shape) - 3))])
        stack = np.moveaxis(values.reshape(shape), axis, 0)
        if stack.dtype.fields or np.iscomplexobj(stack):
            raise BadRow("NIfTI: voxels are colours or complex numbers")
        there = stack[_there(stack)]
        lowest = float(there.min()) if there.size else 0.0
        chosen = [_numbers(stack[n], lowest) for n in choose(shape[axis], spec.dicom.frames)]
        in_hounsfield = AIR[0] <= lowest <= AIR[1]
    except BadRow:
        raise
    except Exception as error:  # nibabel may raise anything on a broken file
        raise BadRow("NIfTI: file is broken") from error
    # Axes point to the right, the front and the head (RAS+): both sides of the picture begin at their ends.
    shades = _shades(np.stack([each[::-1, ::-1].T for each in chosen]), in_hounsfield, spec)
    spacing = (float(zooms[down]), float(zooms[across]))
    pictures = [square(Image.fromarray(each).convert("RGB"), spacing) for each in shades]
    by_default = in_hounsfield and not (spec.dicom.window or spec.dicom.frames == MEDGEMMA)
    for picture in pictures:
        picture.info["default_window"] = by_default
    return pictures


def _there(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Where a volume has values: not where programs wrote NaN, infinity or the lowest number of 16 bits for no value."""
    return np.asarray(np.isfinite(values) & (values != NO_VALUE))


def _numbers(values: NDArray[Any], lowest: float) -> NDArray[np.float32]:
    """Returns voxels, and where there is no value 0 or, if that is lower, `lowest`, that of the volume: air in a CT."""
    return np.where(_there(values), values, min(lowest, 0)).astype(np.float32)


def _shades(values: NDArray[np.float32], in_hounsfield: bool, spec: DatasetSpec) -> NDArray[np.uint8]:
    """Returns slices of shape (slices, height, width) as grey of that shape, or as three windows with 3 as the last side."""
    if spec.dicom.window is not None:
        return windowed(values, *spec.dicom.window, "LINEAR_EXACT")
    if in_hounsfield:
        return in_colours(values) if spec.dicom.frames == MEDGEMMA else windowed(values, *HOUNSFIELD)
    low, high = np.percentile(values, SHARES)
    high = high if high > low else values.max()
    return eight_bits((values - low) / max(high - low, 1e-9))


def _inflated(data: bytes) -> bytes:
    unpacker = zlib.decompressobj(16 + zlib.MAX_WBITS)
    try:
        whole = unpacker.decompress(data, LARGEST + 1)
    except zlib.error as error:
        raise BadRow("NIfTI: its packed part is broken") from error
    if len(whole) > LARGEST:
        raise BadRow(f"NIfTI: over {LARGEST / 1e9:g} GB unpacked")
    return whole
