"""Does the loader keep ahead of a GPU? Ours beside the notebook's way, on the same files, on two cores.

    python benchmarks/loader.py [--images 600] [--seconds 20]
    python benchmarks/loader.py --many 100000          memory and scratch for so many images in shards, nothing else
    python benchmarks/loader.py --series 1000          memory for so many CT series of --slices (100) files each, nothing else
    python benchmarks/loader.py --identity 100000      what it costs to know so many rows again, nothing else
    python benchmarks/loader.py --tokens 600           what it costs to count so many rows' tokens at the look, nothing else

The notebook's way is Unsloth's and TRL's: decode every image into a list of conversations, then let TRL's collator run the
processor in the training process. Ours: two loader processes read rows from shards, decode, shrink, and run the processor.
Rates are images a second that two cores would give, from the processors' time that the work took: other work on the machine
does not change them much. A batch is handed over in shared memory, whose fresh pages the kernel clears: where that is slow, as in
many virtual machines, it takes longer than all else.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from results import append

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

if TYPE_CHECKING:
    from job.data import Row

CORES = 2
BATCH = 8
WARM = 6
FAMILIES = {"qwen2_5_vl": "Qwen2.5-VL", "mllama": "Llama 3.2 Vision"}
GIGABYTE = 1e9


def picture(chance: np.random.Generator, side: int, depth: int = 8) -> Image.Image:
    """Soft blobs with grain: compresses about as a radiograph does. Grey of 16 bits, or colour of 8."""
    blobs = chance.integers(0, 256, (side // 28, side // 28), dtype=np.uint8)
    grey = np.asarray(Image.fromarray(blobs).resize((side, side), Image.Resampling.BICUBIC), dtype=np.float32)
    grey = (grey + chance.normal(0, 4, grey.shape)).clip(0, 255)
    if depth == 16:
        return Image.fromarray((grey * 16).astype(np.uint16))
    return Image.fromarray(np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2))


def encoded(image: Image.Image, kind: str) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **({"quality": 90} if kind == "JPEG" else {}))
    return stream.getvalue()


def shards(folder: Path, images: int, side: int, kind: str = "JPEG", depth: int = 8, distinct: int = 64) -> Path:
    """WebDataset shards of a thousand rows; `distinct` different pictures take turns."""
    folder.mkdir(parents=True)
    chance = np.random.default_rng(0)
    files = [encoded(picture(chance, side, depth), kind) for _ in range(min(distinct, images))]
    for first in range(0, images, 1000):
        with tarfile.open(folder / f"{first:06d}.tar", "w") as archive:
            for number in range(first, min(first + 1000, images)):
                caption = f"Row {number}. The heart is of normal size and the lungs are clear."
                for ending, data in ((kind.lower(), files[number % len(files)]), ("txt", caption.encode())):
                    member = tarfile.TarInfo(f"{number:06d}.{ending}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    return folder


def series(folder: Path, count: int, slices: int) -> Path:
    """CT series of slices of 512 pixels a side, as an archive exports them, and a table of reports. Pixels are holes in the
    files, which take no room."""
    import pydicom
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

    meta, file = pydicom.dataset.FileMetaDataset(), pydicom.Dataset()
    meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = CTImageStorage, ExplicitVRLittleEndian
    meta.MediaStorageSOPInstanceUID = file.SOPInstanceUID = f"1.2.826.{'8' * 8}.{'9' * 6}"
    file.file_meta, file.SOPClassUID, file.Modality = meta, CTImageStorage, "CT"
    file.StudyInstanceUID, file.SeriesInstanceUID = f"1.2.826.{'8' * 8}", f"1.2.826.{'8' * 8}.1"
    file.PatientID, file.InstanceNumber, file.BodyPartExamined = "8" * 8, "9" * 6, "CHEST"
    file.ImageType, file.Manufacturer = ["ORIGINAL", "PRIMARY", "AXIAL"], "Maker"
    file.SeriesDescription, file.StudyDate, file.SeriesNumber = "CHEST 1.0 B60f", "20200101", 1
    file.ImageOrientationPatient, file.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [0, 0, "9" * 6]
    file.Rows = file.Columns = 512
    file.SamplesPerPixel, file.BitsAllocated, file.BitsStored, file.HighBit = 1, 16, 16, 15
    file.PixelRepresentation, file.PhotometricInterpretation = 0, "MONOCHROME2"
    file.RescaleSlope, file.RescaleIntercept, file.PixelSpacing = 1, -1024, [0.7, 0.7]
    file.WindowCenter, file.WindowWidth = 40, 400
    file.PixelData = bytes(2 * 512**2)
    file.save_as(memory := io.BytesIO(), enforce_file_format=True)
    whole = memory.getvalue()
    head = whole[: -len(file.PixelData)]
    for number in range(count):
        (folder / f"{number:08d}").mkdir(parents=True)
        own = head.replace(b"8" * 8, b"%08d" % (number + 10**7))
        for slice_ in range(slices):
            with (folder / f"{number:08d}" / f"{slice_:06d}.dcm").open("wb") as stream:
                stream.write(own.replace(b"9" * 6, b"%06d" % (slice_ + 10**5)))
                stream.truncate(len(whole))
    rows = (f"1.2.826.{number + 10**7},Series {number} is clear." for number in range(count))
    (folder / "reports.csv").write_text("\n".join(["study,txt", *rows]))
    return folder


def spec(path: Path, scratch: Path, **dataset: Any) -> Any:
    from job.config.schema import JobSpec

    needed = {"model": {"name_or_path": "none"}, "output": {"url": str(scratch / "output")}}
    rows = {"path": str(path), "eval_fraction": 0, "answer_column": "txt", **dataset}
    return JobSpec.model_validate(needed | {"dataset": rows})


def processor_of(family: str) -> Any:
    from processors import build_processor

    return build_processor(family, "full", None)


def cpu() -> float:
    """Seconds of processor time of this process and of the children that it has now."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    seconds = own.ru_utime + own.ru_stime
    for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
        seconds += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return seconds


