"""DICOM as pydicom's own test files have it: every kind of pixel, and nobody's name."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from job.config.loader import validate
from job.config.schema import DatasetSpec, PrivacySpec
from job.data.facts import QuarantinedRow
from job.data.images import Files, load_anew
from job.data.pixels import BadRow
from job.data.prepare import prepare
from job.data.stacks import choose, montage
from job.errors import DataError, SpecError
from job.planning.facts import Facts
from job.planning.warnings import warnings

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


def theirs(name: str) -> bytes:
    path = get_testdata_file(name, download=False)
    assert path, name
    return Path(path).read_bytes()


def spec(**dicom: Any) -> DatasetSpec:
    return DatasetSpec.model_validate({"path": "d", "dicom": dicom})


def pictures(data: bytes, **dicom: Any) -> list[Image.Image]:
    return load_anew({"bytes": data}, Files(privacy=PrivacySpec(burned_in="allow")), spec(**dicom))[1]


def shown(data: bytes, **dicom: Any) -> np.ndarray:
    (picture,) = pictures(data, **dicom)
    assert picture.mode == "RGB"
    return np.asarray(picture)


def made(pixels: np.ndarray, **tags: Any) -> bytes:
    """A small file of our own; `pixels` are uint16 of shape (rows, columns) or (frames, rows, columns)."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = CTImageStorage, ExplicitVRLittleEndian
    meta.MediaStorageSOPInstanceUID = generate_uid()
    file = Dataset()
    file.file_meta = meta
    file.SOPClassUID, file.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    file.Rows, file.Columns = pixels.shape[-2:]
    if pixels.ndim == 3:
        file.NumberOfFrames = len(pixels)
    file.SamplesPerPixel, file.BitsAllocated, file.BitsStored, file.HighBit = 1, 16, 16, 15
    file.PixelRepresentation, file.PhotometricInterpretation = 0, "MONOCHROME2"
    file.PixelData = pixels.astype("<u2").tobytes()
    for name, value in tags.items():
        setattr(file, name, value)
    stream = io.BytesIO()
    file.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


RAMP = np.arange(0, 1024, 4).reshape(16, 16)

DECODED = [
    "CT_small.dcm",
    "MR_small_bigendian.dcm",
    "MR_small_RLE.dcm",
    "MR_small_jp2klossless.dcm",
    "MR_small_jpeg_ls_lossless.dcm",
    "JPEG2000.dcm",
    "693_J2KI.dcm",
    "image_dfl.dcm",
    "SC_rgb_jpeg_gdcm.dcm",
    "SC_rgb_jpeg_dcmtk.dcm",
    "SC_rgb_rle_16bit.dcm",
    "SC_rgb_rle_32bit.dcm",
    "SC_ybr_full_422_uncompressed.dcm",
    "examples_palette.dcm",
    "examples_rgb_color.dcm",
    "examples_jpeg2k.dcm",
]


@pytest.mark.parametrize("name", DECODED)
def test_every_transfer_syntax_gives_a_picture_with_something_in_it(name: str):
    picture = shown(theirs(name))
    assert picture.dtype == np.uint8
    assert picture.std() > 5


def test_compressed_files_show_what_the_plain_one_does():
    plain = shown(theirs("MR_small.dcm"))
    for name in (
        "MR_small_RLE.dcm",
        "MR_small_jp2klossless.dcm",
        "MR_small_jpeg_ls_lossless.dcm",
        "MR_small_bigendian.dcm",
    ):
        assert (shown(theirs(name)) == plain).all()
    red = shown(theirs("SC_rgb_jpeg_dcmtk.dcm"))[5, 50]  # stored as YBR; its first bar is red
    assert red[0] > 240
    assert red[1:].max() < 20


