"""Ask a real vLLM about tiny models: what a right export is worth, and whether each of many faults is refused.

    python -m tests.serve_proof [FAMILY | FAMILY-language ...] [--faults [NAME ...]]

The vLLM of JOB_SERVE_PYTHON, or of build/vllm, loads each family's `merged/` and `adapter/`, whose adapters have something to say
in tower and language model; what it answers is compared as `export.serve` does. Then one thing at a time is wrong with the
first family's folders, or with the command. Prints a table, and ends with 1 if a right folder was refused or a fault that changes
answers was not.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from safetensors.torch import load_file, save_file

from job.config.environment import Environment
from job.config.loader import load_spec
from job.config.schema import JobSpec
from job.errors import JobError
from job.export import served as gate
from job.export.engines import Served, vllm
from job.export.gate import Reference, refer
from job.export.questions import Agreement, Asked, rows_to_ask
from job.export.serving import Serving, serving
from job.model.loaded import Loaded
from job.model.transformers_backend import load
from job.model.weight_map import read_base
from job.planning.survey import survey
from job.store import open_store
from tests.test_predict import make_data
from tests.tiny import CPU, make_model, perturb, shapes

CASES = (*shapes.SERVED, "gemma3-language", "llava-language")
"""Families, and those whose language model alone is adapted, since vLLM does not serve adapters of their tower."""
PYTHON = Path(__file__).parents[1] / "build" / "vllm" / "bin" / "python"
STEPS = 40
SYSTEM = "You are a helpful assistant. Name the side."
Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """A family's export, and what was measured of it."""

    spec: JobSpec
    loaded: Loaded
    serving: Serving
    reference: Reference
    rows: list[Asked]
    folder: Path

    def served(self, folder: Path) -> Served:
        merged, *adapter = gate.folders_to_serve(self.spec, self.loaded, {"merged": folder, "adapter": folder})
        return merged if (folder / "config.json").exists() else adapter[0]

    def ask(self, folder: Path, command: gate.MakeCommand) -> tuple[Agreement | None, str]:
        """What a server answers from the folder, and why it is refused."""
        found, served = None, self.served(folder)
        try:
            found = gate.ask_server(self.spec, self.loaded, self.serving, self.reference, self.rows, served, command)
            gate.refuse_served(found, folder.name, self.spec, self.reference)
        except JobError as error:
            return found, str(error)
        return found, ""


def spec_of(folder: Path) -> dict[str, Any]:
    """The spec of a whole job that starts from an adapter, and asks a server before it publishes."""
    return {
        "model": {"name_or_path": str(folder / "base")},
        "lora": {
            "r": 8,
            "lora_alpha": 16,
            "init_adapter": str(folder / "start"),
            "finetune_vision_layers": not folder.name.endswith("-language"),
        },
        "dataset": {
            "path": str(folder / "data"),
            "eval_rows": 8,
            "system_prompt": SYSTEM,
            "instruction": "What is it?",
        },
        "training": {"max_steps": STEPS, "learning_rate": 5e-3, "max_length": 512},
        "evaluation": {"max_new_tokens": 24, "explained_rows": 0},
        "export": {"serve": {"engine": "vllm", "seconds": 900}, "gate": {"rows": 8}},
        "output": {"url": str(folder / "output")},
    }


def run_job(folder: Path) -> str:
    """Run the job from adapters that have something to say in tower and language model. Returns its last line."""
    make_model(folder.name.partition("-")[0], folder / "base", "served")
    make_data(folder / "data")
    tree = spec_of(folder)
    loaded = perturb(load(load_spec({}, yaml.safe_dump(tree)), folder / "base", CPU), 0.05)
    loaded.model.save_pretrained(folder / "start")
    there = {**os.environ, "JOB_SPEC": yaml.safe_dump(tree)}
    there |= {"JOB_SCRATCH": str(folder / "scratch"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "job", "run"], env=there, capture_output=True, text=True, check=False)
    return done.stderr.splitlines()[-1]


def make_case(folder: Path) -> Case:
    """Measure anew what the job in `folder` published, as its gate did."""
    spec = load_spec({}, yaml.safe_dump(spec_of(folder)))
    output, base = folder / "output", Path(spec.model.name_or_path)
    found = survey(spec, open_store(spec.output.url), folder, Environment(), fetch=True, all_data=True, world=1).data
    assert found is not None
    loaded = load(spec, base, CPU, output / "adapter")
    reference = refer(spec, loaded, read_base(base), found.evaluation, lambda: None, None)
    answers = map(json.loads, (output / "evaluation" / "after.jsonl").read_text().splitlines())
    measured = {row["id"]: (row["generated"], row["tokens"]) for row in answers}
    asked = rows_to_ask(reference, loaded, spec, found, measured)
    return Case(spec, loaded, serving(spec, loaded, found, folder), reference, asked, output)


