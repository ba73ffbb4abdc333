"""Words burned into pixels: by what files say, and by looking, for real."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from job.config.loader import validate
from job.config.schema import PrivacySpec
from job.data.burned_in import BurnedIn, can_read, cleared, left_of, read
from job.data.facts import QuarantinedRow
from job.data.images import Files, load, load_anew
from job.data.prepare import prepare
from job.errors import DataError, SpecError
from job.planning.optional_packages import check_packages
from tests.data.test_dicom import made, spec, tree_of

NAME = "QUACKENBUSH ZEBEDEE"
SECONDARY = "1.2.840.10008.5.1.4.1.1.7"
ocr = pytest.mark.skipif(not can_read(), reason="needs the burned-in extra")


def scan(*texts: tuple[int, int, str], seed: int = 0) -> np.ndarray:
    """A bright shape in noise, as radiographs are, with texts at their places."""
    rows, columns = np.mgrid[:256, :384] / 256 - 0.5
    noise = np.random.default_rng(seed).normal(0, 8, rows.shape)
    shades = 40 + 150 * np.exp(-(((columns - 0.25) / 0.3) ** 2) - (rows / 0.4) ** 2) + noise
    picture = Image.fromarray(np.clip(shades, 0, 255).astype(np.uint8))
    for x, y, text in texts:
        ImageDraw.Draw(picture).text((x, y), text, fill=255, font=ImageFont.load_default(14))
    return np.asarray(picture)


def dicom(pixels: np.ndarray, **tags: Any) -> bytes:
    return made(pixels.astype(np.uint16), WindowCenter=128, WindowWidth=256, **tags)


def asked(privacy: dict[str, Any], data: bytes) -> list[Image.Image]:
    files = Files(privacy=PrivacySpec.model_validate(privacy))
    return load_anew({"bytes": data}, files, spec())[1]


@pytest.mark.parametrize(
    ("tags", "known"),
    [
        ({"Modality": "CR", "BurnedInAnnotation": "YES"}, "yes"),
        ({"Modality": "US"}, "maybe"),
        ({"Modality": "CT", "SOPClassUID": SECONDARY}, "maybe"),
        ({"Modality": "CT", "SOPClassUID": f"{SECONDARY}.4"}, "maybe"),
        ({"Modality": "CT", "SOPClassUID": f"{SECONDARY}7"}, ""),
        ({"Modality": "CT", "ImageType": ["DERIVED", "SECONDARY", "SCREEN SAVE"]}, "maybe"),
        ({"Modality": "US", "BurnedInAnnotation": "NO"}, ""),
        ({"Modality": "CR"}, ""),
    ],
)
def test_what_a_file_says_or_may_hold(tags: dict[str, Any], known: str):
    (picture,) = asked({"burned_in": "allow"}, dicom(scan(), **tags))
    assert picture.info["burned_in"] == known


def test_by_default_what_a_file_says_is_enough_to_set_its_row_aside(tmp_path: Path, tree: dict[str, Any]):
    files = {f"{n}.dcm": dicom(scan(seed=n), Modality="CR") for n in range(3)}
    files["2.dcm"] = dicom(scan(seed=2), Modality="CR", BurnedInAnnotation="YES")
    tree_of(tmp_path / "data", [{"file": name, "caption": "R"} for name in files], files)
    tree["dataset"] |= {"eval_fraction": 0, "max_bad_fraction": 0.5}
    tree["privacy"] = {"look_for_text": False}
    data = prepare(validate(tree), tmp_path / "scratch")
    reason = "text is burned into the image, as its file says (privacy.burned_in)"
    assert (data.quarantined, len(data.train)) == ([QuarantinedRow(2, reason)], 2)
    tree["privacy"]["burned_in"] = "refuse"
    with pytest.raises(
        DataError, match=r"1 of 3 rows have images with burned-in text.*first: row 2.*privacy\.burned_in refuses"
    ):
        prepare(validate(tree), tmp_path / "scratch")
    tree["privacy"]["burned_in"] = "allow"
    data = prepare(validate(tree), tmp_path / "scratch")
    assert (len(data.train), data.facts.burned_in_yes) == (3, 1)


@pytest.mark.parametrize(
    ("text", "rest"),
    [("L", ""), ("AP PORTABLE - SEMI ERECT", ""), ("Doe, Jane", "DOEJANE"), ("R 4711", "4711"), ("左 L", "左")],
)
def test_marks_of_technologists_are_no_names(text: str, rest: str):
    assert left_of(text) == rest


@ocr
@pytest.mark.parametrize("place", [(4, 4), (150, 120)])  # in a dark corner, and over the bright shape
def test_a_name_is_read_wherever_it_stands(place: tuple[int, int]):
    with pytest.raises(BurnedIn, match="text is burned into the image"):
        asked({}, dicom(scan((*place, NAME)), Modality="US"))


@ocr
def test_a_picture_without_words_or_with_marks_alone_passes():
    for texts in ([], [(350, 4, "L"), (250, 230, "PORTABLE")]):
        (picture,) = asked({}, dicom(scan(*texts), Modality="US"))
        assert picture.info["burned_in"] == ""


@ocr
def test_masked_the_words_are_gone_and_the_rest_is_as_it_was():
    texts = ((4, 4, NAME), (350, 230, "L"))
    (picture,) = asked({"burned_in": "mask"}, dicom(scan(*texts), Modality="US"))
    assert picture.info["burned_in"] == "masked"
    assert [words.text for words in read(picture) if left_of(words.text)] == []
    same = np.asarray(picture)[..., 0] == asked({"burned_in": "allow"}, dicom(scan(*texts), Modality="US"))[
        0
    ].getchannel(0)
    assert same[40:].all()
    assert 0.9 < same.mean() < 1


@ocr
def test_what_cannot_be_masked_is_set_aside():
    """Its file says that there are words, and none is found."""
    with pytest.raises(BurnedIn, match="could not be masked"):
        asked({"burned_in": "mask"}, dicom(scan(), Modality="US", BurnedInAnnotation="YES"))


@ocr
def test_pictures_of_every_format_are_read_where_the_spec_asks_for_it(tmp_path: Path):
    Image.fromarray(scan((4, 4, NAME))).save(tmp_path / "a.jpg")
    files = Files(base=tmp_path)
    assert len(load("a.jpg", files, spec())) == 1
    with pytest.raises(BurnedIn):
        load("a.jpg", files._replace(privacy=PrivacySpec(look_for_text=True)), spec())


@ocr
def test_of_a_picture_that_is_shrunk_to_be_read_the_right_place_is_painted():
    large = Image.fromarray(scan((4, 4, NAME))).resize((1920, 1280))
    painted = cleared(large, PrivacySpec(look_for_text=True, burned_in="mask"))
    assert (painted.size, read(painted)) == (large.size, [])


def test_looking_and_masking_want_the_extra(tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("job.planning.optional_packages.find_spec", lambda name: None if name == "rapidocr" else name)
    for privacy in ({"look_for_text": True}, {"burned_in": "mask"}):
        with pytest.raises(SpecError, match=r"privacy\..*needs the package rapidocr.*burned-in extra"):
            check_packages(validate(tree | {"privacy": privacy}), cuda=False)
    with pytest.raises(SpecError, match="mask needs a search for text"):
        validate(tree | {"privacy": {"burned_in": "mask", "look_for_text": False}})
