"""Makes Unsloth load, train and run vision models on a CPU, for tests: Python imports this module at the start of a process whose
PYTHONPATH has its folder, the repository and build/unsloth (`environment` in tests/family_proof.py).

With UNSLOTH_ALLOW_CPU=1, its own variable for tests, Unsloth imports without a GPU and patches transformers, PEFT and TRL as on
one; its classes for vision models then only ask for a device's name, its memory and autocast. Its kernels stay untried.
"""

import functools
import os
import sys
from types import ModuleType, SimpleNamespace
from typing import Any


def spoof_gpu(torch: Any) -> None:
    device = SimpleNamespace(name="CPU", major=9, minor=0, total_memory=48 * 2**30, multi_processor_count=1)
    torch.cuda.get_device_properties = torch.cuda.memory.get_device_properties = lambda *_, **__: device
    autocast = torch.amp.autocast_mode.autocast
    begin = autocast.__init__

    @functools.wraps(begin)  # torch.compile reads its signature
    def on_cpu(self: Any, device_type: str, *given: Any, **named: Any) -> None:
        begin(self, device_type.replace("cuda", "cpu"), *given, **named)

    autocast.__init__ = on_cpu


def allow_bfloat16(utils: ModuleType) -> None:
    utils.SUPPORTS_BFLOAT16 = True  # type: ignore[attr-defined]


if os.environ.get("UNSLOTH_ALLOW_CPU") == "1":
    from job.model.patches.unsloth_import import Finder

    sys.meta_path[:0] = [Finder("torch", spoof_gpu), Finder("unsloth.models._utils", allow_bfloat16)]
