"""Damaged pictures, DICOM files and archives, read as a job's stage in reads them:
`python -m tests.fuzz_pictures [N] [--seed S] [--kinds …]`.

Each core has a process that reads case after case and says how each ended; it is begun again when it dies. A case is accepted,
or refused with a sentence, within `SECONDS` of a processor and `MEMORY`; its decoder may die, its reader may not. What fails is
kept below build/fuzz, and what was tried is printed. The same seed gives the same cases.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import re
import resource
import shutil
import struct
import sys
import tarfile
import tempfile
import time
import traceback
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "build" / "fuzz"
SECONDS = 5.0
MEMORY = 3 * 2**30
"""Bytes of RAM that the reader or a decoder may take: a picture of `max_image_pixels` takes up to 2 GB while it is made."""
AT_ONCE = 100
"""Cases between two looks at the memory of the decoders."""
TOLD = re.compile(r"decoder (crashed|does not finish|hung)")
"""How a sentence tells that a child ended."""
NUMBERS = (0, 1, 2, 3, 127, 128, 255, 256, 32767, 32768, 65535, 2**16, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**32 - 2)


def picture(side: int = 24) -> Image.Image:
    chance = np.random.default_rng(side)
    small = Image.fromarray(chance.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    return small.resize((side, side), Image.Resampling.BICUBIC)


def _written(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@cache
def good_images() -> dict[str, bytes]:
    """One file of each way to write each format, by name."""
    rgb, made = picture(), dict[str, bytes]()
    grey, deep = rgb.convert("L"), Image.fromarray(np.asarray(rgb.convert("L"), dtype=np.uint16) * 200)
    more = [picture(side).resize(rgb.size) for side in (30, 40)]
    text = {"exif": _exif(), "icc_profile": b"\0" * 400}
    for name, image, options in (
        ("grey", grey, {}),
        ("colour", rgb, {"quality": 90} | text),
        ("progressive", rgb, {"progressive": True}),
        ("cmyk", rgb.convert("CMYK"), {}),
        ("restarts", rgb, {"restart_marker_blocks": 1, "subsampling": 2}),
    ):
        made[f"JPEG {name}"] = _written(image, "JPEG", **options)
    for mode in ("1", "L", "P", "LA", "RGB", "RGBA"):
        made[f"PNG {mode}"] = _written(rgb.convert(mode), "PNG", **text)
    made["PNG 16 bits"] = _written(deep, "PNG")
    made["PNG frames"] = _written(rgb, "PNG", save_all=True, append_images=more)
    for name, options in (
        ("lossy", {"quality": 80} | text),
        ("lossless", {"lossless": True}),
        ("frames", {"save_all": True, "append_images": more}),
    ):
        made[f"WEBP {name}"] = _written(rgb, "WEBP", **options)
    made["WEBP alpha"] = _written(rgb.convert("RGBA"), "WEBP")
    for way in ("raw", "tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits"):
        made[f"TIFF {way}"] = _written(rgb, "TIFF", compression=way)
    for way in ("group3", "group4"):
        made[f"TIFF {way}"] = _written(rgb.convert("1"), "TIFF", compression=way)
    made["TIFF 16 bits"] = _written(deep, "TIFF")
    made["TIFF floats"] = _written(Image.fromarray(np.asarray(grey, dtype=np.float32)), "TIFF")
    made["TIFF pages"] = _written(rgb, "TIFF", save_all=True, append_images=more)
    for mode in ("1", "L", "P", "RGB", "RGBA"):
        made[f"BMP {mode}"] = _written(rgb.convert(mode), "BMP")
    made |= {"GIF one": _written(rgb, "GIF"), "GIF frames": _written(rgb, "GIF", save_all=True, append_images=more)}
    made |= {"PPM colour": _written(rgb, "PPM"), "PPM grey": _written(deep, "PPM")}
    for name, image, options in (
        ("lossless", rgb, {}),
        ("lossy", rgb, {"irreversible": True, "quality_layers": [20]}),
        ("grey", deep, {}),
        ("codestream", grey, {"no_jp2": True}),
    ):
        made[f"JPEG2000 {name}"] = _written(image, "JPEG2000", **options)
    if "AVIF" in Image.SAVE:
        made["AVIF"] = _written(rgb, "AVIF")
    return made


def _exif() -> bytes:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a" * 20
    return exif.tobytes()


@cache
def good_dicom() -> dict[str, bytes]:
    """What pydicom ships, by transfer syntax and name, and some of it deflated, implicit or big endian."""
    import pydicom
    from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    made = dict[str, bytes]()
    for path in sorted((Path(pydicom.__file__).parent / "data" / "test_files").rglob("*.dcm")):
        data = path.read_bytes()
        if data[128:132] != b"DICM" or len(data) > 300_000:
            continue
        header = pydicom.dcmread(path)
        syntax = header.file_meta.get("TransferSyntaxUID")
        if "PixelData" not in header or syntax is None:
            continue
        made[f"{syntax.name}: {path.name}"] = data
        if not syntax.is_compressed and syntax.is_little_endian and len(data) < 50_000:
            for other in (DeflatedExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRLittleEndian):
                header.file_meta.TransferSyntaxUID = other
                stream = io.BytesIO()
                header.save_as(stream, implicit_vr=other.is_implicit_VR, little_endian=True)
                made[f"{other.name}: {path.name}, written anew"] = stream.getvalue()
    return made


def _damaged(rng: random.Random, data: bytes, first: int = 0) -> bytes:
    """Bits flipped, bytes cut, inserted, doubled or removed, numbers written over others, behind the `first` bytes."""
    made = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        place = rng.randrange(first, max(len(made), first + 1))
        # Headers are short beside what they tell about, and most that can go wrong is in them.
        place = place if rng.random() < 0.5 else min(first + int(rng.expovariate(1 / 150)), len(made))
        way, size = rng.randrange(8), rng.choice((1, 2, 4, 16, 200))
        if way <= 1 and place < len(made):
            made[place] ^= 1 << rng.randrange(8)
        elif way == 2:
            made[place : place + size] = rng.randbytes(size)
        elif way <= 4:
            width, order = rng.choice((1, 2, 4)), rng.choice("<>")
            number = rng.choice(NUMBERS) % 2 ** (8 * width)
            made[place : place + width] = struct.pack(order + {1: "B", 2: "H", 4: "I"}[width], number)
        elif way == 5:
            made[place:place] = rng.choice(
                (rng.randbytes(size), bytes(size), b"\xff" * size, made[place : place + size])
            )
        elif way == 6:
            del made[place : place + size]
        elif rng.random() < 0.4:
            del made[place:]
    return bytes(made)


def _one_of(rng: random.Random, files: dict[str, bytes], end: str) -> str:
    """The name of a file; each kind of file is as likely as the others."""
    kind = rng.choice(sorted({name.partition(end)[0] for name in files}))
    return rng.choice([name for name in files if name.partition(end)[0] == kind])


def image_case(rng: random.Random) -> tuple[str, bytes]:
    name = _one_of(rng, good_images(), " ")
    data = good_images()[name]
    if name.startswith("PNG") and rng.random() < 0.7:
        return name.partition(" ")[0], _png(rng, data)
    return name.partition(" ")[0], _damaged(rng, data)


def _png(rng: random.Random, data: bytes) -> bytes:
    """Damage within chunks whose sums are right, for readers stop at a wrong one."""
    chunks, place = [], 8
    while place < len(data):
        (size,) = struct.unpack(">I", data[place : place + 4])
        chunks.append((data[place + 4 : place + 8], data[place + 8 : place + 8 + size]))
        place += size + 12
    number, way = rng.randrange(len(chunks)), rng.random()
    kind, body = chunks[number]
    if kind in (b"IDAT", b"fdAT") and way < 0.4:
        body = zlib.compress(_damaged(rng, zlib.decompress(body))) if kind == b"IDAT" else _damaged(rng, body)
    elif way < 0.8:
        body = _damaged(rng, body)
    elif way < 0.9:
        kind = rng.choice((b"iCCP", b"zTXt", b"iTXt", b"tRNS", b"PLTE", b"acTL", b"fcTL", b"fdAT", b"eXIf", b"gAMA"))
    chunks[number] = kind, body
    if way >= 0.9:
        chunks.insert(rng.randrange(len(chunks) + 1), rng.choice(chunks))
    return data[:8] + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


SIZES = ("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "BitsAllocated", "BitsStored", "HighBit")
SIZES += ("PixelRepresentation", "PlanarConfiguration")


def dicom_case(rng: random.Random) -> tuple[str, bytes]:
    name = _one_of(rng, good_dicom(), ":")
    data, kind = good_dicom()[name], name.partition(":")[0]
    way = rng.random()
    if way < 0.25:
        return kind, _with_other_values(rng, data)
    if way < 0.5 and (place := _pixels_at(data)):
        return kind, _damaged(rng, data, place)
    if "Deflated" in kind and way < 0.8:
        start = 144 + int.from_bytes(data[140:144], "little")
        packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
        plain = zlib.decompress(data[start:], -zlib.MAX_WBITS)
        return kind, data[:start] + packer.compress(_damaged(rng, plain)) + packer.flush()
    return kind, _damaged(rng, data, rng.choice((0, 132, 132)))


def _pixels_at(data: bytes) -> int:
    return max(data.rfind(b"\xe0\x7f\x10\0"), 0)


def _with_other_values(rng: random.Random, data: bytes) -> bytes:
    import pydicom
    from pydicom.uid import AllTransferSyntaxes

    header = pydicom.dcmread(io.BytesIO(data))
    for _ in range(rng.choice((1, 1, 2))):
        if rng.random() < 0.2:
            header.file_meta.TransferSyntaxUID = rng.choice(AllTransferSyntaxes)
            continue
        name = rng.choice(SIZES)
        now = header.get(name)
        near = [int(now) + 1, abs(int(now) - 1), int(now) * 2] if str(now or "").isdigit() else []
        setattr(header, name, rng.choice((*near, *(each for each in NUMBERS if each < 2**16))) % 2**16)
    stream = io.BytesIO()
    try:
        implicit = header.original_encoding[0]
        header.save_as(stream, implicit_vr=implicit, little_endian=header.original_encoding[1])
    except Exception:  # what pydicom does not write is damaged as it is
        return _damaged(rng, data)
    return stream.getvalue()


@cache
def good_archives() -> dict[str, bytes]:
    """Small WebDataset shards as tar has them in its three formats; zips of an image folder, packed and stored, and of
    the images that a table names; and a workbook."""
    files = dict[str, bytes]()
    for number in range(6):
        files[f"{number}.png"] = _written(picture(16 + number), "PNG")
        files[f"{number}.txt"] = f"Nothing {number}.".encode()
        files[f"{number}.json"] = f'{{"patient": "p{number}"}}'.encode()
    made = dict[str, bytes]()
    for name, way in (("ustar", tarfile.USTAR_FORMAT), ("gnu", tarfile.GNU_FORMAT), ("pax", tarfile.PAX_FORMAT)):
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w", format=way) as archive:
            for file, data in files.items():
                member = tarfile.TarInfo(("" if name == "ustar" else "é" * 60) + file)
                member.size, member.pax_headers = len(data), {"comment": "x" * 20} if name == "pax" else {}
                archive.addfile(member, io.BytesIO(data))
        made[f"tar {name}"] = stream.getvalue()
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w", format=way) as archive:
            for file, data in files.items():
                if file.endswith(".png"):
                    member = tarfile.TarInfo(("./" if name == "ustar" else "é" * 60 + "/") + file)
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
        made[f"tar images {name}"] = stream.getvalue()
    rows = "".join(f'{{"file_name": "{number}.png", "caption": "Nothing {number}."}}\n' for number in range(6))
    for name, packing in (("packed", zipfile.ZIP_DEFLATED), ("stored", zipfile.ZIP_STORED)):
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", packing) as packed:
            for file, data in {"metadata.jsonl": rows.encode(), **files}.items():
                if not file.endswith((".txt", ".json")):
                    packed.writestr(file, data)
        made[f"zip {name}"] = stream.getvalue()
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", packing) as packed:
            for file, data in files.items():
                if file.endswith(".png"):
                    packed.writestr(file, data)
        made[f"images {name}"] = stream.getvalue()
    return made | {"workbook": _zipped(WORKBOOK)}


OFFICE = "http://schemas.openxmlformats.org"
MAIN = f'xmlns="{OFFICE}/spreadsheetml/2006/main"'
SHEET = "application/vnd.openxmlformats-officedocument.spreadsheetml"
PART = f'<Relationships xmlns="{OFFICE}/package/2006/relationships"><Relationship Id="r1" Type="{OFFICE}/officeDocument/2006/'
WORKBOOK = {
    "[Content_Types].xml": f'<Types xmlns="{OFFICE}/package/2006/content-types"><Default Extension="xml" ContentType="application'
    '/xml"/><Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
    + "".join(
        f'<Override PartName="/xl/{part}.xml" ContentType="{SHEET}.{kind}+xml"/>'
        for part, kind in (("workbook", "sheet.main"), ("s", "worksheet"), ("t", "sharedStrings"))
    )
    + "</Types>",
    "_rels/.rels": f'{PART}relationships/officeDocument" Target="xl/workbook.xml"/></Relationships>',
    "xl/_rels/workbook.xml.rels": f'{PART}relationships/worksheet" Target="s.xml"/><Relationship Id="r2" '
    f'Type="{OFFICE}/officeDocument/2006/relationships/sharedStrings" Target="t.xml"/></Relationships>',
    "xl/workbook.xml": f'<workbook {MAIN} xmlns:r="{OFFICE}/officeDocument/2006/relationships">'
    '<workbookPr date1904="1"/><sheets><sheet name="Rows" sheetId="1" r:id="r1"/></sheets></workbook>',
    "xl/t.xml": f'<sst {MAIN} count="2"><si><t>caption</t></si><si><t>No_x000D_thing</t></si></sst>',
    "xl/s.xml": f'<worksheet {MAIN}><dimension ref="A1:C9"/><sheetData>'
    '<row r="1"><c r="A1" t="s"><v>0</v></c><c r="B1" t="inlineStr"><is><t>age</t></is></c></row>'
    + "".join(
        f'<row r="{n}"><c r="A{n}" t="s"><v>1</v></c><c r="B{n}"><v>{n}.5</v></c><c r="C{n}" t="e"><v>#N/A</v></c></row>'
        for n in range(2, 9)
    )
    + "</sheetData></worksheet>",
}
"""The parts of a workbook with two columns."""


def _zipped(parts: Mapping[str, str | bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as packed:
        for name, data in parts.items():
            packed.writestr(name, data)
    return stream.getvalue()


def _workbook(rng: random.Random) -> bytes:
    """One whose archive is whole, with a damaged part or other values in its sheet."""
    part = rng.choice([*WORKBOOK])
    text = WORKBOOK[part]
    if part != "xl/s.xml" or rng.random() < 0.3:
        return _zipped(WORKBOOK | {part: _damaged(rng, text.encode())})
    places = [*re.finditer(r'(?<=[>"])[^<>"]*(?=[<"])', text)]
    place = rng.choice(places)
    strange = (
        "",
        "-1",
        "1E999",
        "99999999999",
        "XFD1048576",
        "A0",
        "n",
        "d",
        "b",
        "str",
        "e",
        "2024-01-01T25:00",
        "\ud7ff",
        "#REF!",
    )
    return _zipped(WORKBOOK | {part: text[: place.start()] + rng.choice(strange) + text[place.end() :]})


def archive_case(rng: random.Random) -> tuple[str, bytes]:
    name = rng.choice([*good_archives()])
    data, kind = good_archives()[name], name.partition(" ")[0]
    if kind == "workbook" and rng.random() < 0.7:
        return kind, _workbook(rng)
    if kind != "tar":
        places = [match.start() for match in re.finditer(rb"PK\x01\x02|PK\x03\x04|PK\x05\x06", data)]
        return kind, _damaged(rng, data, rng.choice((0, *places)))
    place = rng.randrange(len(data) // 512) * 512
    if rng.random() < 0.6 and data[place + 257 : place + 262] == b"ustar":
        return kind, data[:place] + _tar_header(rng, data[place : place + 512]) + data[place + 512 :]
    return kind, _damaged(rng, data, rng.choice((0, place)))


def _tar_header(rng: random.Random, header: bytes) -> bytes:
    """A header with other values and a right sum."""
    fields = ((0, 100), (100, 8), (108, 8), (124, 12), (124, 12), (136, 12), (156, 1), (157, 100), (257, 8), (345, 155))
    place, size = rng.choice(fields)
    number = rng.choice((*NUMBERS, 2**40, 2**63, 50 * 10**9))
    value = rng.choice(
        (
            f"{number:o}".encode(),
            b"\x80" + number.to_bytes(size - 1, "big") if number.bit_length() < 8 * (size - 1) else b"\x80",
            b"\xff" * size,
            b"",
            rng.randbytes(size),
            rng.choice((b"S", b"L", b"K", b"x", b"g", b"1", b"2", b"3", b"6", b"7")),
            b"../../x",
            b"/dev/zero",
        )
    )
    made = header[:place] + value[:size].ljust(size, b"\0") + header[place + size :]
    plain = made[:148] + b" " * 8 + made[156:]
    return plain[:148] + f"{sum(plain):06o}\0 ".encode() + plain[156:]


@dataclass(frozen=True)
class Verdict:
    """How a case ended: `accepted`, `refused`, `decoder` (a child's death, told), `traceback` or `death` (of the reader)."""

    kind: str
    ending: str
    said: str
    seconds: float
    memory: int = 0

    @property
    def fault(self) -> str:
        if self.ending in ("traceback", "death"):
            return self.ending
        if self.memory > MEMORY:
            return f"took {self.memory / 2**20:.0f} MB, or one of the {AT_ONCE} before it"
        return f"over {SECONDS:g} s" if self.seconds > SECONDS and self.ending != "decoder" else ""


def read_picture(data: bytes, folder: Path) -> str:
    """Through what the look at rows calls; DICOM also through what joins it with reports. Returns why it is refused, if it is."""
    from job.config.schema import DatasetSpec, PrivacySpec
    from job.data.dicom_studies import _headers
    from job.data.images import Files, load_anew
    from job.data.pixels import BadRow

    if data[128:132] == b"DICM":
        file = folder / "a.dcm"
        file.write_bytes(data)
        list(_headers(folder, [file], []))
    try:
        load_anew({"bytes": data}, Files(privacy=PrivacySpec(burned_in="allow")), DatasetSpec(path="x"))
    except BadRow as reason:
        return str(reason)
    return ""


def read_archive(data: bytes, folder: Path) -> str:
    """Through all that is done with rows before training."""
    from job.config.schema import JobSpec
    from job.data.prepare import prepare
    from job.errors import JobError

    kind = "images" if b"metadata.jsonl" not in data else "zip"
    kind = "workbook" if b"xl/s.xml" in data else kind if data.startswith(b"PK") or b"PK\1\2" in data else "tar"
    kind = "images.tar" if kind == "tar" and b".txt" not in data else kind
    names = {"zip": "a.zip", "workbook": "a.xlsx", "images": "images.zip", "images.tar": "images.tar", "tar": "a.tar"}
    file = folder / names[kind]
    file.write_bytes(data)
    dataset: dict[str, Any] = {"path": str(file), "max_bad_fraction": 1.0, "eval_rows": 1}
    if kind == "workbook":
        dataset["image_column"] = None
    if kind.startswith("images"):
        dataset["path"] = str(folder / "rows.csv")
        (folder / "rows.csv").write_text("image,caption\n" + "".join(f"{n},Nothing {n}.\n" for n in range(6)))
    spec = {"model": {"name_or_path": "x"}, "dataset": dataset, "output": {"url": "x"}}
    try:
        found = prepare(JobSpec.model_validate(spec), folder / "scratch")
    except JobError as error:
        assert error.exit_code in (65, 78), error
        return str(error)
    finally:
        shutil.rmtree(folder / "scratch", ignore_errors=True)
        file.unlink()
    return "; ".join(sorted({row.reason for row in found.quarantined}))


Maker = Callable[[random.Random], tuple[str, bytes]]
KINDS: dict[str, tuple[Maker, Callable[[bytes, Path], str]]] = {
    "images": (image_case, read_picture),
    "dicom": (dicom_case, read_picture),
    "archives": (archive_case, read_archive),
}


def made(target: str, seed: int, number: int) -> tuple[str, bytes]:
    kind, data = KINDS[target][0](random.Random(f"{seed} {target} {number}"))
    return f"{target}: {kind}", data


def _read(target: str, data: bytes, folder: Path) -> tuple[str, str, float]:
    """How a case ends, what is said, and the seconds."""
    began = time.monotonic()
    try:
        said = KINDS[target][1](data, folder)
        ending = "decoder" if TOLD.search(said) else "refused" if said else "accepted"
    except Exception:
        ending, said = "traceback", traceback.format_exc()
    return ending, said, time.monotonic() - began


def work(pipe: Connection, target: str, seed: int, numbers: range) -> None:
    """Read the cases, and say how each ended: its number, then how."""
    import warnings

    from job.data import decoder

    warnings.simplefilter("ignore")
    with Path(os.devnull).open("w") as null:
        os.dup2(null.fileno(), 2)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        for count, number in enumerate(numbers):
            kind, data = made(target, seed, number)
            pipe.send(number)
            ending, said, seconds = _read(target, data, Path(name))
            if seconds > SECONDS:  # of the clock: other work on the machine may have taken them
                seconds = min(seconds, _read(target, data, Path(name))[2])
            memory = 0
            if count % AT_ONCE == AT_ONCE - 1:
                decoder.dismiss()
                memory = max(
                    resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
                )
            pipe.send(Verdict(kind, ending, said, seconds, memory * 1024))
        decoder.dismiss()


@dataclass
class Table:
    """What was tried, by kind."""

    ended: dict[str, Counter[str]] = field(default_factory=dict)
    slowest: dict[str, float] = field(default_factory=dict)
    reasons: dict[str, Counter[str]] = field(default_factory=dict)
    memory: int = 0
    failed: list[str] = field(default_factory=list)

    def add(self, verdict: Verdict, name: str) -> None:
        counts = self.ended.setdefault(verdict.kind, Counter())
        counts[verdict.ending] += 1
        counts["slow"] += verdict.fault.startswith("over")
        self.slowest[verdict.kind] = max(self.slowest.get(verdict.kind, 0.0), verdict.seconds)
        self.memory = max(self.memory, verdict.memory)
        if verdict.ending == "decoder":
            self.reasons.setdefault(verdict.kind, Counter())[verdict.said] += 1
        if verdict.fault:
            self.failed.append(f"{name}: {verdict.fault}: {verdict.said}")

    def __str__(self) -> str:
        columns = ("accepted", "refused", "decoder", "traceback", "death", "slow")
        head = ("tried", "accepted", "refused", "decoder died", "traceback", "death", f"over {SECONDS:g} s", "slowest")
        lines = [f"{'kind':<46}" + "".join(f"{name:>13}" for name in head)]
        total = Counter[str]()
        for kind, counts in [*sorted(self.ended.items()), ("all", total)]:
            tried = sum(counts[column] for column in columns[:-1])
            cells = [tried, *(counts[column] for column in columns)]
            slowest = self.slowest.get(kind, max(self.slowest.values(), default=0.0))
            lines.append(f"{kind:<46}" + "".join(f"{cell:>13,}" for cell in cells) + f"{slowest:>11.1f} s")
            total.update(counts if counts is not total else {})
        lines += [
            f"{kind}: {times} × {why}" for kind, those in sorted(self.reasons.items()) for why, times in those.items()
        ]
        return "\n".join([*lines, f"most memory of a process: {self.memory / 2**20:.0f} MB"])


def fuzz(targets: list[str], count: int, seed: int, workers: int, keep: Path | None = None) -> Table:
    table = Table()
    for target in targets:
        for number, verdict in _verdicts(target, seed, [range(first, count, workers) for first in range(workers)]):
            name = f"{target}-{seed}-{number}"
            table.add(verdict, name)
            if keep is not None and (verdict.fault or verdict.ending == "decoder"):
                keep.mkdir(parents=True, exist_ok=True)
                (keep / name).write_bytes(made(target, seed, number)[1])
    return table


def _verdicts(target: str, seed: int, parts: list[range]) -> Iterator[tuple[int, Verdict]]:
    """Each case and how it ended, from a process for each part. One that dies is begun again behind the case that it died of."""
    context = get_context("spawn")

    def begun(numbers: range) -> tuple[Any, range, Connection]:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=work, args=(theirs, target, seed, numbers))
        process.start()
        theirs.close()
        return process, numbers, ours

    running = {each[2]: each for each in map(begun, filter(None, parts))}
    at = dict[Connection, int]()
    while running:
        for pipe in cast("list[Connection]", wait([*running])):
            process, numbers, _ = running[pipe]
            try:
                said = pipe.recv()
            except EOFError:
                process.join()
                del running[pipe]
                if process.exitcode:
                    number = at.get(pipe, numbers[0])
                    yield number, Verdict(made(target, seed, number)[0], "death", f"exit code {process.exitcode}", 0.0)
                    if left := numbers[numbers.index(number) + 1 :]:
                        again = begun(left)
                        running[again[2]] = again
                continue
            if isinstance(said, int):
                at[pipe] = said
            else:
                yield at[pipe], said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", nargs="?", type=int, default=1000, help="cases of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="*", choices=[*KINDS], default=[*KINDS])
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    chosen = parser.parse_args()
    began = time.monotonic()
    table = fuzz(chosen.kinds, chosen.count, chosen.seed, chosen.workers, KEPT)
    print(*table.failed, table, sep="\n")
    print(f"{chosen.count * len(chosen.kinds) / (time.monotonic() - began) * 60:.0f} a minute")
    sys.exit(bool(table.failed))


if __name__ == "__main__":
    main()
