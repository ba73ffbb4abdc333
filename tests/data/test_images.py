"""One image value → one RGB picture."""

import base64
import contextlib
import io
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from pydicom.data import get_testdata_file

from job.config.schema import DatasetSpec
from job.data.image_cache import ImageCache
from job.data.images import (
    Bounds,
    Files,
    begins_as_picture,
    decode,
    file_name,
    load,
    load_anew,
    locate,
    looks_like_picture,
)
from job.data.pixels import BadRow, shrink


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


ODD = b"\x1a\x01\x0a\0\x01\0\0\0\x26\0\0\0\0\0\0\0\xff\xff\xff\xff\0\0\0\0"
"""A resolution of -1/0, as a signed fraction at byte 38 of the block."""


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_turns_as_pillow_does_beside_any_other_tag(kind: str, turn: int):
    """Pillow writes all tags anew when it turns an image, and cannot write some that it can read."""
    image = Image.fromarray(np.arange(8 * 12 * 3, dtype=np.uint8).reshape(8, 12, 3))
    exif = Image.Exif()
    exif[0x0112] = turn
    plain = encoded(image, kind, exif=exif)
    right = ImageOps.exif_transpose(Image.open(io.BytesIO(plain))).convert("RGB")
    assert np.array_equal(decode(plain, limits()), right)
    odd = b"Exif\0\0II*\0\x08\0\0\0\x02\0\x12\x01\x03\0\x01\0\0\0" + bytes([turn, 0, 0, 0]) + ODD
    if kind != "TIFF":
        assert np.array_equal(decode(encoded(image, kind, exif=odd), limits()), right)
        assert decode(encoded(image, kind, exif=odd[:20]), limits()).size == (12, 8)


@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize(("kind", "top"), [("u1", 255), ("<u2", 65535), ("<u2", 4095), ("<f4", 1.0)])
def test_zero_is_white_or_black_at_every_depth_of_tiff(kind: str, top: float, photometric: int):
    ramp = np.linspace(0, top, 256).reshape(16, 16)
    stored = (ramp if photometric else top - ramp).astype(kind)
    grey = np.asarray(decode(tiff(stored, photometric), limits()))[..., 0].astype(int)
    assert np.abs(grey - np.arange(256).reshape(16, 16)).max() <= 1


def tiff(values: np.ndarray, photometric: int) -> bytes:
    """One uncompressed strip; Pillow writes deep images with black as zero alone."""
    height, width = values.shape
    short, form = (3, 3 if values.dtype.kind == "f" else 1)
    tags = [(256, width), (257, height), (258, 8 * values.itemsize), (259, 1), (262, photometric), (273, 8)]
    tags += [(277, 1), (278, height), (279, values.nbytes), (339, form)]
    body = b"II*\0" + struct.pack("<I", 8 + values.nbytes) + values.tobytes() + struct.pack("<H", len(tags))
    return body + b"".join(struct.pack("<HHIHH", tag, short, 1, value, 0) for tag, value in tags) + bytes(4)


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
        locate(value, Files())


def deep(values: np.ndarray, kind: str) -> bytes:
    return encoded(Image.fromarray(values), kind)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("top", [1023, 4095, 65535])
def test_sixteen_bits_are_stretched_not_cut(kind: str, top: int):
    """Pillow's own conversion makes all above 255 white."""
    ramp = np.linspace(0, top, 256, dtype=np.uint16).reshape(16, 16)
    grey = np.asarray(decode(deep(ramp, kind), limits()))[..., 0]
    assert np.abs(grey.astype(int) - np.arange(256).reshape(16, 16)).max() <= 1


@pytest.mark.parametrize(("kind", "top"), [(np.uint8, 255), (np.uint16, 4095), (np.float32, 1)])
def test_a_tiff_in_which_zero_is_white_is_no_negative(kind: type, top: int):
    ramp = np.linspace(0, top, 256).reshape(16, 16)
    black = deep(ramp.astype(kind), "TIFF")
    entry = b"\x06\x01\x03\0\x01\0\0\0"  # PhotometricInterpretation, one short number
    white = deep((top - ramp).astype(kind), "TIFF").replace(entry + b"\x01", entry + b"\0")
    shown = [np.asarray(decode(data, limits()), dtype=int) for data in (black, white)]
    assert (shown[0][0, 0, 0], shown[0][-1, -1, 0]) == (0, 255)
    assert np.abs(shown[0] - shown[1]).max() <= 1