def weights(change: Callable[[Weights, Weights], None]) -> Callable[[Path, Case], None]:
    """A fault of the weights (first argument), given the base's weights (second), which an adapter has none of."""

    def spoil(folder: Path, case: Case) -> None:
        (file,) = folder.glob("*.safetensors")
        right = load_file(file)
        change(right, load_file(case.loaded.folder / "model.safetensors"))
        save_file({name: tensor.contiguous() for name, tensor in right.items()}, file, {"format": "pt"})

    return spoil


def settings(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path, Case], None]:
    def spoil(folder: Path, case: Case) -> None:
        tree = json.loads((folder / name).read_text())
        change(tree)
        (folder / name).write_text(json.dumps(tree))

    return spoil


def template(old: str, new: str) -> Callable[[Path, Case], None]:
    def spoil(folder: Path, case: Case) -> None:
        file = folder / "chat_template.jinja"
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, new))

    return spoil


def both(*faults: Callable[[Path, Case], None]) -> Callable[[Path, Case], None]:
    def spoil(folder: Path, case: Case) -> None:
        for fault in faults:
            fault(folder, case)

    return spoil


def missing(name: str) -> Callable[[Path, Case], None]:
    return lambda folder, case: (folder / name).unlink()


def is_tower(name: str) -> bool:
    return "visual" in name


def drop_tower(merged: Weights, base: Weights) -> None:
    merged |= {name: tensor for name, tensor in base.items() if is_tower(name)}


def scale_adapter(share: float) -> Callable[[Weights, Weights], None]:
    def change(merged: Weights, base: Weights) -> None:
        merged |= {name: base[name] + share * (tensor - base[name]) for name, tensor in merged.items()}

    return change


def exchange_layers(merged: Weights, base: Weights) -> None:
    """Each of two layers receives the other's adapter."""
    for name in [name for name in merged if name.startswith("model.layers.0.")]:
        other = name.replace(".0.", ".1.")
        first, second = merged[name] - base[name], merged[other] - base[other]
        merged[name], merged[other] = base[name] + second, base[other] + first


def rename(old: str, new: str) -> Callable[[Weights, Weights], None]:
    def change(named: Weights, base: Weights) -> None:
        found = {name.replace(old, new): named.pop(name) for name in list(named) if old in name}
        assert found
        named |= found

    return change


def drop(part: str) -> Callable[[Weights, Weights], None]:
    def change(named: Weights, base: Weights) -> None:
        for name in [name for name in named if part in name]:
            named[name] = torch.zeros_like(named[name])

    return change


def eight_bits(merged: Weights, base: Weights) -> None:
    merged |= {name: tensor.to(torch.float8_e5m2).to(tensor.dtype) for name, tensor in merged.items()}


def pixels(tree: dict[str, Any]) -> None:
    tree["image_processor"]["size"]["longest_edge"] = 1 << 20


def without_tower(command: list[str]) -> list[str]:
    return [word for word in command if word != "--enable-tower-connector-lora"]


def in_16_bits(command: list[str]) -> list[str]:
    return ["bfloat16" if word == "float32" else word for word in command]


def larger_pictures(command: list[str]) -> list[str]:
    return [word.replace('"max_pixels": 7056', '"max_pixels": 70560') for word in command]