def test_windows_follow_the_standard():
    """PS3.3 C.11.2.1.2 in words: the center less a half is the middle, the width less one is the whole range."""
    linear = shown(made(RAMP, WindowCenter=400, WindowWidth=201))[..., 0]
    by_hand = np.clip(((RAMP - 399.5) / 200 + 0.5) * 255 + 0.5, 0, 255).astype(np.uint8)
    assert (linear == by_hand).all()
    exact = shown(made(RAMP, WindowCenter=400, WindowWidth=200, VOILUTFunction="LINEAR_EXACT"))[..., 0]
    assert (exact[RAMP <= 300] == 0).all()
    assert (exact[RAMP >= 500] == 255).all()
    soft = shown(made(RAMP, WindowCenter=400, WindowWidth=200, VOILUTFunction="SIGMOID"))[..., 0].ravel()
    assert abs(int(soft[100]) - 128) <= 1
    assert (np.diff(soft.astype(int)) >= 0).all()
    ours = shown(made(RAMP, WindowCenter=1, WindowWidth=2), window=(400, 201))[..., 0]
    assert (ours == by_hand).all()
    assert (shown(made(RAMP, WindowCenter=0, WindowWidth=0)) == shown(made(RAMP))).all()


def test_windows_agree_with_pydicom():
    from pydicom.pixels import apply_modality_lut, apply_voi_lut, pixel_array

    for name in ("CT_small.dcm", "MR_small.dcm"):
        data = theirs(name)
        header = pydicom.dcmread(io.BytesIO(data))
        header.WindowCenter, header.WindowWidth = (40, 400) if name[:2] == "CT" else (600, 1600)
        stream = io.BytesIO()
        header.save_as(stream)
        values = apply_voi_lut(apply_modality_lut(pixel_array(io.BytesIO(data)), header), header)
        slope, base = float(header.get("RescaleSlope", 1)), float(header.get("RescaleIntercept", 0))
        low, high = (slope * 2**15 * sign + base - (sign > 0) for sign in (-1, 1))
        if not header.PixelRepresentation:
            low, high = base, slope * 65535 + base
        reference = np.clip((values - low) / (high - low) * 255, 0, 255)
        assert np.abs(shown(stream.getvalue())[..., 0] - reference).max() < 2


def test_rescale_and_monochrome1_are_applied():
    scaled = shown(made(RAMP, RescaleSlope=2, RescaleIntercept=-1000, WindowCenter=0.5, WindowWidth=1001))[..., 0]
    assert (scaled == shown(made(RAMP, WindowCenter=500.25, WindowWidth=501))[..., 0]).mean() > 0.9
    plain = shown(made(RAMP))
    assert (shown(made(RAMP, PhotometricInterpretation="MONOCHROME1")) == 255 - plain).all()


def test_padding_is_black_and_does_not_set_the_range():
    padded = RAMP + 1000
    padded[0] = 0
    for kind in ("MONOCHROME1", "MONOCHROME2"):
        picture = shown(made(padded, PixelPaddingValue=0, PhotometricInterpretation=kind))[..., 0]
        assert (picture[0] == 0).all()
        assert picture[1:].max() == 255
        assert picture[1:].min() == 0


def test_an_enhanced_file_has_its_window_in_each_frame():
    def group(center: int) -> Dataset:
        frame, voi = Dataset(), Dataset()
        voi.WindowCenter, voi.WindowWidth = center, 201
        frame.FrameVOILUTSequence = [voi]
        return frame

    data = made(np.stack([RAMP, RAMP]), PerFrameFunctionalGroupsSequence=[group(200), group(800)])
    first, second = (np.asarray(pictures(data, frames=[n])[0])[..., 0] for n in (0, 1))
    assert first.mean() > second.mean() + 100


def test_frames_of_an_enhanced_file_are_in_the_order_in_which_they_lie():
    def lying(height: float) -> Dataset:
        group, place = Dataset(), Dataset()
        place.ImagePositionPatient = [0, 0, height]
        group.PlanePositionSequence = [place]
        return group

    shared, turned = Dataset(), Dataset()
    turned.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    shared.PlaneOrientationSequence = [turned]
    stack = np.stack([np.full((16, 16), n * 40) for n in range(3)])
    tags = {
        "WindowCenter": 100,
        "WindowWidth": 201,
        "PerFrameFunctionalGroupsSequence": [*map(lying, (20.0, 0.0, 10.5))],
    }
    both = [made(stack, **tags, SharedFunctionalGroupsSequence=[shared]), made(stack, **tags)]
    shades = [[int(np.asarray(each)[0, 0, 0]) for each in pictures(data, frames=[0, 1, 2])] for data in both]
    assert shades == [[52, 103, 1], [1, 52, 103]]  # without an orientation, as they are stored


