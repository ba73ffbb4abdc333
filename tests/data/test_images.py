"""One image value → one RGB picture."""

import io

import pytest
from PIL import Image

from job.data.images import BadRow, decode, image_bytes


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the file's 40 × 20 is to be seen as 20 × 40
    data = encoded(Image.new("RGB", (40, 20)), "JPEG", exif=exif)
    assert decode(data, max_pixels=10_000, max_side=None).size == (20, 40)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "RGB"])
def test_every_mode_becomes_rgb(mode: str):
    kind = "TIFF" if mode == "CMYK" else "PNG"
    assert decode(encoded(Image.new(mode, (4, 4)), kind), max_pixels=100, max_side=None).mode == "RGB"


def test_the_bound_is_on_pixels_not_on_bytes():
    with pytest.raises(BadRow, match="101×100 is over 10000 pixels"):
        decode(encoded(Image.new("L", (101, 100))), max_pixels=10_000, max_side=None)


@pytest.mark.parametrize("value", [None, 3, {"bytes": None, "path": None}, ""])
def test_a_value_that_is_no_image_is_a_bad_row(value: object):
    with pytest.raises(BadRow, match="no image"):
        image_bytes(value, None)
