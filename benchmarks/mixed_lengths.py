"""Forward and backward of rows of two lengths, in parts of like length as in the job, beside one batch padded to the longest.

    python benchmarks/mixed_lengths.py MODEL [--rounds 5] [--kept all|inputs|nothing] [--sides 1024 448] [--words 16 16]

MODEL is a checkpoint, real or made by models.py, of a family whose images take as many tokens as their size asks for, such as
Qwen's. Eight rows; each is of one of two kinds, with an image of one of the two sides (pixels) and an answer of one of the two
lengths (words). At the defaults their tokens are about 5 : 1. A tiny model, whose processor shrinks all images to one size, takes
`--words 300 16`. Model and loss are as in training: through Unsloth in 16 bits on a GPU, by plain transformers
on a CPU. Both ways are timed in turns, after one round that is not; the losses are those of the same weights.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from results import append, this_machine

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if TYPE_CHECKING:
    from job.model.loaded import Loaded
    from job.model.memory_model import Kept

ROWS = 8


def rows_of(sides: list[int], words: list[int], rows: int = ROWS) -> list[dict[str, Any]]:
    noise = np.random.default_rng(0)

    def row(number: int) -> dict[str, Any]:
        small = noise.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        image = Image.fromarray(small).resize((sides[number % 2],) * 2, Image.Resampling.BICUBIC)
        asked = [{"type": "image"}, {"type": "text", "text": "What does this radiograph show?"}]
        answer = "The lungs are clear. " * (words[number % 2] // 4)
        messages = [("user", asked), ("assistant", [{"type": "text", "text": answer.strip()}])]
        return {"messages": [{"role": role, "content": content} for role, content in messages], "images": [image]}

    return [row(number) for number in range(rows)]


def loaded_for_training(model: Path, kept: Kept) -> Loaded:
    """As in training: by Unsloth in 16 bits on a GPU, by plain transformers, which keeps all, on a CPU."""
    import torch

    from job.config.schema import JobSpec
    from job.model.load import choose_backend, import_first, load_model, to_training

    spec = JobSpec.model_validate(
        {"model": {"name_or_path": str(model)}, "dataset": {"path": "."}, "output": {"url": "none"}}
    )
    on_gpu = torch.cuda.is_available()
    device, backend = torch.device("cuda", 0) if on_gpu else torch.device("cpu"), choose_backend(spec.model, on_gpu)
    import_first(backend)
    loaded = load_model(spec, model, device, backend, "16bit" if on_gpu else "32bit", kept if on_gpu else "all", None)
    to_training(loaded)
    return loaded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kept", choices=("all", "inputs", "nothing"), default="inputs")
    parser.add_argument("--sides", type=int, nargs=2, default=[1024, 448])
    parser.add_argument("--words", type=int, nargs=2, default=[16, 16])
    given = parser.parse_args()
    import torch

    on_gpu = torch.cuda.is_available()
    loaded = loaded_for_training(given.model, given.kept)
    device = loaded.device

    from job.model.collator import Collator, image_token
    from job.model.families import family_of
    from job.model.image_layout import Batch
    from job.train.lengths import of_like_length, pass_tokens, unpadded_parts
    from job.train.loss import count_tokens, token_loss

    family = str(loaded.model.config.model_type)
    batch = Collator(loaded.processor, 1 << 15)(rows_of(given.sides, given.words))  # type: ignore[arg-type]
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    divisor = count_tokens([batch])

    def parts() -> list[Batch]:
        rows = {**batch, "pictures": [1] * ROWS, "picture_keys": [""] * ROWS}
        found = unpadded_parts(rows, family_of(family).layout, image_token(loaded.processor), pass_tokens(device))
        return [{name: part[name] for name in batch if name in part} for part in found]

    def step(make: Callable[[], list[Batch]]) -> tuple[float, float]:
        """The loss, and seconds of cutting, forward and backward."""
        loaded.model.zero_grad()
        began, loss = time.monotonic(), 0.0
        for part in make():
            with torch.autocast("cuda", torch.bfloat16, enabled=on_gpu):
                found = token_loss(loaded.model, {name: each.to(device) for name, each in part.items()}, divisor)
            found.backward()  # type: ignore[no-untyped-call]
            loss += float(found.detach())
        return loss, time.monotonic() - began

    taken: dict[str, list[float]] = {"padded": [], "parts": []}
    losses = {}
    for number in range(given.rounds + 1):
        for name, make in (("padded", lambda: [batch]), ("parts", parts)):
            losses[name], seconds = step(make)
            if number:
                taken[name].append(seconds)
    padded, apart = (statistics.median(taken[name]) for name in ("padded", "parts"))
    tokens = (
        ROWS
        * max(lengths)
        / sum(len(rows) * max(lengths[row] for row in rows) for rows in of_like_length(lengths, pass_tokens(device)))
    )
    case = f"{family}, {max(lengths)} and {min(lengths)} tokens in turn"
    where = torch.cuda.get_device_name(0) if on_gpu else this_machine()
    detail = f"{padded:.3f} and {apart:.3f} s; {tokens:.2f} times fewer tokens"
    append("mixed lengths", f"{case}: padded over parts", padded / apart, "times", detail=detail, device=where)
    gap = 100 * abs(losses["parts"] / losses["padded"] - 1)
    append("mixed lengths", f"{case}: loss apart", gap, "%", goal="within 0.1", meets=gap <= 0.1, device=where)


if __name__ == "__main__":
    main()