def test_frames_are_chosen():
    assert choose(30, "middle") == [15]
    assert choose(30, [0, -1]) == [0, 29]
    spread = choose(300, "montage")
    assert (len(spread), spread[0] > 5, spread[-1] < 295) == (16, True, True)
    with pytest.raises(BadRow, match="names a frame that it does not have"):
        choose(3, [3])
    stack = np.stack([np.full((16, 16), n * 10) for n in range(9)])
    data = made(stack, WindowCenter=40, WindowWidth=81)
    assert [np.asarray(p)[0, 0, 0] for p in pictures(data, frames=[1, 7])] == [33, 225]
    assert shown(data, frames="montage").shape == (48, 48, 3)
    assert shown(theirs("examples_ybr_color.dcm"), frames="montage").shape == (960, 1280, 3)
    with pytest.raises(BadRow, match="names a frame"):
        pictures(data, frames=[9])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("MR_truncated.dcm", r"pixels cannot be decoded \(Explicit VR Little Endian\)"),
        ("JPGExtended.dcm", r"JPEG Extended.*; install pylibjpeg-libjpeg, whose licence is the GPL"),
        ("rtplan.dcm", "no image in it"),
        ("SC_rgb_small_odd.dcm", "image too small: 3×3"),
    ],
)
def test_what_cannot_be_shown_is_a_bad_row(name: str, reason: str):
    with pytest.raises(BadRow, match=reason):
        load_anew({"bytes": theirs(name)}, Files(), spec())


def test_cut_files_are_bad_rows():
    data = theirs("CT_small.dcm")
    for size in (133, 400, 1500, 20000):
        with pytest.raises(BadRow):
            load_anew({"bytes": data[:size]}, Files(), spec())
    modality = b"\x08\x00\x60\x00C"  # its type is broken, which shows when it is asked for
    with pytest.raises(BadRow):
        load_anew({"bytes": made(RAMP, Modality="CR").replace(modality + b"S", modality + b"\xb8")}, Files(), spec())


SECRET = "Zebedee^Quackenbush"


