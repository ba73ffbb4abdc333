"""What it costs to decode DICOM in a child process, beside decoding it in this one.

    python benchmarks/decoding.py [--rounds 15]

The same files are decoded both ways in turns, so that other work on the machine meets both alike; the ratios are of processor
time of this process and the child together.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from loader import cpu, picture
from results import append

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if TYPE_CHECKING:
    from job.config.schema import DatasetSpec


def dicom(side: int, syntax: str = "") -> bytes:
    """A radiograph of 12 in 16 bits."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    file, meta = Dataset(), FileMetaDataset()
    file.file_meta, meta.TransferSyntaxUID = meta, ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = file.SOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = file.SOPInstanceUID = generate_uid()
    file.Rows = file.Columns = side
    file.SamplesPerPixel, file.BitsAllocated, file.BitsStored, file.HighBit = 1, 16, 12, 11
    file.PixelRepresentation, file.PhotometricInterpretation = 0, "MONOCHROME2"
    file.WindowCenter, file.WindowWidth = 2048, 4096
    file.PixelData = np.asarray(picture(np.random.default_rng(0), side, 16), dtype="<u2").tobytes()
    if syntax:
        file.compress(syntax)
    stream = io.BytesIO()
    file.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def in_this_process(data: bytes, spec: DatasetSpec) -> list[Any]:
    from job.data.dicom import frames, opened

    return [each.convert("RGB") for each in frames(*opened(data, spec)[:2], spec)]


def in_turns(ways: list[Callable[[], Any]], rounds: int) -> list[float]:
    """The median of seconds of processor time that each way takes."""
    taken: list[list[float]] = [[] for _ in ways]
    for number in range(rounds + 1):
        for way, seconds in zip(ways, taken, strict=True):
            calls, before = 0, cpu()
            while cpu() - before < 0.2:  # the clock of a child ticks a hundred times a second
                way()
                calls += 1
            if number:  # the first loads decoders
                seconds.append((cpu() - before) / calls)
    return [statistics.median(each) for each in taken]


def main() -> None:
    from pydicom.uid import JPEG2000Lossless, RLELossless

    from job.config.schema import DatasetSpec
    from job.data import decoder

    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    warnings.simplefilter("ignore")
    spec = DatasetSpec(path="none")
    before = time.monotonic()
    decoder.decoded_apart(dicom(64), spec)
    append("decoding", "a child's first picture", time.monotonic() - before, "s")
    (child,) = decoder._children().waiting
    for side, name, syntax in (
        (512, "plain", ""),
        (512, "JPEG 2000", JPEG2000Lossless),
        (2500, "plain", ""),
        (2500, "RLE", RLELossless),
        (2500, "JPEG 2000", JPEG2000Lossless),
    ):
        data = dicom(side, syntax)
        here, apart = in_turns(
            [
                partial(in_this_process, data, spec),
                partial(decoder.decoded_apart, data, spec),
            ],
            rounds,
        )
        case, detail = f"{side} px DICOM, {name}", f"{here * 1e3:.1f} and {apart * 1e3:.1f} ms"
        append("decoding", f"{case}: in a child beside in this process", apart / here, "times", detail=detail)
    status = Path(f"/proc/{child.process.pid}/smaps_rollup").read_text()
    held = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("Pss:"))
    append("decoding", "memory of a child that waits", held / 1e3, "MB")
    decoder.dismiss()


if __name__ == "__main__":
    main()