MERGED: dict[str, Callable[[Path, Case], None]] = {
    "the tower's LoRA left out": weights(drop_tower),
    "half of alpha": weights(scale_adapter(0.5)),
    "twice alpha": weights(scale_adapter(2.0)),
    "the adapter left out": weights(scale_adapter(0.0)),
    "LoRA of two layers exchanged": weights(exchange_layers),
    "wrong prefix of the tower": weights(rename("visual.", "vision.")),
    "a norm of zeros": weights(drop("layers.1.post_attention_layernorm")),
    "weights through FP8": weights(eight_bits),
    "other turns in the template": template("'<|im_start|>' + message.role", "'<|im_start|>the ' + message.role"),
    "no generation prompt in the template": template("<|im_start|>assistant\\n", ""),
    "pictures as large as the base takes": settings("processor_config.json", pixels),
    "another mean of pictures": settings(
        "processor_config.json", lambda tree: tree["image_processor"].update(image_mean=[0.1, 0.2, 0.3])
    ),
    "wrong stop token": both(
        settings("generation_config.json", lambda tree: tree.update(eos_token_id=[0])),
        settings("tokenizer_config.json", lambda tree: tree.update(eos_token="<|vision_end|>")),
    ),
    "a full stop as stop token": settings("generation_config.json", lambda tree: tree.update(eos_token_id=[13])),
    "a penalty on repeats": settings("generation_config.json", lambda tree: tree.update(repetition_penalty=4.0)),
    "answers of 4 tokens": settings("generation_config.json", lambda tree: tree.update(max_new_tokens=4)),
    "no processor file": missing("processor_config.json"),
    "no tokenizer": missing("tokenizer.json"),
    "no chat template": missing("chat_template.jinja"),
    "another number of heads": settings("config.json", lambda tree: tree["text_config"].update(num_key_value_heads=2)),
    "another base of rotary embeddings": settings(
        "config.json", lambda tree: tree["text_config"]["rope_parameters"].update(rope_theta=100.0)
    ),
}
ADAPTER: dict[str, Callable[[Path, Case], None]] = {
    "half of alpha": settings("adapter_config.json", lambda tree: tree.update(lora_alpha=tree["lora_alpha"] / 2)),
    "the tower's LoRA left out": weights(drop("visual")),
    "wrong prefix": weights(rename("base_model.model.model.", "base_model.model.other.")),
    "wrong prefix of the tower": weights(rename("model.visual.", "model.vision.")),
}
COMMANDS: dict[str, tuple[str, Callable[[list[str]], list[str]]]] = {
    "LoRA of the tower not enabled": ("adapter", without_tower),
    "larger pictures": ("adapter", larger_pictures),
    "another precision": ("merged", in_16_bits),
}


class Fault(NamedTuple):
    """One thing that is wrong with a folder or with the command that serves it."""

    kind: str
    what: str
    spoil: Callable[[Path, Case], None] = lambda folder, case: None
    command: Callable[[list[str]], list[str]] = lambda command: command


HARMLESS = {"another precision"}
"""What changes no answer, and must pass: bfloat16 where float32 was measured."""
FAULTS = [
    *(Fault("merged", what, spoil) for what, spoil in MERGED.items()),
    *(Fault("adapter", what, spoil) for what, spoil in ADAPTER.items()),
    *(Fault(kind, what, command=command) for what, (kind, command) in COMMANDS.items()),
]


def tell(kind: str, what: str, found: Agreement | None, said: str, seconds: float) -> None:
    figures = "no answers"
    if found is not None:
        kept = "none" if found.effect_kept is None else f"{found.effect_kept:.3f}"
        figures = (
            f"tokens {found.token_agreement:.3f}, log-probabilities {found.logprob_difference:.4f}, effect {kept}, "
            f"answers {found.greedy_equal}/{found.greedy}"
        )
    print(f"| {kind} | {what} | {'refused' if said else 'passed'} | {figures} | {seconds:.0f} s | {said} |", flush=True)


def spoilt(case: Case, fault: Fault) -> tuple[Agreement | None, str]:
    """Ask a server about a copy of a folder of the output with one fault."""
    folder = case.folder.parent / "spoilt" / fault.kind
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(case.folder / fault.kind, folder)
    fault.spoil(folder, case)
    return case.ask(folder, lambda served, program: fault.command(vllm(served, program)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=CASES)
    parser.add_argument("--faults", nargs="*", help='As "merged: half" or "adapter", or none. Default: all.')
    parser.add_argument(
        "--again", action="store_true", help="Only the faults, with what an earlier run left in the folder."
    )
    parser.add_argument("--folder", type=Path, default=Path("build/serve-proof"))
    given = parser.parse_args()
    os.environ.setdefault("JOB_SERVE_PYTHON", str(PYTHON))
    bad, folders = 0, [(given.folder / family).absolute() for family in given.families]
    print("| folder | what is wrong | end | what was seen | seconds | why |\n|---|---|---|---|---|---|", flush=True)
    for folder in folders if not given.again else ():
        began = time.monotonic()
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        said = run_job(folder)
        published = json.loads((folder / "output" / "evaluation" / "report.json").read_text())["gate"]
        for name in ("merged", "adapter"):
            found = published.get(f"served_{name}")
            refused = "" if "published: " in said else said
            if found or refused:
                tell(name, f"{folder.name}: nothing", found and Agreement(**found), refused, time.monotonic() - began)
            bad += bool(refused)
    if given.faults == []:
        sys.exit(bad > 0)
    case = make_case(folders[0])
    for fault in FAULTS:
        if given.faults is None or f"{fault.kind}: {fault.what}".startswith(tuple(given.faults)):
            began = time.monotonic()
            found, said = spoilt(case, fault)
            tell(fault.kind, fault.what, found, said, time.monotonic() - began)
            bad += bool(said) == (fault.what in HARMLESS)
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