def tree_of(folder: Path, reports: list[dict[str, str]], files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    head = ",".join(reports[0])
    (folder / "reports.csv").write_text("\n".join([head, *(",".join(row.values()) for row in reports)]) + "\n")


@pytest.fixture
def prepared(tree: dict[str, Any], tmp_path: Path):
    def prepare_it(**dataset: Any):
        tree["dataset"] = {"path": str(tmp_path / "d"), "answer_column": "report", "eval_fraction": 0} | dataset
        tree.setdefault("privacy", {"look_for_text": False})
        return prepare(validate(tree), tmp_path / "scratch")

    return prepare_it


def study(n: int, patient: str, modality: str, slices: int) -> dict[str, bytes]:
    tags = {
        "StudyInstanceUID": f"1.2.{n}",
        "SeriesInstanceUID": f"1.2.{n}.1",
        "PatientID": patient,
        "PatientName": SECRET,
    }
    tags |= {"PatientBirthDate": "19010203", "Modality": modality, "WindowCenter": 512, "WindowWidth": 1024}
    return {
        f"st{n}/{k:03d}": made(
            RAMP.T if k % 2 else RAMP, InstanceNumber=slices - k, SOPInstanceUID=f"1.2.{n}.1.{k}", **tags
        )
        for k in range(slices)
    }


def test_a_tree_and_its_reports_are_joined(tmp_path: Path, prepared):
    files = study(1, "P1", "CT", 9) | study(2, "P2", "CR", 2) | study(3, "P1", "CR", 1) | study(4, "P3", "CR", 1)
    reports = [{"StudyUID": f"1.2.{n}", "report": f"Report {n}."} for n in (1, 2, 3)]
    tree_of(tmp_path / "d", reports, files)
    (tmp_path / "d" / "DICOMDIR").write_bytes(b"no image")
    (tmp_path / "d" / "cut.dcm").write_bytes(next(iter(files.values()))[:400])
    data = prepared(instruction="{modality}")
    rows = {row["reference"]: row for row in data.train}
    assert [len(rows[f"Report {n}."]["images"]) for n in (1, 2, 3)] == [1, 2, 1]  # the middle slice; both views; one
    assert rows["Report 1."]["messages"][0]["content"][-1]["text"] == "CT"
    assert rows["Report 1."]["unit"] == rows["Report 3."]["unit"] != rows["Report 2."]["unit"]
    assert "13 DICOM images joined with 3 reports by StudyInstanceUID (column StudyUID), 1 images without a report" in (
        data.facts.source
    )
    assert "1 damaged files left out (cut.dcm among them)" in data.facts.source
    assert data.facts.decoders > 0
    assert data.facts.grouped
    assert len(prepared(dicom={"frames": [0, 4]}).train[0]["images"]) == 2
    assert prepared(dicom={"frames": "montage"}).train[0]["images"][0].size == (48, 48)


def test_no_tag_of_a_patient_leaves_a_file(tmp_path: Path, prepared):
    tree_of(tmp_path / "d", [{"study": "1.2.1", "report": "R"}], study(1, "MRN-4711", "CR", 1))
    data = prepared(instruction="{modality}")
    (row,) = data.train
    said = str(data.facts) + str([{**row, "images": [picture.info for picture in row["images"]]}])
    written = b"".join(path.read_bytes() for path in (tmp_path / "scratch").rglob("*") if path.is_file())
    for secret in ("4711", "Zebedee", "Quackenbush", "19010203"):
        assert secret not in said
        assert secret.encode() not in written
    for field in ("PatientName", "_patient"):
        with pytest.raises(DataError, match="no such column"):
            prepared(instruction=f"{{{field}}}")


def test_words_in_the_pixels_are_warned_about(tmp_path: Path, prepared, tree: dict[str, Any]):
    files = {"a.dcm": made(RAMP, Modality="US"), "b.dcm": made(RAMP.T, Modality="CR", BurnedInAnnotation="YES")}
    files["c.dcm"] = made(RAMP + 1, Modality="US", BurnedInAnnotation="NO")
    tree_of(tmp_path / "d", [{"file": name, "report": "R"} for name in files], files)
    tree["privacy"] = {"burned_in": "allow"}
    data = prepared()
    assert (data.facts.burned_in_yes, data.facts.burned_in_maybe) == (1, 1)


def test_a_report_without_its_file_and_a_table_that_names_none(tmp_path: Path, prepared):
    tree_of(
        tmp_path / "d", [{"study": "1.2.1", "report": "R"}, {"study": "1.2.9", "report": "S"}], study(1, "P", "CR", 1)
    )
    assert prepared(max_bad_fraction=0.5).quarantined == [QuarantinedRow(1, "no image")]
    with (tmp_path / "d" / "reports.csv").open("a") as table:
        table.write("1.2.1,too,many\n")
    assert [row.row for row in prepared(max_bad_fraction=0.7).quarantined] == [1, 2]
    tree_of(tmp_path / "d", [{"study": "9", "report": "R"}], {})
    with pytest.raises(DataError, match=r"no column of the reports names a DICOM file.*the columns are study, report"):
        prepared()
    (tmp_path / "d" / "more.csv").write_text("a\n1\n")
    with pytest.raises(DataError, match=r"2 tables; name the table of reports in dataset\.dicom\.reports"):
        prepared()


def test_rows_of_any_table_may_name_dicom_files(tmp_path: Path, prepared):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "x.dcm").write_bytes(theirs("CT_small.dcm"))
    (tmp_path / "d" / "metadata.jsonl").write_text(json.dumps({"file_name": "x.dcm", "report": "R"}) + "\n")
    assert prepared().train[0]["images"][0].size == (128, 128)


def test_a_montage_fits_pictures_of_different_sizes():
    from PIL import Image

    assert montage([Image.new("RGB", (600, 300)), Image.new("RGB", (10, 20)), Image.new("RGB", (5, 5))]).size == (
        1024,
        512,
    )


