"""What docker/trial.sh runs in the image itself.

    python benchmarks/image.py                            # imports and compilers; on a GPU, one operation of each library
    python benchmarks/image.py prepare FOLDER FAMILY SIZE # base model, rows and spec of the whole job, as whole_job.py makes them

Prints seconds. Ends with 1 when an import or an operation fails.
"""

import importlib.util
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

with suppress(ImportError):  # where a kernel finds it
    import triton.language as tl

PACKAGES = (
    "torch",
    "triton",
    "bitsandbytes",
    "unsloth",
    "transformers",
    "peft",
    "trl",
    "datasets",
    "torchvision",
    "torchao",
)
"""In this order: Unsloth wants to come before transformers."""


def imports() -> list[str]:
    """Imports what is installed; the names of what fails."""
    wrong = []
    for name in PACKAGES:
        if importlib.util.find_spec(name) is None:
            print(f"{name}: not in this variant")
            continue
        began = time.monotonic()
        try:
            module = importlib.import_module(name)
            print(f"{name} {module.__version__}: {time.monotonic() - began:.1f} s")
        except Exception as error:
            wrong.append(f"import {name}: {type(error).__name__}: {error}")
    return wrong


def operations() -> dict[str, Callable[[], object]]:
    """One for each library that the image brings for a GPU, by its name."""
    import torch
    from torch import distributed
    from torch.nn import functional

    def here(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.rand(shape, device="cuda", dtype=dtype)

    def half(*shape: int) -> torch.Tensor:
        return here(*shape, dtype=torch.bfloat16)

    def four_bits() -> object:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        return dequantize_4bit(*quantize_4bit(half(64, 64), quant_type="nf4"))

    def reduce() -> object:
        with tempfile.TemporaryDirectory() as folder:
            distributed.init_process_group("nccl", init_method=f"file://{folder}/store", rank=0, world_size=1)
            distributed.all_reduce(value := here(4))
            distributed.destroy_process_group()
            return value

    query = half(1, 8, 128, 64)
    return {
        "cuBLAS": lambda: here(64, 64) @ here(64, 64),
        "cuBLASLt": lambda: functional.linear(half(64, 64), half(64, 64), half(64)),
        "cuDNN, convolution": lambda: functional.conv2d(half(1, 3, 64, 64), half(8, 3, 14, 14), stride=14),
        "cuDNN, transposed": lambda: functional.conv_transpose3d(here(1, 4, 8, 8, 8), here(4, 4, 3, 3, 3)),
        "attention": lambda: functional.scaled_dot_product_attention(query, query, query),
        "cuSOLVER": lambda: torch.linalg.eigh(here(64, 64)),
        "cuSPARSE": lambda: here(64, 64).to_sparse_csr() @ here(64, 64),
        "cuFFT": lambda: torch.fft.fft2(here(64, 64)),
        "cuRAND": lambda: torch.nn.init.normal_(here(64, 64)),
        "NVRTC": lambda: torch.special.airy_ai(here(64)),
        "NCCL": reduce,
        "bitsandbytes": four_bits,
        "torch.compile, Triton": lambda: torch.compile(lambda x: functional.gelu(x) * x.sum())(here(64, 64)),
    }


def compilers() -> dict[str, Callable[[], object]]:
    """What compiles at run time and needs no GPU for that, by what it is for."""
    import torch

    def launcher() -> object:
        """As triton.runtime.build compiles what starts a kernel."""
        import triton

        headers = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "launcher.c")
            source.write_text(
                "#include <cuda.h>\n#include <Python.h>\nPyObject *none(CUstream stream) { return Py_None; }\n"
            )
            options = ["-O3", "-shared", "-fPIC", f"-I{headers}", f"-I{sysconfig.get_path('include', 'posix_prefix')}"]
            return subprocess.run(["gcc", source, *options, "-o", f"{folder}/launcher.so"], check=True)

    def kernel(capability: int) -> object:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        source = ASTSource(
            fn=triton.jit(doubled), signature={"values": "*fp32", "size": "constexpr"}, constexprs={(1,): 64}
        )
        return triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]

    return {
        "torch.compile, g++": lambda: torch.compile(lambda x: torch.sin(x) * x.sum())(torch.rand(64, 64)),
        "Triton's launcher, gcc": launcher,
        "Triton for compute capability 8.0": lambda: kernel(80),
        "Triton for compute capability 9.0": lambda: kernel(90),
        "Triton for compute capability 10.0": lambda: kernel(100),
    }


def doubled(values, size):  # type: ignore[no-untyped-def]
    """A kernel of Triton."""
    at = values + tl.arange(0, size)
    tl.store(at, tl.load(at) * 2)


def tried(checks: dict[str, Callable[[], object]], after: Callable[[], object] = str) -> list[str]:
    """What fails. `after` each, whatever it began has ended."""
    wrong = []
    for name, run in checks.items():
        began = time.monotonic()
        try:
            run()
            after()
            print(f"{name}: {time.monotonic() - began:.1f} s")
        except Exception as error:
            wrong.append(f"{name}: {type(error).__name__}: {error}")
    return wrong


def on_the_gpu() -> list[str]:
    """What fails."""
    import torch

    if not torch.cuda.is_available():
        print("torch sees no GPU")
        return []
    print(f"{torch.cuda.get_device_name(0)}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")  # type: ignore[no-untyped-call]
    return tried(operations(), torch.cuda.synchronize)


def prepare(folder: Path, family: str, size: str) -> None:
    import torch
    import yaml
    from throughput import make_data
    from whole_job import spec_of

    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    maker = [sys.executable, str(Path(__file__).with_name("models.py")), family, str(folder / "model")]
    subprocess.run([*maker, "--size", size, "--dtype", dtype], check=True)
    data = make_data(folder / "data", 96)
    (folder / "spec.yaml").write_text(yaml.safe_dump(spec_of(folder / "model", data, folder / "output", None, 3)))


def main() -> None:
    if sys.argv[1:2] == ["prepare"]:
        prepare(Path(sys.argv[2]), *sys.argv[3:])
        return
    wrong = imports()
    if importlib.util.find_spec("triton") and shutil.which("g++"):
        wrong += tried(compilers())
    wrong += on_the_gpu()
    for each in wrong:
        print(f"WRONG: {each}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
