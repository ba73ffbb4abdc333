"""The whole export under a limit of host memory, for a process of its own; test_host_memory.py runs it.

The limit is RLIMIT_DATA: private memory that can be written, anonymous or mapped from a file. safetensors maps weight files
that way. Where they hold 32 bits, as the CPU computes, transformers takes them as they are mapped, and a model counts once;
where they hold 16, it counts them beside the model while it reads a folder. Each file holds a tenth of the model, since one at
a time is read back from the output.
"""

from __future__ import annotations

import json
import resource
import threading
from pathlib import Path

import torch

from job.config.schema import JobSpec
from job.context import RunContext
from job.data import Data
from job.data.prepare import prepare
from job.evaluate.generate import answer_losses
from job.evaluate.records import Comparison
from job.evaluate.stage import Results
from job.export.stage import Exported, export
from job.runtime.preemption import Preemption
from job.runtime.status import Record
from job.store import open_store
from job.store.lease import acquire
from tests.tiny import job_spec, load_tiny, models, perturb, picture, processors

MARGIN = {True: 0.35, False: 0.6}
"""What the export may take beside one model, as a share of it, by `scratch_copy`: pieces of the merge (of two files at once,
straight to the output), logits, samples of the weights, new threads. 0.25 and 0.41 to 0.49 were seen. Pages that are really
in use grow by 5 % of the model: most of this is room that libraries reserve."""
WIDTH, LAYERS, HEADS = 512, 14, 4
SECTIONS = {"qwen2_5_vl": [16, 24, 24], "qwen3_vl": [24, 20, 20]}
"""Of the rotary embedding, over half a head."""
FILES = 10


def make_wide(family: str, folder: Path, dtype: torch.dtype) -> int:
    """A tiny base whose language model is wide, in files of `dtype`. Returns the bytes of its weights in 32 bits."""
    text, vision = models.TEXT[family]["tiny"], models.VISION[family]["tiny"]
    text |= {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": LAYERS,
        "initializer_range": 0.02,
    }
    if "head_dim" in text:
        text["head_dim"] = WIDTH // HEADS
    if "out_hidden_size" in vision:
        vision["out_hidden_size"] = WIDTH
    if family in SECTIONS:
        text["rope_parameters"] |= {"mrope_section": SECTIONS[family]}
    processor = processors.build_processor(family, "tiny", None)
    torch.manual_seed(0)
    model = models.build_model(family, "tiny", processor, "cpu", dtype)
    size = sum(weight.nbytes for weight in model.parameters())
    model.save_pretrained(folder, max_shard_size=size // FILES)
    processor.save_pretrained(folder)
    return size * 4 // dtype.itemsize


def make_data(spec: JobSpec, rows: Path, scratch: Path) -> Data:
    rows.mkdir()
    lines = [{"file_name": f"{number}.png", "caption": f"Finding {number}."} for number in range(4)]
    for number, line in enumerate(lines):
        picture(number).save(rows / str(line["file_name"]))
    (rows / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return prepare(spec, scratch)


def counted() -> int:
    """Bytes that RLIMIT_DATA counts."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmData"].split()[0]) * 1024


def limited_export(
    family: str, folder: Path, *, scratch_copy: bool, dtype: torch.dtype = torch.float32, keep: bool = False
) -> Exported:
    """Export a model that outweighs all else in this process, with `MARGIN` of one model on top of what the process has once
    it is loaded. With `keep`, someone goes on referring to its weights. Raises what the export does for want of memory."""
    torch.set_num_threads(1)
    threading.stack_size(2**20)  # stacks count whole, used or not
    size = make_wide(family, folder / "base", dtype)
    spec = job_spec(
        dataset={"path": str(folder / "rows"), "eval_fraction": 0.5},
        export={"scratch_copy": scratch_copy},
        output={"url": str(folder / "output")},
    )
    data = make_data(spec, folder / "rows", folder / "data")
    loaded = perturb(load_tiny(folder / "base"), 0.02)
    answer_losses(loaded, list(data.evaluation), spec.training.max_length)  # as a job does before it exports
    kept = [weight.detach() for weight in loaded.model.parameters()] if keep else []
    store, scratch = open_store(spec.output.url), folder / "scratch"
    scratch.mkdir()
    with acquire(store, "test", 60.0) as lease, Record(store, scratch).kept() as record:
        attempt = RunContext(spec, store, lease, scratch, record, Preemption(), 1)
        resource.setrlimit(resource.RLIMIT_DATA, (counted() + int(MARGIN[scratch_copy] * size), resource.RLIM_INFINITY))
        try:
            return export(attempt, loaded, data, Results([], [], Comparison(), []), fold=True, gate_room=None)
        finally:
            resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            kept.clear()
