"""One image value → one RGB picture."""

import io

import pytest
from PIL import Image

from job.data.images import BadRow, Files, decode, image_bytes
from job.spec import DatasetSpec


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def limits(**fields: object) -> DatasetSpec:
    return DatasetSpec.model_validate({"path": "d"} | fields)


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the file's 40 × 20 is to be seen as 20 × 40
    data = encoded(Image.new("RGB", (40, 20)), "JPEG", exif=exif)
    assert decode(data, limits()).size == (20, 40)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "RGB"])
def test_every_mode_becomes_rgb(mode: str):
    kind = "TIFF" if mode == "CMYK" else "PNG"
    assert decode(encoded(Image.new(mode, (4, 4)), kind), limits()).mode == "RGB"


def test_the_bound_is_on_pixels_not_on_bytes():
    with pytest.raises(BadRow, match="101×100 is over 10000 pixels"):
        decode(encoded(Image.new("L", (101, 100))), limits(max_image_pixels=10_000))


@pytest.mark.parametrize("value", [None, 3, {"bytes": None, "path": None}, ""])
def test_a_value_that_is_no_image_is_a_bad_row(value: object):
    with pytest.raises(BadRow, match="no image"):
        image_bytes(value, Files())