def test_floats_and_flat_images_are_shown():
    assert decode(deep(np.linspace(-1, 1, 64, dtype=np.float32).reshape(8, 8), "TIFF"), limits()).getextrema()[0] == (
        0,
        255,
    )
    assert decode(deep(np.full((8, 8), 700, np.uint16), "PNG"), limits()).getextrema()[0] == (0, 0)
    with pytest.raises(BadRow, match="values that are not numbers"):
        decode(deep(np.full((8, 8), np.nan, np.float32), "TIFF"), limits())


def test_what_is_transparent_becomes_white():
    clear = Image.new("RGBA", (8, 8), (10, 20, 30, 0))
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([10, 20, 30] * 256)
    for data in (encoded(clear), encoded(clear.convert("LA")), encoded(palette, transparency=0)):
        assert decode(data, limits()).getpixel((4, 4)) == (255, 255, 255)
    assert decode(encoded(palette), limits()).getpixel((4, 4)) == (10, 20, 30)


def test_cmyk_jpegs_keep_their_colours():
    data = encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)
    red, green, blue = decode(data, limits()).getpixel((8, 8))
    assert red > 240
    assert max(green, blue) < 15


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        ((3000, 10), "too narrow: 3000×10; one side may be 200 times the other"),
        ((2, 90), "too small"),
        ((9, 3), "too small"),
    ],
)
def test_absurd_shapes_are_refused(size: tuple[int, int], reason: str):
    with pytest.raises(BadRow, match=reason):
        decode(encoded(Image.new("L", size)), limits())


def test_a_large_jpeg_is_shrunk_to_the_same_picture_as_a_png():
    noise = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    large = Image.fromarray(noise).resize((1600, 1200), Image.Resampling.BICUBIC)
    files = [encoded(large), encoded(large, "JPEG", quality=95)]
    found = [decode(data, limits(), Bounds(side=200)) for data in files]
    small = [np.asarray(shrink(picture, (200, 150)), dtype=int) for picture in found]
    assert small[0].shape == small[1].shape == (150, 200, 3)
    assert np.abs(small[0] - small[1]).mean() < 2


@settings(max_examples=60)
@given(st.sampled_from(["PNG", "JPEG", "TIFF", "GIF", "WEBP", "BMP"]), st.integers(0, 2**32), st.integers(1, 40))
def test_a_damaged_file_is_a_picture_or_a_bad_row(kind: str, seed: int, hits: int):
    chance = np.random.default_rng(seed)
    data = bytearray(encoded(Image.fromarray(chance.integers(0, 256, (24, 24, 3), dtype=np.uint8)), kind))
    for place in chance.integers(0, len(data), hits):
        data[place] = chance.integers(0, 256)
    with contextlib.suppress(BadRow):
        assert decode(bytes(data), limits()).mode == "RGB"


@pytest.mark.parametrize(
    "value", ["data:image/png;base64,!!", "data:text/plain,hello", {"path": "/no", "offset": 0, "size": 9}]
)
def test_a_url_or_a_piece_that_holds_no_image_is_a_bad_row(value: object):
    with pytest.raises(BadRow):
        load(value, Files(), limits())


def bounded(tmp_path: Path, **bounds: float) -> Files:
    return Files(tmp_path, None, ImageCache(tmp_path / "shelf", 10**6), Bounds(**bounds))


@pytest.mark.parametrize(
    ("bounds", "pictures", "size"),
    [
        ({}, 1, (400, 200)),
        ({"side": 100}, 1, (100, 50)),
        ({"area": 20000}, 1, (200, 100)),
        ({"short": 50}, 1, (100, 50)),
        ({"row": 80000}, 4, (200, 100)),
        ({"side": 1000, "area": 10**6, "short": 500, "row": 10**6}, 2, (400, 200)),
    ],
)
def test_bounds_keep_the_shape_and_make_nothing_larger(bounds: dict[str, float], pictures: int, size: tuple[int, int]):
    assert Bounds(**bounds).size(400, 200, pictures) == size


def test_no_side_is_shrunk_below_what_processors_take():
    assert Bounds(side=50).size(2000, 50, 1) == (50, 4)


def test_grey_pictures_are_kept_as_such(tmp_path: Path):
    chance = np.random.default_rng(0)
    for name, shape in (("colour", (300, 400, 3)), ("grey", (300, 400))):
        Image.fromarray(chance.integers(0, 256, shape, dtype=np.uint8)).save(tmp_path / f"{name}.png")
        load_anew(f"{name}.png", bounded(tmp_path, side=50), limits())
    kinds = sorted(path.read_bytes()[25] for path in (tmp_path / "shelf").rglob("*.png"))
    assert kinds == [0, 2]  # PNG's grey, PNG's colour


