"""The peer: plain transformers + PEFT on the GPU, in a process that Unsloth never patched.

python -m tests.gpu.plain FOLDER ADAPTER…     prints, for each model folder and adapter, labels and loss of one batch
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from job.model import load_model
from job.model.collator import Collator
from tests.tiny import batch, job_spec


def main() -> None:
    found = []
    for folder, adapter in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        loaded = load_model(
            job_spec(lora={"r": 4}), Path(folder), torch.device("cuda", 0), "transformers", "16bit", Path(adapter)
        )
        inputs = {name: tensor.cuda() for name, tensor in Collator(loaded.processor, 512)(batch()).items()}
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            loss = float(loaded.model(**inputs).loss)
        found.append({"loss": loss, "labels": inputs["labels"].tolist(), "groups": loaded.groups})
    print(json.dumps(found))


if __name__ == "__main__":
    main()
