"""NIfTI volumes, real ones of nibabel's own collection among them, are shown as a reader sees them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from job.config.loader import validate
from job.config.schema import DatasetSpec
from job.data.images import Files, load_anew
from job.data.pixels import BadRow
from job.data.prepare import prepare
from tests.data.test_dicom import as_medgemma

nibabel = pytest.importorskip("nibabel", reason="needs the extra nifti")
THEIRS = Path(nibabel.__file__).parent / "tests" / "data"


def pictures(data: bytes, **dicom: Any) -> list[Image.Image]:
    return load_anew({"bytes": data}, Files(), DatasetSpec.model_validate({"path": "d", "dicom": dicom}))[1]


def made(values: np.ndarray, axes: str = "RAS", zooms: tuple[float, ...] = (1, 1, 1)) -> bytes:
    """A file of values on the axes right, front, head, stored along other axes."""
    orientation = nibabel.orientations.axcodes2ornt(tuple(axes))
    plain = nibabel.Nifti1Image(values, np.diag([*zooms, 1]))
    stored = plain.as_reoriented(
        nibabel.orientations.ornt_transform(nibabel.orientations.axcodes2ornt(tuple("RAS")), orientation)
    )
    return bytes(stored.to_bytes())


def marked() -> np.ndarray:
    """A body with a bright spot to the right, in front, at the head."""
    values = np.full((20, 16, 12), 100, np.int16)
    values[14:, 12:, 9:] = 1000
    return values


@pytest.mark.parametrize("axes", ["RAS", "LPS", "PIR", "SAL"])
def test_the_right_side_is_on_the_left_and_the_front_above_however_it_is_stored(axes: str):
    low, high = (np.asarray(each.convert("L")) for each in pictures(made(marked(), axes), frames=[0, -1]))
    assert (low.shape, low.max()) == ((16, 20), 0)
    assert (high[:4, :6] == 255).all()
    assert high[4:].max() == high[:, 6:].max() == 0


@pytest.mark.parametrize(("zooms", "shape"), [((5, 1, 1), (12, 16)), ((1, 5, 1), (12, 20)), ((1, 1, 5), (16, 20))])
def test_slices_are_those_of_the_acquisition(zooms: tuple[float, ...], shape: tuple[int, int]):
    (picture,) = pictures(made(marked(), "LPS", zooms), frames=[-1])
    assert (picture.height, picture.width) == shape
    shades = np.asarray(picture.convert("L"))
    assert shades[0, 0] == 255
    assert shades[-1, -1] == 0


@pytest.mark.parametrize("nothing", [np.nan, np.inf, -(2**15)])
def test_voxels_without_a_value_are_as_dark_as_air_and_change_no_other(nothing: float):
    scan = np.where(marked() == 1000, 60, -1000).astype(np.float32)
    whole = np.asarray(pictures(made(scan), frames=[-1])[0])
    scan[:3] = nothing
    assert (np.asarray(pictures(made(scan), frames=[-1])[0]) == whole).all()


def test_voxels_that_are_not_square_are_stretched_and_a_window_is_kept():
    (picture,) = pictures(made(marked(), zooms=(1, 1.25, 2)), window=(550, 1800))
    assert picture.size == (20, 20)
    assert np.asarray(picture).min() == round((100 + 350) / 1800 * 255)
    assert pictures(made(marked()), frames="montage")[0].size == (80, 48)
    assert len(pictures(made(marked()), frames=5)) == 5


def test_a_volume_in_hounsfield_units_gets_a_window_of_its_own():
    """NIfTI names no modality, but air is at -1000 in CT alone."""
    units = np.tile(np.linspace(-1000, 1000, 20, dtype=np.int16)[:, None, None], (1, 16, 12))
    (picture,) = pictures(made(units))
    assert picture.info["default_window"]
    expected = np.clip((units[::-1, 0, 0] - 39.5) / 399 + 0.5, 0, 1) * 255
    assert np.abs(np.asarray(picture)[0, :, 0] - expected).max() <= 1
    coloured = pictures(made(units), frames="medgemma")
    assert (len(coloured), coloured[0].info["default_window"]) == (12, False)
    assert np.abs(np.asarray(coloured[3])[5] - as_medgemma(units[::-1, 0, 0].astype(float))).max() <= 1
    for other in (units + 1001, units * 4, units // 2):  # MR, phases, and what was cut
        assert not pictures(made(other.astype(np.int16)))[0].info["default_window"]
        assert np.ptp(np.asarray(pictures(made(other.astype(np.int16)), frames="medgemma")[0]), axis=2).max() == 0


@pytest.mark.parametrize(
    "name", ["anatomical.nii", "functional.nii", "example4d.nii.gz", "example_nifti2.nii.gz", "standard.nii.gz"]
)
def test_real_volumes_have_something_in_them(name: str):
    (picture,) = pictures((THEIRS / name).read_bytes())
    shades = np.asarray(picture.convert("L"))
    assert shades.min() == 0
    assert shades.max() == 255
    if name.startswith("example4d"):  # a head, seen from below: dark corners, a bright middle
        high, wide = shades.shape
        middle = shades[high // 3 : -high // 3, wide // 3 : -wide // 3]
        assert middle.mean() > 2 * np.mean([shades[:5, :5], shades[:5, -5:], shades[-5:, :5], shades[-5:, -5:]])


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda data: data[:400], "NIfTI: file is broken"),
        (lambda data: gzip.compress(data)[:-500], "NIfTI: file is broken"),
        (lambda data: gzip.compress(data[::-1]), "image of an unknown format"),
        (lambda data: gzip.compress(data)[:10] + b"\xff" * 50, "NIfTI: its packed part is broken"),
        (lambda data: gzip.compress(gzip.compress(data)), "image of an unknown format"),
    ],
)
def test_what_cannot_be_shown_is_a_bad_row(spoil: Any, reason: str):
    data = made(np.random.default_rng(0).integers(0, 900, (20, 16, 12), dtype=np.int16))
    with pytest.raises(BadRow, match=reason):
        pictures(spoil(data))
    with pytest.raises(BadRow, match="names a frame that it does not have"):
        pictures(data, frames=[12])


def test_tables_name_volumes_with_or_without_their_endings(tree: dict[str, Any], tmp_path: Path):
    folder = tmp_path / "set"
    (folder / "imagesTr").mkdir(parents=True)
    for n in range(2):
        (folder / "imagesTr" / f"case_{n}.nii.gz").write_bytes(gzip.compress(made(marked() + n)))
    rows = [{"image": f"case_{n}", "caption": f"c{n}"} for n in range(2)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree["dataset"] = {"path": str(folder), "eval_fraction": 0, "dicom": {"frames": "medgemma"}}
    data = prepare(validate(tree), tmp_path / "scratch")
    assert [len(row["images"]) for row in data.train] == [12, 12]
    assert [part.get("text") for part in data.train[0]["messages"][0]["content"]][:4] == [
        None,
        "SLICE 1",
        None,
        "SLICE 2",
    ]
    assert data.facts.source.endswith("images in image found in imagesTr/")
