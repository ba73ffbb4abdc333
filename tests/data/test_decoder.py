"""A damaged DICOM file costs one row: not the job, and not the machine's memory."""

from __future__ import annotations

import io
import multiprocessing
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pydicom
import pytest
from pydicom.uid import DeflatedExplicitVRLittleEndian

from job.config.schema import DatasetSpec, JobSpec, PrivacySpec
from job.data import decoder
from job.data.dicom import HEADER, inflated, read_header
from job.data.images import Files, load_anew
from job.data.pixels import BadRow
from job.data.prepare import prepare
from job.errors import OutOfMemory
from tests.data.test_dicom import RAMP, made, theirs

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")

DEADLY = {"MR_small_jpeg_ls_lossless.dcm": (1402, 65), "SC_rgb_jpeg_gdcm.dcm": (1266, 2)}
"""Files of pydicom's, and the byte that ends their decoder: found by `make fuzz`."""


def deadly(name: str) -> bytes:
    place, value = DEADLY[name]
    data = theirs(name)
    return data[:place] + bytes([value]) + data[place + 1 :]


def seen(data: bytes) -> tuple[int, int]:
    (picture,) = load_anew({"bytes": data}, Files(privacy=PrivacySpec(burned_in="allow")), DatasetSpec(path="d"))[1]
    return picture.size


def waiting() -> decoder.Child:
    """The one child that waits, once a file has gone through it."""
    decoder.dismiss()
    assert seen(made(RAMP)) == (16, 16)
    (child,) = decoder._children().waiting
    return child


def test_a_file_that_ends_its_decoder_is_a_bad_row_and_the_next_is_read():
    good = theirs("MR_small.dcm")
    with ThreadPoolExecutor(4) as pool:
        ended = [pool.submit(seen, data) for data in [deadly(name) for name in DEADLY] + [good] * 4]
    for each in ended[: len(DEADLY)]:
        assert isinstance(each.exception(), BadRow)
        assert "DICOM: its decoder crashed with SIG" in str(each.exception())
    assert [each.result() for each in ended[len(DEADLY) :]] == [(64, 64)] * 4


@pytest.mark.parametrize(
    ("sound", "damaged"),
    [(b"\xe0\x7f\x10\0OW", b"\xe0\x7f\x10\0OS"), (b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1\\2.1\0")],
    ids=["no known kind of value", "two transfer syntaxes"],
)
def test_what_pydicom_finds_only_when_it_is_asked_is_a_bad_row(sound: bytes, damaged: bytes):
    data = made(RAMP)
    assert data.count(sound) == 1
    with pytest.raises(BadRow, match="DICOM"):
        seen(data.replace(sound, damaged))


def test_the_look_quarantines_such_a_row(tmp_path: Path):
    files = [theirs("MR_small.dcm"), deadly("MR_small_jpeg_ls_lossless.dcm"), theirs("CT_small.dcm")]
    for number, data in enumerate(files):
        (tmp_path / f"{number}.bin").write_bytes(data)
    lines = [f'{{"file_name": "{number}.bin", "caption": "Clear."}}\n' for number in range(3)]
    (tmp_path / "metadata.jsonl").write_text("".join(lines))
    rows = {"path": str(tmp_path), "max_bad_fraction": 0.5, "eval_rows": 1}
    spec = JobSpec.model_validate({"model": {"name_or_path": "x"}, "dataset": rows, "output": {"url": "x"}})
    (bad,) = prepare(spec, tmp_path / "scratch").quarantined
    assert bad.row == 1
    assert bad.reason.startswith("DICOM: its decoder crashed with SIG")
    assert not decoder._children().waiting


def test_a_child_that_something_else_ended_costs_no_row(monkeypatch):
    waiting().process.kill()
    assert seen(made(RAMP)) == (16, 16)
    child = waiting()
    for stop in decoder.STOPS:  # a scheduler sends them to every process
        child.process.send_signal(stop)
    assert seen(made(RAMP)) == (16, 16)
    assert decoder._children().waiting == [child]
    monkeypatch.setattr(decoder, "SILENCE", 0.5)
    child.process.send_signal(signal.SIGSTOP)
    assert seen(made(RAMP)) == (16, 16)
    assert child.process.returncode == -signal.SIGKILL


def test_one_that_takes_too_long_is_a_bad_row():
    waiting().process.send_signal(signal.SIGXCPU)
    with pytest.raises(BadRow, match="DICOM: its decoder does not finish"):
        seen(made(RAMP))


def test_children_that_are_killed_again_and_again_are_no_fault_of_the_data(monkeypatch):
    monkeypatch.setattr(decoder, "TRIES", 1)
    waiting().process.kill()
    with pytest.raises(OutOfMemory):
        seen(made(RAMP))


def _in_a_worker(pipe: Any) -> None:
    try:
        pipe.send(seen(theirs("MR_small.dcm")))
    finally:
        decoder.dismiss()


def test_a_loaders_worker_has_children_of_its_own():
    child = waiting()
    ours, theirs_ = multiprocessing.Pipe()
    worker = multiprocessing.get_context("fork").Process(target=_in_a_worker, args=(theirs_,), daemon=True)
    worker.start()
    assert ours.poll(60)
    assert ours.recv() == (64, 64)
    worker.join()
    assert seen(made(RAMP)) == (16, 16)
    assert decoder._children().waiting == [child]


def deflated(pixels: int) -> bytes:
    header = pydicom.dcmread(io.BytesIO(made(RAMP)))
    header.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    header.PixelData = bytes(pixels)
    stream = io.BytesIO()
    header.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def test_what_is_deflated_is_inflated_as_far_as_its_sizes_say(tmp_path: Path):
    data = deflated(300_000_000)
    assert len(data) < 10**6
    assert len(inflated(data, HEADER)) < HEADER + 1000
    (tmp_path / "a.dcm").write_bytes(data)
    assert read_header(tmp_path / "a.dcm", ["Rows"]).Rows == 16
    waiting()
    try:
        seen(data)
    except BadRow as reason:
        assert "cannot be decoded" in str(reason)
    (child,) = decoder._children().waiting
    most = next(
        line for line in Path(f"/proc/{child.process.pid}/status").read_text().splitlines() if line.startswith("VmHWM")
    )
    assert int(most.split()[1]) < 250_000
    assert seen(deflated(512)) == (16, 16)


def test_sizes_are_looked_at_before_anything_is_decoded():
    for tags in ({"Rows": 9000, "Columns": 9000}, {"SamplesPerPixel": 200}, {"NumberOfFrames": -1}):
        with pytest.raises(BadRow, match=r"too large|values per pixel|frames of"):
            seen(made(RAMP, **tags))