def test_what_is_on_the_shelf_is_not_decoded_again(tmp_path: Path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    files = bounded(tmp_path, side=50)
    (first,) = load_anew("a.png", files, limits())[1]
    (again,) = load("a.png", files, limits())
    assert first.tobytes() == again.tobytes()
    (shelved,) = (tmp_path / "shelf").rglob("*.png")
    Image.new("L", (50, 38), 9).save(shelved)
    assert load("a.png", files, limits())[0].getpixel((0, 0)) == (9, 9, 9)
    Image.new("L", (400, 300), 7).save(tmp_path / "a.png")  # another file of that name
    assert load("a.png", files, limits())[0].getpixel((0, 0)) == (7, 7, 7)


def test_a_file_that_changed_behind_its_old_size_and_time_is_made_anew_by_the_look(tmp_path: Path):
    """As rsync's -t leaves it, or a shard in a store, whose pieces have no time at all; with room left, and with none."""
    file, kept = tmp_path / "a.bmp", []
    for room in (10**6, 1):
        files = Files(tmp_path, None, ImageCache(tmp_path / "shelf", room), Bounds(side=50))
        for grey in (7, 9):
            Image.new("RGB", (400, 300), (grey, grey, grey)).save(file)
            os.utime(file, (1, 1))
            load_anew("a.bmp", files, limits())
            kept.append(load("a.bmp", files, limits())[0].getpixel((0, 0))[0])
    assert kept == [7, 9, 7, 9]


def test_the_shelf_holds_no_more_than_its_room(tmp_path: Path):
    for number in range(6):
        noise = np.random.default_rng(number).integers(0, 256, (200, 200, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{number}.png")
    files = Files(tmp_path, None, ImageCache(tmp_path / "shelf", 25_000), Bounds(side=50))
    for number in range(6):
        load_anew(f"{number}.png", files, limits())
    sizes = [path.stat().st_size for path in (tmp_path / "shelf").rglob("*.png")]
    assert 25_000 <= sum(sizes) < 25_000 + max(sizes)
    small = Image.new("RGB", (50, 50))
    small.save(tmp_path / "small.png")
    load_anew("small.png", bounded(tmp_path, side=50), limits())
    assert len(list((tmp_path / "shelf").rglob("*.png"))) == len(sizes)  # what is small enough is not kept


KINDS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "JPEG2000")


@pytest.mark.parametrize("kind", KINDS)
def test_base64_alone_is_a_picture(kind: str):
    data = encoded(Image.new("RGB", (16, 12), "red"), kind)
    text = base64.b64encode(data).decode()
    folded = base64.encodebytes(data).decode()
    other = base64.urlsafe_b64encode(data).decode().rstrip("=")
    for value in (text, folded, other, str(text.encode()), {"bytes": text, "path": None}):
        for files in (Files(), Files("/somewhere")):
            assert locate(value, files) == data
        assert looks_like_picture(value)
    assert looks_like_picture([text])
    assert load(text, Files(), limits())[0].size == (16, 12)


def test_dicom_may_come_as_base64():
    data = Path(str(get_testdata_file("CT_small.dcm", download=False))).read_bytes()
    assert load(base64.b64encode(data).decode(), Files("/somewhere"), limits())[0].size == (128, 128)


def test_base64_that_is_broken_is_no_path():
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    text = base64.b64encode(encoded(Image.fromarray(noise))).decode()
    with pytest.raises(BadRow, match="image is broken base64"):
        locate(f"{text[:100]}!{text[101:]}", Files("/somewhere"))
    with pytest.raises(BadRow, match="image is broken: "):
        load(text[:400], Files("/somewhere"), limits())


@given(st.text(st.sampled_from("abcdefghijklmnopqrstuvwxyzABCDEFGHIJ0123456789/_-+."), min_size=1, max_size=200))
def test_a_path_is_not_taken_for_base64(name: str):
    assert not begins_as_picture(f"images/{name}")
    assert not begins_as_picture(f"{name[:4]}.png")


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ("films/1.png", "films/1.png"),
        ({"path": "films/1.png", "bytes": b"\x89PNG"}, "films/1.png"),
        ({"path": None, "bytes": b"\x89PNG"}, None),
        ("https://pacs.example/1.png?token=secret", "https://pacs.example/1.png"),
        ("data:image/png;base64,iVBORw0KGgo=", None),
        (base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(600)).decode(), None),
        (b"\x89PNG", None),
        ({"montage": ["1.dcm"]}, None),
    ],
)
def test_a_file_is_named_as_the_data_do_without_secrets_or_contents(value: Any, name: str | None) -> None:
    assert file_name(value) == name