def rate(work: Callable[[], Iterator[int]], seconds: float) -> float:
    """Images a second on two cores, over `seconds` of wall time. `work` yields how many images each batch had; the first few
    batches, which libraries load and processes start for, are not counted."""
    done, start, began, batches = 0, 0.0, 0.0, work()
    for number, count in enumerate(batches):
        if number < WARM:
            start, began = cpu(), time.monotonic()
            continue
        done += count
        if time.monotonic() - began > seconds:
            break
    used = cpu() - start
    batches.close()  # type: ignore[attr-defined]
    return done / used * CORES


def of_loader(rows: Any, collate: Callable[[Any], Any]) -> Iterator[int]:
    """Batches of random rows from two processes, epoch after epoch."""
    import torch
    from torch.utils.data import DataLoader

    torch.set_num_threads(1)
    loader = DataLoader(
        rows, batch_size=BATCH, num_workers=CORES, collate_fn=collate, shuffle=True, persistent_workers=True
    )
    while True:
        for batch in loader:
            yield batch if isinstance(batch, int) else len(batch["input_ids"])


class Ours:
    """A collator whose batch says how many rows it had, without sending the pixels anywhere."""

    def __init__(self, processor: Any) -> None:
        from job.model.collator import Collator

        self.collator = Collator(processor, 1 << 20)

    def __call__(self, rows: list[Row]) -> int:
        return len(self.collator(rows)["input_ids"])


def notebook(files: list[bytes], processor: Any) -> Iterator[int]:
    """As the notebook has it: a list of conversations with decoded images, then TRL's collator in this process."""
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    collator = DataCollatorForVisionLanguageModeling(processor)
    for start in range(0, len(files) - BATCH + 1, BATCH):
        rows = []
        for data in files[start : start + BATCH]:
            image = Image.open(io.BytesIO(data)).convert("RGB")
            user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe the image."}]}
            answer = {"role": "assistant", "content": [{"type": "text", "text": "The heart is of normal size."}]}
            rows.append({"messages": [user, answer], "images": [image]})
        yield len(collator(rows)["input_ids"])


