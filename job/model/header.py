"""Reads and checks the header of a safetensors file without loading any weight."""

from __future__ import annotations

import json
import math
import os
import struct
from pathlib import Path
from typing import Any

from job.errors import NotAllowed, SpecError

HEADER_BYTES = 100_000_000
"""Maximum header size, from the format's own reader."""
BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
"""Bits per number by type. Types smaller than a byte are not listed, and their sizes not checked."""


def read_header(file: Path, field: str = "model.name_or_path") -> tuple[dict[str, Any], int]:
    """Return a safetensors file's header and the offset of its data: 8 bytes of length, then JSON (the format's own
    specification).

    Raises SpecError, naming `field`, for a file that is missing, is not safetensors, or does not hold what its header says.
    """
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(HEADER_BYTES, size - 8):
                raise ValueError("it ends within its header")
            header = json.loads(stream.read(length))
        if not isinstance(header, dict):
            raise ValueError("its header is not a JSON object")
        header.pop("__metadata__", None)
        _check(header, size - 8 - length)
    except FileNotFoundError as error:
        raise SpecError(f"{field}: {file} does not exist, though the index names it") from error
    except PermissionError as error:
        raise NotAllowed(f"{field}: {file} may not be read by user {os.geteuid()}") from error
    except (ValueError, struct.error, OSError, RecursionError) as error:
        why = f" ({error})" if type(error) is ValueError else ""
        raise SpecError(
            f"{field}: {file} is not a safetensors file, or not all of it{why}; fetch or save it again"
        ) from error
    return header, 8 + length


def _check(header: dict[str, Any], data: int) -> None:
    """Raises ValueError unless the tensors are contiguous and fill the `data` bytes after the header."""
    places = sorted(_place(name, tensor) for name, tensor in header.items())
    end = 0
    for begin, until, name in places:
        if begin != end:
            raise ValueError(f"the data of {name} begin at {begin} and not at {end}")
        end = until
    if end != data:
        raise ValueError(f"{end} bytes should follow its header, and {data} do")


def _place(name: str, tensor: Any) -> tuple[int, int, str]:
    """Return where a tensor's data begin and end, and its name. Raises ValueError when the entry is not a tensor."""
    shape, places = (tensor.get(field) if isinstance(tensor, dict) else None for field in ("shape", "data_offsets"))
    numbers = all(
        isinstance(each, list) and all(type(one) is int and one >= 0 for one in each) for each in (shape, places)
    )
    if not numbers or shape is None or places is None or len(places) != 2 or not isinstance(tensor.get("dtype"), str):
        raise ValueError(f"its header lacks the type, shape or position of {name[:200]}")
    bits = BITS.get(tensor["dtype"])
    if bits is not None and (places[1] - places[0]) * 8 != math.prod(shape) * bits:
        raise ValueError(f"the size of {name[:200]} does not fit its shape")
    return places[0], places[1], name[:200]
