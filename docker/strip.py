"""Strips debugging information and symbol tables from the shared libraries below a folder: `strip.py FOLDER`.

Neither is ever loaded, and in Triton alone they are 280 MB. A stripped library takes the place of the original only where all
else is the same: what the loader reads (the program headers and each byte of the segments they name), and each other section.
Of libraries that lie in one folder under several names, all but the longest name become links to it.
"""

import hashlib
import mmap
import struct
import subprocess
import sys
from pathlib import Path

GOES = (b".symtab", b".strtab", b".shstrtab", b".debug", b".gnu.build.attributes")
"""Beginnings of the names of sections, none of which is ever loaded; the last is how the compiler was called."""
NO_BITS = 8


def content(file: Path) -> tuple[object, ...]:
    """Of a 64-bit ELF file (elf(5)): its program headers, digests of the sections that stay, and what segments hold beside.

    Where in the file a segment lies may change by whole pages. Beside sections there are zeros, and X's where patchelf moved one.
    """
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY) as data:
        programs, sections = struct.unpack_from("<QQ", data, 0x20)
        _, program_count, _, count, names = struct.unpack_from("<5H", data, 0x36)
        headers = [struct.unpack_from("<2I6Q", data, programs + 56 * n) for n in range(program_count)]
        tables = [struct.unpack_from("<2I4Q2I2Q", data, sections + 64 * n) for n in range(count)]
        titles = [data[start : data.find(b"\0", start)] for start in (tables[names][4] + each[0] for each in tables)]
        kept = []
        for title, (_, kind, flags, address, at, size, *_) in zip(titles, tables, strict=True):
            held = slice(at, at + (size if kind != NO_BITS else 0))
            if not title.startswith(GOES):
                kept.append((title, kind, flags, address, size, digest(data[held])))
                data[held] = bytes(held.stop - held.start)
        data[0x28:0x30], data[0x3C:0x40] = bytes(8), bytes(4)  # where the section headers are
        data[programs : programs + 56 * program_count] = bytes(56 * program_count)
        beside = [data[at : at + size].translate(None, b"\0X") for _, _, at, _, _, size, _, _ in headers]
        segments = [
            (kind, flags, at % max(align, 1), address, memory - size, align)
            for kind, flags, at, address, _, size, memory, align in headers
        ]
        return segments, kept, beside


def digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def strip(file: Path) -> int | None:
    """Bytes saved; None where something else would change."""
    new = file.with_name(f"{file.name}.stripped")
    try:
        done = subprocess.run(["strip", "--strip-unneeded", "-o", new, file], capture_output=True, check=False)
        if done.returncode != 0 or content(new) != content(file):
            return None
        saved = file.stat().st_size - new.stat().st_size
        if saved > 0:
            new.chmod(file.stat().st_mode)
            new.replace(file)
        return saved
    finally:
        new.unlink(missing_ok=True)


def is_library(file: Path) -> bool:
    if file.is_symlink() or not file.is_file() or file.stat().st_size < 64:
        return False
    with file.open("rb") as stream:
        return stream.read(5) == b"\x7fELF\x02"


def link_copies(files: list[Path]) -> int:
    """Bytes saved."""
    saved, first = 0, dict[tuple[Path, bytes], Path]()
    for file in sorted(files, key=lambda each: (-len(each.name), each.name)):
        with file.open("rb") as stream:
            key = file.parent, digest(stream.read())
        if key in first:
            saved += file.stat().st_size
            file.unlink()
            file.symlink_to(first[key].name)
        else:
            first[key] = file
    return saved


def main() -> None:
    files = [file for file in sorted(Path(sys.argv[1]).rglob("*.so*")) if is_library(file)]
    copies = link_copies(files)
    saved = {file: strip(file) for file in files if not file.is_symlink()}
    print(f"{len(saved)} libraries: {sum(filter(None, saved.values())):,} bytes of symbols, {copies:,} of copies")
    print("left as they were:", *(file.name for file, size in saved.items() if size is None))


if __name__ == "__main__":
    main()
