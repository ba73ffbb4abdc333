"""INT4 rounded to the nearest, and tuned by auto-round on training rows, side by side.

    PYTHONPATH=.:build/formats python benchmarks/int4.py [--steps 20 200] [--trained 60]

On a tiny Qwen2.5-VL that was trained to say what it sees: the loss of each kind of weights on held-out rows, the share of the
adapter's gain that it keeps, and the seconds that it took. `.ci/formats` brings llm-compressor and auto-round to
build/formats.
"""

import argparse
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from job.config.schema import GateSpec
from job.evaluate.generate import answer_losses
from job.export import quantise
from job.export.gain import judge, label_shares
from job.export.gate import compare
from job.export.merge import copy_rest, merge_to_folder, recipe
from job.export.read_back import read_folder
from job.export.tensor_map import changes, read_adapter
from job.model.loaded import Loaded
from job.model.weight_map import read_base
from tests.export.trained import Trained, make_trained


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="*", default=[20, 200], help="of auto-round, for each layer")
    parser.add_argument("--trained", type=int, default=60, help="steps of training")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        measure(Path(name), given.steps, given.trained)


def measure(folder: Path, steps: Sequence[int], trained_steps: int) -> None:
    trained = make_trained(folder, trained_steps)
    spec, loaded, data = trained.spec, trained.loaded, trained.data
    loaded.model.save_pretrained(folder / "adapter")
    base = read_base(loaded.folder)
    adapter = changes(base, *read_adapter(folder / "adapter"))
    merge_to_folder(recipe(base, folder / "adapter", adapter, loaded.device), folder / "merged")
    copy_rest(loaded.folder, folder / "merged")

    def read(precision: str, check: object) -> object:
        return read_folder(spec.model, folder / "merged", base, loaded.device, precision, check)  # type: ignore[arg-type]

    verdict = compare(spec, loaded, base, read, data.evaluation)
    print(f"{'weights':<28} {'loss':>8} {'gain kept':>10} {'labels kept':>12} {'seconds':>8}")
    for kind, loss in (("base", verdict.loss_base), ("base + adapter", verdict.loss_adapter)):
        print(f"{kind:<28} {loss:>8.4f}")
    print(f"{'merged, bfloat16':<28} {verdict.loss_merged:>8.4f}")
    rows = quantise.calibration_rows(loaded, data.train, spec)
    for count in (0, *steps):
        began = time.monotonic()
        shutil.rmtree(folder / "int4", ignore_errors=True)
        quantise.STEPS = count
        model = quantise.write_int4(
            spec.model, folder / "merged", folder / "int4", loaded.device, loaded.processor, rows if count else []
        )
        seconds = time.monotonic() - began
        small = replace(loaded, model=model, precision="16bit")
        lost, labels = loss_of(small, trained), label_shares(small, data, spec, trained.results)
        kept = judge("merged_int4", lost, labels, verdict, GateSpec()).gain_kept
        said = f"INT4, auto-round {count} steps" if count else "INT4, to the nearest"
        print(
            f"{said:<28} {lost:>8.4f} {kept.get('loss', float('nan')):>10.1%} "
            f"{kept.get('finding_accuracy', float('nan')):>12.1%} {seconds:>8.1f}"
        )


@torch.inference_mode()
def loss_of(small: Loaded, trained: Trained) -> float:
    rows = [trained.data.evaluation[place] for place in range(len(trained.data.evaluation))]
    found = answer_losses(small, rows, trained.spec.training.max_length)
    return sum(loss * count for loss, count in found) / sum(count for _, count in found)


if __name__ == "__main__":
    main()
