"""Merging the 11B shape on a GPU, beside Unsloth's save_pretrained_merged: time, peak host memory, peak disk; and the gate.

    python benchmarks/merge.py WORK [--json FILE] [--family mllama] [--size full] [--cases base,adapter,…]

WORK is a folder with room for three copies of the model (64 GB). Every case runs in a process of its own, in this order,
and uses what earlier ones left in WORK, so cases can be spread over several calls:

    base      makes the model with random weights
    adapter   makes an adapter of rank 16 on all four groups, with something to say
    upload    sends the base's weight files to a folder store: what publishing costs at least
    stream    merges straight into the same store (export.scratch_copy: false)
    merge     merges to a folder, and says by how much the files' bytes differ from the base's
    gate16    the gate, trained in 16 bits
    fault     the gate again, with one layer of forty folded at twice its scale: must be refused
    gate4     the gate, trained in 4 bits; then nf4 and FP8 (where llm-compressor is installed)
    unsloth16 Unsloth's save_pretrained_merged, the model held in 16 bits
    unsloth4  the same, the model held in 4 bits

Before each timed case the base is read once, so that all of them find it in the page cache, and dirty pages are written
out. Seconds are given twice: until the call returned, and until the disk had everything. Peak host memory is that of the
process while the case ran: `own` is anonymous memory, `all` counts mapped files too.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from results import append

Facts = dict[str, Any]
SENTENCES = (
    "There is a nodule in the left upper zone.",
    "The heart is of normal size, and the lungs are clear.",
    "A fracture of the right clavicle is seen; there is no pneumothorax, and no effusion.",
    "Both lungs show patchy opacities, more on the right.",
)


@contextlib.contextmanager
def watched(work: Path, facts: Facts) -> Iterator[None]:
    """Fill `facts` with seconds, memory and disk of the block."""
    done = threading.Event()
    peak = {"own": 0, "disk": 0}
    before = disk(work)

    def look() -> None:
        for count in range(10**9):
            peak["own"] = max(peak["own"], memory("RssAnon"))
            if count % 10 == 0:
                peak["disk"] = max(peak["disk"], disk(work) - before)
            if done.wait(0.05):
                return

    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # begins VmHWM anew
    facts["host GB before"] = memory("VmRSS") / 1e9
    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    began = time.monotonic()
    yield
    facts["seconds"] = time.monotonic() - began
    os.sync()
    facts["seconds with sync"] = time.monotonic() - began
    done.set()
    thread.join()
    peak["disk"] = max(peak["disk"], disk(work) - before)
    facts["peak host GB, own"] = peak["own"] / 1e9
    facts["peak host GB, all"] = memory("VmHWM") / 1e9
    facts["peak disk GB"] = peak["disk"] / 1e9


def memory(field: str) -> int:
    lines = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:")]
    return int(lines[0].split()[1]) * 1024 if lines else 0


def disk(folder: Path) -> int:
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += (Path(place) / name).stat().st_blocks * 512
    return total


def warm(work: Path) -> None:
    for file in (work / "base").glob("*.safetensors"):
        with file.open("rb", buffering=0) as stream:
            while stream.read(2**24):
                pass
    os.sync()


def spec_of(work: Path, **export: Any) -> Any:
    from job.config.schema import JobSpec

    return JobSpec.model_validate(
        {
            "model": {"name_or_path": str(work / "base")},
            "dataset": {"path": "rows"},
            "output": {"url": str(work / "store")},
            "training": {"max_length": 16_384},
            "evaluation": {"batch_size": 4},
            "export": export,
        }
    )


def rows_of() -> list[Facts]:
    import numpy as np
    from PIL import Image

    from job.config.schema import RADIOGRAPHER
    from job.data.conversations import conversation

    rows = []
    for number in range(16):
        patches = np.random.default_rng(number).integers(0, 256, (7, 7, 3), dtype=np.uint8)
        picture = Image.fromarray(patches).resize((560, 560), Image.Resampling.NEAREST)
        messages = conversation(RADIOGRAPHER, SENTENCES[number % 4], None)
        rows.append({"id": f"row-{number}", "messages": messages, "images": [picture]})
    return rows


def load(work: Path, precision: str, start: bool = True) -> Any:
    from job.model.load import load_model
    from job.planning.survey import torch_device

    adapter = work / "adapter" if start else None
    return load_model(spec_of(work), work / "base", torch_device(), "transformers", precision, "all", adapter)


def recipe_of(work: Path) -> Any:
    from job.export.merge import recipe
    from job.export.tensor_map import changes, read_adapter
    from job.model.weight_map import read_base
    from job.planning.survey import torch_device

    base = read_base(work / "base")
    changed = changes(base, *read_adapter(work / "adapter"))
    return recipe(base, work / "adapter", changed, torch_device())


def base(work: Path, family: str, size: str) -> Facts:
    import torch
    from models import make_model

    from job.planning.survey import torch_device

    if not (work / "base" / "config.json").exists():
        make_model(family, work / "base", size, device=str(torch_device()), dtype=torch.bfloat16)
    return {"GB": disk(work / "base") / 1e9}


def adapter(work: Path, *_: str) -> Facts:
    import torch

    loaded = load(work, "16bit", start=False)
    generator = torch.Generator(loaded.device).manual_seed(0)
    with torch.no_grad():
        for name, weight in loaded.model.named_parameters():
            if "lora_B" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator, device=weight.device) * 0.01)
    loaded.model.save_pretrained(work / "adapter")
    return {"parameters": sum(loaded.groups.values()), **loaded.groups}


def upload(work: Path, *_: str) -> Facts:
    from job.store import open_store
    from job.store.folders import upload_files

    warm(work)
    store, facts = open_store(str(work / "store")), Facts()
    with watched(work, facts):
        upload_files(
            store, work / "base", {file.name: f"merged/{file.name}" for file in (work / "base").glob("*.safetensors")}
        )
    shutil.rmtree(work / "store")
    return facts


def stream(work: Path, *_: str) -> Facts:
    from job.export.merge import merge_to_store
    from job.store import open_store

    warm(work)
    store, facts = open_store(str(work / "store")), Facts()
    todo = recipe_of(work)
    with watched(work, facts):
        merge_to_store(todo, store, "merged")
    shutil.rmtree(work / "store")
    return facts


def merge(work: Path, *_: str) -> Facts:
    from job.export.merge import copy_rest, merge_to_folder

    warm(work)
    shutil.rmtree(work / "merged", ignore_errors=True)
    (work / "merged.identity").unlink(missing_ok=True)
    facts = Facts()
    began = time.monotonic()
    todo = recipe_of(work)
    prepared = time.monotonic() - began
    with watched(work, facts):
        merge_to_folder(todo, work / "merged")
        copy_rest(work / "base", work / "merged")
    return {"seconds to find every place": prepared, **facts, "weights changed": len(todo.changes)}


def judged(work: Path, loaded: Any, folder: Path) -> Facts:
    from functools import partial

    import torch

    from job.errors import GateRefused
    from job.export.gate import compare, refuse
    from job.export.read_back import read_folder
    from job.model.loaded import release
    from job.model.weight_map import read_base

    spec = spec_of(work)
    began = time.monotonic()
    base = read_base(work / "base")
    read = partial(read_folder, spec.model, folder, base, loaded.device)
    let_go = partial(release, loaded.model)
    verdict = compare(spec, loaded, base, read, rows_of(), let_go=let_go)
    facts = {"seconds": time.monotonic() - began, **asdict(verdict), "wrong": verdict.wrong[:3]}
    if torch.cuda.is_available():
        facts["peak GPU GB"] = torch.cuda.max_memory_allocated() / 1e9
    try:
        refuse(verdict, spec.export.gate)
        facts["verdict"] = "passes"
    except GateRefused as error:
        facts["verdict"] = f"REFUSED: {error}"
    return facts


def gate16(work: Path, *_: str) -> Facts:
    return judged(work, load(work, "16bit"), work / "merged")


def fault(work: Path, *_: str) -> Facts:
    from dataclasses import replace

    from job.export.fold import Lora
    from job.export.merge import pieces

    todo = recipe_of(work)
    key = [key for key in sorted(todo.changes) if key.endswith("mlp.down_proj.weight")][-1]
    change = todo.changes[key]
    assert isinstance(change, Lora)
    wrong = replace(todo, changes={**todo.changes, key: replace(change, scale=2 * change.scale)})
    folder = work / "faulty"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(work / "merged", folder, copy_function=os.link)
    file = todo.base.slots[key].file
    (folder / file).unlink()
    with (folder / file).open("wb") as target:
        for piece in pieces(wrong, file):
            target.write(piece)
    facts = judged(work, load(work, "16bit"), folder)
    shutil.rmtree(folder)
    return {"scaled twice": key, **facts}


def gate4(work: Path, *_: str) -> Facts:
    from job.export.gate import micro_batches
    from job.export.logits import answers, loss, spread_rows
    from job.export.quantise import write_fp8, write_nf4
    from job.model.loaded import release

    loaded = load(work, "4bit")
    facts = {"gate": judged(work, loaded, work / "merged")}
    spec = spec_of(work)
    for name, write in (("nf4", write_nf4), ("fp8", write_fp8)):
        began = time.monotonic()
        try:
            model = write(spec.model, work / "merged", work / name, loaded.device)
            small = type(loaded)(model, loaded.processor, work / name, "transformers", "16bit", loaded.device, {})
            measured = loss(answers(small, spread_rows(rows_of(), 16, 4), spec, micro_batches(spec, small)))
            facts[name] = {"GB": disk(work / name) / 1e9, "seconds": time.monotonic() - began, "loss": measured}
            release(model)
        except Exception as error:
            facts[name] = {"failed": f"{type(error).__name__}: {error}"[:300]}
        shutil.rmtree(work / name, ignore_errors=True)
    return facts


def unsloth(work: Path, precision: str) -> Facts:
    from job.model.load import import_first, load_model
    from job.planning.survey import torch_device

    import_first("unsloth")
    warm(work)
    shutil.rmtree(work / "merged", ignore_errors=True)  # room
    loaded = load_model(spec_of(work), work / "base", torch_device(), "unsloth", precision, "nothing", work / "adapter")
    facts = Facts()
    with watched(work, facts):
        loaded.model.save_pretrained_merged(str(work / "unsloth"), loaded.processor, save_method="merged_16bit")
    facts["GB"] = disk(work / "unsloth") / 1e9
    facts |= beside(work, work / "unsloth")
    shutil.rmtree(work / "unsloth")
    return facts


def beside(work: Path, folder: Path) -> Facts:
    """How far their files are from what ours would hold: a slice of each changed weight, and names."""
    import torch
    from safetensors import safe_open

    from job.export.fold import changed

    todo = recipe_of(work)
    theirs: dict[str, Path] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            theirs |= dict.fromkeys(opened.keys(), file)
    shares = []
    for key, change in list(todo.changes.items())[::8]:
        if key in theirs:
            with safe_open(work / "base" / todo.base.slots[key].file, "pt", device=str(todo.device)) as opened:
                right = changed(opened.get_tensor(key), change)
            with safe_open(theirs[key], "pt", device=str(todo.device)) as opened:
                shares.append(float((opened.get_tensor(key).to(torch.bfloat16) != right).float().mean()))
    return {
        "tensors of the base that they lack": len(set(todo.base.slots) - set(theirs)),
        "changed weights looked at": len(shares),
        "share of their numbers that differ from ours, mean": sum(shares) / max(1, len(shares)),
        "the same, worst weight": max(shares, default=0.0),
    }


CASES: dict[str, Callable[..., Facts]] = {
    "base": base,
    "adapter": adapter,
    "upload": upload,
    "stream": stream,
    "merge": merge,
    "gate16": gate16,
    "fault": fault,
    "gate4": gate4,
    "unsloth16": lambda work, *_: unsloth(work, "16bit"),
    "unsloth4": lambda work, *_: unsloth(work, "4bit"),
}


def summary(found: dict[str, Facts]) -> None:
    """The figures that the goals are about, into results.jsonl."""

    def of(case: str, name: str) -> float | None:
        value = found.get(case, {}).get(name)
        return float(value) if value is not None else None

    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    for case in ("merge", "stream", "upload", "unsloth16", "unsloth4"):
        for name, unit in (
            ("seconds", "s"),
            ("seconds with sync", "s"),
            ("peak host GB, own", "GB"),
            ("peak host GB, all", "GB"),
            ("peak disk GB", "GB"),
        ):
            if (value := of(case, name)) is not None:
                append("merge", f"{case}, {name}", value, unit, device=device)
    for other in ("unsloth16", "unsloth4"):
        if (ours := of("merge", "seconds")) and (theirs := of(other, "seconds")):
            share = ours / theirs
            append("merge", f"merge over {other}", share, "×", goal="at most 0.6", meets=share <= 0.6, device=device)
    if (peak := of("merge", "peak host GB, all")) is not None:
        append("merge", "peak host memory", peak, "GB", goal="under 12", meets=peak < 12, device=device)
    if (both := of("stream", "seconds")) and (alone := of("upload", "seconds")):
        goal = "at most 1.3"
        append(
            "merge",
            "merge + upload over upload",
            both / alone,
            "×",
            goal=goal,
            meets=both <= 1.3 * alone,
            device=device,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--json", type=Path, help="also write all figures there, after each case")
    parser.add_argument("--family", default="mllama")
    parser.add_argument("--size", choices=("tiny", "full"), default="full")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--only", choices=CASES, help=argparse.SUPPRESS)  # one case, in this process
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    if given.only:
        print("\n" + json.dumps(CASES[given.only](given.work.resolve(), given.family, given.size)), flush=True)
        return
    found: dict[str, Facts] = {}
    for case in given.cases.split(","):
        began = time.monotonic()
        command = [
            sys.executable,
            __file__,
            str(given.work),
            "--family",
            given.family,
            "--size",
            given.size,
            "--only",
            case,
        ]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        try:
            found[case] = json.loads(done.stdout.strip().splitlines()[-1])
        except (ValueError, IndexError):
            traceback.print_exc(limit=0)
            found[case] = {"failed": done.stdout[-2000:]}
        found[case]["whole case, seconds"] = time.monotonic() - began
        print(f"== {case}\n{json.dumps(found[case], indent=1)}", flush=True)
        if given.json:
            given.json.write_text(json.dumps(found, indent=1))
    summary(found)


if __name__ == "__main__":
    main()
