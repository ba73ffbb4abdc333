"""The peer: plain transformers + PEFT on the GPU, in a process that Unsloth never patched.

python -m tests.gpu.plain FOLDER ADAPTER…     prints, for each model folder and adapter, labels and loss of one batch, and
leaves the adapter's gradients in ADAPTER/gradients.safetensors
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from job.model.collator import Collator
from job.model.load import load_model, to_training
from tests.tiny import batch, job_spec

GRADIENTS = "gradients.safetensors"


def gradients(loaded: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of the loss of one batch, by the adapter's weights. In float32, without dropout."""
    to_training(loaded)
    with torch.autocast("cuda", torch.bfloat16):
        loss = loaded.model(**inputs, use_cache=False).loss
    loss.backward()
    trained = [(name, weight) for name, weight in loaded.model.named_parameters() if weight.requires_grad]
    return {name: weight.grad.float().cpu().contiguous() for name, weight in trained if weight.grad is not None}


def main() -> None:
    found = []
    for folder, adapter in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        spec = job_spec(model={"name_or_path": "tiny", "attn_implementation": "eager"}, lora={"r": 4})
        loaded = load_model(spec, Path(folder), torch.device("cuda", 0), "transformers", "16bit", "all", Path(adapter))
        inputs = {name: tensor.cuda() for name, tensor in Collator(loaded.processor, 512)(batch()).items()}
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            loss = float(loaded.model(**inputs).loss)
        save_file(gradients(loaded, inputs), Path(adapter) / GRADIENTS)
        found.append({"loss": loss, "labels": inputs["labels"].tolist(), "groups": loaded.groups})
    print(json.dumps(found))


if __name__ == "__main__":
    main()