SCOUT = {"Modality": "CT", "ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}
CAPTURE = {"Modality": "CT", "SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"}
NOISE = [
    SCOUT,
    CAPTURE,
    CAPTURE | {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7.4"},
    {"Modality": "SEG"},
    {"Modality": "RTDOSE"},
    {"Modality": "CT", "ImageType": ["DERIVED", "SECONDARY", "SCREEN SAVE"]},
]


PLANES: dict[int, dict[str, Any]] = {
    1: {"ImageOrientationPatient": [1, 0, 0, 0, 1, 0], "ImagePositionPatient": [0, 0, 0]},
    2: {
        "ImageOrientationPatient": [1, 0, 0, 0, 0.1, -0.99],
        "ImagePositionPatient": [0, 0, 0],
        "BodyPartExamined": "CHEST",
        "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
    },
}


def ct_study() -> dict[str, bytes]:
    """Two series of slices, the second longer, and one file of each kind that no report is about."""
    files = {}
    described = {1: "AX LUNG", 2: "COR"}
    for number, slices in ((1, 3), (2, 5)):
        for k in range(slices):
            tags = {"SeriesInstanceUID": f"1.3.{number}", "SeriesNumber": number, "Modality": "CT"}
            tags |= {"SeriesDescription": described[number], "InstanceNumber": k, **PLANES[number]}
            files[f"{number}/{k}.dcm"] = made(RAMP + 50 * number + k, WindowCenter=600, WindowWidth=1200, **tags)
    for number, tags in enumerate(NOISE):
        where = {"SeriesInstanceUID": f"1.3.9.{number}", "SeriesNumber": 90 + number}
        files[f"noise/{number}.dcm"] = made(RAMP.T + number, WindowCenter=600, WindowWidth=1200, **where, **tags)
    return {name: stamped(data, StudyInstanceUID="1.3", PatientID="P") for name, data in files.items()}


def stamped(data: bytes, **tags: Any) -> bytes:
    header = pydicom.dcmread(io.BytesIO(data))
    for name, value in tags.items():
        setattr(header, name, value)
    stream = io.BytesIO()
    header.save_as(stream)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("rule", "darkest"),
    [
        ({}, [51, 102]),
        ({"take": "first"}, [51]),
        ({"take": "largest"}, [102]),
        ({"description": "^ax"}, [51]),
        ({"body_part": ["chest"]}, [102]),
        ({"orientation": ["axial"]}, [51]),
        ({"orientation": ["coronal", "axial"], "image_type": ["original"]}, [102]),
        ({"modality": ["CT"], "description": "cor|ax"}, [51, 102]),
        ({"every_kind": True, "description": "ax|^$"}, [51, 0, 1, 2, 3, 4, 5]),
        ({"every_kind": True, "modality": ["SEG"]}, [3]),
    ],
)
def test_a_study_gives_the_series_that_the_rule_takes(
    tmp_path: Path, prepared, rule: dict[str, Any], darkest: list[int]
):
    """Each picture is known by its darkest value, which its window keeps."""
    tree_of(tmp_path / "d", [{"study": "1.3", "report": "R"}], ct_study())
    data = prepared(dicom={"series": rule})
    (row,) = data.train
    expected = [int(np.clip(((value - 599.5) / 1199 + 0.5) * 255 + 0.5, 0, 255)) for value in darkest]
    assert [int(np.asarray(picture).min()) for picture in row["images"]] == expected
    said = "; left out: 2 secondary captures, 1 " if not rule.get("every_kind") else ""
    assert ("left out" in data.facts.source, said in data.facts.source) == (bool(said), True)


def test_what_a_report_names_itself_is_taken_whatever_it_is(tmp_path: Path, prepared):
    tree_of(tmp_path / "d", [{"file": f"noise/{n}.dcm", "report": f"R{n}"} for n in range(len(NOISE))], ct_study())
    data = prepared(max_bad_fraction=0.4)
    refused = {row.row: row.reason for row in data.quarantined}
    assert (len(data.train), list(refused)) == (len(NOISE) - 2, [3, 4])
    assert refused[3].startswith("DICOM: a SEG object, and no image")
    assert len(prepared(dicom={"series": {"every_kind": True}}).train) == len(NOISE)
    (tmp_path / "d" / "reports.csv").write_text("series_uid,report\n1.3.9.1,R\n")
    assert len(prepared().train) == 1


def test_a_report_of_which_nothing_is_taken_says_why(tmp_path: Path, prepared):
    files = {name: data for name, data in ct_study().items() if name == "noise/1.dcm"}
    tree_of(
        tmp_path / "d",
        [{"study": "1.3", "report": "R"}, {"study": "1.2.1", "report": "S"}],
        files | study(1, "P", "CR", 1),
    )
    data = prepared(max_bad_fraction=0.5)
    assert data.quarantined == [QuarantinedRow(0, "no image in the series that dataset.dicom.series selects")]


def test_a_rule_that_is_no_expression_is_refused(tree: dict[str, Any]):
    tree["dataset"]["dicom"] = {"series": {"description": "ax("}}
    with pytest.raises(SpecError, match=r"dataset\.dicom\.series\.description: not a regular expression"):
        validate(tree)


def bare(name: str) -> bytes:
    """One of theirs without preamble and meta group."""
    header = pydicom.dcmread(io.BytesIO(theirs(name)))
    header.preamble, header.file_meta = None, FileMetaDataset()
    stream = io.BytesIO()
    header.save_as(stream, implicit_vr="implicit" in name, little_endian=True)
    return stream.getvalue()


@pytest.mark.parametrize("name", ["CT_small.dcm", "MR_small_implicit.dcm", "examples_palette.dcm"])
def test_a_file_without_preamble_shows_the_same(tmp_path: Path, prepared, name: str):
    data = bare(name)
    assert data[128:132] != b"DICM"
    assert (shown(data) == shown(theirs(name))).all()
    tree_of(tmp_path / "d", [{"file": "IM0001", "report": "R"}], {"IM0001": data, "notes.txt": b"no image"})
    facts = prepared().facts
    assert "1 DICOM images joined with 1 reports by path" in facts.source
    assert "damaged" not in facts.source


def lut(values: np.ndarray, bits: int) -> Dataset:
    table = Dataset()
    table.LUTDescriptor, table.LUTData = [len(values), 0, bits], values.astype("<u2").tobytes()
    table["LUTDescriptor"].VR, table["LUTData"].VR = "US", "OW"
    return table


@pytest.mark.parametrize("bits", [10, 12])
def test_a_table_that_declares_more_bits_than_it_fills_is_as_bright(bits: int):
    curve = np.arange(1024) * (2**bits - 1) // 1023
    plain, wide = (shown(made(RAMP, VOILUTSequence=[lut(curve, each)])) for each in (bits, 16))
    assert (plain == wide).all()
    assert (plain.min(), plain.max() > 250) == (0, True)
    deep = shown(made(RAMP, VOILUTSequence=[lut(curve * 2 ** (16 - bits) // 4, 16)]))
    assert deep.max() < 70  # a table of 14 bits in 16 is meant


def test_a_palette_of_8_bits_in_16_is_not_black():
    colours = {}
    for colour, step in (("Red", 1), ("Green", 2), ("Blue", 3)):
        entries = (np.arange(1024) * step // 4 % 256).astype("<u2")
        colours[f"{colour}PaletteColorLookupTableDescriptor"] = [1024, 0, 16]
        colours[f"{colour}PaletteColorLookupTableData"] = entries.tobytes()
    picture = shown(made(RAMP, PhotometricInterpretation="PALETTE COLOR", **colours))
    assert (picture[..., 0] == RAMP // 4).all()
    assert (picture[..., 1] == RAMP // 2 % 256).all()


@pytest.mark.parametrize("value", [63536, -2000])
def test_padding_of_the_other_sign_is_found(value: int):
    padded = RAMP + 1000
    padded[0] = 63536
    file = pydicom.dcmread(io.BytesIO(made(padded)))
    file.add_new("PixelPaddingValue", "US" if value > 0 else "SS", value)
    file.save_as(stream := io.BytesIO())
    picture = shown(stream.getvalue())[..., 0]
    assert (picture[0] == 0).all()
    assert picture[1:].max() == 255


@pytest.mark.parametrize(
    ("tags", "size"),
    [
        ({"PixelSpacing": [2, 1]}, (16, 32)),
        ({"PixelSpacing": [0.5, 1]}, (32, 16)),
        ({"PixelAspectRatio": [3, 2]}, (16, 24)),
        ({"PixelSpacing": [1, 1], "PixelAspectRatio": [3, 2]}, (16, 16)),
        ({"PixelSpacing": [1, 0.999]}, (16, 16)),
        ({"PixelSpacing": [500, 1]}, (16, 16)),
        ({"PixelSpacing": [0, 0]}, (16, 16)),
    ],
)
def test_pixels_that_are_not_square_are_shown_as_they_lie(tags: dict[str, Any], size: tuple[int, int]):
    assert pictures(made(RAMP, **tags))[0].size == size


def test_a_ct_image_without_a_window_gets_that_of_soft_tissue_and_is_told(
    tmp_path: Path, prepared, tree: dict[str, Any]
):
    tags = {"Modality": "CT", "RescaleIntercept": -500, "RescaleSlope": 1}
    own = made(RAMP, WindowCenter=40, WindowWidth=400, **tags)
    assert (shown(made(RAMP, **tags)) == shown(own)).all()
    files = {"a.dcm": made(RAMP, **tags), "b.dcm": own, "c.dcm": made(RAMP * 0 + 7, Modality="CR")}
    tree_of(tmp_path / "d", [{"file": name, "report": "R"} for name in files], files)
    facts = prepared().facts
    assert (facts.default_window, facts.blank) == (1, 1)
    said = warnings(validate(tree), Facts(data=facts), [], None, None, "", "32bit")
    assert any(
        each.startswith("1 rows have CT images without a window, which are shown with center 40") for each in said
    )
    assert any(each.startswith("1 rows have an image of one grey throughout") for each in said)
    assert prepared(dicom={"window": [0, 100]}).facts.default_window == 0


@pytest.mark.parametrize("placed", [True, False])
def test_slices_are_in_the_order_in_which_they_lie(tmp_path: Path, prepared, placed: bool):
    files = {}
    for number, height in enumerate([30.0, -5.0, 10.5, 2.0]):
        tags = {"StudyInstanceUID": "1.9", "SeriesInstanceUID": "1.9.1", "PatientID": "P", "Modality": "CT"}
        tags |= {"InstanceNumber": number, "WindowCenter": 100, "WindowWidth": 201}
        if placed or number:
            tags |= {"ImageOrientationPatient": [1, 0, 0, 0, 1, 0], "ImagePositionPatient": [0, 0, height]}
        files[f"{number}.dcm"] = made(np.full((16, 16), 40 * number + 20), **tags)
    tree_of(tmp_path / "d", [{"study": "1.9", "report": "R"}], files)
    (row,) = prepared(dicom={"frames": [0, 1, 2, 3]}).train
    order = [round((np.asarray(picture)[0, 0, 0] / 255 * 200 - 20) / 40) for picture in row["images"]]
    assert order == ([1, 3, 2, 0] if placed else [0, 1, 2, 3])
    (row,) = prepared(dicom={"frames": 2}).train
    assert len(row["images"]) == 2


def as_medgemma(values: np.ndarray) -> np.ndarray:
    """As `window` and `norm` in its notebook: https://github.com/Google-Health/medgemma, high_dimensional_ct_hugging_face."""
    clips = [(-1024, 1024), (-135, 215), (0, 80)]
    return np.stack(
        [np.round((np.clip(values, low, high) - low) / (high - low) * 255, 0) for low, high in clips], axis=-1
    )


def said_of(row: Any) -> list[str]:
    return [part.get("text", "*") for part in row["messages"][0]["content"]]


def test_a_volume_is_shown_as_medgemma_was_shown_it(tmp_path: Path, prepared):
    n = 200
    assert choose(n, "medgemma") == [round(i / 85 * (n - 1)) for i in range(1, 86)]
    assert choose(85, "medgemma") == [*range(85)]
    tags = {
        "StudyInstanceUID": "1.4",
        "SeriesInstanceUID": "1.4.1",
        "PatientID": "P",
        "WindowCenter": 40,
        "WindowWidth": 80,
    }
    scaled = tags | {"Modality": "CT", "RescaleIntercept": -300, "RescaleSlope": 1}
    files = {f"{k}.dcm": made(RAMP + 10 * k, InstanceNumber=k, **scaled) for k in range(3)}
    tree_of(tmp_path / "d", [{"study": "1.4", "report": "R"}], files)
    data = prepared(dicom={"frames": "medgemma"}, instruction="Read.")
    (row,) = data.train
    assert said_of(row) == ["*", "SLICE 1", "*", "SLICE 2", "*", "SLICE 3", "Read."]
    for k, picture in enumerate(row["images"]):
        assert np.abs(np.asarray(picture) - as_medgemma(RAMP + 10.0 * k - 300)).max() <= 1
    assert data.facts.default_window == 0
    grey = shown(made(RAMP, **tags, Modality="MR"), frames="medgemma")
    assert (grey == shown(made(RAMP, **tags, Modality="MR"))).all()
    assert (shown(next(iter(files.values())), frames="medgemma", window=[0, 100])[..., 0] == 255).any()


def test_a_blank_number_joins_nothing_and_one_of_two_patients_is_a_bad_row(tmp_path: Path, prepared):
    numbers = {1: "", 2: "", 3: "A3", 4: "A4", 5: "A4", 6: "A6"}
    tags = {
        n: {"AccessionNumber": number, "PatientID": f"P{n}", "StudyInstanceUID": f"1.{n}"}
        for n, number in numbers.items()
    }
    files = {f"{n}.dcm": made(np.full((16, 16), 20 * n), **each) for n, each in tags.items()}
    reports = [{"accession": number, "report": f"R{n}"} for n, number in ((1, ""), (3, "A3 "), (4, "A4"), (6, "A6"))]
    tree_of(tmp_path / "d", reports, files)
    data = prepared(max_bad_fraction=0.5)
    assert [row["reference"] for row in data.train] == ["R3", "R6"]
    assert [row.reason for row in data.quarantined] == ["no image", "its images are of several patients"]


def test_a_study_is_shown_beside_the_one_before(tmp_path: Path, prepared):
    files, told = (
        {},
        {1: ("20200103", "CR"), 2: ("20200102", "CR"), 3: ("20200104", "CT"), 4: ("", "CR"), 5: ("20190101", "CR")},
    )
    for n, (date, modality) in told.items():
        tags = {"StudyInstanceUID": f"1.{n}", "SeriesInstanceUID": f"1.{n}.1", "PatientID": "Q" if n == 5 else "P"}
        tags |= {"StudyDate": date, "Modality": modality, "WindowCenter": 100, "WindowWidth": 201}
        files[f"{n}.dcm"] = made(np.full((16, 16), 20 * n), **tags)
    tree_of(tmp_path / "d", [{"study": f"1.{n}", "report": f"R{n}"} for n in (1, 3, 4, 5)], files)
    data = prepared(dicom={"prior": True}, instruction="Compare.")
    first, *others = data.train
    assert said_of(first) == ["Previous study:", "*", "Current study:", "*", "Compare."]
    assert [np.asarray(picture)[0, 0, 0] for picture in first["images"]] == [52, 26]
    assert [said_of(row) for row in others] == [["*", "Compare."]] * 3
    assert "StudyInstanceUID (column study), 1 of 4 studies beside the one before; " in f"{data.facts.source}; "
    for date, shown in (("2020.12.31", 1), ("20201399", 1), ("2020.01.01", 2)):
        files["2.dcm"] = made(
            np.full((16, 16), 40), StudyInstanceUID="1.2", PatientID="P", Modality="CR", StudyDate=date
        )
        tree_of(tmp_path / "d", [{"study": "1.1", "report": "R1"}], files)
        assert len(prepared(dicom={"prior": True}, instruction="Compare.").train[0]["images"]) == shown
    assert said_of(prepared(instruction="Compare.").train[0]) == ["*", "Compare."]
