"""Real files that pydicom and nibabel pack with their tests, and what the job makes of them.

python -m tests.data.real_files      writes tests/data/pictures anew; look at every picture before you keep it
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
from PIL import Image

from job.config.loader import validate
from job.config.schema import DatasetSpec, PrivacySpec
from job.data import Data
from job.data.images import Files, load_anew
from job.data.prepare import prepare

KEPT = Path(__file__).parent / "pictures"
SIDE = 96
"""Longest side in pixels of the pictures that are kept."""
FOLDERS = {
    "pydicom": Path(pydicom.__file__).parent / "data" / "test_files",
    "nibabel": Path(nibabel.__file__).parent / "tests" / "data",
    "nicom": Path(nibabel.__file__).parent / "nicom" / "tests" / "data",
}
ENDINGS = (".dcm", ".nii", ".gz", "")
PICTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "ct-soft-tissue": ("pydicom/CT_small.dcm", {}),
    "ct-medgemma": ("pydicom/CT_small.dcm", {"frames": "medgemma"}),
    "ct-lung": ("pydicom/CT_small.dcm", {"window": [-600, 1500]}),
    "ct-own-window": ("pydicom/J2K_pixelrep_mismatch.dcm", {}),
    "mr": ("pydicom/examples_overlay.dcm", {}),
    "bone-scan": ("pydicom/JPEG2000.dcm", {}),
    "palette": ("pydicom/examples_palette.dcm", {}),
    "ultrasound-ybr": ("pydicom/examples_ybr_color.dcm", {}),
    "colours": ("pydicom/GDCMJ2K_TextGBR.dcm", {}),
    "bars": ("pydicom/SC_rgb_jpeg_dcmtk.dcm", {}),
    "nifti-head": ("nibabel/example4d.nii.gz", {}),
    "nifti-montage": ("nibabel/example4d.nii.gz", {"frames": "montage"}),
    "nifti-anatomical": ("nibabel/anatomical.nii", {}),
}
"""Name of a picture → file, and how it is shown (`dataset.dicom`)."""


def names() -> list[str]:
    """Files that may hold an image: texts, code and other formats are left out, and pages of a directory's records."""
    files = [
        f"{key}/{file.relative_to(folder)}" for key, folder in FOLDERS.items() for file in sorted(folder.rglob("*"))
    ]
    return [
        name
        for name in files
        if Path(name).suffix in ENDINGS and path_of(name).is_file() and "TINY_ALPHA" not in name and "/." not in name
    ]


def path_of(name: str) -> Path:
    key, _, rest = name.partition("/")
    return FOLDERS[key] / rest


def prepared(folder: Path) -> Data:
    """Every file as a row of one table, prepared as a job's."""
    rows = folder / "rows"
    rows.mkdir()
    for key, there in FOLDERS.items():
        (rows / key).symlink_to(there)
    lines = [json.dumps({"image": name, "caption": f"Film {n}."}) for n, name in enumerate(names())]
    (rows / "rows.jsonl").write_text("\n".join(lines))
    tree = {
        "model": {"name_or_path": "none"},
        "output": {"url": str(folder / "output")},
        "dataset": {"path": str(rows), "eval_fraction": 0, "max_bad_fraction": 0.99, "image_max_side": None},
        "privacy": {"burned_in": "allow", "look_for_text": False},
    }
    return prepare(validate(tree), folder / "scratch")


def found(data: Data) -> dict[str, Any]:
    """For each file the size and the mean brightness of its image, or why there is none."""
    known = names()
    images = {known[int(row["id"].removeprefix("row-"))]: row["images"][0] for row in data.train}
    said: dict[str, Any] = {known[row.row]: row.reason for row in data.quarantined}
    said |= {name: [*image.size, round(float(np.asarray(image).mean()), 1)] for name, image in images.items()}
    return dict(sorted(said.items()))


def picture(name: str) -> Image.Image:
    """One of `PICTURES`, small enough to be kept."""
    file, how = PICTURES[name]
    spec = DatasetSpec.model_validate({"path": "d", "dicom": how})
    (image,) = load_anew({"path": str(path_of(file))}, Files(path_of(file).parent, privacy=ALLOWED), spec)[1]
    image.thumbnail((SIDE, SIDE), Image.Resampling.BOX)
    return image


ALLOWED = PrivacySpec(burned_in="allow", look_for_text=False)


def main() -> None:
    warnings.simplefilter("ignore")
    KEPT.mkdir(exist_ok=True)
    for name in PICTURES:
        picture(name).save(KEPT / f"{name}.png", optimize=True)
    with tempfile.TemporaryDirectory() as folder:
        said = found(prepared(Path(folder)))
    lines = (f"  {json.dumps(name)}: {json.dumps(each, ensure_ascii=False)}" for name, each in said.items())
    (KEPT / "expected.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
    sys.stdout.write(f"{len(said)} files, {len(PICTURES)} pictures\n")


if __name__ == "__main__":
    main()
