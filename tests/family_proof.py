"""Take families through a whole job that is stopped and killed on the way, each as a tiny random model.

    python -m tests.family_proof [--unsloth] [FAMILY …]

For each family, by default all of tests/families.py and tests/other_families.py: `check`; a run that is sent SIGTERM; one on
another scratch folder that is sent SIGKILL; one on a third scratch folder, which must publish; and one that nobody disturbs,
whose losses must be the same. Then plain transformers loads `merged/`, whose logits must be those of base + adapter. A family
that is refused must be so by `check` and `run` in one sentence. Closes with `families=N proved=N`.

With --unsloth the jobs run through Unsloth, in 16 bits, on a CPU (tests/unsloth_on_cpu), from build/unsloth.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForImageTextToText
from transformers.utils.logging import disable_progress_bar

from job.model.base_model import base_facts
from job.model.collator import Collator
from job.model.header import read_header
from job.model.lora_targets import group_of
from job.model.transformers_backend import linears, load_processor
from tests.families import FAMILIES as KNOWN
from tests.other_families import OTHERS
from tests.tiny import job_spec, make_model, picture, row

from whole_job import Case, Unfinished, apart_from_uncut, process_of, whole, wrong_files  # isort: skip  # tests.tiny finds it

ROOT = Path(__file__).parent.parent
UNSLOTH = ROOT / "build" / "unsloth"


def make_rows(folder: Path) -> Path:
    """Eight pictures, two of them to be held out."""
    captions = [
        {"file_name": f"{n}.png", "caption": f"There is a nodule. {'It is large. ' * (n % 3)}"} for n in range(8)
    ]
    for number, each in enumerate(captions):
        picture(number, 60 + 8 * number, 60).save(folder / each["file_name"])
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, captions)))
    return folder


def make_base(family: str, folder: Path) -> Path:
    if family in KNOWN:
        return make_model(family, folder, dtype=torch.float32)
    OTHERS[family].make(folder)
    return folder


def make_both(family: str, folder: Path) -> tuple[Path, Path]:
    """Return a tiny base of `family` and rows for it, both in `folder`."""
    for name in ("base", "rows"):
        (folder / name).mkdir()
    return make_base(family, folder / "base"), make_rows(folder / "rows")


def spec_of(base: Path, rows: Path, output: Path, **lora: Any) -> dict[str, Any]:
    return {
        "model": {"name_or_path": str(base)},
        "lora": {"r": 4} | lora,
        "dataset": {"path": str(rows), "eval_rows": 2},
        "training": {"max_steps": 2, "effective_batch_size": 2, "max_length": 2048, "learning_rate": 0.05},
        "evaluation": {"max_new_tokens": 4, "explained_rows": 0},
        "export": {"gate": {"rows": 2}},
        "output": {"url": str(output)},
    }


def adapted(adapter: Path) -> dict[str, int]:
    """LoRA parameters by group, as the adapter's file holds them."""
    found = Counter[str]()
    for name, tensor in read_header(adapter / "adapter_model.safetensors")[0].items():
        found[str(group_of(name.partition(".lora_")[0]))] += prod(tensor["shape"])
    return dict(found)


@torch.no_grad()
def logits_agree(base: Path, output: Path) -> None:
    batch = Collator(load_processor(job_spec().model, base), 2048)([row(1)])
    model = AutoModelForImageTextToText.from_pretrained(base).eval()
    stored, held = base_facts(base).linears, linears(model)
    assert len([name for name in stored if "lm_head" not in name]) == len(
        [name for name in held if "lm_head" not in name]
    )
    before = model(**batch).logits
    expected = PeftModel.from_pretrained(model, output / "adapter").eval()(**batch).logits
    merged = AutoModelForImageTextToText.from_pretrained(output / "merged").eval()(**batch).logits
    torch.testing.assert_close(merged, expected, rtol=1e-3, atol=1e-3)
    assert (expected - before).abs().max() > 0.01


def environment() -> dict[str, str]:
    """The variables with which a job runs through Unsloth on a CPU."""
    paths = (ROOT / "tests" / "unsloth_on_cpu", ROOT, UNSLOTH)
    return {"PYTHONPATH": ":".join(map(str, paths)), "UNSLOTH_ALLOW_CPU": "1"}


def job(command: str, spec: dict[str, Any], scratch: Path, **there: str) -> subprocess.CompletedProcess[str]:
    variables = os.environ | there | {"JOB_SPEC": yaml.safe_dump(spec), "JOB_SCRATCH": str(scratch)}
    ran = [sys.executable, "-m", "job", command]
    return subprocess.run(ran, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)


def prove(
    family: str, folder: Path, *, uncut: bool = True, start: Callable[..., Any] = process_of, **model: str
) -> list[str]:
    """Return what is not as it should be. `start` starts the jobs that are stopped and killed; `model` are fields of the spec."""
    (base, rows), output = make_both(family, folder), folder / "output"
    spec = spec_of(base, rows, output)
    spec["training"] |= {"max_steps": 9, "num_train_epochs": 3, "learning_rate": 0.01}
    spec["checkpoint"] = {"save_steps": 2}
    spec["model"] |= model
    if family in OTHERS and (sentence := OTHERS[family].refused):
        last = f"exit 78: model.name_or_path: {base} {sentence}"
        ended = [job(command, spec, folder / "scratch") for command in ("check", "run")]
        return [each.stderr[-2000:] for each in ended if each.stderr.strip().splitlines()[-1] != last]
    checked = job("check", spec, folder / "scratch")
    if checked.returncode:
        return [checked.stderr[-2000:]]
    case = Case(family, folder, None, math.inf, start)
    try:
        whole(case, spec, [], single=False)
        difference, wrong = apart_from_uncut(case, spec) if uncut else (0.0, [])
    except Unfinished as error:
        return [str(error)]
    wrong += wrong_files(output, base)
    if difference > 0:
        wrong.append(f"losses are {difference:.2g} apart from those of the undisturbed run")
    logits_agree(base, output)
    return wrong


def main() -> None:
    disable_progress_bar()
    torch.set_num_threads(1)
    model = dict[str, str]()
    if "--unsloth" in sys.argv:
        sys.argv.remove("--unsloth")
        os.environ |= environment()
        model = {"backend": "unsloth", "precision": "16bit"}
    families, proved = sys.argv[1:] or [*KNOWN, *OTHERS], 0
    for family in families:
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            wrong = prove(family, Path(folder), **model)
        print(f"{family}: {'; '.join(wrong) or 'as it should be'}, {time.monotonic() - began:.0f} s", flush=True)
        proved += not wrong
    print(f"families={len(families)} proved={proved}")
    sys.exit(proved != len(families))


if __name__ == "__main__":
    main()
