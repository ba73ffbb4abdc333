"""Refuses unsafe pickles: reading a pickle can run any program, so nothing from the store is unpickled blindly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from job.errors import DataError

SUFFIXES = {".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt", ".joblib"}


def refuse_pickles(folder: Path) -> None:
    """Raise DataError if reading a file below `folder` could run code.

    Every file that is a pickle, by its name or by its first bytes, must pass torch's `weights_only` reader, which builds only
    tensors and plain values. Tensor data is not read, so this takes milliseconds.
    """
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if path.suffix in SUFFIXES or _looks_pickled(path):
            try:
                load_weights(path, map_location="meta")
            except ModuleNotFoundError:
                raise DataError(f"{path.name} cannot be checked for code without torch, so it is not used.") from None
            except Exception as error:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                raise DataError(
                    f"{path.name} is refused: reading it could run code, or it is damaged. {reason}"
                ) from None


def load_weights(path: Path, *, map_location: str = "cpu") -> Any:
    """Load what `torch.save` wrote, if it holds only tensors, plain values and numpy's random states."""
    import numpy
    import torch

    # Needed for a saved numpy random state; the dtype classes have had their own names since numpy 1.25.
    dtypes = [type(numpy.dtype(kind)) for kind in ("uint32", "uint64", "int64", "float64")]
    rebuild: Any = numpy.empty(0).__reduce__()[0]  # numpy's _reconstruct, wherever this numpy keeps it
    old_name = (rebuild, "numpy.core.multiarray._reconstruct")
    with torch.serialization.safe_globals([rebuild, old_name, numpy.ndarray, numpy.dtype, *dtypes]):
        return torch.load(path, map_location=map_location, weights_only=True)


def _looks_pickled(path: Path) -> bool:
    """Return whether a file starts like a pickle of protocol 2 or later, or like a zip, in which torch wraps its pickles."""
    with path.open("rb") as stream:
        start = stream.read(4)
    return (start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05") or start == b"PK\x03\x04"