def measure_rates(folder: Path, images: int, seconds: float) -> None:
    from job.data.images import Bounds
    from job.data.prepare import prepare

    path, side = shards(folder / "jpeg", images, 560), 560
    data = prepare(spec(path, folder), folder / "scratch", bounds=Bounds(side=side))
    files = [encoded(picture(np.random.default_rng(n % 64), side), "JPEG") for n in range(64)] * (images // 64)

    def decoding() -> Iterator[int]:
        for file in files * 100:
            with Image.open(io.BytesIO(file)) as image:
                image.load()
            yield 1

    ceiling = rate(decoding, seconds)
    append("loader", "560 px JPEG, libjpeg-turbo alone: the ceiling", ceiling, "images/s on 2 cores")
    decoded = rate(lambda: of_loader(data.train, len), seconds)
    append(
        "loader",
        "560 px JPEG from shards, decoded rows",
        decoded,
        "images/s on 2 cores",
        goal="over 200",
        meets=decoded > 200,
    )
    for family, name in FAMILIES.items():
        processor = processor_of(family)
        ours = rate(partial(of_loader, data.train, Ours(processor)), seconds)
        what = f"the same, with {name}'s processor"
        append("loader", what, ours, "images/s on 2 cores", goal="over 200", meets=ours > 200)
        handed = rate(partial(of_loader, data.train, Ours(processor).collator), seconds)
        append("loader", f"the same, {name}'s, and handed to the training process", handed, "images/s on 2 cores")
        theirs = rate(partial(notebook, files, processor), seconds) / CORES
        append("loader", f"notebook's way, {name}: its one process", theirs, "images/s on 1 core")
        append("loader", f"ours beside the notebook's, {name}", ours / theirs, "times")
        append("loader", f"ours beside libjpeg-turbo alone, {name}", ours / rate(decoding, seconds), "times")


def measure_large(folder: Path, seconds: float) -> None:
    """Radiographs of 16 bits as PNG, 2500 pixels a side: decoded each time, and from the shelf."""
    from job.data.images import Bounds
    from job.data.prepare import prepare

    path = shards(folder / "large", 64, 2500, "PNG", depth=16, distinct=16)
    rates = []
    for cache in (0, 1):
        scratch = folder / f"large-scratch-{cache}"
        data = prepare(spec(path, folder, cache_gb=cache), scratch, bounds=Bounds(area=4 * 560**2))

        rates.append(rate(partial(of_loader, data.train, len), seconds))
    append("loader", "2500 px PNG of 16 bits, decoded each time", rates[0], "images/s on 2 cores")
    append("loader", "2500 px PNG of 16 bits, shrunk once and kept", rates[1], "images/s on 2 cores")
    append("loader", "kept beside decoded each time", rates[1] / rates[0], "times")


def measure_many(folder: Path, count: int) -> None:
    """One look at all rows, then random batches through two loader processes: memory of all three, and what scratch holds."""
    path = shards(folder / "many", count, 512, distinct=512)
    size = sum(file.stat().st_size for file in path.iterdir())
    print(f"{count} images in shards of {size / GIGABYTE:.1f} GB", flush=True)
    command = [sys.executable, __file__, "--look", str(path), "--folder", str(folder)]
    said = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    scratch = sum(file.stat().st_size for file in (folder / "scratch").rglob("*") if file.is_file())
    case = f"{count:,} images of 512 px in shards of {size / GIGABYTE:.1f} GB"
    memory = said["memory"] / GIGABYTE
    append("loader", f"{case}: memory of all processes", memory, "GB", goal="under 2", meets=memory < 2)
    append("loader", f"{case}: scratch", scratch / GIGABYTE, "GB")
    append("loader", f"{case}: the one look at all rows", said["looked"], "images/s on 2 cores")
    append("loader", f"{case}: random batches after it", said["loaded"], "images/s on 2 cores")


def measure_series(folder: Path, count: int, slices: int) -> None:
    """All headers read and joined with their reports, and the middle slice of each series decoded; then random batches."""
    path = series(folder / "series", count, slices)
    command = [sys.executable, __file__, "--look", str(path), "--folder", str(folder)]
    said = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    case, memory = f"{count:,} CT series of {slices} slices of 512 px", said["memory"] / GIGABYTE
    append("loader", f"{case}: memory of all processes", memory, "GB", goal="under 2", meets=memory < 2)
    append("loader", f"{case}: headers read and joined, middle slices decoded", said["seconds"], "s of processor time")
    append("loader", f"{case}: random batches after it", said["loaded"], "images/s on 2 cores")


def measure_identity(folder: Path, count: int) -> None:
    """What an attempt pays to see whether its rows are those that the run began with, beside the look at them that it takes
    anyway. Small pictures, and no tokens counted, make that look cheap."""
    from job.data.prepare import prepare
    from job.output.identity import changes, from_json, row_identity
    from job.store import open_store

    path = shards(folder / "identity", count, 224, distinct=512)
    began = cpu()
    data = prepare(spec(path, folder), folder / "scratch")
    looked, store = cpu() - began, open_store(str(folder / "output"))
    assert data.identity is not None
    began = cpu()
    other = [row_identity([f"{n % 512:064x}"], [f"{n:064x}", 1.0]) for n in range(count)]
    digests = cpu() - began
    store.write("identity.json", data.identity.to_json())
    before = from_json(store.read("identity.json"))
    assert before == data.identity
    same = cpu() - began
    # The dearest case: every row has changed, so that each of them is matched with another.
    told = changes(before, replace(before, train=b"".join(other)))
    price = cpu() - began
    print(told[0], flush=True)
    case = f"identity of {count:,} rows of 224 px"
    append("loader", f"{case}: the look at them all", looked, "s of processor time")
    detail = f"{digests:.2f} s of it for the digests of rows"
    append("loader", f"{case}: made, written, read and found the same", same, "s of processor time", detail=detail)
    share, goal = price / looked, "under 1, an extra pass"
    append("loader", f"{case}, all of them changed, beside the look", share, "times", goal=goal, meets=share < 1)
    append("loader", f"{case}: the file in the output", len(store.read("identity.json")) / 1e6, "MB")


def measure_tokens(folder: Path, count: int) -> None:
    """The look at rows with their tokens counted beside the look without, in turns; small pictures make that look cheap."""
    from job.data.prepare import prepare
    from job.model.token_length import TokenCounter

    path = shards(folder / "tokens", count, 560)
    for family, name in FAMILIES.items():
        seconds, ruler = {True: 0.0, False: 0.0}, TokenCounter(processor_of(family))
        prepare(spec(path, folder), folder / "scratch", ruler)  # what is loaded and compiled once
        for counted in (True, False) * 3:
            began = cpu()
            prepare(spec(path, folder), folder / "scratch", ruler if counted else None)
            seconds[counted] += cpu() - began
        case = f"the look at {count:,} rows of 560 px, {name}'s tokens counted, beside the look without"
        append("loader", case, seconds[True] / seconds[False], "times")


def look(path: Path, folder: Path) -> None:
    """In a process of its own, so that its memory is its own. Prints what `measure_many` reads."""
    from job.data.images import Bounds
    from job.data.prepare import prepare

    most, began = Most(), cpu()
    data = prepare(spec(path, folder), folder / "scratch", bounds=Bounds(area=4 * 560**2))
    seconds = cpu() - began
    loaded = rate(lambda: of_loader(data.train, len), 30)
    said = {"memory": most.stop(), "seconds": seconds, "looked": len(data.train) / seconds * CORES, "loaded": loaded}
    print(json.dumps(said))


class Most(threading.Thread):
    """Watches the memory of this process and all below it; pages that several share count once (PSS)."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self.ended = 0, threading.Event()
        self.start()

    def run(self) -> None:
        while not self.ended.wait(0.5):
            self.most = max(self.most, sum(map(self.held, self.below(os.getpid()))))

    def below(self, process: int) -> Iterator[int]:
        yield process
        for task in Path(f"/proc/{process}/task").glob("*/children"):
            for child in task.read_text().split():
                yield from self.below(int(child))

    def held(self, process: int) -> int:
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:  # it has ended
            return 0
        return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))

    def stop(self) -> int:
        self.ended.set()
        self.join()
        return self.most


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=640)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--many", type=int, default=0)
    parser.add_argument("--series", type=int, default=0)
    parser.add_argument("--slices", type=int, default=100)
    parser.add_argument("--identity", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=0)
    parser.add_argument("--look", type=Path)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    if given.look:
        return look(given.look, given.folder)
    folder = Path(tempfile.mkdtemp(dir=given.folder))
    try:
        if given.many:
            measure_many(folder, given.many)
        elif given.series:
            measure_series(folder, given.series, given.slices)
        elif given.identity:
            measure_identity(folder, given.identity)
        elif given.tokens:
            measure_tokens(folder, given.tokens)
        else:
            measure_rates(folder, given.images, given.seconds)
            measure_large(folder, given.seconds)
    finally:
        shutil.rmtree(folder)
    return None


if __name__ == "__main__":
    main()
